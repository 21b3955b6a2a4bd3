"""Tables as pictures."""

from chanaxes_pl.plots.correlations import plot_correlations
from chanaxes_pl.plots.gaussian import plot_alignment, plot_simulation
from chanaxes_pl.plots.pruning import plot_lesions, plot_pruning

__all__ = ["plot_alignment", "plot_correlations", "plot_lesions", "plot_pruning", "plot_simulation"]
