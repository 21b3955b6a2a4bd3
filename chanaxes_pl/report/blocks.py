"""What a section of the report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure, with the numbers that are drawn in it.

    Attributes:
        name: of its files.
        figure: as it is printed.
        numbers: become the CSV file.
        caption: says how to read it.
        points: of each scatter plot, in the order they were drawn: ``run, layer, channel`` and the columns that a
            pointer over a point shows.
    """

    name: str
    figure: Figure
    numbers: pd.DataFrame
    caption: str
    points: Sequence[pd.DataFrame] = ()


@dataclass(frozen=True)
class Table:
    """Cells, the first of each row its name."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to see here, and how to get it."""

    reason: str


@dataclass(frozen=True)
class Folded:
    """Text that is shown when asked for."""

    summary: str
    text: str


Block = Picture | Table | Missing | Folded


@dataclass(frozen=True)
class Section:
    """A heading, what it is about, and what was found."""

    title: str
    about: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to see but why there is nothing."""
        return all(isinstance(block, Missing) for block in self.blocks)

    @property
    def anchor(self) -> str:
        """Its name within the page."""
        return self.title.lower().replace(" ", "-")
