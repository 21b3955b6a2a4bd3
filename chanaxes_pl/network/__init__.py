"""Looking at a model, and leaving it untouched: layers, samples, hooks, dependency groups, MACs."""
