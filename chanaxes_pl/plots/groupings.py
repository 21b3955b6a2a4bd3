"""Groups of channels and what peers duplicate, layer by layer, as pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, WIDTH, canvas, short

_LOOKS = {
    "ari": ("local and target axis", GREEN, "o"),
    "ceiling_local": ("local axis, both halves of the probe", BLUE, "^"),
    "ceiling_target": ("target axis, both halves of the probe", ORANGE, "v"),
}


def plot_groupings(groups: pd.DataFrame, title: str = "") -> Figure:
    """Agreement of the two axes' groups by layer, beside that of each axis with itself, a panel a checkpoint.

    Args:
        groups: from :func:`groupings`, with ``when``, what to call each checkpoint. Of several runs the mean is drawn.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    moments = list(dict.fromkeys(groups["when"]))
    layers = list(dict.fromkeys(groups["layer"]))
    with canvas(len(moments), 1, (WIDTH, 1.2 + 2.1 * len(moments)), title, sharex=True, sharey=True) as (figure, grid):
        for axes, when in zip(grid.flat, moments, strict=True):
            means = groups[groups["when"] == when].groupby("layer", sort=False)[list(_LOOKS)].mean().reindex(layers)
            for column, (label, colour, marker) in _LOOKS.items():
                axes.plot(range(len(layers)), means[column], marker, color=colour, label=label, alpha=0.8)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_title(when)
            axes.set_ylabel("adjusted\nRand index")
            sns.despine(ax=axes)
        _name_layers(grid[-1, 0], layers)
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8
        )
    return figure


def plot_peer_support(support: pd.DataFrame, title: str = "") -> Figure:
    """What peers hold of each layer: median peer R², and the task information that they duplicate or do not.

    Args:
        support: by layer ``peer_r2`` (median over channels, with ``peer_r2_low`` and ``peer_r2_high`` quartiles),
            ``duplicate`` and ``nonreplaceable`` (nats), see :func:`task_masses`. Of several runs the mean is drawn.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    layers = list(dict.fromkeys(support["layer"]))
    means = support.groupby("layer", sort=False).mean(numeric_only=True).reindex(layers)
    at = np.arange(len(layers))
    with canvas(2, 1, (WIDTH, 4.4), title, sharex=True) as (figure, grid):
        upper, lower = grid.flat
        upper.vlines(at, means["peer_r2_low"], means["peer_r2_high"], color=PURPLE, alpha=0.5)
        upper.plot(at, means["peer_r2"], "o", color=PURPLE, markersize=4)
        upper.set(ylabel="peer R²\n(median, quartiles)", ylim=(0, 1.03))
        lower.bar(at, means["nonreplaceable"], color=ORANGE, label="only the channel's own")
        lower.bar(at, means["duplicate"], bottom=means["nonreplaceable"], color=GREY, label="duplicated by peers")
        lower.set_ylabel("task information\nof the layer (nats)")
        for axes in (upper, lower):
            sns.despine(ax=axes)
        _name_layers(lower, layers)
        figure.legend(*lower.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def _name_layers(axes: Axes, layers: list[str]) -> None:
    skip = -(-len(layers) // 30)
    names = [short(name, layers) for name in layers[::skip]]
    axes.set_xticks(range(0, len(layers), skip), names, rotation=90, fontsize=7)
