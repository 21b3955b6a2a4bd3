"""Every channel as a point: its local axis against its target axis, at a few checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from chanaxes_pl.plots.style import DEPTH, WIDTH, canvas, words
from chanaxes_pl.plots.ticks import layer_bar

#: Metrics that are plotted against each other; each pair is a row of panels.
PAIRS = (("input_capture", "task_information"), ("peer_overlap", "target_excess"))


def channel_panels(table: pd.DataFrame, steps: Mapping[str, int]) -> list[pd.DataFrame]:
    """The points of each panel of :func:`plot_channels`, row by row, in the order they are drawn.

    Args:
        table: channels of several checkpoints.
        steps: the step of each checkpoint to show, by the checkpoint's name.

    Returns:
        The live channels, for each pair of :data:`PAIRS` and each step: their columns, the ranks of both metrics within
        their layer (in percent) as ``x`` and ``y``, and ``local``, ``target`` and ``when``.
    """
    panels = []
    for local, target in PAIRS:
        for when, step in steps.items():
            rows = table[(table["step"] == step) & ~table["dead"].astype(bool)]
            ranks = 100 * rows.groupby(["run", "layer"], sort=False)[[local, target]].rank(pct=True)
            named = {"when": when, "local": local, "target": target, "x": ranks[local], "y": ranks[target]}
            panels.append(rows.assign(**named).dropna(subset=["x", "y"]))
    return panels


def plot_channels(panels: list[pd.DataFrame], layers: list[str], title: str = "") -> Figure:
    """Plot the rank of the target metric against that of the local one: a point for each channel, coloured by depth.

    Args:
        panels: the tables of :func:`channel_panels`.
        layers: names of all layers, from the input to the output.
        title: text above the figure.
    """
    rows = len(PAIRS)
    columns = len(panels) // rows
    size = (WIDTH, 0.5 + WIDTH / max(columns, 2) * rows * 0.85)
    depth = {name: place for place, name in enumerate(layers)}
    look = {"cmap": DEPTH, "vmin": 0, "vmax": max(len(layers) - 1, 1), "s": 7, "linewidths": 0, "alpha": 0.6}
    with canvas(rows, columns, size, title, sharex=True, sharey=True) as (figure, grid):
        dots = None
        for axes, points in zip(grid.flat, panels, strict=True):
            dots = axes.scatter(points["x"], points["y"], c=points["layer"].map(depth), rasterized=True, **look)
            names = {key: points[key].iloc[0] if len(points) else "" for key in ("when", "local", "target")}
            axes.set(title=names["when"], xlabel=f"{words(names['local'])}\n(rank in its layer, %)")
            axes.tick_params(labelbottom=True)
            if axes in grid[:, 0]:
                axes.set_ylabel(f"{words(names['target'])}\n(rank in its layer, %)")
        layer_bar(figure, dots, grid, layers)
    return figure
