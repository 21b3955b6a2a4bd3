"""Analysis of tables: correlations, groupings, scores, damage, grids, prediction, structure, runs."""
