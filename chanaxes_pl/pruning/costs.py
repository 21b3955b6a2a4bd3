"""Costs: what a budget can be a share of, as functions of how many units each group has lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from chanaxes_pl.units.removal import Group, without


class Cost(Protocol):
    """Cost of a network as a function of how many units each group has lost."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups in the order that ``removed`` uses."""
        ...

    @property
    def dense(self) -> float:
        """Cost with all units."""
        ...

    @property
    def unit(self) -> str:
        """Name of what is counted, for messages."""
        ...

    @property
    def exact(self) -> bool:
        """Whether it is counted; if it is measured, it varies a little."""
        ...

    def of(self, removed: np.ndarray) -> float:
        """Return the cost after each group has lost ``removed`` ``[G]`` units."""
        ...


class Parameters:
    """Number of parameters, counted on a copy of the network without the units.

    The biases that compensation adds to layers without one are not in it: they depend on which layers can be fitted.

    Args:
        model: dense network; it does not change.
        groups: its removable groups.
        example: ``[B, …]`` images; the count does not depend on them.

    Attributes:
        groups: groups in the order that ``removed`` uses.
        dense: number of parameters with all units; one that several layers share counts once.
        unit: what is counted, for messages.
        exact: that it is counted, not measured.
    """

    unit, exact = "parameters", True

    def __init__(self, model: nn.Module, groups: Iterable[Group], example: Tensor) -> None:
        self.groups = tuple(groups)
        self.dense = count_parameters(model)
        self._model = model
        self._known: dict[tuple[int, ...], int] = {}

    def of(self, removed: np.ndarray) -> int:
        """Return the number of parameters after each group has lost ``removed`` ``[G]`` units."""
        key = tuple(map(int, removed))
        if key not in self._known:
            self._known[key] = count_parameters(without(self._model, self.groups, removed))
        return self._known[key]


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model; one that several layers share counts once.

    Example:
        >>> count_parameters(nn.Conv2d(3, 8, 3))
        224
    """
    return sum(parameter.numel() for parameter in model.parameters())
