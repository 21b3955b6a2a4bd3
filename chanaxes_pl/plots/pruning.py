"""Accuracy of pruned networks, what each group of layers costs the outputs, and damage by lesions."""

from __future__ import annotations

from itertools import cycle, product

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.analysis.text import LESIONED, interval
from chanaxes_pl.plots.style import COLOURS, DASHES, DEPTH, MARKERS, WIDTH, canvas, horizontal, words
from chanaxes_pl.plots.ticks import layer_bar

# Points of accuracy that a panel shows at least.
_SPAN = 5.0
#: More bands than this hide each other.
_BANDS = 8


def plot_pruning(grid: pd.DataFrame, title: str = "") -> Figure:
    """Plot accuracy over remaining MACs: a column for each allocation, a row for each compensation, a line for a score.

    Each row has its own scale: compensated networks differ by a few percent, uncompensated ones by dozens.

    Args:
        grid: the table of ``pruning_grid``. Of several runs, and of several random draws, the mean is drawn, with the
            range if there are few enough scores to tell their bands apart.
        title: text above the figure.
    """
    dense = 100 * grid.loc[grid["score"] == "dense", "accuracy"].mean()
    pruned = grid[grid["score"] != "dense"]
    pruned = pruned.assign(score=pruned["score"].str.replace(r"^random_\d+$", "random", regex=True))
    columns, rows = list(dict.fromkeys(pruned["allocation"])), list(dict.fromkeys(pruned["compensate"]))
    looks = _looks(pruned)
    size = (2.2 + 3.6 * len(columns), 0.8 + 3.0 * len(rows))
    with canvas(len(rows), len(columns), size, title, sharex=True, sharey="row") as (figure, panels):
        for axes, (compensation, allocation) in zip(panels.flat, product(rows, columns), strict=True):
            panel = pruned[(pruned["compensate"] == compensation) & (pruned["allocation"] == allocation)]
            for score, look in looks.items():
                curves = panel[panel["score"] == score].groupby("budget")[["macs_share", "accuracy"]]
                points = 100 * curves.agg(["mean", "min", "max"])
                x, y = points["macs_share"]["mean"], points["accuracy"]
                if len(looks) <= _BANDS:
                    axes.fill_between(x, y["min"], y["max"], color=look["color"], alpha=0.12, linewidth=0)
                axes.plot(x, y["mean"], label=score, markersize=3.5, linewidth=1, **look)
            horizontal(axes, dense, label="not pruned")
            axes.set_title(f"{allocation}, {'no compensation' if compensation == 'none' else compensation}")
        for axes in panels[-1]:
            axes.set_xlabel("MACs left (%)")
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        for axes in panels[:, 0]:
            axes.set_ylabel("accuracy (%)")
            low, high = axes.get_ylim()
            if high - low < _SPAN:  # differences of noise would fill the panel
                axes.set_ylim((low + high - _SPAN) / 2, (low + high + _SPAN) / 2)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _looks(pruned: pd.DataFrame) -> dict[str, dict]:
    """The look of each score's line: the colour of its family, and dashes and a marker of its own within it.

    The two baselines that others are read against have colours of their own.
    """
    looks = {}
    for family, scores in pruned.groupby("family", sort=False)["score"].unique().items():
        for score, marker, dashes in zip(scores, cycle(MARKERS), cycle(DASHES)):
            looks[score] = {"color": COLOURS.get(score, COLOURS[str(family)]), "marker": marker, "linestyle": dashes}
    return looks


def plot_sensitivity(table: pd.DataFrame, title: str = "") -> Figure:
    """Plot how far the outputs move as each group of layers alone loses units: a line for a group, coloured by depth.

    Args:
        table: the table of ``sensitivity``.
        title: text above the figure.
    """
    groups = list(dict.fromkeys(table["group"]))
    with canvas(1, 1, (WIDTH, 3.6), title) as (figure, panels):
        (axes,) = panels.flat
        for depth, name in enumerate(groups):
            rows = table[table["group"] == name]
            shade = depth / max(1, len(groups) - 1)
            axes.plot(
                100 * rows["removed"] / rows["units"],
                rows["divergence"],
                color=DEPTH(shade),
                marker="o",
                markersize=2.5,
                linewidth=1,
                label=name,
            )
        smallest = table.loc[table["divergence"] > 0, "divergence"].min()
        axes.set_yscale("symlog", linthresh=float(smallest) if smallest == smallest else 1.0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("units removed from the group (%)")
        axes.set_ylabel("divergence of the outputs")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside right center", fontsize=6, ncols=-(-len(groups) // 24)
        )
    return figure


def plot_lesions(table: pd.DataFrame, correlations: pd.DataFrame, damage: str = "zero_loss", title: str = "") -> Figure:
    """Plot the damage of every lesioned channel against each of its metrics.

    Args:
        table: lesions and axes of the same channels, from ``join_axes``.
        correlations: the table of ``score_damage_correlation`` for these lesions; each score in it gets a panel.
        damage: name of the column of damage.
        title: text above the figure.
    """
    mean = correlations[correlations["layer"] == NETWORK]
    layers = list(dict.fromkeys(table["layer"]))
    depth = table["layer"].map({name: place for place, name in enumerate(layers)})
    columns = min(3, len(mean))
    rows = -(-len(mean) // columns)
    with canvas(rows, columns, (WIDTH, 0.4 + 2.2 * rows), title, sharey=True) as (figure, panels):
        dots = None
        for axes, row in zip(panels.flat, mean.to_dict("records"), strict=False):
            ranks = 100 * table.groupby("layer")[row["score"]].rank(pct=True)
            dots = axes.scatter(ranks, table[damage], c=depth, cmap=DEPTH, s=8, linewidths=0, alpha=0.7)
            horizontal(axes)
            axes.set_title(
                f"{words(row['score'])}\nρ = {interval(pd.Series(row).rename({'rho': 'mean'}), spread=False)}",
                fontsize=8,
            )
            axes.set_xlabel("rank in its layer (%)")
            axes.set_yscale("symlog", linthresh=0.01)
        for axes in panels.flat[len(mean) :]:
            axes.set_axis_off()
        for axes in panels[:, 0]:
            axes.set_ylabel(f"damage if {LESIONED.get(damage.removesuffix('_loss'), damage)} (nats)")
        layer_bar(figure, dots, panels, layers)
    return figure
