"""Building blocks of the report's sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure, with the numbers that are drawn in it.

    Attributes:
        name: name of its files.
        figure: the figure.
        numbers: table for the CSV file.
        caption: explanation of the figure.
        points: points of each scatter plot, in drawing order: ``run, layer, channel`` and the columns that a pointer
            over a point shows.
    """

    name: str
    figure: Figure
    numbers: pd.DataFrame
    caption: str
    points: Sequence[pd.DataFrame] = ()


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of each row is its name."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Missing:
    """A note that says why something is missing, and how to get it."""

    reason: str


@dataclass(frozen=True)
class Folded:
    """Text that the reader can unfold."""

    summary: str
    text: str


Block = Picture | Table | Missing | Folded


@dataclass(frozen=True)
class Section:
    """A section of the page: heading, introduction and blocks."""

    title: str
    about: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def empty(self) -> bool:
        """Whether the section holds only notes about what is missing."""
        return all(isinstance(block, Missing) for block in self.blocks)

    @property
    def anchor(self) -> str:
        """Name of the section in links within the page."""
        return self.title.lower().replace(" ", "-")
