"""Observation of a model that leaves it unchanged: layers, samples, hooks, dependency groups, MACs."""
