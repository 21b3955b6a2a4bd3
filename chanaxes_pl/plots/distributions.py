"""How the metrics are distributed over channels, and how that changes while a network trains."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.plots.correlations import time_axis
from chanaxes_pl.plots.style import COLOURS, WIDTH, canvas, words

#: Shares of the channels that lie below the edges of the bands and the line in their middle.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def distributions(table: pd.DataFrame) -> pd.DataFrame:
    """Quantiles over the live channels of every layer and run: ``epoch, step, metric, quantile, nats, channels``."""
    rows = []
    for (epoch, step), checkpoint in table.groupby(["epoch", "step"]):
        for metric in METRICS:
            values = checkpoint.loc[~checkpoint["dead"].astype(bool), metric].dropna().to_numpy()
            edges = np.quantile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
            rows += [
                {"epoch": epoch, "step": step, "metric": metric, "quantile": q, "nats": edge, "channels": len(values)}
                for q, edge in zip(QUANTILES, edges, strict=True)
            ]
    return pd.DataFrame(rows)


def plot_distributions(quantiles: pd.DataFrame, title: str = "") -> Figure:
    """Median, middle half and middle 90 % of each metric over the checkpoints, a panel a metric.

    Args:
        quantiles: from :func:`distributions`.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    with canvas(2, 2, (WIDTH, 4.6), title, sharex=True) as (figure, panels):
        for axes, metric in zip(panels.flat, METRICS, strict=True):
            _draw_bands(axes, quantiles[quantiles["metric"] == metric], metric)
        for axes in panels[0]:
            axes.set_xlabel("")
    return figure


def _draw_bands(axes: Axes, quantiles: pd.DataFrame, metric: str) -> None:
    edges = quantiles.pivot_table(index="step", columns="quantile", values="nats", dropna=False)
    at = edges.index
    edges = edges.to_numpy()
    for low, high, alpha in ((0, 4, 0.18), (1, 3, 0.35)):
        axes.fill_between(at, edges[:, low], edges[:, high], color=COLOURS[metric], alpha=alpha, linewidth=0)
    axes.plot(at, edges[:, 2], color=COLOURS[metric], marker="o", markersize=3)
    axes.set(title=words(metric), ylabel="nats")
    time_axis(axes, quantiles)
    sns.despine(ax=axes)
