"""Baseline scores from weights, BatchNorm scales and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.core.targets import check_classes
from chanaxes_pl.network.batches import Step
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import calls, observed
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED, channel_count
from chanaxes_pl.units.groups import Units

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def _distances(rows: Tensor) -> Tensor:
    """Return the sum of Euclidean distances from each row of ``[C, F]`` to all others, ``[C]``."""
    rows = rows.to(accumulation_device(rows.device)).double()  # for wide layers, cdist subtracts products
    return torch.cdist(rows, rows).sum(1)


def _over_larger(squares: Tensor) -> Tensor:
    """Divide each of ``[C]`` squared norms by the sum of those that are not smaller."""
    ascending, channels = squares.sort()
    smaller = F.pad(ascending.cumsum(0)[:-1], (1, 0))
    return torch.empty_like(squares).scatter(0, channels, ascending / (squares.sum() - smaller))


#: A key of :data:`WEIGHT_SCORES`.
WeightScore = Literal["l1", "l2", "bn_scale", "fpgm", "lamp", "taylor"]
#: Score → function of the weight ``[C, F]`` of C filters (of γ ``[C, 1]`` for ``bn_scale``) and of its gradient that
#: gives ``[C]``; low = remove.
WEIGHT_SCORES: Mapping[WeightScore, Callable[[Tensor, Any], Tensor]] = {
    "l1": lambda w, _: w.abs().sum(1),  # Li et al. (ICLR 2017)
    "l2": lambda w, _: w.square().sum(1),  # squared: the order is the same
    "bn_scale": lambda w, _: w.abs().sum(1),  # |γ|: Liu et al. (ICCV 2017)
    "fpgm": lambda w, _: _distances(w),  # He et al. (CVPR 2019), equation 6
    "lamp": lambda w, _: _over_larger(w.square().sum(1)),  # Lee et al. (ICLR 2021), with a filter as one weight
    "taylor": lambda w, gradient: (w * gradient).abs().sum(1),  # Molchanov et al. (CVPR 2019), summed over a filter
}


def weight_score(score: WeightScore, module: nn.Module) -> Tensor:
    """Compute one of :data:`WEIGHT_SCORES` of a module's output channels, ``[C]``.

    Args:
        score: a key of :data:`WEIGHT_SCORES`.
        module: convolution or Linear layer, with a gradient for ``"taylor"``; for ``"bn_scale"``, the BatchNorm
            behind it.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    gradient = None if weight.grad is None else _filters(module, weight.grad)
    return WEIGHT_SCORES[score](_filters(module, weight.detach()), gradient)


def _filters(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, or its gradient, as ``[C, F]``: a transposed convolution has its outputs second."""
    if not isinstance(module, TRANSPOSED):
        return weight.reshape(len(weight), -1)
    if not isinstance(module.groups, int) or module.groups == 1:
        return weight.transpose(0, 1).flatten(1)
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def weight_scores(
    score: WeightScore, model: nn.Module, units: Units, batches: Callable[[], Iterator[Any]], step: Step
) -> dict[str, Tensor]:
    """Compute one of :data:`WEIGHT_SCORES` of every producer's channels, layer by layer.

    The loss of ``taylor`` is the mean cross-entropy over the probe.

    Args:
        score: a key of :data:`WEIGHT_SCORES`.
        model: model to score; it does not change.
        units: the model's units.
        batches: function that returns an iterator over the probe's batches.
        step: ``(model, batch) → (logits, labels)``.

    Returns:
        Layer → ``[C]``; low = remove.

    Raises:
        ValueError: if a producer has no BatchNorm (``bn_scale``), or the loss is not finite (``taylor``).
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
                "expected one behind every removable layer: protect those layers, or use a score that needs no "
                "BatchNorm, such as l2, taylor or keep_both",
            )
    if score == "taylor":
        modules = _with_gradients(model, names, batches(), step)
    return {name: weight_score(score, modules[name]) for name in names}


def norms_behind(model: nn.Module, units: Units, forward: Callable[[], Any]) -> dict[str, nn.Module]:
    """Find the BatchNorm behind every producer that has one.

    A BatchNorm counts if it runs after the layer with no convolution, Linear layer or other BatchNorm in between, has
    a scale for each of the layer's channels, and loses channels together with the layer.

    Args:
        model: model to search; it does not change.
        units: the model's units.
        forward: function that runs the model on any batch.
    """
    kinds = (*CONVOLUTIONS, nn.Linear, _BATCH_NORM)
    behind = dict(pairwise(call.name for call in calls(model, forward) if isinstance(call.module, kinds)))
    norms: dict[str, nn.Module] = {}
    for group in units.groups.values():
        cut = {cut.path if cut.dimension is None else cut.path.rpartition(".")[0] for cut in group.cuts}
        for layer in cut.intersection(group.producers, behind):
            norm = model.get_submodule(behind[layer])
            if behind[layer] in cut and isinstance(norm, _BATCH_NORM) and norm.affine:
                norms |= {layer: norm} if len(norm.weight) == channel_count(model.get_submodule(layer)) else {}
    return norms


def _with_gradients(model: nn.Module, names: Iterable[str], batches: Iterable[Any], step: Step) -> dict[str, nn.Module]:
    """Copy layers, and give their weights the gradient of the mean cross-entropy over the probe in eval mode."""
    copied = clone(model).requires_grad_(False)
    layers = {name: copied.get_submodule(name) for name in names}
    weights: list[Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    for weight in weights:
        weight.requires_grad_(True).grad = torch.zeros_like(weight)
    images, total = 0, 0.0
    with observed(copied), torch.enable_grad():
        for batch in batches:
            logits, labels = step(copied, batch)
            check_classes(logits, labels)
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
