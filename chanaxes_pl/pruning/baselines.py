"""Baselines that look at weights, norms and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.network.groups import Units
from chanaxes_pl.network.hooks import calls, observed
from chanaxes_pl.network.layers import CONVOLUTIONS, channel_count
from chanaxes_pl.network.probe import Step
from chanaxes_pl.network.removal import clone

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def _distances(rows: Tensor) -> Tensor:
    """``[C]``: the sum of Euclidean distances from each row of ``[C, F]`` to all others."""
    rows = rows.to(accumulation_device(rows.device)).double()  # large layers: cdist subtracts products
    return torch.cdist(rows, rows).sum(1)


def _over_larger(squares: Tensor) -> Tensor:
    """``[C]``: each of ``[C]`` squared norms over the sum of all that are not smaller."""
    ascending, channels = squares.sort()
    smaller = F.pad(ascending.cumsum(0)[:-1], (1, 0))
    return torch.empty_like(squares).scatter(0, channels, ascending / (squares.sum() - smaller))


#: Score → ``[C]`` of a weight ``[C, F]`` of C filters, or γ ``[C, 1]``, and of its gradient; low = remove.
WEIGHT_SCORES: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "l1": lambda w, _: w.abs().sum(1),  # Li et al. (ICLR 2017)
    "l2": lambda w, _: w.square().sum(1),  # without the root: the order is the same
    "bn_scale": lambda w, _: w.abs().sum(1),  # |γ|: Liu et al. (ICCV 2017)
    "fpgm": lambda w, _: _distances(w),  # He et al. (CVPR 2019), equation 6
    "lamp": lambda w, _: _over_larger(w.square().sum(1)),  # Lee et al. (ICLR 2021), a filter as one weight
    "taylor": lambda w, gradient: (w * gradient).abs().sum(1),  # Molchanov et al. (CVPR 2019), summed over a filter
}


def weight_score(score: str, module: nn.Module) -> Tensor:
    """One of :data:`WEIGHT_SCORES` of a module's output channels, ``[C]``.

    Args:
        score: its name.
        module: a convolution or Linear, with gradients for ``"taylor"``; for ``"bn_scale"`` the BatchNorm behind it.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    gradient = None if weight.grad is None else weight.grad.reshape(len(weight), -1)
    return WEIGHT_SCORES[score](weight.detach().reshape(len(weight), -1), gradient)


def weight_scores(
    score: str, model: nn.Module, units: Units, batches: Callable[[], Iterator[Any]], step: Step
) -> dict[str, Tensor]:
    """One of :data:`WEIGHT_SCORES` of every producer's channels, each layer by itself.

    The loss of ``taylor`` is the mean cross-entropy over the probe.

    Args:
        score: a key of :data:`WEIGHT_SCORES`.
        model: left as it is.
        units: of the model.
        batches: gives the probe's batches each time it is called.
        step: ``(model, batch) → (logits, labels)``.

    Returns:
        Layer → ``[C]``; low = remove.

    Raises:
        ValueError: for ``bn_scale`` where a producer has no BatchNorm, for ``taylor`` where the loss is not finite.
    """
    names = [name for group in units.groups.values() for name in group.producers]
    modules = {name: model.get_submodule(name) for name in names}
    if score == "bn_scale":
        modules = norms_behind(model, units, lambda: step(model, next(batches())))
        bare = [name for name in names if name not in modules]
        if bare:
            more = f" and {len(bare) - 3} more" if len(bare) > 3 else ""
            raise ArgumentError(
                "score='bn_scale'",
                f"no BatchNorm with a scale runs right after {', '.join(bare[:3])}{more}; "
                "expected one behind every removable layer: protect those layers, or take another score: all others do "
                "without, l2, taylor or keep_both for instance",
            )
    if score == "taylor":
        modules = _with_gradients(model, names, batches(), step)
    return {name: weight_score(score, modules[name]) for name in names}


def norms_behind(model: nn.Module, units: Units, forward: Callable[[], Any]) -> dict[str, nn.Module]:
    """The BatchNorm behind every producer that has one.

    That is the one that runs right after it, no convolution, Linear layer or other BatchNorm in between, if it has a
    scale for each of the layer's channels and loses them with the layer.

    Args:
        model: left as it is.
        units: of the model.
        forward: runs the model on some batch.
    """
    kinds = (*CONVOLUTIONS, nn.Linear, _BATCH_NORM)
    behind = dict(pairwise(call.name for call in calls(model, forward) if isinstance(call.module, kinds)))
    norms: dict[str, nn.Module] = {}
    for group in units.groups.values():
        cut = {cut.path for cut in group.cuts}
        for layer in cut.intersection(group.producers, behind):
            norm = model.get_submodule(behind[layer])
            if behind[layer] in cut and isinstance(norm, _BATCH_NORM) and norm.affine:
                norms |= {layer: norm} if len(norm.weight) == channel_count(model.get_submodule(layer)) else {}
    return norms


def _with_gradients(model: nn.Module, names: Iterable[str], batches: Iterable[Any], step: Step) -> dict[str, nn.Module]:
    """Copies of layers whose weights hold the gradient of the mean cross-entropy over the probe, in eval mode."""
    copied = clone(model).requires_grad_(False)
    layers = {name: copied.get_submodule(name) for name in names}
    weights: list[Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    for weight in weights:
        weight.requires_grad_(True).grad = torch.zeros_like(weight)
    images, total = 0, 0.0
    with observed(copied), torch.enable_grad():
        for batch in batches:
            logits, labels = step(copied, batch)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            loss.backward()
            images, total = images + len(labels), total + loss.item()
    if not np.isfinite(total):
        raise ArgumentError(
            "score='taylor'",
            f"the cross-entropy over the probe is {total}, expected a finite number; "
            "the network's logits are not finite",
        )
    for weight in weights:
        weight.grad /= images  # type: ignore[operator]
    return layers
