"""How early the axes predict the end, as a picture."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.analysis.correlations import AXES, NETWORK
from chanaxes_pl.plots.correlations import time_axis
from chanaxes_pl.plots.style import COLOURS, WIDTH, canvas, words

_TITLES = {"damage": "final damage", "order": "final pruning order"}


def plot_early_prediction(result: pd.DataFrame, title: str = "") -> Figure:
    """Rank correlation of every metric with final damage and final pruning order, over the checkpoints of a run.

    Args:
        result: from ``early_prediction``; the mean over layers is drawn with its interval.
        title: above the figure.

    Returns:
        A figure of 7.2 × 4 inches; ``figure.savefig(path)`` writes it.
    """
    mean = result[result["layer"] == NETWORK]
    with canvas(1, 2, (WIDTH, 4.0), title, sharex=True, sharey=True) as (figure, grid):
        panels = grid.ravel()
        for axes, (target, name) in zip(panels, _TITLES.items(), strict=True):
            _draw(axes, mean[mean["target"] == target])
            axes.set_title(f"{name} ({result.attrs[target]})" if target in result.attrs else name)
        panels[0].set_ylabel("Spearman ρ within layers")
        figure.legend(
            *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
    return figure


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    """One target's lines; its reason where it has none."""
    for metric, line in rows.groupby("metric", sort=False):
        at, colour = line["step"], COLOURS[str(metric)]
        dashes, marker = ("--", "s") if metric in AXES else ("-", "o")
        axes.plot(
            at, line["rho"], dashes, color=colour, marker=marker, markersize=3, linewidth=1.2, label=words(str(metric))
        )
        axes.fill_between(at, line["low"], line["high"], color=colour, alpha=0.1, linewidth=0)
    if rows["rho"].isna().all():
        reason = rows["reason"].iloc[0].replace(": ", ":\n")
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", wrap=True)
    axes.axhline(0, color="black", linewidth=0.6)
    time_axis(axes, rows)
    sns.despine(ax=axes)
