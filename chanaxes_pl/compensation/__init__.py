"""Compensation: weights of a pruned network fitted to the dense network, without labels."""
