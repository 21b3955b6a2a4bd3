"""Structure within layers, by depth, as a picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.plots.style import BLUE, COLOURS, GREEN, GREY, RED, canvas, short, words

#: Layers whose names fit below a panel.
_NAMED = 26


def plot_structure(structure: pd.DataFrame, title: str = "") -> Figure:
    """Modularity of the channels' graphs, excess of pairs and triplets, and propagation, over the depth of a network.

    Args:
        structure: from ``layer_structure``, one row a layer; nulls are drawn as bars of ± 2 standard deviations.
        title: above the figure.

    Returns:
        A figure of 7 × 8.6 inches; ``figure.savefig(path)`` writes it.
    """
    names = structure["layer"].tolist()
    with canvas(3, 1, (7, 8.6), title, sharex=True) as (figure, grid):
        modularity, excess, routed = grid.flat
        for graph, colour in (("overlap", BLUE), ("excess", RED)):
            _draw_band(modularity, structure[f"{graph}_null"], structure[f"{graph}_null_sd"], colour)
            _draw_line(modularity, structure[f"{graph}_modularity"], colour, f"{graph} graph")
            _draw_line(modularity, structure[f"{graph}_null"], colour, "weights shuffled, ± 2 sd", null=True)
        modularity.set_ylabel("modularity")
        for column, colour, label in (("pair_excess", RED, "pairs"), ("triplet_excess", GREEN, "triplets")):
            _draw_line(excess, structure[column], colour, label)
            _draw_line(excess, structure[f"{column}_null"], colour, "null target", null=True)
        excess.set(ylabel="mean excess (nats)", ylim=(0, None))
        nulls = [f"routed_{metric}_null" for metric in METRICS]
        spread = structure[[f"{null}_sd" for null in nulls]].mean(axis=1)
        _draw_band(routed, structure[nulls].mean(axis=1), spread, GREY, "weights shuffled, ± 2 sd")
        for metric in METRICS:
            _draw_line(routed, structure[f"routed_{metric}"], COLOURS[metric], words(metric))
        routed.set_ylabel("ρ(routed, own metric)")
        routed.axhline(0, color="black", linewidth=0.6)
        every = -(-len(names) // _NAMED)
        labels = [short(name, names) for name in names[::every]]
        routed.set_xticks(range(0, len(names), every), labels, rotation=90, fontsize=7)
        for axes in (modularity, excess, routed):
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
            sns.despine(ax=axes)
    return figure


def _draw_line(axes: Axes, values: pd.Series, colour: tuple, label: str, null: bool = False) -> None:
    look = {"marker": "_", "markersize": 8} if null else {"marker": "o", "markersize": 3.5}
    axes.plot(np.arange(len(values)), values, color=colour, linestyle="none", label=label, **look)


def _draw_band(axes: Axes, mean: pd.Series, spread: pd.Series, colour: tuple, label: str = "_") -> None:
    at = np.arange(len(mean))
    axes.bar(at, 4 * spread, 0.8, mean - 2 * spread, color=colour, alpha=0.2, linewidth=0, label=label)
