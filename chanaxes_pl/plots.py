"""Tables as pictures."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from chanaxes_pl.correlations import HEADLINE, NETWORK, headline

_RHO = "ρ(input capture, task information)"
_TICKS = 9
# Colour-blind safe, and the same thing in the same colour everywhere.
_BLUE, _ORANGE, _GREEN, _GREY = (sns.color_palette("colorblind")[k] for k in (0, 1, 2, 7))
_FAMILIES = {"local": _BLUE, "target": _ORANGE, "both": _GREEN, "baseline": _GREY}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>PX*"


def plot_correlations(correlations: pd.DataFrame, title: str = "") -> Figure:
    """Axis correlation over epochs: the mean over layers on the left, every layer on the right.

    Args:
        correlations: of all checkpoints of one run, from :func:`axis_correlations`; with resamples, the 95 %
            interval over channels is drawn as a band.
        title: above the figure.

    Returns:
        A figure of 10 × 4.5 inches; ``figure.savefig(path)`` writes it.
    """
    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        mean, layers = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _draw_mean(mean, headline(correlations))
        _draw_layers(layers, correlations)
        figure.legend(*mean.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
        figure.suptitle(title)
    return figure


def _draw_mean(axes: Axes, rows: pd.DataFrame) -> None:
    at = np.arange(len(rows))
    ceiling = np.sqrt(rows["reliability_local"] * rows["reliability_target"])
    axes.plot(at, ceiling, color=_GREY, linestyle="--", label="ceiling set by reliability")
    axes.plot(at, rows["null"], color=_ORANGE, marker=".", label="null target")
    if rows["low"].notna().any():
        axes.fill_between(at, rows["low"], rows["high"], color=_BLUE, alpha=0.25, linewidth=0)
    axes.plot(at, rows["rho"], color=_BLUE, marker="o", markersize=4, label="measured, 95 % over channels")
    axes.axhline(0, color="black", linewidth=0.6)
    lowest = min(0.0, rows[["rho", "low", "null"]].min().min())
    axes.set(ylim=(lowest - 0.08, 1.08), ylabel=_RHO, title="mean over layers")
    _label_checkpoints(axes, rows)
    sns.despine(ax=axes)


def _draw_layers(axes: Axes, correlations: pd.DataFrame) -> None:
    pairs = pd.Series(list(zip(correlations["local"], correlations["target"], strict=True)), index=correlations.index)
    rows = correlations[(pairs == HEADLINE) & (correlations["layer"] != NETWORK)]
    names = list(dict.fromkeys(rows["layer"]))
    grid = rows.pivot_table(index="layer", columns="step", values="rho", dropna=False).reindex(names)
    axes.set_facecolor("0.85")  # shows where a layer has no correlation
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    skip = -(-len(names) // 25)
    axes.set_yticks(range(0, len(names), skip), [_short(name, names) for name in names[::skip]], fontsize=7)
    axes.set_title("every layer")
    axes.figure.colorbar(image, ax=axes, label=_RHO, shrink=0.9)
    _label_checkpoints(axes, rows.drop_duplicates("step"))


def _short(name: str, names: list[str]) -> str:
    """A layer's name without the module that all of them are in."""
    head = name.split(".")[0] + "."
    return name.removeprefix(head) if all(other.startswith(head) for other in names) else name


def _label_checkpoints(axes: Axes, rows: pd.DataFrame) -> None:
    """One place a checkpoint, labelled with its epoch: early steps would vanish on a true scale."""
    epochs = rows["epoch"].to_numpy()

    def label(place: float, _position: int) -> str:
        near = round(place)
        if not 0 <= near < len(epochs) or abs(place - near) > 0.01:
            return ""
        return f"{epochs[near]:.1g}" if epochs[near] < 1 else f"{epochs[near]:g}"

    axes.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True, steps=[1, 2, 3, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(label))
    axes.set_xlabel("epochs trained (one place a checkpoint)")


def plot_pruning(grid: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy over remaining MACs: a column an allocation, a row a kind of compensation, a line a score.

    Args:
        grid: from ``pruning_grid``. Of several runs, and of several random draws, the mean is drawn with the range.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    dense = grid[grid["score"] == "dense"]
    pruned = grid[grid["score"] != "dense"]
    pruned = pruned.assign(score=pruned["score"].str.replace(r"^random_\d+$", "random", regex=True))
    columns, rows = list(dict.fromkeys(pruned["allocation"])), list(dict.fromkeys(pruned["compensate"]))
    styles = _styles(pruned)
    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(2.2 + 3.6 * len(columns), 0.8 + 3.0 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
        for (row, strength), (column, allocation) in ((r, c) for r in enumerate(rows) for c in enumerate(columns)):
            axes = panels[row, column]
            panel = pruned[(pruned["compensate"] == strength) & (pruned["allocation"] == allocation)]
            for score, style in styles.items():
                _draw_curve(axes, panel[panel["score"] == score], score, style)
            axes.axhline(100 * dense["accuracy"].mean(), color="black", linewidth=0.6)
            axes.set_title(f"{allocation}, {'no compensation' if strength == 'none' else strength}")
            axes.set(xlabel="MACs left (%)" if row == len(rows) - 1 else "", ylabel="" if column else "accuracy (%)")
            sns.despine(ax=axes)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        figure.suptitle(title)
    return figure


def _styles(pruned: pd.DataFrame) -> dict[str, dict]:
    """A line's look by score: the colour is its family's, dashes and marker tell it from its kin."""
    styles: dict[str, dict] = {}
    for family, scores in pruned.groupby("family", sort=False)["score"].unique().items():
        looks = zip(scores, cycle(_MARKERS), cycle(_DASHES))
        styles |= {
            score: {"color": _FAMILIES[str(family)], "marker": marker, "linestyle": dashes}
            for score, marker, dashes in looks
        }
    return styles


def _draw_curve(axes: Axes, curve: pd.DataFrame, score: str, style: dict) -> None:
    points = curve.groupby("budget")[["macs_share", "accuracy"]].agg(["mean", "min", "max"]) * 100
    x, y = points["macs_share"]["mean"], points["accuracy"]
    axes.plot(x, y["mean"], label=score, markersize=3.5, linewidth=1, **style)
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
    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(1.2 + 3.4 * columns, 0.6 + 2.9 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        dots = None
        for place, row in enumerate(mean.to_dict("records")):
            axes = panels.flat[place]
            ranks = table.groupby("layer")[row["score"]].rank(pct=True)
            dots = axes.scatter(100 * ranks, table[damage], c=depth, cmap="viridis", s=6, linewidths=0, alpha=0.7)
            axes.set_title(f"{row['score']}: ρ = {row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", fontsize=9)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_xlabel("rank in its layer (%)")
            sns.despine(ax=axes)
        for axes in panels.flat[len(mean) :]:
            axes.set_axis_off()
        for axes in panels[:, 0]:
            axes.set_ylabel(f"damage, {damage} (nats)")
        if dots is not None:
            bar = figure.colorbar(dots, ax=panels, shrink=0.8, aspect=40, label="layer")
            ticks = sorted({0, len(layers) // 2, len(layers) - 1})
            bar.set_ticks(ticks, labels=[_short(layers[tick], layers) for tick in ticks])
        figure.suptitle(title)
    return figure
