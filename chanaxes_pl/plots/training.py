"""What loggers hold about training itself: accuracy, and what the tracker cost."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chanaxes_pl.plots.style import BLUE, GREEN, GREY, ORANGE, WIDTH, canvas

#: How a split is drawn; the same split of several runs is drawn alike.
SPLITS = {"train": (GREY, "--", ""), "val": (BLUE, "-", "o"), "test": (GREEN, "none", "D")}


def plot_accuracy(accuracies: pd.DataFrame, title: str = "") -> Figure:
    """Top-1 accuracy over epochs, a line a run and split.

    Args:
        accuracies: ``run, split, epoch`` (completed) and ``accuracy``, a share.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    with canvas(1, 1, (WIDTH, 3.0), title) as (figure, grid):
        axes = grid[0, 0]
        for split, (colour, line, marker) in SPLITS.items():
            rows = accuracies[accuracies["split"] == split]
            for number, (_, run) in enumerate(rows.groupby("run", sort=False)):
                label = {"train": "training images", "val": "validation images", "test": "test images"}[split]
                look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1}
                axes.plot(run["epoch"], 100 * run["accuracy"], label="" if number else label, **look)
        axes.set(xlabel="epochs trained", ylabel="top-1 accuracy (%)", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        sns.despine(ax=axes)
    return figure


def plot_cost(costs: pd.DataFrame, title: str = "") -> Figure:
    """What the tracker took: seconds a checkpoint, and its share of the run so far.

    Args:
        costs: ``run, step, seconds, time_share`` (of wall-clock time).
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    with canvas(1, 2, (WIDTH, 2.6), title) as (figure, grid):
        left, right = grid.flat
        for _, run in costs.groupby("run", sort=False):
            places = range(len(run))
            left.plot(places, run["seconds"], color=BLUE, marker=".", linewidth=1)
            right.plot(places, 100 * run["time_share"], color=ORANGE, marker=".", linewidth=1)
        _finish(left, "seconds a checkpoint", left.get_ylim()[1])
        _finish(right, "share of the run so far (%)", right.get_ylim()[1])
    return figure


def _finish(axes: Axes, label: str, top: float) -> None:
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set(xlabel="checkpoint", ylabel=label, ylim=(0, top))
    sns.despine(ax=axes)
