"""Tables as pictures."""

from chanaxes_pl.plots.correlations import plot_correlations
from chanaxes_pl.plots.prediction import plot_early_prediction
from chanaxes_pl.plots.pruning import plot_lesions, plot_pruning
from chanaxes_pl.plots.structure import plot_structure

__all__ = ["plot_correlations", "plot_early_prediction", "plot_lesions", "plot_pruning", "plot_structure"]
