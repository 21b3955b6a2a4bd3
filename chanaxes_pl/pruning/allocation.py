"""Allocation: how many units each group keeps under a budget of MACs, parameters or latency.

An allocation is a removal order: entry t names the group that loses a unit at turn t. A budget is a prefix of that
order, found by bisection. The score alone decides which units of a group go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal

import numpy as np
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError, is_whole, short
from chanaxes_pl.pruning.costs import Cost
from chanaxes_pl.units.removal import Group

#: An item of :data:`ALLOCATIONS`.
Allocation = Literal["uniform", "shared", "own", "sensitivity"]
#: Ways to choose how much each group loses: the same share everywhere (``"uniform"``), what one threshold over all
#: groups removes under a reference score (``"shared"``), or under the score itself (``"own"``), or what moves the
#: outputs least for the MACs that it frees (``"sensitivity"``).
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "shared", "own", "sensitivity")
#: Default budgets of a pruning grid, as shares of the dense network's MACs, parameters or latency.
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


def fit_budget(cost: Cost, order: np.ndarray, budget: float, round_to: int = 1) -> np.ndarray:
    """Return how many units each group loses, ``[G]``, so that the cost is as close to a budget as one unit allows.

    With ``round_to`` above 1, units go in steps that leave every layer of a group a multiple of ``round_to`` channels:
    a group of 18 channels can keep 18, 16 or 8 in steps of 8. It keeps at least ``round_to`` channels, and a group with
    fewer stays whole. A step has the place of its middle unit in the order. Steps are coarse, so the budget of an exact
    cost becomes a bound: the last steps are taken back as long as the cost stays within it. A measured cost is met as
    closely as one step allows, because of many trials the luckiest would pass.

    Args:
        cost: cost of the network, such as its MACs.
        order: removal order, from :func:`uniform_order`, :func:`threshold_order` or :func:`sensitivity_order`.
        budget: cost that remains, as a share of the dense network's.
        round_to: number of channels, 1 or more.

    Raises:
        ValueError: if the budget is not in (0, 1], or cannot be reached with one unit, or ``round_to`` channels, left
            in every group; or if ``round_to`` is no such number, or more than every group has.
    """
    check_reachable(cost, budget, round_to)
    numbers, units = _in_steps(cost.groups, order, round_to)

    def removed(turns: int) -> np.ndarray:
        return np.bincount(numbers[:turns], units[:turns], len(cost.groups)).astype(int)

    def share(turns: int) -> float:
        return cost.of(removed(turns)) / cost.dense

    above, below = 0, len(numbers)  # turns that leave at least, and at most, the budget
    while below - above > 1:
        middle = (above + below) // 2
        above, below = (middle, below) if share(middle) >= budget else (above, middle)
    if round_to == 1 or not cost.exact:
        return removed(above if share(above) - budget <= budget - share(below) else below)
    lost, full = removed(below), set()
    for group, step in zip(numbers[:below][::-1], units[:below][::-1], strict=True):
        lost[group] -= step
        if group in full or cost.of(lost) > budget * cost.dense:
            full.add(group)  # only the last step of a group can be taken back
            lost[group] += step
    return lost


def check_reachable(cost: Cost, budget: float, round_to: int = 1) -> None:
    """Raise ValueError if :func:`fit_budget` cannot reach a budget."""
    check_budget(budget, cost.unit)
    check_round_to(round_to)
    widest = max(group.size * max(_widths(group)) for group in cost.groups)
    if round_to > widest:
        raise ArgumentError(f"round_to={round_to}", f"expected at most {widest}, the channels of the widest layer")
    ends = [group.size - min(_step(group, round_to), group.size) for group in cost.groups]
    least = cost.of(np.array(ends)) / cost.dense
    if budget < least:
        fewest = "one unit" if round_to == 1 else f"{round_to} channels"
        from_here = math.ceil(least * 1e4) / 1e4
        raise ArgumentError(
            f"budget={budget}",
            f"{least:.4f} of the {cost.unit} remain when every group is down to {fewest}, protected and "
            f"unprunable layers included; expected a budget from {from_here:.4f} to 1, or a shorter protect="
            f"{'' if round_to == 1 else ' or a smaller round_to='}",
        )


def _in_steps(groups: Sequence[Group], order: np.ndarray, round_to: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a removal order in steps, as group numbers ``[T]`` and the units ``[T]`` that each step takes."""
    numbers, units, places = [], [], []
    for g, group in enumerate(groups):
        turns, step = np.flatnonzero(order == g), _step(group, round_to)
        ends = np.arange(group.size % step or step, group.size - step + 1, step)  # units lost after each step
        starts = np.concatenate([[0], ends])[: len(ends)]
        numbers += [g] * len(ends)
        units += (ends - starts).tolist()
        places += turns[(starts + ends - 1) // 2].tolist()
    by = np.argsort(np.asarray(places, dtype=int), kind="stable")
    return np.asarray(numbers, dtype=int)[by], np.asarray(units, dtype=int)[by]


def _step(group: Group, round_to: int) -> int:
    """Return the fewest units whose channels are a multiple of ``round_to`` in every layer of a group."""
    return math.lcm(*(round_to // math.gcd(round_to, width) for width in _widths(group)))


def _widths(group: Group) -> list[int]:
    """Return the channels of a unit in each layer that produces it."""
    return [channels.shape[1] for channels in group.producers.values()] or [1]


def check_budget(budget: float, unit: str = "MACs") -> None:
    """Raise ValueError unless 0 < budget ≤ 1; ``unit`` is what it is a share of."""
    if not isinstance(budget, Real) or not 0 < budget <= 1:
        raise ArgumentError(
            f"budget={short(budget)}",
            f"expected the share of the dense network's {unit} that remains, above 0 and at most 1, such as 0.5",
        )


def check_round_to(round_to: int) -> None:
    """Raise ValueError unless ``round_to`` is a whole number from 1 on."""
    if not is_whole(round_to, 1):
        raise ArgumentError(
            f"round_to={round_to!r}",
            "expected a whole number of channels, such as 8, of which every layer keeps a multiple, or 1 for any width",
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
