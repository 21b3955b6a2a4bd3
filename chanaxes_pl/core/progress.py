"""Progress bars, in a terminal alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(
    items: Iterable[Item] | None, name: str, unit: str, *, total: float | None = None, shown: bool = True
) -> tqdm[Item]:
    """Show how far a loop is; a bar inside another one's loop goes when it is done.

    Args:
        items: what is looped over; ``None`` where the caller says when to go on.
        name: what is being done.
        unit: what an item is.
        total: number of items, where they do not tell.
        shown: whether to show a bar if the output is a terminal.
    """
    return tqdm(items, desc=name, unit=unit, total=total, leave=None, disable=None if shown else True)  # type: ignore[return-value]
