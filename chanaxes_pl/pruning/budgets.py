"""How many units every group keeps under a budget of multiply–accumulates (MACs).

Every allocation is an order in which units go, as a sequence of groups, whose turn it is; a budget is a prefix of it,
found by bisection. Which unit goes when its group's turn comes is up to the score alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from chanaxes_pl.layers import CONVOLUTIONS, channel_count
from chanaxes_pl.probe import observed
from chanaxes_pl.pruning.units import Group

#: How much each group loses: the same share everywhere; what a reference score would choose by one threshold for
#: all; what each score would choose so for itself.
ALLOCATIONS = ("uniform", "shared", "own")
#: Budgets of the pruning grid, as shares of the dense network's MACs.
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply–accumulates that a model spends on one image: half of what PyTorch's flop counter says.

    Convolutions, Linear layers and other matrix products count, nothing else does.

    Args:
        model: in any mode; left as it is.
        example: ``[B, …]``, images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32))
        221184
    """
    with observed(model), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // (2 * len(example))


@dataclass(frozen=True, eq=False)
class _Layer:
    """MACs of one layer: ``scale`` × outputs × inputs that each of them reads."""

    scale: float
    outputs: int
    inputs: int
    groups: int
    # Outputs and inputs that go with each unit, by the number of its group.
    per_output: dict[int, int]
    per_input: dict[int, int]

    def macs(self, removed: np.ndarray) -> float:
        outputs = self.outputs - sum(k * removed[g] for g, k in self.per_output.items())
        if self.groups == self.inputs:  # depthwise: an output reads one input, whatever is left
            return self.scale * outputs
        inputs = self.inputs - sum(k * removed[g] for g, k in self.per_input.items())
        return self.scale * outputs * inputs / self.groups


class Cost:
    """MACs of one image as a function of how many units each group has lost.

    Args:
        model: the dense network; left as it is.
        groups: its removable groups.
        example: ``[B, …]``, images.

    Attributes:
        groups: the groups, in the order in which ``removed`` counts them.
        dense: MACs with all units.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Group], example: Tensor) -> None:
        self.groups = tuple(groups)
        self.dense, runs = _runs(model, example)
        self._layers = [_cost(name, *run, self.groups) for name, run in runs.items()]
        # Products between activations and the like: taken not to change, and measured on the slim network anyway.
        self._rest = self.dense - self._of_layers(np.zeros(len(self.groups)))

    def macs(self, removed: np.ndarray) -> float:
        """MACs after ``removed`` ``[G]`` units of each group are gone."""
        return self._rest + self._of_layers(removed)

    def _of_layers(self, removed: np.ndarray) -> float:
        return sum(layer.macs(removed) for layer in self._layers)


def _runs(model: nn.Module, example: Tensor) -> tuple[int, dict[str, tuple[nn.Module, int]]]:
    """MACs, and every convolution and Linear layer that runs with the positions at which it computes its outputs."""
    runs: dict[str, tuple[nn.Module, int]] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions = output.numel() // (len(example) * channel_count(layer))
        runs[name] = (layer, runs.get(name, (layer, 0))[1] + positions)

    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, (*CONVOLUTIONS, nn.Linear))
    ]
    try:
        return count_macs(model, example), runs
    finally:
        for handle in handles:
            handle.remove()


def _cost(name: str, layer: nn.Module, positions: int, groups: Sequence[Group]) -> _Layer:
    per_output = {g: group.producers[name].shape[1] for g, group in enumerate(groups) if name in group.producers}
    per_input = {g: group.consumers[name].shape[1] for g, group in enumerate(groups) if name in group.consumers}
    if isinstance(layer, nn.Linear):
        return _Layer(positions, layer.out_features, layer.in_features, 1, per_output, per_input)
    assert isinstance(layer, CONVOLUTIONS)
    kernel = int(np.prod(layer.kernel_size))
    return _Layer(positions * kernel, layer.out_channels, layer.in_channels, layer.groups, per_output, per_input)


def uniform_order(groups: Sequence[Group]) -> np.ndarray:
    """Turns at which every group has lost the same share of its units, ``[Σ(U − 1)]`` group numbers."""
    return _by_key(
        np.concatenate([[g] * (group.size - 1) for g, group in enumerate(groups)]),
        [(turn + 0.5) / group.size for group in groups for turn in range(group.size - 1)],
    )


def threshold_order(groups: Sequence[Group], values: Mapping[str, Tensor]) -> np.ndarray:
    """Turns as one threshold that rises over all groups takes them, ``[Σ(U − 1)]`` group numbers.

    Args:
        groups: the removable groups.
        values: group name → ``[U]``, comparable between groups; low goes first, a group's highest never.
    """
    numbers = np.concatenate([[g] * (group.size - 1) for g, group in enumerate(groups)])
    return _by_key(numbers, [value for group in groups for value in values[group.name].sort().values[:-1].tolist()])


def _by_key(numbers: np.ndarray, keys: Sequence[float]) -> np.ndarray:
    return numbers[np.argsort(np.asarray(keys), kind="stable")]


def fit_budget(cost: Cost, order: np.ndarray, budget: float, caller: str = "fit_budget") -> np.ndarray:
    """How many units of each group go, ``[G]``, so that MACs come as close to a budget as one unit allows.

    Args:
        cost: of the network.
        order: the turns, from :func:`uniform_order` or :func:`threshold_order`.
        budget: MACs that remain, as a share of the dense network's.
        caller: how an error names the call.

    Raises:
        ValueError: if the budget is not in (0, 1], or lower than what remains with one unit left in every group.
    """
    check_budget(budget, caller)

    def removed(turns: int) -> np.ndarray:
        return np.bincount(order[:turns], minlength=len(cost.groups))

    def share(turns: int) -> float:
        return cost.macs(removed(turns)) / cost.dense

    least = share(len(order))
    if budget < least:
        raise ValueError(
            f"{caller}(budget={budget}): {least:.4f} of the MACs remain when every group is down to one unit, "
            f"protected and unprunable layers included; expected a budget from {least:.4f} to 1, or a shorter protect="
        )
    above, below = 0, len(order)  # turns with at least, and with at most the budget
    while below - above > 1:
        middle = (above + below) // 2
        above, below = (middle, below) if share(middle) >= budget else (above, middle)
    closer = above if share(above) - budget <= budget - share(below) else below
    return removed(closer)


def check_budget(budget: float, caller: str) -> None:
    """Refuse a budget that is no share."""
    if not 0 < budget <= 1:
        raise ValueError(
            f"{caller}(budget={budget}): expected the share of the dense network's MACs that remains, above 0 and at "
            "most 1, such as 0.5"
        )


def keep_best(groups: Sequence[Group], removed: np.ndarray, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The units that stay, ascending, when every group gives up its lowest.

    Args:
        groups: the removable groups.
        removed: ``[G]``, how many units each of them loses.
        scores: group name → ``[U]``; low = remove; of equals the first goes.
    """
    return {
        group.name: scores[group.name].argsort(stable=True)[int(count) :].sort().values
        for group, count in zip(groups, removed, strict=True)
    }
