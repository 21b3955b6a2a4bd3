"""Tables as pictures."""

from chanaxes_pl.plots.channels import channel_panels, plot_channels
from chanaxes_pl.plots.correlations import plot_correlations, plot_pairs
from chanaxes_pl.plots.distributions import distributions, plot_distributions
from chanaxes_pl.plots.groupings import plot_groupings, plot_peer_support
from chanaxes_pl.plots.pruning import plot_lesions, plot_pruning
from chanaxes_pl.plots.training import plot_accuracy, plot_cost

__all__ = [
    "channel_panels",
    "distributions",
    "plot_accuracy",
    "plot_channels",
    "plot_correlations",
    "plot_cost",
    "plot_distributions",
    "plot_groupings",
    "plot_lesions",
    "plot_pairs",
    "plot_peer_support",
    "plot_pruning",
]
