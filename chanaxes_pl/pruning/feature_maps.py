"""Baseline scores from feature maps, as the next layers read them: HRank and CHIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.network.hooks import calls, hooked, observed
from chanaxes_pl.units.removal import Group

#: A key of :data:`MAP_SCORES`.
MapScore = Literal["hrank", "chip"]
#: Score → the number of images that it uses at most, from the probe's first one on.
MAP_IMAGES: dict[MapScore, int] = {"hrank": 64, "chip": 16}
# Nodes of the integral over ln t, relative to the largest eigenvalue. The tails beyond them are below 1e-13 of the
# whole. So is the error of this step, exp(−2π²/0.6), because the integrand is analytic in a strip of half-width π.
_STEP = 0.6
_NODES = torch.arange(-60, 60 + _STEP, _STEP, dtype=torch.float64)


def map_ranks(maps: Tensor) -> Tensor:
    """Compute the rank of every feature map; its mean over images is HRank (Lin et al., CVPR 2020).

    Args:
        maps: ``[B, C, h, w]``; a singular value counts if it exceeds the rounding of the maps' own precision.

    Returns:
        ``[B, C]`` float64.

    Example:
        >>> import torch
        >>> map_ranks(torch.stack([torch.eye(3), torch.ones(3, 3)])[None])
        tensor([[3., 1.]], dtype=torch.float64)
    """
    maps = maps if maps.dtype == torch.float64 else maps.float()
    return torch.linalg.matrix_rank(maps).double()


def channel_independence(maps: Tensor) -> Tensor:
    """Compute the loss of nuclear norm with each channel; its mean over images is CHIP (Sui et al., NeurIPS 2021).

    Let the rows a_i of A ``[C, P]`` be the maps of one image. The value is ‖A‖_* − ‖A with row i zeroed‖_*. One
    decomposition A = U Σ Vᵀ serves all channels: removing a_i changes the characteristic polynomial of AᵀA by the
    factor g_i(t) = 1 − a_iᵀ (AᵀA + t)⁻¹ a_i = 1 − Σ_k U_ik² + Σ_k U_ik² t / (t + σ_k²). Because
    √x = (1/2π) ∫ t^(−1/2) ln(1 + x/t) dt, the norms differ by (1/π) ∫₀^∞ √t · g_i′(t) / g_i(t) dt. All terms are
    positive, and the trapezoidal rule in ln t is exact to rounding.

    Args:
        maps: ``[B, C, h, w]``.

    Returns:
        ``[B, C]`` float64, in the unit of the maps.

    Example:
        >>> import torch
        >>> a, b = torch.eye(2)[:1], torch.eye(2)[1:]
        >>> channel_independence(torch.stack([a, a, b])[None]).round(decimals=3)  # √2 − 1 for each of two equal maps
        tensor([[0.4140, 0.4140, 1.0000]], dtype=torch.float64)
    """
    rows = maps.flatten(2).to(accumulation_device(maps.device)).double()
    return torch.stack([_independence(image) for image in rows])


def _independence(rows: Tensor) -> Tensor:
    basis, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    largest = singular[0].clamp(min=torch.finfo(rows.dtype).tiny)
    spectrum, shares = (singular / largest).square()[:, None], basis.square()
    nodes = _NODES.to(rows.device).exp()
    # The share of a_i's direction outside the maps' span; 0 if the basis is square.
    outside = (1 - shares.sum(1, keepdim=True)).clamp(min=0) if len(rows) > len(singular) else 0.0
    factor = outside + shares @ (nodes / (nodes + spectrum))
    slope = shares @ (spectrum / (nodes + spectrum).square())
    return largest / math.pi * _STEP * (nodes.pow(1.5) * slope / factor).sum(1)


#: Score → function of feature maps ``[B, C, h, w]`` that gives ``[B, C]``; low = remove.
MAP_SCORES: dict[MapScore, Callable[[Tensor], Tensor]] = {"hrank": map_ranks, "chip": channel_independence}


def map_scores(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Callable[[], Iterator[Any]],
    forward: Callable[[Any], Any],
    images: Mapping[MapScore, int] = MAP_IMAGES,
) -> dict[MapScore, dict[str, Tensor]]:
    """Compute the mean over images of some :data:`MAP_SCORES` of every unit; low = remove.

    The maps are the inputs of one consumer of the group, so they come after the activation, as in both papers. The
    consumer is the one with the largest map, and the first of these to run. Behind a flattened map, a channel's inputs
    form a map again, as nearly square as their number allows. A single number is a map of rank 0 or 1. Values that are
    not finite count as 0.

    Args:
        model: model to score; it does not change.
        groups: the model's groups.
        batches: function that returns an iterator over the probe's batches, from its first image on.
        forward: function that runs the model on a batch.
        images: score → maximum number of images.

    Returns:
        Score → group name → ``[U]`` float64, the mean over a unit's channels.
    """
    groups = list(groups)
    readers = _readers(model, groups, lambda: forward(next(batches())))
    zero = torch.zeros((), dtype=torch.float64)
    sums: dict[MapScore, dict[str, Tensor]] = {score: {group.name: zero for group in groups} for score in images}
    seen = size = 0

    def look(group: Group, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal size
        size = len(inputs[0])
        for score, limit in images.items():
            if seen < limit:
                maps = unit_maps(group, readers[group.name], layer, inputs[0][: limit - seen])
                found = MAP_SCORES[score](maps).sum(0).reshape(group.size, -1).mean(1)
                sums[score][group.name] = sums[score][group.name] + found.cpu()

    hooks = [(model.get_submodule(readers[group.name]), partial(look, group)) for group in groups]
    with observed(model), hooked(hooks, before=True):
        for batch in batches():
            forward(batch)
            seen += size
            if seen >= max(images.values()):
                break
    return {score: {name: total / min(seen, images[score]) for name, total in of.items()} for score, of in sums.items()}


def unit_maps(group: Group, reader: str, layer: nn.Module, tensor: Tensor) -> Tensor:
    """Return a group's channels as one of its consumers reads them: ``[B, U·c, h, w]``, the c channels of each unit.

    Args:
        group: group of channels.
        reader: name of the consumer.
        layer: the consumer.
        tensor: the consumer's input, ``[B, F, *spatial]`` of a convolution, ``[B, *positions, F]`` of a Linear layer.
    """
    features = tensor.movedim(-1, 1) if isinstance(layer, nn.Linear) else tensor
    flattened = _flattened(group, reader)
    if flattened > 1:
        height = next(side for side in range(math.isqrt(flattened), 0, -1) if flattened % side == 0)
    else:
        height = features.shape[2] if features.ndim > 3 else 1
    maps = features[:, group.consumers[reader].flatten().to(features.device)]
    maps = maps.reshape(len(maps), maps.shape[1] // flattened, height, -1).to(accumulation_device(maps.device))
    return maps.nan_to_num(0.0, 0.0, 0.0)


def _flattened(group: Group, reader: str) -> int:
    """Return how many inputs of a consumer hold one channel's map."""
    return max(1, group.consumers[reader].shape[1] // group.producers[group.layer].shape[1])


def _readers(model: nn.Module, groups: Iterable[Group], forward: Callable[[], Any]) -> dict[str, str]:
    """Choose the consumer of each group, by group name, whose input holds the maps."""
    consumers = {name for group in groups for name in group.consumers}
    positions: dict[str, int] = {}
    for call in calls(model, forward):
        if call.name in consumers:
            features = call.input_shape[-1 if isinstance(call.module, nn.Linear) else 1]
            positions[call.name] = math.prod(call.input_shape) // (call.input_shape[0] * features)
    for group in groups:
        if not group.consumers:
            raise InputError(
                f"the channels of {group.layer!r} are summed over by attention itself and read by no layer, so hrank "
                "and chip do not know what they are for: protect= that layer, or take another score"
            )
    return {
        group.name: max(group.consumers, key=lambda name, group=group: positions[name] * _flattened(group, name))
        for group in groups
    }
