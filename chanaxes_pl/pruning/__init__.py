"""Lesions, peer replacement, pruning at matched MACs and compensation."""
