"""The look of all figures: sizes, type, and the same colour for the same thing everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.typing import ColorType
from numpy.typing import ArrayLike

from chanaxes_pl.analysis.correlations import MAIN_PAIR

#: Width in inches of a figure over both columns of a paper.
WIDTH = 7.2
#: Label of the main correlation.
RHO = f"ρ({', '.join(name.replace('_', ' ') for name in MAIN_PAIR)})"

# Wong's palette (Nature Methods 8, 441; 2011), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind")
#: The colour of a metric, an axis, or a family of scores.
COLOURS = {
    "input_capture": BLUE,
    "peer_overlap": SKY,
    "peer_r2": PURPLE,
    "task_information": ORANGE,
    "target_excess": RED,
    "local_axis": BLUE,
    "target_axis": ORANGE,
    "alignment": BROWN,
    "local": BLUE,
    "target": ORANGE,
    "both": GREEN,
    "joint": RED,
    "baseline": GREY,
    "l1": PURPLE,
    "random": "0.3",
}
#: Colours from the first layer to the last; without the yellow end, which is invisible on white.
DEPTH = ListedColormap(mpl.colormaps["plasma"](np.linspace(0, 0.78, 256)))
#: What tells lines of one colour apart.
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^v<>PX*"

_SETTINGS: dict[Any, Any] = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=1.1),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.parse_math": False,  # names of runs and layers may hold a $
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the look of all figures while the context is open."""
    with mpl.rc_context(_SETTINGS):
        yield


@contextmanager
def canvas(
    rows: int, columns: int, size: tuple[float, float], title: str = "", **options: Any
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Open a styled figure with a grid of panels and a title.

    Args:
        rows: rows of panels.
        columns: columns of panels.
        size: width and height in inches.
        title: text above the figure.
        options: further arguments of ``Figure.subplots``.

    Yields:
        The figure, and its panels, an array of ``[rows, columns]`` axes.
    """
    with styled():
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        figure.suptitle(title)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != "linear":  # its labels are powers, not names
                for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                    tick.label1.set_parse_math(True)


def horizontal(axes: Axes, y: float = 0.0, label: str | None = None) -> None:
    """Draw a thin black line at ``y`` over the whole width, for comparison, with a label for the legend."""
    axes.axhline(y, color="black", linewidth=0.6, label=label)


def banded(
    axes: Axes, x: ArrayLike, y: pd.Series, low: pd.Series, high: pd.Series, color: ColorType, alpha: float, **look: Any
) -> None:
    """Draw the line ``y`` over a band of the same colour and of opacity ``alpha``; no band where its edges are NaN."""
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
    axes.plot(x, y, color=color, **look)


def words(name: str) -> str:
    """A column's name as text.

    >>> words("input_capture"), words("peer_r2")
    ('input capture', 'peer R²')
    """
    return name.replace("_r2", " R²").replace("_", " ")
