"""Multiply–accumulates (MACs) of a network, whole or with units removed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from chanaxes_pl.network.batches import FAILURES
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import calls, observed
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED, channel_count
from chanaxes_pl.units.flow import LAYERS
from chanaxes_pl.units.removal import Group, without

# PyTorch's flop counter knows attention on other devices only.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply–accumulates of a model on one image: half the operations of PyTorch's flop counter.

    Only convolutions, Linear layers and other matrix products count.

    Args:
        model: model in any mode; it does not change.
        example: ``[B, …]`` images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32))
        221184
    """
    # With gradients: without them the counter trips over parameters that modules are given as inputs, and
    # nn.MultiheadAttention runs as one operation that it does not know.
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention})
    with observed(model), torch.enable_grad(), counter:
        model(example)
    return counter.get_total_flops() // (2 * len(example))


def _without_numbers(model: nn.Module, example: Tensor) -> int:
    """Return the MACs from shapes alone, which is fast; −1 if the model needs numbers. It is of no use afterwards."""
    try:
        return count_macs(model.to("meta"), example.to("meta"))
    except FAILURES:
        return -1


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """Return the operations of attention from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


#: Sets of channels, each with its size and the groups that take from it, with their numbers of units.
_Sets = list[tuple[int, dict[int, int]]]


def _sets(members: Mapping[int, Tensor]) -> _Sets:
    """Collect the channels ``[U, k]`` of groups; those of two groups are the same, as of heads and of their widths."""
    found: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
    for number, indices in members.items():
        found[tuple(sorted(indices.flatten().tolist()))][number] = len(indices)
    return [(len(channels), units) for channels, units in found.items()]


def _lost(sets: _Sets, removed: np.ndarray) -> float:
    """Return how many channels of some sets go: of a set that two groups share, each leaves its share."""
    lost = 0.0
    for size, units in sets:
        left = size
        for group, count in units.items():
            left = left * (count - removed[group]) / count
        lost += size - left
    return lost


@dataclass(frozen=True, eq=False)
class _Layer:
    """MACs of one layer: ``scale`` × outputs × inputs per output, less the positions that go with units of groups."""

    scale: float
    outputs: int
    inputs: int
    groups: int
    outputs_of: _Sets
    inputs_of: _Sets
    share_of: Mapping[int, float]

    @property
    def cut_by(self) -> set[int]:
        """Numbers of the groups that it loses channels or positions with."""
        return {group for _, units in (*self.outputs_of, *self.inputs_of) for group in units} | set(self.share_of)

    def macs(self, removed: np.ndarray) -> float:
        outputs = self.outputs - _lost(self.outputs_of, removed)
        inputs = self.inputs - _lost(self.inputs_of, removed)
        positions = 1 - sum(share * removed[group] for group, share in self.share_of.items())
        return self.scale * positions * outputs * inputs / self.groups


# Less than a multiply–accumulate is rounding.
_LEAST = 0.5
#: MACs of products between activations, and which share of them goes with each unit of some groups.
_Product = tuple[float, dict[int, float]]


class Macs:
    """MACs of one image as a function of how many units each group has lost.

    Args:
        model: dense network; it does not change.
        groups: its removable groups.
        example: ``[B, …]`` images.

    Attributes:
        groups: groups in the order that ``removed`` uses.
        dense: MACs with all units.
        unit: what is counted, for messages.
        exact: that it is counted, not measured.
    """

    unit, exact = "MACs", True

    def __init__(self, model: nn.Module, groups: Iterable[Group], example: Tensor) -> None:
        self.groups = tuple(groups)
        self.dense, runs = _runs(model, example)
        shares = _shares_of_positions(model, self.groups, example, {name: count for name, (_, count) in runs.items()})
        self._layers = [_cost(name, *run, self.groups, shares[name]) for name, run in runs.items()]
        # Products between activations.
        self._rest = self.dense - self._of_layers(np.zeros(len(self.groups)))
        self._products = self._find_products(model, example) if self._rest else []
        self._cut: list[tuple[list[_Layer], list[_Product]]] = [
            ([layer for layer in self._layers if number in layer.cut_by], [p for p in self._products if number in p[1]])
            for number in range(len(self.groups))
        ]

    def of(self, removed: np.ndarray) -> float:
        """Return the MACs after each group has lost ``removed`` ``[G]`` units."""
        return self._rest + self._of_products(removed, self._products) + self._of_layers(removed)

    def freed(self, removed: np.ndarray, group: int) -> float:
        """Return the MACs that the next unit of a group frees after each group has lost ``removed`` ``[G]`` units."""
        layers, products = self._cut[group]
        after = removed.copy()
        after[group] += 1
        whole, cut = (
            self._of_products(lost, products) + sum(layer.macs(lost) for layer in layers) for lost in (removed, after)
        )
        return whole - cut

    @staticmethod
    def _of_products(removed: np.ndarray, products: Iterable[_Product]) -> float:
        """Return the MACs of some products beyond those of the dense network: at most 0."""
        return sum(
            amount * (math.prod(1 - share * removed[group] for group, share in share_of.items()) - 1)
            for amount, share_of in products
        )

    def _find_products(self, model: nn.Module, example: Tensor) -> list[_Product]:
        """Return what products there are.

        Found by cutting a group in half. Groups that share a layer, such as the heads of an attention and the channels
        within them, are factors of the same product; the widths of queries and of values, which share none, are factors
        of one product each, and the heads of both.
        """
        lost: dict[int, float] = {}
        count = _without_numbers if _without_numbers(clone(model), example) == self.dense else count_macs
        for number, group in enumerate(self.groups):
            half = np.zeros(len(self.groups), dtype=int)
            half[number] = group.size // 2
            counted = count(without(model, self.groups, half), example)
            rest = counted - self._of_layers(half)
            if half[number] and counted >= 0 and rest < self._rest:
                lost[number] = (self._rest - rest) / half[number]  # MACs of a unit
        products: list[_Product] = []
        while lost:
            # The group that takes from most products, and then those that share a layer with it.
            first = max(lost, key=lambda number: lost[number] * self.groups[number].size)
            left, unit = lost[first] * self.groups[first].size, 1 / self.groups[first].size
            lost.pop(first)
            joined = {number: lost[number] for number in lost if self._share_a_layer(number, first)}
            amounts = {number: each * self.groups[number].size for number, each in joined.items()}
            if any(amount > left - _LEAST for amount in amounts.values()):  # factors of one product
                products.append((left, {first: unit} | {number: each / left for number, each in joined.items()}))
                left = 0.0
            else:
                for number, amount in amounts.items():
                    products.append((amount, {first: unit, number: 1 / self.groups[number].size}))
                    left -= amount
            for number in joined:
                lost.pop(number)
            if left > _LEAST:
                products.append((left, {first: unit}))
        return products

    def _share_a_layer(self, one: int, other: int) -> bool:
        return bool(self.groups[one].producers.keys() & self.groups[other].producers.keys())

    def _of_layers(self, removed: np.ndarray) -> float:
        return sum(layer.macs(removed) for layer in self._layers)


def _runs(model: nn.Module, example: Tensor) -> tuple[int, dict[str, tuple[nn.Module, int]]]:
    """Return the MACs, and each convolution and Linear layer that runs with the number of positions of its kernel."""
    positions = _positions(model, example)
    return count_macs(model, example), {name: (model.get_submodule(name), count) for name, count in positions.items()}


def _positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return for each convolution and Linear layer that runs its number of positions, in all runs together."""
    found: dict[str, int] = {}
    for call in calls(model, lambda: model(example)):
        if isinstance(call.module, TRANSPOSED):
            count = math.prod(call.input_shape) // (len(example) * call.module.in_channels)
        elif isinstance(call.module, LAYERS):
            count = math.prod(call.output_shape) // (len(example) * channel_count(call.module))
        else:
            continue
        found[call.name] = found.get(call.name, 0) + count
    return found


