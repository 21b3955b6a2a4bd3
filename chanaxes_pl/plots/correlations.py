"""The correlation of both axes over training."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.analysis.correlations import MAIN_PAIR, NETWORK, PAIRS, main_correlation
from chanaxes_pl.plots.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    ORANGE,
    RHO,
    WIDTH,
    banded,
    canvas,
    horizontal,
    words,
)
from chanaxes_pl.plots.ticks import label_checkpoints, layer_ticks, time_axis
from chanaxes_pl.tables import SPLIT_HALF


def plot_correlations(correlations: pd.DataFrame, title: str = "") -> Figure:
    """Plot axis correlation over epochs: the mean over layers on the left, every layer on the right.

    Args:
        correlations: the table of :func:`axis_correlations`, for all checkpoints of one run or of several. Of one run
            with resamples, the 95 % interval over channels is drawn as a band; of several, their mean, and each as a
            thin line.
        title: text above the figure.
    """
    with canvas(1, 2, (WIDTH, 4.0), title, width_ratios=(1.15, 1)) as (figure, ((mean, layers),)):
        _draw_mean(mean, main_correlation(correlations))
        _draw_layers(layers, correlations)
        figure.legend(*mean.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def _draw_mean(axes: Axes, rows: pd.DataFrame) -> None:
    rows = rows.assign(ceiling=np.sqrt(rows["reliability_local"] * rows["reliability_target"]))
    runs = [run for _, run in rows.groupby("run", sort=False)] if "run" in rows else [rows]
    shown = rows.groupby("step", as_index=False)[["epoch", "rho", "null", "ceiling", "low", "high"]].mean()
    at = shown["step"]
    axes.plot(at, shown["ceiling"], color=GREY, linestyle="--", label="ceiling set by reliability")
    axes.plot(at, shown["null"], color=ORANGE, marker=".", label="null target")
    look = {"marker": "o", "markersize": 4}
    if len(runs) > 1:
        for run in runs:
            axes.plot(run["step"], run["rho"], color=BLUE, linewidth=0.8, alpha=0.5)
        axes.plot(at, shown["rho"], color=BLUE, label=f"measured, mean and each of {len(runs)} runs", **look)
    else:
        look["label"] = "measured, 95 % over channels"
        banded(axes, at, shown["rho"], shown["low"], shown["high"], BLUE, alpha=0.25, **look)
    horizontal(axes)
    lowest = min(0.0, rows[["rho", "low", "null"]].min().min())
    axes.set(ylim=(lowest - 0.08, 1.08), ylabel=RHO, title="mean over layers")
    time_axis(axes, rows)


def _draw_layers(axes: Axes, correlations: pd.DataFrame) -> None:
    local, target = MAIN_PAIR
    pair = (correlations["local"] == local) & (correlations["target"] == target)
    rows = correlations[pair & (correlations["layer"] != NETWORK)]
    names = list(dict.fromkeys(rows["layer"]))
    grid = rows.pivot_table(index="layer", columns="step", values="rho", dropna=False).reindex(names)
    axes.set_facecolor("0.85")  # shows where a layer has no correlation
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(*layer_ticks(names, most=25), fontsize=6.5)
    axes.set_title("every layer")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
    label_checkpoints(axes, rows.drop_duplicates("step"))


def plot_pairs(correlations: pd.DataFrame, reliabilities: pd.DataFrame, title: str = "") -> Figure:
    """Plot the correlation of all pairs of metrics, mean over layers, and how reliable each metric is, over training.

    Args:
        correlations: the table of :func:`axis_correlations`; of several runs the mean is drawn.
        reliabilities: the table of :func:`reliabilities`; of several runs the mean is drawn.
        title: text above the figure.
    """
    rows, reliable = (table[table["layer"] == NETWORK] for table in (correlations, reliabilities))
    looks = [
        {"marker": marker, "linestyle": dashes, "markersize": 4, "linewidth": 1}
        for marker, dashes in zip(MARKERS, (*DASHES, "-"), strict=False)
    ]
    with canvas(1, 2, (WIDTH, 4.4), title) as (figure, ((left, right),)):
        for (local, target), look in zip(PAIRS, looks, strict=False):
            pair = rows[(rows["local"] == local) & (rows["target"] == target)].groupby("step")["rho"].mean()
            colour = COLOURS["both" if local == "local_axis" else local]
            left.plot(pair.index, pair, color=colour, label=f"{words(local)}, {words(target)}", **look)
        for metric, look in zip(SPLIT_HALF, looks, strict=False):
            mean = reliable[reliable["metric"] == metric].groupby("step")["reliability"].mean()
            right.plot(mean.index, mean, color=COLOURS[metric], label=words(metric), markerfacecolor="none", **look)
        horizontal(left)
        left.set(title="ρ, mean over layers", ylabel="ρ")
        right.set(title="split-half reliability (scale of its own)")
        for axes in (left, right):
            time_axis(axes, rows)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure
