"""Pruning: scores, allocation to a budget of MACs, compensation, pruned networks on disk, and grids."""
