"""Labels of layers and of training time along axes and colour bars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_TICKS = 6


def short(name: str, names: Sequence[str]) -> str:
    """A layer's name without the module that all of ``names`` are in."""
    head = name.split(".")[0] + "."
    return name.removeprefix(head) if all(other.startswith(head) for other in names) else name


def layer_ticks(layers: Sequence[str], most: int = 30) -> tuple[range, list[str]]:
    """Positions and names of the layers to label, of which the first is at 0; at most ``most`` names fit."""
    shown = range(0, len(layers), -(-len(layers) // most))
    return shown, [short(layers[place], layers) for place in shown]


def layer_bar(figure: Figure, dots: PathCollection | None, panels: np.ndarray, layers: Sequence[str]) -> None:
    """Draw a colour bar of depth beside the panels.

    Args:
        figure: the figure of the panels.
        dots: points coloured by the position of their layer in ``layers``; None draws nothing.
        panels: the axes that make room for the bar.
        layers: all layers, in order of depth.
    """
    if dots is None:
        return
    bar = figure.colorbar(dots, ax=panels, shrink=0.8, aspect=40, label="layer")
    ticks = sorted({0, len(layers) // 2, len(layers) - 1})
    bar.set_ticks(ticks, labels=[short(layers[tick], layers) for tick in ticks])


def label_checkpoints(axes: Axes, rows: pd.DataFrame) -> None:
    """Label the columns of a heat map, one for each checkpoint, with their epochs.

    Args:
        axes: the panel of the heat map.
        rows: a table with ``epoch``, one row for each checkpoint.
    """
    epochs = rows["epoch"].to_numpy()
    at = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), _TICKS)).round().astype(int))
    axes.set_xticks(at, [f"{epoch:.2g}" if epoch < 1 else f"{epoch:g}" for epoch in epochs[at]], fontsize=7.5)
    axes.set_xlabel("epochs trained (one column for each checkpoint)")


def time_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Make the horizontal axis, optimiser steps, linear up to the first step and logarithmic from there on.

    Args:
        axes: a panel with lines over steps.
        rows: a table with ``step`` and ``epoch`` of the checkpoints; some of them get a tick.
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
    axes.set_xticks(steps[at], [f"{steps[i]:g}\n({epochs.iloc[i]:.2g})" for i in at], fontsize=7.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.2 * first if steps[0] == 0 else steps[0] / 1.15, max(steps[-1], 0.2 * first) * 1.15)
    axes.set_xlabel("optimiser step, log scale (epoch)")
