"""Observation of a model that leaves it unchanged: layers, samples, hooks, probes, copies."""
