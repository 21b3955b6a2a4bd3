"""Layers that read the units of groups, and the moments of what they read, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import ArgumentError, InputError
from chanaxes_pl.core.memory import GIGABYTE
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.network.hooks import hooked
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED, by_position, why_not_affine
from chanaxes_pl.network.sampling import local_samples, patches, sample_positions
from chanaxes_pl.units.removal import Group

# At least this many samples are gathered before they are summed up.
_ROWS = 256
# Samples that are enough, for each input of a consumer, and at least.
_PER_INPUT, _ENOUGH = 3, 10_000


class Sampling(NamedTuple):
    """How many positions of an image are taken: ``positions`` at most, and no more than are of use in ``images``."""

    positions: float
    images: int | None

    def taken(self, total: int, inputs: int) -> int:
        """Return how many of ``total`` positions a layer of some inputs takes."""
        count = min(total, self.positions)
        if self.images:
            count = min(count, math.ceil(max(_ENOUGH, _PER_INPUT * inputs) / self.images))
        return int(count)


class Reader:
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
        sampling: Sampling,
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

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layer's weight."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight.nbytes

    def by_place(self, group: Group) -> Reader:
        """Return a reader of the same layer that takes every place of its kernel, or of the flattened map, alone."""
        members = group.consumers[self._name] if isinstance(self.layer, nn.Linear) else None
        return Reader(self._name, self.layer, False, self._sampling, members)

    def read(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Take in a batch, as a forward hook."""
        inputs = args[0].detach()
        seen = output if self.whole or isinstance(layer, nn.Linear) else inputs
        total = math.prod(seen.shape[1:-1] if isinstance(layer, nn.Linear) else seen.shape[2:])
        count = self._sampling.taken(total, self.inputs)
        for images in inputs.split(max(1, self._room // count)):
            places = sample_positions(np.arange(self._images, self._images + len(images)), total, count)
            if places is None:
                places = torch.arange(total).expand(len(images), -1)
            self._images += len(images)
            self._add(self._samples(layer, images, places, output.shape[2:]))

    def inverse(self, group: Group, ridge: float) -> tuple[Tensor, Tensor]:
        """Return what an elimination of a group's units starts from, in float64.

        Args:
            group: a group that the layer reads.
            ridge: λ.

        Returns:
            ``[G, S, S]``, H⁻¹ at the columns of the units, unit by unit; ``[G, R, S]``, weights there with the same
            squares as the layer's, as shares of the standard deviation of its outputs.
        """
        inverse = self._inverted(ridge)
        if self._weight is None:
            weight = self._root().to(inverse)
            self._weight = weight / math.sqrt(self._variance) if self._variance > 0 else torch.zeros_like(weight)
        columns = self._columns(group).to(inverse.device)
        blocks = torch.arange(self._blocks, device=columns.device)[:, None]
        among = inverse[blocks[:, :, None], columns[:, :, None], columns[:, None]]
        return among, self._weight.transpose(1, 2)[blocks, columns].mT.contiguous()

    def refits(
        self, group: Group, order: Tensor, counts: Sequence[int], ridge: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the layer's best weights after the first units of an order have gone, for some numbers of units.

        They minimise tr((W − W′) H (W − W′)ᵀ), where H = Cov(x) + λ v I, over all W′ that are 0 at the inputs B of
        units that are gone: W′ = W − W_B (H⁻¹_BB)⁻¹ H⁻¹_B·. With H⁻¹_BB = C Cᵀ in the order in which units go, the
        first rows of C⁻¹ H⁻¹_B· and columns of W_B C⁻ᵀ are those of every smaller B.

        Args:
            group: a group that the layer reads.
            order: ``[U]``, the units in the order in which they go.
            counts: how many units have gone, rising.
            ridge: λ.

        Yields:
            For each count the weight, of the layer's shape and type, and what is to be added to its outputs,
            ``[C]``, so that their mean stays.
        """
        inverse, rows = self._inverted(ridge), self._rows()
        fitted = rows.to(inverse)
        columns = self._columns(group).to(inverse.device).unflatten(1, (group.size, -1))
        gone = columns[:, order[: max(counts)].to(inverse.device)].flatten(1)
        width = gone.shape[1] // max(counts)
        panel = inverse.gather(1, gone[..., None].expand(-1, -1, self.inputs))
        root = torch.linalg.cholesky(panel.gather(2, gone[:, None].expand(-1, gone.shape[1], -1)))
        outputs = fitted.gather(2, gone[:, None].expand(-1, fitted.shape[1], -1))
        outputs = torch.linalg.solve_triangular(root, outputs.mT, upper=False).mT
        panel = torch.linalg.solve_triangular(root, panel, upper=False)
        begin = 0
        for count in counts:
            end = count * width
            fitted = fitted.baddbmm(outputs[:, :, begin:end], panel[:, begin:end], alpha=-1)
            fitted.scatter_(2, gone[:, None, :end].expand(-1, fitted.shape[1], -1), 0.0)
            shift = ((rows.to(fitted) - fitted) @ self._mean[..., None])[..., 0]
            yield self._placed(fitted), self._per_output(shift)
            begin = end

    def forget(self) -> None:
        """Free the memory that moments take."""
        self._waiting: list[Tensor] = []
        self._images = 0
        self._moments: Moments | None = None
        self._inverse: Tensor | None = None
        self._weight: Tensor | None = None
        self._mean, self._variance = torch.empty(0), 0.0

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

    def _inverted(self, ridge: float) -> Tensor:
        """Return H⁻¹ ``[G, F, F]``; the moments are used up when it is first asked for."""
        if self._inverse is None:
            among, spread, self._mean = self._covariance()
            rows = self._rows().to(among)
            self._variance = float(((rows @ among) * rows).sum())
            _add_ridge(among, spread, ridge)
            self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(among))
        return self._inverse

    def _covariance(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Cov(x) ``[G, F, F]``, the mean variances ``[G]`` and means ``[G, F]``; the moments are used up."""
        self._sum_up()
        assert self._moments is not None
        among, mean = self._moments.scatter.div_(self._moments.count), self._moments.mean
        if not among.isfinite().all():
            raise InputError(
                f"layer {self._name!r} reads NaN or infinity on this probe: expected finite values; "
                "leave out the images that give them, or protect= what it reads"
            )
        self._moments = None
        return among, among.diagonal(dim1=1, dim2=2).mean(1), mean

    def _parts(self) -> list[Tensor]:
        """Return views ``[G, r, F]`` of the weights, whose rows read the inputs."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[union-attr,operator]
        if self.whole:
            return [weight.reshape(self._blocks, -1, self.inputs)]
        if self._members is not None:
            return [weight[:, inputs][None] for inputs in self._members.T]
        if isinstance(self.layer, TRANSPOSED):
            return [weight.reshape(self._blocks, self.inputs, -1).mT]
        return [weight.reshape(self._blocks, -1, self.inputs, self._kernel).movedim(3, 2).flatten(1, 2)]

    def _rows(self) -> Tensor:
        return torch.cat(self._parts(), 1)

    def _placed(self, rows: Tensor) -> Tensor:
        """Return a weight of the layer's shape and type with other rows, of which the layer reads its groups' alone."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[union-attr,operator]
        if self.whole:
            return rows.reshape(weight.shape).to(weight)
        if self._members is not None:
            placed = weight.clone()
            for inputs, part in zip(self._members.T, rows[0].split(len(weight)), strict=True):
                placed[:, inputs] = part.to(weight)
            return placed
        if isinstance(self.layer, TRANSPOSED):
            return rows.mT.reshape(weight.shape).to(weight)
        places = rows.unflatten(1, (-1, self._kernel)).movedim(2, 3)
        return places.reshape(weight.shape).to(weight)

    def _per_output(self, shift: Tensor) -> Tensor:
        """Return ``[C]``, the sum over each output's rows ``[G, R]``."""
        weight: Tensor = self.layer.weight  # type: ignore[union-attr,assignment]
        if self.whole:
            total = shift.flatten()
        elif self._members is not None:
            total = shift.view(-1, len(weight)).sum(0)
        else:  # for a transposed convolution about as many places of the kernel as its stride leaves
            share = math.prod(self.layer.stride) if isinstance(self.layer, TRANSPOSED) else 1
            total = shift.unflatten(1, (-1, self._kernel)).sum(2).flatten() / share
        return total.to(weight)

    def _root(self) -> Tensor:
        """``[G, R, F]``, weights with the same squares as the layer's, and no more rows than columns."""
        parts = self._parts()
        if sum(part.shape[1] for part in parts) <= self.inputs:
            return torch.cat(parts, 1).double()
        squares = parts[0].new_zeros(self._blocks, self.inputs, self.inputs, dtype=torch.float64)
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


def _add_ridge(among: Tensor, spread: Tensor, ridge: float) -> None:
    """Make H of Cov(x) ``[G, F, F]`` with the mean variances ``[G]`` of its blocks."""
    # Moments of float32 samples are good to 1e-7 of the sum of variances, which is far below λ times their mean
    # even for thousands of inputs. Inputs that never vary cost nothing, whatever stands in for H.
    among.diagonal(dim1=1, dim2=2).add_(torch.where(spread > 0, ridge * spread, 1.0)[:, None])


def measured(
    model: nn.Module,
    groups: Sequence[Group],
    sampling: Sampling,
    memory: float,
    share: float,
    run: Callable[[], object],
) -> Iterator[tuple[Group, list[Reader]]]:
    """Give each group with its readers, which have taken in the probe. They forget what no later group needs.

    Args:
        model: dense network.
        groups: its groups.
        sampling: which samples readers take.
        memory: gigabytes (10⁹ bytes) that there are.
        share: share of them that readers take at most.
        run: function that runs the model over the probe; called for every pass that ``memory`` takes.

    Raises:
        ValueError: if there is no room for the readers of one group.
    """
    wanted = [(group, _readers(model, group, sampling, memory, share)) for group in groups]
    for together in _passes(wanted, memory * share * GIGABYTE):
        uses = Counter(reader for _, found in together for reader in found)
        with hooked((reader.layer, reader.read) for reader in uses):
            run()
        for group, found in together:
            yield group, found
            uses.subtract(found)
            for reader in found:
                if not uses[reader]:
                    reader.forget()


def _passes(wanted: Iterable[tuple[Group, list[Reader]]], memory: float) -> Iterator[list[tuple[Group, list[Reader]]]]:
    """Share out groups over passes through the probe, so that each takes at most ``memory`` bytes."""
    share: list[tuple[Group, list[Reader]]] = []
    known: dict[Any, Reader] = {}
    for group, readers in wanted:
        joined = known | {reader.key: known.get(reader.key, reader) for reader in readers}
        working = [_working(found) for _, found in share] + [_working(readers)]
        if share and _held(joined.values()) + max(working) > memory:
            yield share
            share, joined = [], {reader.key: reader for reader in readers}
        known = joined
        share.append((group, [known[reader.key] for reader in readers]))
    if share:
        yield share


def _readers(model: nn.Module, group: Group, sampling: Sampling, memory: float, share: float) -> list[Reader]:
    """Return the consumers of a group, the widest of them place by place if they take too much memory."""
    limit = memory * share * GIGABYTE
    readers = []
    for name in group.consumers:
        layer = model.get_submodule(name)
        whole = not isinstance(layer, TRANSPOSED) and not why_not_affine(layer)
        readers.append(Reader(name, layer, whole, sampling))
    while _held(readers) + _working(readers) > limit:
        parts = [reader.by_place(group) for reader in readers]
        saved = [reader.size - part.size for reader, part in zip(readers, parts, strict=True)]
        widest = max(range(len(readers)), key=saved.__getitem__)
        if saved[widest] <= 0:
            least = (_held(readers) + _working(readers)) / share / GIGABYTE
            raise ArgumentError(
                f"memory={memory:g}",
                f"expected at least {least * 1.05:.2g} GB{', half of it' if share < 1 else ''} for the moments of what "
                f"reads {group.name!r}",
            )
        readers[widest] = parts[widest]
    return readers


def _held(readers: Iterable[Reader]) -> int:
    """Bytes of moments, and of samples that wait."""
    return sum(12 * reader.size for reader in readers)


def _working(readers: Iterable[Reader]) -> int:
    """Bytes at most while samples are summed up, H is inverted, or units go."""
    return sum(24 * reader.size for reader in readers)
