"""Groups of channels, and what peers duplicate, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from chanaxes_pl.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, WIDTH, canvas, horizontal
from chanaxes_pl.plots.ticks import layer_ticks

_LOOKS = {
    "ari": ("local and target axis", GREEN, "o"),
    "ceiling_local": ("local axis, both halves of the probe", BLUE, "^"),
    "ceiling_target": ("target axis, both halves of the probe", ORANGE, "v"),
}


def plot_groupings(groups: pd.DataFrame, title: str = "") -> Figure:
    """Plot how well the groups of both axes agree, and how well each axis agrees with itself, for each layer.

    Args:
        groups: the table of :func:`groupings` with a column ``when``, the name of each checkpoint, which gets a panel.
            Of several runs the mean is drawn.
        title: text above the figure.
    """
    moments = list(dict.fromkeys(groups["when"]))
    layers = list(dict.fromkeys(groups["layer"]))
    with canvas(len(moments), 1, (WIDTH, 1.2 + 2.1 * len(moments)), title, sharex=True, sharey=True) as (figure, grid):
        for axes, when in zip(grid.flat, moments, strict=True):
            means = groups[groups["when"] == when].groupby("layer", sort=False)[list(_LOOKS)].mean().reindex(layers)
            for column, (label, colour, marker) in _LOOKS.items():
                axes.plot(range(len(layers)), means[column], marker, color=colour, label=label, alpha=0.8)
            horizontal(axes)
            axes.set(title=when, ylabel="adjusted\nRand index")
        grid[-1, 0].set_xticks(*layer_ticks(layers), rotation=90, fontsize=7)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def plot_peer_support(support: pd.DataFrame, title: str = "") -> Figure:
    """Plot how much of each layer's channels, and of their task information, other channels of the layer duplicate.

    Args:
        support: for each layer ``peer_r2`` (median over channels, with the quartiles ``peer_r2_low`` and
            ``peer_r2_high``), ``duplicate`` and ``nonreplaceable`` (nats), see :func:`task_masses`. Of several runs
            the mean is drawn.
        title: text above the figure.
    """
    layers = list(dict.fromkeys(support["layer"]))
    means = support.groupby("layer", sort=False).mean(numeric_only=True).reindex(layers)
    at = range(len(layers))
    with canvas(2, 1, (WIDTH, 4.4), title, sharex=True) as (figure, ((upper,), (lower,))):
        upper.vlines(at, means["peer_r2_low"], means["peer_r2_high"], color=PURPLE, alpha=0.5)
        upper.plot(at, means["peer_r2"], "o", color=PURPLE, markersize=4)
        upper.set(ylabel="peer R²\n(median, quartiles)", ylim=(0, 1.03))
        lower.bar(at, means["nonreplaceable"], color=ORANGE, label="only the channel's own")
        lower.bar(at, means["duplicate"], bottom=means["nonreplaceable"], color=GREY, label="duplicated by peers")
        lower.set_ylabel("task information\nof the layer (nats)")
        lower.set_xticks(*layer_ticks(layers), rotation=90, fontsize=7)
        figure.legend(*lower.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure
