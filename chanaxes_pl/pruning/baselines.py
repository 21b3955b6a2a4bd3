"""Baselines that look at weights, norms and gradients, by torch-pruning's formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.network.groups import Units, library_importance
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import CONVOLUTIONS, channel_count
from chanaxes_pl.network.probe import Step
from chanaxes_pl.network.removal import twin
from chanaxes_pl.pruning.feature_maps import before_layers

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def library_scores(
    score: str, model: nn.Module, units: Units, batches: Callable[[], Iterator[Any]], step: Step, caller: str
) -> dict[str, Tensor]:
    """One of torch-pruning's scores of every producer's channels, each layer by itself.

    What it computes under these names: ``l1`` Σ|w|, ``l2`` Σw² (no root), ``bn_scale`` |γ| of the BatchNorm behind the
    layer, ``lamp`` Σw² over the sum of all Σw² that are not smaller, ``taylor`` Σ|w · ∂loss/∂w| with the mean
    cross-entropy over the probe as loss, ``fpgm`` the sum of the distances from a filter to all others, where a filter
    is taken as the vector of its *squared* weights.

    Args:
        score: a key of ``LIBRARY_SCORES``.
        model: left as it is.
        units: of the model.
        batches: gives the probe's batches each time it is called.
        step: ``(model, batch) → (logits, labels)``.
        caller: how an error names the call.

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
            raise ValueError(
                f"{caller}(score='bn_scale'): no BatchNorm with a scale runs right after {', '.join(bare[:3])}{more}; "
                "expected one behind every removable layer: protect those layers, or take another score: all others do "
                "without, l2, taylor or two_axis for instance"
            )
    if score == "taylor":
        modules = _with_gradients(model, names, batches(), step, caller)
    return {name: library_importance(score, modules[name]) for name in names}


def norms_behind(model: nn.Module, units: Units, forward: Callable[[], Any]) -> dict[str, nn.Module]:
    """The BatchNorm behind every producer that has one.

    That is the one that runs right after it, no convolution, Linear layer or other BatchNorm in between, if it has a
    scale for each of the layer's channels and loses them with the layer.

    Args:
        model: left as it is.
        units: of the model.
        forward: runs the model on some batch.
    """
    ran: list[str] = []
    watched = {name: m for name, m in model.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear, _BATCH_NORM))}
    hooks = [(module, lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    with observed(model), before_layers(hooks):
        forward()
    behind = dict(pairwise(ran))
    norms: dict[str, nn.Module] = {}
    for group in units.groups.values():
        cut = {cut.path for cut in group.cuts}
        for layer in cut.intersection(group.producers, behind):
            norm = watched[behind[layer]]
            if behind[layer] in cut and isinstance(norm, _BATCH_NORM) and norm.affine:
                norms |= {layer: norm} if len(norm.weight) == channel_count(watched[layer]) else {}
    return norms


def _with_gradients(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], step: Step, caller: str
) -> dict[str, nn.Module]:
    """Copies of layers whose weights hold the gradient of the mean cross-entropy over the probe, in eval mode."""
    copied = twin(model).requires_grad_(False)
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
        raise ValueError(
            f"{caller}(score='taylor'): the cross-entropy over the probe is {total}, expected a finite number; "
            "the network's logits are not finite"
        )
    for weight in weights:
        weight.grad /= images  # type: ignore[operator]
    return layers
