"""Joint selection: units go one by one, each time the one whose loss its remaining peers make up for best.

Every other score judges a channel beside all of its peers. If two channels are copies of each other, both look
replaceable, although only one of them is. Backward elimination takes account of what has gone before. The loss is
measured where the units are read: for a consumer with weights W over inputs x, after the best change of the weights
that read the remaining units, as a share of the variance of Wx. This is optimal brain surgeon for blocks of weights
(Hassibi and Stork, 1993), which Kurtic, Frantar and Alistarh (ZipLM, 2023) use for structures of transformers.

With H = Cov(x) + λv I, where v is the mean variance of x, removing the inputs B costs tr(W_B (H⁻¹_BB)⁻¹ W_Bᵀ). This is
the least tr((W − W′) H (W − W′)ᵀ) over all W′ that are 0 at B. A sum of costs is therefore what the ridge regression of
``refit`` leaves, given the dense network's inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from chanaxes_pl.compensation.layerwise import MEMORY, POSITIONS, RIDGE
from chanaxes_pl.core.errors import ArgumentError, InputError
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.network.hooks import hooked, observed
from chanaxes_pl.network.layers import CONVOLUTIONS, by_position, why_not_affine
from chanaxes_pl.network.sampling import local_samples, patches, sample_positions
from chanaxes_pl.units.flow import TRANSPOSED
from chanaxes_pl.units.removal import Group, check_read

# At least this many samples are gathered before they are summed up.
_ROWS = 256
# Columns that removals wait for before H⁻¹ and W are updated.
_PANEL = 256
# Columns of units that are gone are dropped when less than this share of them remains.
_KEPT = 0.75
# Samples that are enough, for each input of a consumer, and at least.
_PER_INPUT, _ENOUGH = 3, 10_000
# Costs rise by at least this share from one unit to the next, so that they order the units without ties.
_RISE = 1e-9
_LEAST = 1e-12
_GIGABYTE = 1e9


def reconstruction_costs(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Callable[[], Iterator[Any]],
    forward: Callable[[Any], Any],
    *,
    ridge: float = RIDGE["refit"],
    positions: int | Literal["all"] = POSITIONS,
    images: int | None = None,
    memory: float = MEMORY,
) -> dict[str, Tensor]:
    """Compute the cost at which each unit goes in a backward elimination of its group.

    Costs of a group's consumers add up. Inputs of a consumer that the group does not own, such as those of other
    groups behind a concatenation, help to make up for what is lost, and never go.

    A consumer counts place by place of its kernel or of its flattened map, each place predicted from that place alone,
    if it is a transposed convolution, if it is not affine in its input (see :func:`why_not_affine`), or if its
    inputs are too many for ``memory``.

    Args:
        model: model to score; it does not change.
        groups: the model's groups.
        batches: function that returns an iterator over the probe's batches, from its first image on; called once for
            every pass that ``memory`` takes.
        forward: function that runs the model on a batch.
        ridge: λ, as a share of the mean variance of a consumer's inputs.
        positions: number of local samples per image, or ``"all"``.
        images: number of images in the batches, if it is known. Then no more positions are taken than give a consumer
            10,000 samples, and 3 for each of its inputs.
        memory: gigabytes (10⁹ bytes) to take beside the network.

    Returns:
        Group name → ``[U]`` float64, the cost of each unit as a share of the variance of what its consumers make of
        their inputs, summed over consumers. It rises along the order in which units go: a cost that falls, because the
        units removed before have left little to lose, counts as equal to the one before it.

    Raises:
        ValueError: if no layer reads a group, a consumer's inputs are not finite, or ``memory`` has no room for the
            moments of one group.
    """
    groups = list(groups)
    check_read(groups)
    costs: dict[str, Tensor] = {}
    sampling = _Sampling(math.inf if positions == "all" else positions, images)
    for share in _passes(model, groups, sampling, memory * _GIGABYTE):
        readers = {reader.key: reader for _, found in share for reader in found}
        with observed(model), hooked((reader.layer, reader.read) for reader in readers.values()):
            for batch in batches():
                forward(batch)
        uses = Counter(reader.key for _, found in share for reader in found)
        for group, found in share:
            order, spent = eliminate([reader.system(group, ridge) for reader in found])
            costs[group.name] = _rising(order, spent)
            uses.subtract(reader.key for reader in found)
            for reader in found:
                if not uses[reader.key]:
                    reader.forget()
    return costs


def eliminate(systems: Sequence[Elimination]) -> tuple[list[int], list[float]]:
    """Let all units go, each time the one of least cost over all systems, the first of equal ones.

    Returns:
        The units in the order in which they went, and the cost of each.
    """
    order: list[int] = []
    spent: list[float] = []
    for _ in range(systems[0].size):
        costs = torch.stack([system.costs().cpu() for system in systems]).sum(0)
        unit = int(costs.argmin())
        order.append(unit)
        spent.append(float(costs[unit].clamp_min(0.0)))
        for system in systems:
            system.remove(unit)
    return order, spent


class Elimination:
    """What one consumer of a group loses as units go, with its weights always at their best for the units that remain.

    A removal of the columns B takes the panel L = H⁻¹_·B C⁻ᵀ, where C Cᵀ = H⁻¹_BB, off H⁻¹ as L Lᵀ and off W as
    W_B C⁻ᵀ Lᵀ: steps of a Cholesky decomposition whose pivots are chosen as it goes. Only the blocks that the next cost
    needs are kept up to date, H⁻¹_uu and W_uᵀW_u of every unit u. The rest waits until enough panels make one product.

    Args:
        inverse: ``[G, S, S]`` float64, H⁻¹ at the columns of the units, unit by unit, for each of G blocks; it is
            overwritten.
        weight: ``[G, O, S]`` float64, the weights there; they are overwritten.
        size: U, the number of units; each has S / U columns in every block.

    Attributes:
        size: U.

    Example:
        >>> import torch
        >>> system = Elimination(torch.eye(3, dtype=torch.float64)[None], torch.tensor([[[3.0, 1.0, 2.0]]]).double(), 3)
        >>> system.costs().tolist()
        [9.0, 1.0, 4.0]
        >>> eliminate([system])
        ([1, 2, 0], [1.0, 4.0, 9.0])
    """

    def __init__(self, inverse: Tensor, weight: Tensor, size: int) -> None:
        self.size = size
        self._inverse, self._weight = inverse, weight
        self._width = inverse.shape[1] // size
        self._places = {unit: unit for unit in range(size)}  # unit → its place in the matrices
        self._begin()

    @property
    def weight(self) -> Tensor:
        """``[G, O, R]``, the weights that read the R columns of the units that remain, in their order."""
        self._update()
        self._drop()
        self._begin()
        return self._weight

    def costs(self) -> Tensor:
        """``[U]``, the cost of each unit if it went next; infinity for those that are gone."""
        places = list(self._places.values())
        solved = torch.linalg.solve(self._among[:, places], self._squares[:, places])
        found = solved.diagonal(dim1=2, dim2=3).sum((0, 2))
        costs = found.new_full((self.size,), math.inf)
        costs[list(self._places)] = found
        return costs

    def remove(self, unit: int) -> None:
        """Let a unit go."""
        place = self._places.pop(unit)
        own = slice(place * self._width, (place + 1) * self._width)
        panels, outputs = self._panels[:, :, : self._filled], self._outputs[:, :, : self._filled]
        column = self._inverse[:, own].mT - panels @ panels[:, own].mT
        root = torch.linalg.cholesky(column[:, own])
        panel, output = (
            torch.linalg.solve_triangular(root, part.mT, upper=False).mT
            for part in (column, self._weight[:, :, own] - outputs @ panels[:, own].mT)
        )
        toward = self._weight.mT @ output - panels @ (outputs.mT @ output)
        blocks, _, width = panel.shape
        lost, toward = (part.reshape(blocks, -1, width, width) for part in (panel, toward))
        self._among -= lost @ lost.mT
        cross = (toward - lost @ (output.mT @ output)[:, None] / 2) @ lost.mT
        self._squares -= cross + cross.mT
        stop = self._filled + width
        self._panels[:, :, self._filled : stop], self._outputs[:, :, self._filled : stop] = panel, output
        self._filled = stop
        if stop + width > self._panels.shape[2]:
            self._update()

    def _begin(self) -> None:
        blocks, columns = self._inverse.shape[:2]
        units = torch.arange(columns, device=self._inverse.device).view(-1, self._width)
        self._among = self._inverse[:, units[:, :, None], units[:, None]].contiguous()
        by_unit = self._weight.unflatten(2, (-1, self._width)).transpose(1, 2)
        self._squares = by_unit.mT @ by_unit
        room = max(self._width, _PANEL // self._width * self._width)
        self._panels = self._inverse.new_empty(blocks, columns, room)
        self._outputs = self._inverse.new_empty(blocks, self._weight.shape[1], room)
        self._filled = 0

    def _update(self) -> None:
        """Take the panels that wait off H⁻¹ and W."""
        panels, outputs = self._panels[:, :, : self._filled], self._outputs[:, :, : self._filled]
        self._inverse.baddbmm_(panels, panels.mT, alpha=-1)
        self._weight.baddbmm_(outputs, panels.mT, alpha=-1)
        # To copy what remains takes longer than to update all, so columns that are gone stay for a while.
        if len(self._places) * self._width < _KEPT * self._inverse.shape[1]:
            self._drop()
        self._begin()

    def _drop(self) -> None:
        """Drop the columns of the units that are gone."""
        places = torch.tensor(list(self._places.values()), dtype=torch.long)
        left = (places[:, None] * self._width + torch.arange(self._width)).flatten().to(self._inverse.device)
        self._inverse = self._inverse.index_select(1, left).index_select(2, left)
        self._weight = self._weight.index_select(2, left)
        self._places = {unit: place for place, unit in enumerate(self._places)}


def _rising(order: Sequence[int], costs: Sequence[float]) -> Tensor:
    """Return ``[U]`` costs by unit that rise strictly along the order."""
    found = torch.empty(len(order), dtype=torch.float64)
    last = 0.0
    for unit, cost in zip(order, costs, strict=True):
        found[unit] = last = max(cost, last * (1 + _RISE), _LEAST)
    return found


class _Sampling(NamedTuple):
    """How many positions of an image are taken: ``positions`` at most, and no more than are of use in ``images``."""

    positions: float
    images: int | None

    def taken(self, total: int, inputs: int) -> int:
        """Return how many of ``total`` positions a layer of some inputs takes."""
        count = min(total, self.positions)
        if self.images:
            count = min(count, math.ceil(max(_ENOUGH, _PER_INPUT * inputs) / self.images))
        return int(count)


class _Reader:
    """A layer that reads units of some groups, and the moments of its inputs.

    Args:
        name: name of the layer.
        layer: layer.
        whole: whether all places of its kernel are inputs together; else every place is a sample of its own.
        sampling: how many positions are taken.
        members: ``[U, k]``, for a Linear layer whose places are samples: the inputs of each unit.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        whole: bool,
        sampling: _Sampling,
        members: Tensor | None = None,
    ) -> None:
        self.layer, self.whole = layer, whole
        #: What tells readers apart.
        self.key = name, whole, None if members is None else tuple(members[:, 0].tolist())
        self._name, self._members = name, members
        self._sampling = sampling
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self._blocks, inputs = 1, weight.shape[1]
        self._kernel = math.prod(weight.shape[2:])
        if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
            self._blocks = layer.groups
            inputs = layer.in_channels // layer.groups
        elif members is not None:
            inputs = len(members)
        self.inputs = inputs * self._kernel if whole else inputs
        self.forget()

    @property
    def size(self) -> int:
        """Numbers in the moments."""
        return self._blocks * self.inputs**2

    def by_place(self, group: Group) -> _Reader:
        """Return a reader of the same layer that takes every place of its kernel, or of the flattened map, alone."""
        members = group.consumers[self._name] if isinstance(self.layer, nn.Linear) else None
        return _Reader(self._name, self.layer, False, self._sampling, members)

    def read(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Take in a batch, as a forward hook."""
        inputs = args[0].detach()
        seen = output if self.whole or isinstance(layer, nn.Linear) else inputs
        total = math.prod(seen.shape[1:-1] if isinstance(layer, nn.Linear) else seen.shape[2:])
        count = self._sampling.taken(total, self.inputs)
        numbers = np.arange(self._images, self._images + len(inputs))
        self._images += len(inputs)
        for images in torch.arange(len(inputs)).split(max(1, self._room // count)):
            places = sample_positions(numbers[images], total, count)
            if places is None:
                places = torch.arange(total).expand(len(images), -1)
            self._add(self._samples(layer, inputs[images[0] : images[-1] + 1], places, output.shape[2:]))

    def system(self, group: Group, ridge: float) -> Elimination:
        """Return the elimination of a group's units, with costs as shares of the variance of the layer's outputs."""
        if self._inverse is None:
            self._settle(ridge)
        assert self._inverse is not None
        columns = self._columns(group).to(self._inverse.device)
        blocks = torch.arange(self._blocks, device=columns.device)[:, None]
        inverse = self._inverse[blocks[:, :, None], columns[:, :, None], columns[:, None]]
        weight = self._weight.transpose(1, 2)[blocks, columns].mT.contiguous()
        return Elimination(inverse, weight, group.size)

    def forget(self) -> None:
        """Free the memory that moments take."""
        self._waiting: list[Tensor] = []
        self._images = 0
        self._moments: Moments | None = None
        self._inverse: Tensor | None = None
        self._weight = torch.empty(0)

    @property
    def _room(self) -> int:
        return max(_ROWS, self.inputs)

    def _samples(self, layer: nn.Module, inputs: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
        """``[n, G, F]`` from a few images at ``[b, p]`` positions."""
        images = torch.arange(len(inputs))
        if isinstance(layer, nn.Linear):
            rows = local_samples(by_position(layer, inputs, len(inputs), self._name), images, places)
            if self._members is not None:
                rows = rows[:, self._members.T].flatten(0, 1)
        elif self.whole:
            assert isinstance(layer, CONVOLUTIONS)
            rows = patches(layer, inputs, images, places, size)
        else:
            rows = local_samples(inputs.flatten(2), images, places)
        return rows.reshape(-1, self._blocks, self.inputs)

    def _add(self, samples: Tensor) -> None:
        self._waiting.append(samples)
        if sum(map(len, self._waiting)) >= self._room:
            self._sum_up()

    def _sum_up(self) -> None:
        if self._waiting:
            moments = Moments.of(torch.cat(self._waiting).transpose(0, 1))
            self._moments = moments if self._moments is None else self._moments.merge_(moments)
        self._waiting = []

    def _settle(self, ridge: float) -> None:
        """Turn the moments into H⁻¹, and the weights into their share of the standard deviation of the outputs."""
        self._sum_up()
        assert self._moments is not None
        among = self._moments.scatter.div_(self._moments.count)
        spread = float(among.diagonal(dim1=1, dim2=2).mean())
        if not among.isfinite().all():
            raise InputError(
                f"layer {self._name!r} reads NaN or infinity on this probe: expected finite values; "
                "leave out the images that give them, or protect= what it reads"
            )
        weight = self._root().to(among)
        variance = float(((weight @ among) * weight).sum())
        self._weight = weight / math.sqrt(variance) if variance > 0 else torch.zeros_like(weight)
        # Moments of float32 samples are good to 1e-7 of the sum of variances, which is far below λ times their mean
        # even for thousands of inputs. Inputs that never vary cost nothing, whatever stands in for H.
        among.diagonal(dim1=1, dim2=2).add_(ridge * spread if spread > 0 else 1.0)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(among))
        self._moments = None

    def _root(self) -> Tensor:
        """``[G, R, F]``, weights with the same squares as the layer's, and no more rows than columns."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[union-attr,operator]
        if self.whole:
            parts = [weight.reshape(self._blocks, -1, self.inputs)]
        elif self._members is not None:
            parts = [weight[:, inputs][None] for inputs in self._members.T]
        elif isinstance(self.layer, TRANSPOSED):
            parts = [weight.reshape(self._blocks, self.inputs, -1).mT]
        else:
            parts = [weight.reshape(self._blocks, -1, self.inputs, self._kernel).movedim(3, 2).flatten(1, 2)]
        if sum(part.shape[1] for part in parts) <= self.inputs:
            return torch.cat(parts, 1).double()
        squares = weight.new_zeros(self._blocks, self.inputs, self.inputs, dtype=torch.float64)
        for part in parts:
            part = part.double()
            squares += part.mT @ part
        values, vectors = torch.linalg.eigh(squares)
        return values.clamp_min(0.0).sqrt()[:, :, None] * vectors.mT

    def _columns(self, group: Group) -> Tensor:
        """``[G, S]``, the columns of a group's units in each block, unit by unit."""
        if self._members is not None:
            return torch.arange(group.size)[None]
        channels = group.consumers[self._name].reshape(group.size, self._blocks, -1).transpose(0, 1)
        if self.whole:
            channels = channels % (self.inputs // self._kernel)
            channels = channels[..., None] * self._kernel + torch.arange(self._kernel)
        else:
            channels = channels % self.inputs
        return channels.flatten(1)


def _passes(
    model: nn.Module, groups: Sequence[Group], sampling: _Sampling, memory: float
) -> Iterator[list[tuple[Group, list[_Reader]]]]:
    """Share out groups over passes through the probe, so that each takes at most ``memory`` bytes."""
    share: list[tuple[Group, list[_Reader]]] = []
    known: dict[Any, _Reader] = {}
    for group in groups:
        readers = _readers(model, group, sampling, memory)
        joined = known | {reader.key: known.get(reader.key, reader) for reader in readers}
        working = [_working(found) for _, found in share] + [_working(readers)]
        if share and _held(joined.values()) + max(working) > memory:
            yield share
            share, joined = [], {reader.key: reader for reader in readers}
        known = joined
        share.append((group, [known[reader.key] for reader in readers]))
    yield share


def _readers(model: nn.Module, group: Group, sampling: _Sampling, memory: float) -> list[_Reader]:
    """Return the consumers of a group, the widest of them place by place if they take too much memory."""
    readers = []
    for name in group.consumers:
        layer = model.get_submodule(name)
        whole = not isinstance(layer, TRANSPOSED) and not why_not_affine(layer)
        readers.append(_Reader(name, layer, whole, sampling))
    while _held(readers) + _working(readers) > memory:
        parts = [reader.by_place(group) for reader in readers]
        saved = [reader.size - part.size for reader, part in zip(readers, parts, strict=True)]
        widest = max(range(len(readers)), key=saved.__getitem__)
        if saved[widest] <= 0:
            least = (_held(readers) + _working(readers)) / _GIGABYTE
            raise ArgumentError(
                f"memory={memory / _GIGABYTE:g}",
                f"expected at least {least * 1.05:.2g} GB, which score='reconstruction' takes for the consumers of "
                f"{group.name!r}",
            )
        readers[widest] = parts[widest]
    return readers


def _held(readers: Iterable[_Reader]) -> int:
    """Bytes of moments, and of samples that wait."""
    return sum(12 * reader.size for reader in readers)


def _working(readers: Iterable[_Reader]) -> int:
    """Bytes at most while samples are summed up, H is inverted, or units go."""
    return sum(24 * reader.size for reader in readers)
