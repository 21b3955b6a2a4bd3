"""How early the axes predict the end, as a picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.analysis.correlations import AXES, NETWORK
from chanaxes_pl.plots.correlations import label_checkpoints
from chanaxes_pl.plots.style import COLOURS, WIDTH, styled, words

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
    with styled():
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (target, name) in zip(panels, _TITLES.items(), strict=True):
            _draw(axes, mean[mean["target"] == target])
            axes.set_title(f"{name} ({result.attrs[target]})" if target in result.attrs else name)
        panels[0].set_ylabel("Spearman ρ within layers")
        figure.legend(
            *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
        figure.suptitle(title)
    return figure


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    """One target's lines; its reason where it has none."""
    for metric, line in rows.groupby("metric", sort=False):
        at, colour = np.arange(len(line)), COLOURS[str(metric)]
        dashes, marker = ("--", "s") if metric in AXES else ("-", "o")
        axes.plot(
            at, line["rho"], dashes, color=colour, marker=marker, markersize=3, linewidth=1.2, label=words(str(metric))
        )
        axes.fill_between(at, line["low"], line["high"], color=colour, alpha=0.1, linewidth=0)
    if rows["rho"].isna().all():
        reason = rows["reason"].iloc[0].replace(": ", ":\n")
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", wrap=True)
    axes.axhline(0, color="black", linewidth=0.6)
    label_checkpoints(axes, rows.drop_duplicates("step"))
    sns.despine(ax=axes)
