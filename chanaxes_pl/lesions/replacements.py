"""What could stand in for a channel: its mean, all its peers, or its compact hull, measured on a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from operator import attrgetter

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.core.peers import hull_coefficients, peer_reconstruction
from chanaxes_pl.network.probe import Placement, Probe
from chanaxes_pl.network.recording import Settings, record
from chanaxes_pl.network.tracing import Edit


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a layer's probe samples say of each channel, in the unit of the layer's output.

    Attributes:
        mean: ``[C]``, over local samples.
        std: ``[C]``, likewise.
        peer: ``[C, C]``, β: row i rebuilds channel i from all its peers, y_i ≈ a_i + Σ_j β_ij y_j.
        hull: ``[C, C]``, the same from its compact hull alone.
    """

    mean: Tensor
    std: Tensor
    peer: Tensor
    hull: Tensor

    @classmethod
    def of(cls, local: Moments) -> Replacement:
        """From the moments of a layer's channels over local samples.

        A dead channel has no coefficients, so that every replacement of it is its mean.
        """
        std = local.variance.sqrt()
        scale = torch.where(local.live, std, 1.0)
        ratio = scale[:, None] / scale
        peer, hull = peer_reconstruction(local).coefficients, hull_coefficients(local)
        return cls(local.mean, std, peer * ratio, hull * ratio)

    def rule(self, operation: str, channel: int) -> tuple[float, Tensor, Tensor]:
        """a_i (a number), and the peers ``[k]`` with their β_ij ``[k]`` other than 0, that replace one channel."""
        row = REPLACEMENTS[operation](self)[channel]
        peers = row.nonzero()[:, 0]
        return float(self.mean[channel] - row[peers] @ self.mean[peers]), peers, row[peers]


#: How a channel's output is rebuilt: the coefficients ``[C, C]`` of its peers.
REPLACEMENTS: dict[str, Callable[[Replacement], Tensor]] = {
    "mean": lambda statistics: torch.zeros_like(statistics.peer),
    "peer": attrgetter("peer"),
    "hull": attrgetter("hull"),
}


def measure_replacements(
    model: nn.Module, probe: Probe, settings: Settings, place: Placement
) -> dict[str, Replacement]:
    """Every layer's :class:`Replacement` by name, from one pass over the probe; the model is left as it was.

    A layer that the forward pass never reaches is not in it. Where several processes run each makes the whole pass.
    """
    moments = record(model, probe, settings, place).moments()
    return {name: Replacement.of(Moments.merge_all(found.local)) for name, found in moments if found is not None}


def replacement(layer: nn.Module, channel: int, statistics: Replacement, operation: str) -> Edit:
    """What a layer would put out had one of its channels been rebuilt from the others, from what it does put out.

    Args:
        layer: a convolution or Linear.
        channel: its output feature.
        statistics: of the layer.
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
            near = get_close_matches(str(operation), known, n=1)
            raise InputError(
                f"unknown operation {operation!r}; expected {', '.join(map(repr, known))}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


def check_channels(layer: str, channels: Iterable[int], width: int) -> None:
    """Raise ValueError unless 0 ≤ channel < width."""
    for channel in channels:
        if not 0 <= channel < width:
            raise InputError(f"layer {layer!r} has no channel {channel}; expected 0 to {width - 1}")
