"""From tables to findings: correlations, groupings, scores, damage, grids, prediction, structure, runs."""
