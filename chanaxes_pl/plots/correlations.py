"""Axis correlation over epochs, as a picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from chanaxes_pl.analysis.correlations import MAIN_PAIR, NETWORK, PAIRS, main_correlation
from chanaxes_pl.plots.style import BLUE, COLOURS, DASHES, GREY, MARKERS, ORANGE, RHO, WIDTH, canvas, short, words
from chanaxes_pl.tables import SPLIT_HALF

_TICKS = 6


def plot_correlations(correlations: pd.DataFrame, title: str = "") -> Figure:
    """Axis correlation over epochs: the mean over layers on the left, every layer on the right.

    Args:
        correlations: of all checkpoints of one run or of several, from :func:`axis_correlations`. Of one run, with
            resamples, the 95 % interval over channels is drawn as a band; of several their mean, and each as a thin
            line.
        title: above the figure.

    Returns:
        A figure of 7.2 × 4 inches; ``figure.savefig(path)`` writes it.
    """
    with canvas(1, 2, (WIDTH, 4.0), title, width_ratios=(1.15, 1)) as (figure, grid):
        mean, layers = grid.flat
        _draw_mean(mean, main_correlation(correlations))
        _draw_layers(layers, correlations)
        figure.legend(*mean.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_mean(axes: Axes, rows: pd.DataFrame) -> None:
    rows = rows.assign(ceiling=np.sqrt(rows["reliability_local"] * rows["reliability_target"]))
    runs = [run for _, run in rows.groupby("run", sort=False)] if "run" in rows else [rows]
    shown = rows.groupby("step", as_index=False)[["epoch", "rho", "null", "ceiling", "low", "high"]].mean()
    at = shown["step"]
    axes.plot(at, shown["ceiling"], color=GREY, linestyle="--", label="ceiling set by reliability")
    axes.plot(at, shown["null"], color=ORANGE, marker=".", label="null target")
    label = "measured, 95 % over channels"
    if len(runs) > 1:
        label = f"measured, mean and each of {len(runs)} runs"
        for run in runs:
            axes.plot(run["step"], run["rho"], color=BLUE, linewidth=0.8, alpha=0.5)
    elif shown["low"].notna().any():
        axes.fill_between(at, shown["low"], shown["high"], color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(at, shown["rho"], color=BLUE, marker="o", markersize=4, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    lowest = min(0.0, rows[["rho", "low", "null"]].min().min())
    axes.set(ylim=(lowest - 0.08, 1.08))
    axes.set_ylabel(RHO, fontsize=9)
    axes.set_title("mean over layers", fontsize=9)
    time_axis(axes, rows)
    sns.despine(ax=axes)


def _draw_layers(axes: Axes, correlations: pd.DataFrame) -> None:
    pairs = pd.Series(list(zip(correlations["local"], correlations["target"], strict=True)), index=correlations.index)
    rows = correlations[(pairs == MAIN_PAIR) & (correlations["layer"] != NETWORK)]
    names = list(dict.fromkeys(rows["layer"]))
    grid = rows.pivot_table(index="layer", columns="step", values="rho", dropna=False).reindex(names)
    axes.set_facecolor("0.85")  # shows where a layer has no correlation
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    skip = -(-len(names) // 25)
    axes.set_yticks(range(0, len(names), skip), [short(name, names) for name in names[::skip]], fontsize=6.5)
    axes.set_title("every layer", fontsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
    label_checkpoints(axes, rows.drop_duplicates("step"))


def plot_pairs(correlations: pd.DataFrame, reliabilities: pd.DataFrame, title: str = "") -> Figure:
    """All pairs of metrics over the checkpoints, mean over layers, and how reliable each metric is.

    Args:
        correlations: from :func:`axis_correlations`; of several runs the mean is drawn.
        reliabilities: from :func:`reliabilities`; the same.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    with canvas(1, 2, (WIDTH, 4.4), title) as (figure, grid):
        left, right = grid.flat
        rows = correlations[correlations["layer"] == NETWORK]
        for (local, target), marker, dashes in zip(PAIRS, MARKERS, (*DASHES, "-"), strict=False):
            pair = rows[(rows["local"] == local) & (rows["target"] == target)].groupby("step")["rho"].mean()
            look = {"color": COLOURS["both" if local == "local_axis" else local], "linestyle": dashes}
            look |= {"marker": marker, "markersize": 4, "linewidth": 1, "label": f"{words(local)}, {words(target)}"}
            left.plot(pair.index, pair, **look)
        for metric, marker, dashes in zip(SPLIT_HALF, MARKERS, (*DASHES, "-"), strict=False):
            values = reliabilities[(reliabilities["layer"] == NETWORK) & (reliabilities["metric"] == metric)]
            mean = values.groupby("step")["reliability"].mean()
            look = {"color": COLOURS[metric], "marker": marker, "linestyle": dashes, "label": words(metric)}
            right.plot(mean.index, mean, markersize=4, linewidth=1, markerfacecolor="none", **look)
        left.set(title="ρ, mean over layers", ylabel="ρ")
        right.set(title="split-half reliability (scale of its own)")
        left.axhline(0, color="black", linewidth=0.6)
        for axes in (left, right):
            time_axis(axes, rows)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
            sns.despine(ax=axes)
    return figure


def label_checkpoints(axes: Axes, rows: pd.DataFrame) -> None:
    """Label the columns of a heat map, one a checkpoint, with their epochs.

    Args:
        axes: of the heat map.
        rows: with ``epoch``, a row a checkpoint.
    """
    epochs = rows["epoch"].to_numpy()
    at = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), _TICKS)).round().astype(int))
    axes.set_xticks(at, [f"{epoch:.2g}" if epoch < 1 else f"{epoch:g}" for epoch in epochs[at]], fontsize=7.5)
    axes.set_xlabel("epochs trained (a column a checkpoint)", fontsize=8.5)


def time_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Give ``axes``, whose x values are optimiser steps, a logarithmic scale from the first step on, and 0 before it.

    Args:
        axes: with lines over steps.
        rows: with ``step`` and ``epoch`` of the checkpoints; ticks stand at some of them.
    """
    epochs = rows.groupby("step")["epoch"].mean()
    steps = epochs.index.to_numpy(float)
    first = steps[steps > 0].min() if (steps > 0).any() else 1.0
    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    # Evenly along the axis, as far as there are checkpoints: the linear part up to the first step is half a decade.
    place = np.where(steps > first, 0.5 + np.log10(np.maximum(steps, first) / first), 0.5 * steps / first)
    span = place[-1] - place[0]
    at: list[int] = []
    for want in np.linspace(place[0], place[-1], _TICKS):
        nearest = int(np.abs(place - want).argmin())
        if not at or place[nearest] - place[at[-1]] > 0.7 * span / (_TICKS - 1):  # else the labels overlap
            at.append(nearest)
    labels = [f"{steps[i]:g}\n({epochs.iloc[i]:.2g})" for i in at]
    axes.set_xticks(steps[at], labels, fontsize=7.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.2 * first if steps[0] == 0 else steps[0] / 1.15, max(steps[-1], 0.2 * first) * 1.15)
    axes.set_xlabel("optimiser step, log scale (epoch)", fontsize=8.5)
