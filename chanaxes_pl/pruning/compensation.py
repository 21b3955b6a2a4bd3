"""Compensation: fit the remaining weights to the dense network's activations, without labels and without training.

Layers are fitted one by one in forward order, on the same images in both networks. ``fold`` predicts a layer's dense
inputs from its remaining inputs at the same position, and folds the coefficients into the weights. ``refit`` solves
for the weights whose outputs are closest to the dense outputs. Both are ridge regressions that shrink towards the
current weights. Such layer-wise reconstruction follows He, Zhang and Sun (2017) and Luo, Wu and Lin (2017). A fit sees
the inputs that the pruned network really gives, so it also corrects errors made upstream.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chanaxes_pl.core.moments import Moments
from chanaxes_pl.network.flow import LAYERS, TRANSPOSED, goes_by_groups
from chanaxes_pl.network.groups import executed_layers
from chanaxes_pl.network.hooks import observed, same_outputs
from chanaxes_pl.network.layers import CONVOLUTIONS, by_position, why_not_affine
from chanaxes_pl.network.removal import Group, add_bias
from chanaxes_pl.network.sampling import local_samples, patches, sample_positions
from chanaxes_pl.network.tracing import Activations, paired_activations

#: A key of :data:`RIDGE`.
Compensation = Literal["fold", "refit"]
#: Kind of compensation → its ridge λ, as a share of the mean variance of the regressors.
RIDGE: dict[Compensation, float] = {"fold": 1e-3, "refit": 1e-2}
#: Number of positions per image that a fit uses.
POSITIONS = 16
# The check that a layer is affine uses this many images, and tolerates this share of the largest output.
_CHECKED = 4
_CHECK_SHARE = 1e-3


def compensate(
    slim: nn.Module,
    dense: nn.Module,
    groups: Iterable[Group],
    kept: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    compensation: Compensation = "refit",
    *,
    ridge: float | None = None,
    positions: int = POSITIONS,
) -> pd.DataFrame:
    """Fit every layer of a pruned network, in place, to its activations in the dense network.

    Args:
        slim: pruned copy of ``dense``, after :func:`remove`; its layers gain a bias.
        dense: dense network; it does not change.
        groups: the dense network's groups.
        kept: group name → the units that stayed.
        batches: calibration set: unlabelled images ``[B, …]`` on the networks' device.
        compensation: ``"fold"`` or ``"refit"``.
        ridge: λ; default from :data:`RIDGE`.
        positions: number of local samples per image, the same in both networks.

    Returns:
        One row per layer: ``layer``; ``before`` and ``after``, the mean squared error of the fitted quantity (outputs
        for ``refit``, inputs for ``fold``) as a share of its variance in the dense network; ``reason``, why the layer
        was not fitted, or empty.

    Raises:
        ValueError: if the kind of compensation is unknown.
    """
    if compensation not in RIDGE:
        raise ValueError(f"compensate={compensation!r}: expected one of {', '.join(map(repr, RIDGE))}, True or False")
    refused = _refusals(dense, slim, batches[0][:1])
    fitted = [name for name, why in refused.items() if not why]
    channels = kept_channels(dense, groups, kept)
    fit = _fold if compensation == "fold" else _refit
    rows = [_row(name, reason=why) for name, why in refused.items() if why]
    with observed(dense), observed(slim):
        for name, activations in paired_activations(dense, slim, batches, fitted):
            layer, original = slim.get_submodule(name), dense.get_submodule(name)
            task = _Task(name, layer, original, *channels[name], positions)
            first = next(activations)
            if _is_affine(original, first):
                found = fit(task, chain([first], activations), RIDGE[compensation] if ridge is None else ridge)
            else:
                found = math.nan, math.nan, "its output is not its weight times its input plus its bias"
            rows.append(_row(name, *found))
    return pd.DataFrame(rows)


def reestimate_norms(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Re-estimate the running statistics of every BatchNorm as the mean over some batches.

    Args:
        model: model to change in place; its modes and the norms' momentum stay as they were.
        batches: unlabelled images ``[B, …]`` on the model's device.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with observed(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.training = True
        try:
            for images in batches:
                model(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def kept_channels(
    dense: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the indices of the inputs and outputs that stay, for every convolution and Linear layer."""
    masks = {}
    for name, layer in dense.named_modules():
        if isinstance(layer, LAYERS):
            linear = isinstance(layer, nn.Linear)
            sizes = (layer.in_features, layer.out_features) if linear else (layer.in_channels, layer.out_channels)
            masks[name] = tuple(torch.ones(size, dtype=torch.bool) for size in sizes)
    for group in groups:
        gone = torch.zeros(group.size, dtype=torch.bool)
        if group.name in kept:
            gone = ~gone.index_fill(0, kept[group.name], True)
        for name, indices in group.consumers.items():
            masks[name][0][indices[gone]] = False
        for name, indices in group.producers.items():
            masks[name][1][indices[gone]] = False
            layer = dense.get_submodule(name)
            if goes_by_groups(layer):
                assert isinstance(layer, CONVOLUTIONS)
                inputs = masks[name][0].view(layer.groups, -1)
                inputs[indices[gone].flatten() // (layer.out_channels // layer.groups)] = False
    return {name: (inputs.nonzero()[:, 0], outputs.nonzero()[:, 0]) for name, (inputs, outputs) in masks.items()}


@dataclass(frozen=True, eq=False)
class _Task:
    """A layer to fit: the slim layer, the dense one, and the inputs and outputs that stay."""

    name: str
    layer: nn.Module
    original: nn.Module
    inputs: Tensor
    outputs: Tensor
    positions: int


class _WeightReads(TorchFunctionMode):
    """Counter of the operations that compute a tensor from each layer's weight, wherever they are called.

    Attributes:
        counts: layer name → number of operations; layers that share a weight count each other's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, layer in model.named_modules():
            if isinstance(layer, LAYERS):
                # By address, because two parameters may share memory.
                self._names[layer.weight.data_ptr()].append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        if any(isinstance(part, Tensor) for part in made):  # otherwise only its shape or device was read
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, nn.Parameter):
                    self.counts.update(self._names.get(value.data_ptr(), ()))
        return result


def _refusals(dense: nn.Module, slim: nn.Module, image: Tensor) -> dict[str, str]:
    """Return why each layer cannot be fitted, or an empty string, in the order in which they run."""
    with observed(dense), _WeightReads(dense) as reads:
        runs = Counter(executed_layers(dense, image))
    reasons = {}
    for name, times in runs.items():
        if isinstance(slim.get_submodule(name), TRANSPOSED):
            reasons[name] = "is a transposed convolution, whose outputs share inputs"
            continue
        reason = why_not_affine(dense.get_submodule(name)) or why_not_affine(slim.get_submodule(name))
        if times > 1:
            reason = "runs more than once in a forward pass"
        elif not reason and reads.counts[name] != 1:
            reason = "its weight is read elsewhere too: fitting it would change what is computed there"
        reasons[name] = reason
    return reasons


def _is_affine(layer: nn.Module, batch: Activations) -> bool:
    """Return whether a layer's output on the first images is what its class computes from its input."""
    few = batch.dense_input[:_CHECKED]
    return same_outputs(type(layer).forward(layer, few), batch.dense_output[:_CHECKED], _CHECK_SHARE)


def _row(layer: str, before: float = math.nan, after: float = math.nan, reason: str = "") -> dict[str, object]:
    reason = reason or ("what it was to be fitted to does not vary" if math.isnan(before) else "")
    return {"layer": layer, "before": before, "after": after, "reason": reason}


def _refit(task: _Task, activations: Iterable[Activations], ridge: float) -> tuple[float, float, str]:
    """Fit a layer's weights and bias so that its inputs x in the slim network give its dense outputs y.

    Minimises E‖y − Wx − b‖² + λ v ‖W − W₀‖² over W and b, separately for each group of a grouped convolution. W₀ are
    the current weights, v is the mean variance of x. This is the reconstruction of He, Zhang and Sun (2017) with ridge.

    Returns:
        The error before and after, and why the layer could not be fitted, else empty; see :func:`compensate`.
    """
    layer = task.layer
    blocks = layer.groups if isinstance(layer, CONVOLUTIONS) else 1

    def sample(batch: Activations, first: int) -> Tensor:
        wanted = by_position(layer, batch.dense_output, len(batch.dense_output), task.name)[:, task.outputs]
        images, places = _places(first, len(wanted), wanted.shape[2], task.positions)
        if isinstance(layer, CONVOLUTIONS):
            seen = patches(layer, batch.slim_input, images, places, batch.dense_output.shape[2:])
        else:
            seen = local_samples(by_position(layer, batch.slim_input, len(wanted), task.name), images, places)
        given = local_samples(wanted, images, places)
        return torch.cat([part.reshape(len(seen), blocks, -1) for part in (seen, given)], 2)

    moments = _moments(activations, sample)
    if moments is None:
        return 0.0, 0.0, ""
    weight = layer.weight.double().reshape(blocks, len(layer.weight) // blocks, -1)  # type: ignore[operator,arg-type]
    fitted, shift, before, after = _ridge(moments, weight, _bias(layer, weight), ridge)
    _write(layer, fitted, shift)
    return before, after, ""


def _fold(task: _Task, activations: Iterable[Activations], ridge: float) -> tuple[float, float, str]:
    """Predict a layer's dense inputs z from the remaining ones x, and fold the coefficients into its weights.

    Minimises E‖z − Rx − r‖² + λ v ‖R − R₀‖² over R and r, with one R for all positions of the kernel. R₀ passes each
    remaining input on unchanged, v is the mean variance of x. The dense weights W and bias b become WR and b + Wr.

    Returns:
        The error before and after, and why the layer could not be fitted, else empty; see :func:`compensate`.
    """
    layer, original = task.layer, task.original
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        return math.nan, math.nan, "its outputs read groups of inputs, which have nothing to fold into"

    def sample(batch: Activations, first: int) -> Tensor:
        wanted = by_position(layer, batch.dense_input, len(batch.dense_input), task.name)
        seen = by_position(layer, batch.slim_input, len(wanted), task.name)
        images, places = _places(first, len(wanted), wanted.shape[2], task.positions)
        return torch.cat([local_samples(part, images, places) for part in (seen, wanted)], 1)[:, None]

    moments = _moments(activations, sample)
    if moments is None:
        return 0.0, 0.0, ""
    width = len(original.weight[0])  # type: ignore[index,arg-type]
    select = moments.mean.new_zeros(1, width, len(task.inputs))
    select[0, task.inputs, torch.arange(len(task.inputs))] = 1.0
    rebuild, shift, before, after = _ridge(moments, select, select.new_zeros(1, width), ridge)
    whole = original.weight.double()[task.outputs].reshape(len(task.outputs), width, -1)  # type: ignore[operator,index]
    fitted = torch.einsum("ock,cj->ojk", whole, rebuild[0].to(whole))
    bias = _bias(original, original.weight.double()[None])[0, task.outputs]  # type: ignore[operator,index]
    _write(layer, fitted, bias + torch.einsum("ock,c->o", whole, shift[0].to(whole)))
    return before, after, ""


def _moments(activations: Iterable[Activations], sample: Callable[[Activations, int], Tensor]) -> Moments | None:
    """Return the moments of the samples ``[n, g, w]`` that ``sample(batch, number of its first image)`` takes.

    Only batches in which something upstream has changed count; the result is ``None`` if there are none.
    """
    moments, first = None, 0
    for batch in activations:
        if not _same(batch):
            part = Moments.of(sample(batch, first).transpose(0, 1))
            moments = part if moments is None else moments.merge_(part)
        first += len(batch.dense_input)
    return moments


def _ridge(moments: Moments, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor, float, float]:
    """Regress the last o variables, y, on the first f, x, with a ridge that shrinks the coefficients to W₀.

    Minimises E‖y − Wx − b‖² + λ v ‖W − W₀‖², where v is the mean variance of x, separately for each of g blocks. Hence
    W = W₀ + (Cov(y, x) − W₀ Cov(x)) (Cov(x) + λ v I)⁻¹ and b = E y − W E x.

    Args:
        moments: moments of g blocks of f + o variables.
        weight: ``[g, o, f]``, W₀.
        bias: ``[g, o]``, the bias that goes with W₀ before the fit.
        ridge: λ.

    Returns:
        W ``[g, o, f]``, b ``[g, o]``, and the mean squared errors before the fit (W₀ and ``bias``) and after it (W and
        b), both as a share of the summed variance of y; NaN if that is 0.
    """
    features = weight.shape[2]
    mean, covariance = moments.mean, moments.covariance
    weight, bias = weight.to(mean), bias.to(mean)
    among, toward = covariance[:, :features, :features], covariance[:, :features, features:]
    own = covariance.diagonal(dim1=1, dim2=2)[:, features:]
    spread = among.diagonal(dim1=1, dim2=2).mean(1)
    penalty = (ridge * spread).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(among + torch.diag_embed(penalty[:, None].expand(-1, features)))
    fitted = weight + torch.cholesky_solve(toward - among @ weight.mT, factor).mT
    shift = mean[:, features:] - (fitted @ mean[:, :features, None])[..., 0]

    def error(trial: Tensor, offset: Tensor) -> float:
        gap = mean[:, features:] - (trial @ mean[:, :features, None])[..., 0] - offset
        rest = own - 2 * (trial * toward.mT).sum(2) + (trial @ among * trial).sum(2)
        return float((rest + gap.square()).sum() / own.sum())

    return fitted, shift, error(weight, bias), error(fitted, shift)


def _places(first: int, count: int, total: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a batch, and the positions sampled in each row, out of ``total``."""
    places = sample_positions(np.arange(first, first + count), total, positions)
    return torch.arange(count), torch.arange(total).expand(count, -1) if places is None else places


def _same(batch: Activations) -> bool:
    """Return whether nothing upstream has changed, so that there is nothing to compensate."""
    return batch.slim_input.shape == batch.dense_input.shape and torch.equal(batch.slim_input, batch.dense_input)


def _bias(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return the bias ``[g, o]`` of a layer with weights ``[g, o, …]``, or zeros if it has none."""
    bias = weight.new_zeros(weight.shape[:2])
    return bias if layer.bias is None else bias + layer.bias.double().reshape(bias.shape)  # type: ignore[operator,union-attr]


def _write(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    add_bias(layer)
    layer.weight.copy_(weight.reshape(layer.weight.shape))  # type: ignore[operator,union-attr,arg-type]
    layer.bias.copy_(bias.flatten())  # type: ignore[operator,union-attr]
