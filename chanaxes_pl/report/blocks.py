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
    def anchor(self) -> str:
        """Its name within the page."""
        return self.title.lower().replace(" ", "-")


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number as a cell shows it; a dash where it is undefined."""
    value = round(float(value), digits) + 0.0  # no −0.00
    return "–" if value != value else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(row: pd.Series, digits: int = 2, sign: bool = False) -> str:
    """``mean ± std [low, high]`` of a row of :func:`mean_over_runs`, where defined."""
    text = number(row["mean"], digits, sign)
    if row["std"] == row["std"]:  # a narrow cell breaks before the bracket, and nowhere else
        low, high = number(row["low"], digits), number(row["high"], digits)
        text += f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(row['std'], digits)} [{low},\N{NO-BREAK SPACE}{high}]"
    return text


def intervals(means: pd.DataFrame, index: str | list[str], columns: str, digits: int = 2) -> pd.DataFrame:
    """Rows of :func:`mean_over_runs` as a table of text, in the order in which they come.

    Args:
        means: the rows.
        index: the column, or columns, that name a row of the table.
        columns: the column that names a column of the table.
        digits: of every number.

    Example:
        >>> means = pd.DataFrame({"layer": ["a", "b"], "step": 0, "mean": [0.5, 0.25], "std": float("nan")})
        >>> intervals(means, "layer", "step")[0].tolist()
        ['0.50', '0.25']
    """
    cells = means.assign(cell=[interval(row, digits) for _, row in means.iterrows()])
    return cells.pivot_table(index=index, columns=columns, values="cell", aggfunc="first", sort=False)
