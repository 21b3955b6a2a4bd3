"""How every figure looks: sizes, type, and the same colour for the same thing everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

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
    "baseline": GREY,
}
#: Depth from the first layer to the last; without the yellow end, which is invisible on white.
DEPTH = ListedColormap(mpl.colormaps["plasma"](np.linspace(0, 0.78, 256)))
#: Marks of lines of one colour.
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^v<>PX*"


@contextmanager
def styled() -> Iterator[None]:
    """The look that all figures are drawn in."""
    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=1.1):
        yield


@contextmanager
def canvas(
    rows: int, columns: int, size: tuple[float, float], title: str = "", **options: Any
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A styled figure to draw in, with its title.

    Args:
        rows: of panels.
        columns: of panels.
        size: width and height in inches.
        title: above the figure.
        options: of ``Figure.subplots``.

    Yields:
        The figure, and ``[rows, columns]`` axes.
    """
    with styled():
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        figure.suptitle(title)


def words(name: str) -> str:
    """A column's name as text.

    >>> words("input_capture"), words("peer_r2")
    ('input capture', 'peer R²')
    """
    return name.replace("_r2", " R²").replace("_", " ")


def short(name: str, names: Sequence[str]) -> str:
    """A layer's name without the module that all of them are in."""
    head = name.split(".")[0] + "."
    return name.removeprefix(head) if all(other.startswith(head) for other in names) else name


def layer_bar(figure: Figure, dots: Any, axes: Any, layers: Sequence[str]) -> None:
    """A colour bar of depth beside ``axes``, for points whose colour is their layer's place in ``layers``."""
    bar = figure.colorbar(dots, ax=axes, shrink=0.8, aspect=40, label="layer")
    ticks = sorted({0, len(layers) // 2, len(layers) - 1})
    bar.set_ticks(ticks, labels=[short(layers[tick], layers) for tick in ticks])
