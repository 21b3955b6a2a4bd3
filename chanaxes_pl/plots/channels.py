"""Every channel as a point: its local axis against its target axis, at a few checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from chanaxes_pl.plots.style import DEPTH, WIDTH, canvas, layer_bar, words

#: Metrics that are set against each other, each a row of panels.
PAIRS = (("input_capture", "task_information"), ("peer_overlap", "target_excess"))


def channel_panels(table: pd.DataFrame, steps: Mapping[str, int]) -> list[pd.DataFrame]:
    """The points of each panel of :func:`plot_channels`, row by row, in the order they are drawn.

    Args:
        table: channels of several checkpoints.
        steps: the checkpoints to show, by what to call them.

    Returns:
        For each pair of :data:`PAIRS` and each step the live channels, with the ranks of their metrics within their
        layer (in percent) as ``x`` and ``y`` beside their columns, ``local``, ``target`` and ``when``.
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
    """Rank of the target metric against rank of the local one, a point a channel, coloured by its layer's depth.

    Args:
        panels: from :func:`channel_panels`.
        layers: names, from the input to the output.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.
    """
    lines = len(PAIRS)
    columns = len(panels) // lines
    depth = {name: place for place, name in enumerate(layers)}
    with canvas(
        lines, columns, (WIDTH, 0.5 + WIDTH / max(columns, 2) * lines * 0.85), title, sharex=True, sharey=True
    ) as (figure, grid):
        dots = None
        for axes, points in zip(grid.flat, panels, strict=True):
            dots = axes.scatter(
                points["x"],
                points["y"],
                c=points["layer"].map(depth),
                vmin=0,
                vmax=max(len(layers) - 1, 1),
                cmap=DEPTH,
                s=7,
                linewidths=0,
                alpha=0.6,
                rasterized=True,
            )
            names = {key: points[key].iloc[0] if len(points) else "" for key in ("when", "local", "target")}
            axes.set_title(names["when"], fontsize=9)
            axes.set_xlabel(f"{words(names['local'])}\n(rank in its layer, %)", fontsize=8)
            axes.set_ylabel(f"{words(names['target'])}\n(rank in its layer, %)", fontsize=8)
            axes.tick_params(labelbottom=True)
            sns.despine(ax=axes)
        for axes in grid[:, 1:].flat:
            axes.set_ylabel("")
        if dots is not None:
            layer_bar(figure, dots, grid, layers)
    return figure
