"""What loggers hold about training itself: accuracy, and the cost of the tracker."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chanaxes_pl.plots.style import BLUE, GREEN, GREY, ORANGE, WIDTH, canvas

#: Colour, line, marker and name of each split; the same split of several runs is drawn alike.
SPLITS = {
    "train": (GREY, "--", "", "training images"),
    "val": (BLUE, "-", "o", "validation images"),
    "test": (GREEN, "none", "D", "test images"),
}


def plot_accuracy(accuracies: pd.DataFrame, title: str = "") -> Figure:
    """Plot top-1 accuracy over epochs: one line for each run and split.

    Args:
        accuracies: a table of ``run, split, epoch`` (completed) and ``accuracy``, a fraction.
        title: text above the figure.
    """
    with canvas(1, 1, (WIDTH, 3.0), title) as (figure, ((axes,),)):
        for split, (colour, line, marker, label) in SPLITS.items():
            rows = accuracies[accuracies["split"] == split]
            for number, (_, run) in enumerate(rows.groupby("run", sort=False)):
                look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1}
                axes.plot(run["epoch"], 100 * run["accuracy"], label="" if number else label, **look)
        axes.set(xlabel="epochs trained", ylabel="top-1 accuracy (%)", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_cost(costs: pd.DataFrame, title: str = "") -> Figure:
    """Plot what the tracker took: seconds for each checkpoint, and its share of the run so far.

    Args:
        costs: a table of ``run, step, seconds`` and ``time_share``, the tracker's fraction of wall-clock time.
        title: text above the figure.
    """
    rows = costs.assign(checkpoint=costs.groupby("run").cumcount(), percent=100 * costs["time_share"])
    with canvas(1, 2, (WIDTH, 2.6), title) as (figure, ((seconds, share),)):
        for axes, column, colour in ((seconds, "seconds", BLUE), (share, "percent", ORANGE)):
            lines = {"units": "run", "estimator": None, "color": colour, "marker": "."}
            sns.lineplot(rows, x="checkpoint", y=column, ax=axes, markeredgecolor=colour, linewidth=1, **lines)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        seconds.set(ylabel="seconds for each checkpoint", ylim=(0, None))
        share.set(ylabel="share of the run so far (%)", ylim=(0, None))
    return figure
