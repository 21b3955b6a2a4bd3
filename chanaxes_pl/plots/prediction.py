"""How well metrics early in training predict damage and pruning order at its end."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.analysis.correlations import AXES, NETWORK
from chanaxes_pl.plots.style import COLOURS, WIDTH, banded, canvas, horizontal, words
from chanaxes_pl.plots.ticks import time_axis

_TITLES = {"damage": "final damage", "order": "final pruning order"}


def plot_early_prediction(result: pd.DataFrame, title: str = "") -> Figure:
    """Plot the rank correlation of every metric with final damage and final pruning order, over the checkpoints.

    Args:
        result: the table of ``early_prediction``; the mean over layers is drawn with its interval.
        title: text above the figure.
    """
    mean = result[result["layer"] == NETWORK]
    with canvas(1, 2, (WIDTH, 4.0), title, sharex=True, sharey=True) as (figure, ((left, right),)):
        for axes, (target, name) in zip((left, right), _TITLES.items(), strict=True):
            _draw(axes, mean[mean["target"] == target])
            axes.set_title(f"{name} ({result.attrs[target]})" if target in result.attrs else name)
        left.set_ylabel("Spearman ρ within layers")
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the lines of one target, or say why there is none."""
    for name, line in rows.groupby("metric", sort=False):
        metric = str(name)
        look = {"linestyle": "--", "marker": "s"} if metric in AXES else {"linestyle": "-", "marker": "o"}
        look |= {"markersize": 3, "linewidth": 1.2, "label": words(metric)}
        banded(axes, line["step"], line["rho"], line["low"], line["high"], COLOURS[metric], alpha=0.1, **look)
    if rows["rho"].isna().all():
        reason = rows["reason"].iloc[0].replace(": ", ":\n")
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", wrap=True)
    horizontal(axes)
    time_axis(axes, rows)
