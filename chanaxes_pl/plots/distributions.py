"""The distribution of each metric over channels, and its change while a network trains."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.plots.style import COLOURS, WIDTH, banded, canvas, words
from chanaxes_pl.plots.ticks import time_axis

#: Fractions of the channels that lie below the edges of the bands and the line in their middle.
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
    """Plot median, middle half and middle 90 % of each metric over the checkpoints.

    Args:
        quantiles: the table of :func:`distributions`.
        title: text above the figure.
    """
    with canvas(2, 2, (WIDTH, 4.6), title, sharex=True) as (figure, panels):
        for axes, metric in zip(panels.flat, METRICS, strict=True):
            _draw_bands(axes, quantiles[quantiles["metric"] == metric], metric)
        for axes in panels[0]:
            axes.set_xlabel("")
    return figure


def _draw_bands(axes: Axes, quantiles: pd.DataFrame, metric: str) -> None:
    edges = quantiles.pivot_table(index="step", columns="quantile", values="nats", dropna=False)
    lowest, low, median, high, highest = (edges[quantile] for quantile in QUANTILES)
    axes.fill_between(edges.index, lowest, highest, color=COLOURS[metric], alpha=0.18, linewidth=0)
    banded(axes, edges.index, median, low, high, COLOURS[metric], alpha=0.35, marker="o", markersize=3)
    axes.set(title=words(metric), ylabel="nats")
    time_axis(axes, quantiles)