def _shares_of_positions(
    model: nn.Module, groups: Sequence[Group], example: Tensor, whole: Mapping[str, int]
) -> dict[str, dict[int, float]]:
    """Return for each layer which share of its positions goes with each unit of the groups.

    Where channels are the positions of a layer, as between the tokens of a mixer, fewer channels are fewer positions.
    """
    shares: dict[str, dict[int, float]] = {name: {} for name in whole}

    def left(cut: Sequence[Group]) -> dict[str, int]:
        halves = np.array([group.size // 2 if group in cut else 0 for group in groups])
        return _positions(without(model, groups, halves), example)

    try:
        if left(groups) == whole:
            return shares
    except torch.OutOfMemoryError:
        raise
    except FAILURES:  # the cut to a budget will tell why
        return shares
    for number, group in enumerate(groups):
        for name, count in left([group]).items():
            if count != whole[name]:
                shares[name][number] = (1 - count / whole[name]) / (group.size // 2)
    return shares


def _cost(
    name: str, layer: nn.Module, positions: int, groups: Sequence[Group], share_of: Mapping[int, float]
) -> _Layer:
    outputs_of = _sets({g: group.producers[name] for g, group in enumerate(groups) if name in group.producers})
    inputs_of = _sets({g: group.consumers[name] for g, group in enumerate(groups) if name in group.consumers})
    if isinstance(layer, nn.Linear):
        return _Layer(positions, layer.out_features, layer.in_features, 1, outputs_of, inputs_of, share_of)
    assert isinstance(layer, CONVOLUTIONS + TRANSPOSED)
    kernel = int(np.prod(layer.kernel_size))
    sizes = layer.out_channels, layer.in_channels, layer.groups
    return _Layer(positions * kernel, *sizes, outputs_of, inputs_of, share_of)
