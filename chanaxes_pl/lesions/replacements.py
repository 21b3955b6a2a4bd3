"""Replacements of a channel, measured on a probe: its mean, all its peers, or its compact hull."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError, nearest
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.core.peers import hull_coefficients, peer_coefficients
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import Settings, record
from chanaxes_pl.network.tracing import Edit

#: A key of :data:`REPLACEMENTS`.
Rebuilding = Literal["mean", "peer", "hull"]


@dataclass(frozen=True, eq=False)
class Replacement:
    """Statistics that replace each channel of a layer, in the unit of the layer's output.

    Attributes:
        mean: ``[C]``, mean over local samples.
        std: ``[C]``, standard deviation over local samples.
        peer: ``[C, C]``, coefficients β: row i rebuilds channel i from all its peers, y_i ≈ a_i + Σ_j β_ij y_j.
        hull: ``[C, C]``, the same coefficients for its compact hull alone.
    """

    mean: Tensor
    std: Tensor
    peer: Tensor
    hull: Tensor

    @classmethod
    def of(cls, local: Moments) -> Replacement:
        """Derive the statistics from the moments of a layer's channels over local samples.

        A dead channel has no coefficients, so every replacement sets it to its mean.
        """
        std = local.variance.sqrt()
        scale = torch.where(local.live, std, 1.0)
        ratio = scale[:, None] / scale
        peer, hull = peer_coefficients(local), hull_coefficients(local)
        return cls(local.mean, std, peer * ratio, hull * ratio)

    def rule(self, operation: Rebuilding, channel: int) -> tuple[float, Tensor, Tensor]:
        """Return the offset a_i of one channel, the peers ``[k]`` that rebuild it, and their nonzero β_ij ``[k]``."""
        row = REPLACEMENTS[operation](self)[channel]
        peers = row.nonzero()[:, 0]
        return float(self.mean[channel] - row[peers] @ self.mean[peers]), peers, row[peers]


#: Operation that rebuilds a channel's output → the coefficients ``[C, C]`` of its peers.
REPLACEMENTS: dict[Rebuilding, Callable[[Replacement], Tensor]] = {
    "mean": lambda statistics: torch.zeros_like(statistics.peer),
    "peer": attrgetter("peer"),
    "hull": attrgetter("hull"),
}


def measure_replacements(
    model: nn.Module, probe: Probe, settings: Settings, place: Placement
) -> dict[str, Replacement]:
    """Measure the :class:`Replacement` of every layer in one pass over the probe; the model does not change.

    The result, by layer name, leaves out layers that the forward pass never reaches. With several processes, each one
    makes the whole pass.
    """
    moments = record(model, probe, settings, place).moments()
    return {name: Replacement.of(Moments.merge_all(found.local)) for name, found in moments if found is not None}


def replacement(layer: nn.Module, channel: int, statistics: Replacement, operation: Rebuilding) -> Edit:
    """Return the edit of a layer's output that rebuilds one channel from the others.

    Args:
        layer: convolution or Linear layer.
        channel: output feature to rebuild.
        statistics: the layer's statistics.
        operation: a key of :data:`REPLACEMENTS`.
    """
    offset, peers, weights = statistics.rule(operation, channel)
    home = next(layer.parameters()).device
    peers, weights = peers.to(home), weights.to(home, torch.promote_types(layer.weight.dtype, torch.float32))  # type: ignore[arg-type]
    dimension = -1 if isinstance(layer, nn.Linear) else 1

    def edit(output: Tensor) -> Tensor:
        changed = output.clone()
        place = changed.select(dimension, channel)
        if len(peers):
            picked = output.index_select(dimension, peers)
            place.copy_(picked.movedim(dimension, -1) @ weights.to(output.dtype)).add_(offset)
        else:
            place.fill_(offset)
        return changed

    return edit


def check_operations(operations: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for an unknown operation."""
    known = tuple(known)
    for operation in operations:
        if operation not in known:
            choices = ", ".join(map(repr, known))
            raise InputError(f"unknown operation {operation!r}; expected {choices}; {nearest(str(operation), known)}")


def check_channels(layer: str, channels: Iterable[int], width: int) -> None:
    """Raise ValueError unless 0 ≤ channel < width."""
    for channel in channels:
        if not 0 <= channel < width:
            raise InputError(f"layer {layer!r} has no channel {channel}; expected 0 to {width - 1}")
