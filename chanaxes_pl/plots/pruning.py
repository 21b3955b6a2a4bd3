"""Pruning curves and lesions, as pictures."""

from __future__ import annotations

from itertools import cycle

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.plots.style import COLOURS, DASHES, DEPTH, MARKERS, WIDTH, canvas, layer_bar, words

#: More bands than this hide each other.
_BANDS = 8


def plot_pruning(grid: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy over remaining MACs: a column an allocation, a row a kind of compensation, a line a score.

    Each row has a scale of its own: compensated networks differ by a few percent, uncompensated ones by dozens.

    Args:
        grid: from ``pruning_grid``. Of several runs, and of several random draws, the mean is drawn; with the range, if
            there are few enough scores to tell their bands apart.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    dense = grid[grid["score"] == "dense"]
    pruned = grid[grid["score"] != "dense"]
    pruned = pruned.assign(score=pruned["score"].str.replace(r"^random_\d+$", "random", regex=True))
    columns, rows = list(dict.fromkeys(pruned["allocation"])), list(dict.fromkeys(pruned["compensate"]))
    styles = _styles(pruned)
    with canvas(
        len(rows), len(columns), (2.2 + 3.6 * len(columns), 0.8 + 3.0 * len(rows)), title, sharex=True, sharey="row"
    ) as (figure, panels):
        for (row, strength), (column, allocation) in ((r, c) for r in enumerate(rows) for c in enumerate(columns)):
            axes = panels[row, column]
            panel = pruned[(pruned["compensate"] == strength) & (pruned["allocation"] == allocation)]
            for score, style in styles.items():
                _draw_curve(axes, panel[panel["score"] == score], score, style, band=len(styles) <= _BANDS)
            axes.axhline(100 * dense["accuracy"].mean(), color="black", linewidth=0.6)
            axes.set_title(f"{allocation}, {'no compensation' if strength == 'none' else strength}")
            axes.set(xlabel="MACs left (%)" if row == len(rows) - 1 else "", ylabel="" if column else "accuracy (%)")
            sns.despine(ax=axes)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def _styles(pruned: pd.DataFrame) -> dict[str, dict]:
    """A line's look by score: the colour is its family's, dashes and marker tell it from its kin."""
    styles: dict[str, dict] = {}
    for family, scores in pruned.groupby("family", sort=False)["score"].unique().items():
        looks = zip(scores, cycle(MARKERS), cycle(DASHES))
        styles |= {
            score: {"color": COLOURS[str(family)], "marker": marker, "linestyle": dashes}
            for score, marker, dashes in looks
        }
    return styles


def _draw_curve(axes: Axes, curve: pd.DataFrame, score: str, style: dict, band: bool) -> None:
    points = curve.groupby("budget")[["macs_share", "accuracy"]].agg(["mean", "min", "max"]) * 100
    x, y = points["macs_share"]["mean"], points["accuracy"]
    axes.plot(x, y["mean"], label=score, markersize=3.5, linewidth=1, **style)
    if band:
        axes.fill_between(x, y["min"], y["max"], color=style["color"], alpha=0.12, linewidth=0)


def plot_lesions(table: pd.DataFrame, correlations: pd.DataFrame, damage: str = "zero_loss", title: str = "") -> Figure:
    """Damage of every lesioned channel against each of its metrics.

    Args:
        table: lesions and axes of the same channels, from ``join_axes``.
        correlations: from ``score_damage_correlation`` of that table, a panel for every score in it.
        damage: the column of damage.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    mean = correlations[correlations["layer"] == NETWORK]
    layers = list(dict.fromkeys(table["layer"]))
    depth = table["layer"].map({name: place for place, name in enumerate(layers)})
    columns = min(3, len(mean))
    lines = -(-len(mean) // columns)
    with canvas(lines, columns, (WIDTH, 0.4 + 2.2 * lines), title, sharey=True) as (figure, panels):
        dots = None
        for place, row in enumerate(mean.to_dict("records")):
            axes = panels.flat[place]
            ranks = table.groupby("layer")[row["score"]].rank(pct=True)
            dots = axes.scatter(100 * ranks, table[damage], c=depth, cmap=DEPTH, s=8, linewidths=0, alpha=0.7)
            axes.set_title(
                f"{words(row['score'])}\nρ = {row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", fontsize=8
            )
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_xlabel("rank in its layer (%)", fontsize=8)
            sns.despine(ax=axes)
        for axes in panels.flat[len(mean) :]:
            axes.set_axis_off()
        for axes in panels[:, 0]:
            axes.set_ylabel(f"damage, {damage} (nats)", fontsize=8)
        if dots is not None:
            layer_bar(figure, dots, panels, layers)
    return figure
