"""Tables as figures: every ``plot_…`` function returns a Matplotlib figure, which ``figure.savefig(path)`` writes."""

from chanaxes_pl.plots.alignment import plot_alignment
from chanaxes_pl.plots.channels import channel_panels, plot_channels
from chanaxes_pl.plots.correlations import plot_correlations, plot_pairs
from chanaxes_pl.plots.distributions import distributions, plot_distributions
from chanaxes_pl.plots.groupings import plot_groupings, plot_peer_support
from chanaxes_pl.plots.prediction import plot_early_prediction
from chanaxes_pl.plots.pruning import plot_lesions, plot_pruning, plot_sensitivity
from chanaxes_pl.plots.simulation import plot_simulation
from chanaxes_pl.plots.structure import plot_structure
from chanaxes_pl.plots.training import plot_accuracy, plot_cost

__all__ = [
    "channel_panels",
    "distributions",
    "plot_accuracy",
    "plot_alignment",
    "plot_channels",
    "plot_correlations",
    "plot_cost",
    "plot_distributions",
    "plot_early_prediction",
    "plot_groupings",
    "plot_lesions",
    "plot_pairs",
    "plot_peer_support",
    "plot_pruning",
    "plot_sensitivity",
    "plot_simulation",
    "plot_structure",
]
