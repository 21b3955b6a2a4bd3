"""Pruning: scores, allocation to a budget, pruned networks on disk, and grids."""
