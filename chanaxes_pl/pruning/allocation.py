"""Allocation: how many units each group keeps under a budget of multiply–accumulates (MACs).

An allocation is a removal order: entry t names the group that loses a unit at turn t. A budget is a prefix of that
order, found by bisection. The score alone decides which units of a group go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.network.macs import Cost
from chanaxes_pl.network.removal import Group

#: An item of :data:`ALLOCATIONS`.
Allocation = Literal["uniform", "shared", "own"]
#: Ways to choose how much each group loses: the same share everywhere (``"uniform"``), what one threshold over all
#: groups removes under a reference score (``"shared"``), or under the score itself (``"own"``).
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "shared", "own")
#: Default budgets of a pruning grid, as shares of the dense network's MACs.
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def uniform_order(groups: Sequence[Group]) -> np.ndarray:
    """Return the removal order that takes the same share of every group: ``[Σ(U − 1)]`` group numbers."""
    return _by_key(
        np.concatenate([[g] * (group.size - 1) for g, group in enumerate(groups)]),
        [(turn + 0.5) / group.size for group in groups for turn in range(group.size - 1)],
    )


def threshold_order(groups: Sequence[Group], values: Mapping[str, Tensor]) -> np.ndarray:
    """Return the removal order of one threshold that rises over all groups: ``[Σ(U − 1)]`` group numbers.

    Args:
        groups: removable groups.
        values: group name → ``[U]`` values that can be compared between groups. The lowest unit goes first; the
            highest unit of each group stays.
    """
    numbers = np.concatenate([[g] * (group.size - 1) for g, group in enumerate(groups)])
    return _by_key(numbers, [value for group in groups for value in values[group.name].sort().values[:-1].tolist()])


def _by_key(numbers: np.ndarray, keys: Sequence[float]) -> np.ndarray:
    return numbers[np.argsort(np.asarray(keys), kind="stable")]


def fit_budget(cost: Cost, order: np.ndarray, budget: float) -> np.ndarray:
    """Return how many units each group loses, ``[G]``, so that the MACs are as close to a budget as one unit allows.

    Args:
        cost: MACs of the network.
        order: removal order, from :func:`uniform_order` or :func:`threshold_order`.
        budget: MACs that remain, as a share of the dense network's.

    Raises:
        ValueError: if the budget is not in (0, 1], or cannot be reached with one unit left in every group.
    """
    check_budget(budget)

    def removed(turns: int) -> np.ndarray:
        return np.bincount(order[:turns], minlength=len(cost.groups))

    def share(turns: int) -> float:
        return cost.macs(removed(turns)) / cost.dense

    least = share(len(order))
    if budget < least:
        raise ArgumentError(
            f"budget={budget}",
            f"{least:.4f} of the MACs remain when every group is down to one unit, "
            f"protected and unprunable layers included; expected a budget from {least:.4f} to 1, or a shorter protect=",
        )
    above, below = 0, len(order)  # turns that leave at least, and at most, the budget
    while below - above > 1:
        middle = (above + below) // 2
        above, below = (middle, below) if share(middle) >= budget else (above, middle)
    closer = above if share(above) - budget <= budget - share(below) else below
    return removed(closer)


def check_budget(budget: float) -> None:
    """Raise ValueError unless 0 < budget ≤ 1."""
    if not 0 < budget <= 1:
        raise ArgumentError(
            f"budget={budget}",
            "expected the share of the dense network's MACs that remains, above 0 and at most 1, such as 0.5",
        )


def check_allocation(allocation: str) -> None:
    """Raise ValueError unless the allocation is one of :data:`ALLOCATIONS`."""
    if allocation not in ALLOCATIONS:
        raise ArgumentError(f"allocation={allocation!r}", f"expected one of {', '.join(map(repr, ALLOCATIONS))}")


def keep_best(groups: Sequence[Group], removed: np.ndarray, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the units that stay, ascending, when every group loses its lowest ones.

    Args:
        groups: removable groups.
        removed: ``[G]``, how many units each group loses.
        scores: group name → ``[U]``; low = remove. Among equal units, the first goes first.
    """
    return {
        group.name: scores[group.name].argsort(stable=True)[int(count) :].sort().values
        for group, count in zip(groups, removed, strict=True)
    }
