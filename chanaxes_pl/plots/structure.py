"""Structure within layers, over the depth of a network."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.plots.style import BLUE, COLOURS, GREEN, GREY, RED, canvas, horizontal, words
from chanaxes_pl.plots.ticks import layer_ticks

#: Layers whose names fit below a panel.
_NAMED = 26


def plot_structure(structure: pd.DataFrame, title: str = "") -> Figure:
    """Plot modularity of the channels' graphs, excess of pairs and triplets, and propagation, for each layer.

    Args:
        structure: the table of ``layer_structure``, one row for each layer; nulls are drawn as bars of ± 2 standard
            deviations.
        title: text above the figure.
    """
    with canvas(3, 1, (7, 8.6), title, sharex=True) as (figure, panels):
        modularity, excess, routed = panels.flat
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
        horizontal(routed)
        routed.set_xticks(*layer_ticks(structure["layer"].tolist(), _NAMED), rotation=90, fontsize=7)
        for axes in panels.flat:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _draw_line(axes: Axes, values: pd.Series, colour: ColorType, label: str, null: bool = False) -> None:
    look = {"marker": "_", "markersize": 8} if null else {"marker": "o", "markersize": 3.5}
    axes.plot(np.arange(len(values)), values, color=colour, linestyle="none", label=label, **look)


def _draw_band(axes: Axes, mean: pd.Series, spread: pd.Series, colour: ColorType, label: str = "_") -> None:
    at = np.arange(len(mean))
    axes.bar(at, 4 * spread, 0.8, mean - 2 * spread, color=colour, alpha=0.2, linewidth=0, label=label)
