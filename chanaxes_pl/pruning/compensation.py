"""Compensation: the channels that stay make up for those that are gone, without labels and without training.

Layer by layer in forward order, what the pruned network really gives a layer is set against what the layer had in the
dense network, over the same images. ``fold`` rebuilds the dense inputs from those that are left, at one position, and
folds the coefficients into the weights; ``refit`` solves for the weights that come closest to the dense outputs.
Both are ridge regressions that shrink towards the weights as they are. Reconstruction after removal is an old idea (He,
Zhang and Sun, 2017; Luo, Wu and Lin, 2017); because each fit sees the errors made upstream, it corrects those too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from chanaxes_pl.core.moments import accumulation_device, symmetric_product, true_float32
from chanaxes_pl.network.groups import executed_layers
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import CONVOLUTIONS, by_position
from chanaxes_pl.network.removal import Group
from chanaxes_pl.network.sampling import local_samples, patches, sample_positions
from chanaxes_pl.pruning.lockstep import Signals, lockstep
from chanaxes_pl.pruning.plans import add_bias

#: Ridge λ of each strength, as a share of the mean variance of what is regressed on.
RIDGE = {"fold": 1e-3, "refit": 1e-2}
#: Positions of a map that are fitted to, an image.
POSITIONS = 16


def compensate(
    slim: nn.Module,
    dense: nn.Module,
    groups: Iterable[Group],
    kept: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    strength: str = "refit",
    *,
    ridge: float | None = None,
    positions: int = POSITIONS,
) -> pd.DataFrame:
    """Fit every layer of a pruned network, in place, to what it did in the dense one.

    Args:
        slim: what :func:`remove` left of a copy of ``dense``; layers gain a bias here.
        dense: left as it is.
        groups: the dense network's.
        kept: group name → units that stayed.
        batches: unlabelled images ``[B, …]``, on the networks' device.
        strength: ``"fold"`` or ``"refit"``.
        ridge: λ; default :data:`RIDGE`.
        positions: local samples an image, the same in both networks.

    Returns:
        One row a layer: ``layer``; ``before`` and ``after``, the mean squared error of what was fitted (``refit``: the
        layer's outputs, ``fold``: its inputs) as a share of its variance in the dense network; ``reason``, why a layer
        was not fitted, else empty.

    Raises:
        ValueError: for an unknown strength.
    """
    if strength not in RIDGE:
        raise ValueError(f"compensate={strength!r}: expected one of {', '.join(map(repr, RIDGE))}, True or False")
    with observed(dense):
        runs = Counter(executed_layers(dense, batches[0][:1]))
    once = [name for name, times in runs.items() if times == 1]
    channels = kept_channels(dense, groups, kept)
    fit = _fold if strength == "fold" else _refit
    rows = [_row(name, reason="runs more than once in a forward pass") for name in runs if runs[name] > 1]
    with observed(dense), observed(slim):
        for name, signals in lockstep(dense, slim, batches, once):
            layer, original = slim.get_submodule(name), dense.get_submodule(name)
            task = _Task(name, layer, original, *channels[name], positions)
            rows.append(_row(name, *fit(task, signals, RIDGE[strength] if ridge is None else ridge)))
    return pd.DataFrame(rows)


def reestimate_norms(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set every BatchNorm's running statistics to the mean over some batches, as they come out of the layers now.

    Args:
        model: changed in place; its modes and the norms' momentum are as before afterwards.
        batches: unlabelled images ``[B, …]``, on the model's device.
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
    """Indices of the inputs and of the outputs that stay, of every convolution and Linear layer."""
    masks = {}
    for name, layer in dense.named_modules():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
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
            if _depthwise(dense.get_submodule(name)):
                masks[name][0][indices[gone]] = False
    return {name: (inputs.nonzero()[:, 0], outputs.nonzero()[:, 0]) for name, (inputs, outputs) in masks.items()}


@dataclass(frozen=True, eq=False)
class _Task:
    """One layer to be fitted, and what is left of it."""

    name: str
    layer: nn.Module
    original: nn.Module
    inputs: Tensor
    outputs: Tensor
    positions: int


def _row(layer: str, before: float = math.nan, after: float = math.nan, reason: str = "") -> dict[str, object]:
    reason = reason or ("what it was to be fitted to does not vary" if math.isnan(before) else "")
    return {"layer": layer, "before": before, "after": after, "reason": reason}


def _refit(task: _Task, signals: Iterator[Signals], ridge: float) -> tuple[float, float, str]:
    layer = task.layer
    blocks = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    sums = _Sums()
    for first, signal in _numbered(signals):
        if _same(signal):
            continue
        wanted = by_position(layer, signal.dense_output, len(signal.dense_output), task.name)[:, task.outputs]
        images, places = _places(first, len(wanted), wanted.shape[2], task.positions)
        if isinstance(layer, CONVOLUTIONS):
            seen = patches(layer, signal.slim_input, images, places, signal.dense_output.shape[2:])
        else:
            seen = local_samples(by_position(layer, signal.slim_input, len(wanted), task.name), images, places)
        samples = [seen.reshape(len(seen), blocks, -1), local_samples(wanted, images, places)]
        sums.update(torch.cat([samples[0], samples[1].reshape(len(seen), blocks, -1)], 2))
    if not sums.count:
        return 0.0, 0.0, ""
    weight = layer.weight.double().reshape(blocks, len(layer.weight) // blocks, -1)  # type: ignore[operator,arg-type]
    bias = _bias(layer, weight)
    fitted, shift, before, after = _ridge(sums, weight, bias, ridge)
    _write(layer, fitted, shift)
    return before, after, ""


def _fold(task: _Task, signals: Iterator[Signals], ridge: float) -> tuple[float, float, str]:
    layer, original = task.layer, task.original
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        for _ in signals:  # they have to pass this layer all the same
            pass
        return math.nan, math.nan, "its outputs read groups of inputs, which have nothing to fold into"
    sums = _Sums()
    for first, signal in _numbered(signals):
        if _same(signal):
            continue
        wanted = by_position(layer, signal.dense_input, len(signal.dense_input), task.name)
        seen = by_position(layer, signal.slim_input, len(wanted), task.name)
        images, places = _places(first, len(wanted), wanted.shape[2], task.positions)
        rows = [local_samples(part, images, places) for part in (seen, wanted)]
        sums.update(torch.cat(rows, 1)[:, None])
    if not sums.count:
        return 0.0, 0.0, ""
    width = len(original.weight[0])  # type: ignore[index,arg-type]
    select = torch.zeros(1, width, len(task.inputs), dtype=torch.float64, device=sums.total.device)
    select[0, task.inputs, torch.arange(len(task.inputs))] = 1.0
    rebuild, shift, before, after = _ridge(sums, select, select.new_zeros(1, width), ridge)
    whole = original.weight.double()[task.outputs].reshape(len(task.outputs), width, -1)  # type: ignore[operator,index]
    fitted = torch.einsum("ock,cj->ojk", whole, rebuild[0].to(whole))
    bias = _bias(original, original.weight.double()[None])[0, task.outputs]  # type: ignore[operator,index]
    _write(layer, fitted, bias + torch.einsum("ock,c->o", whole, shift[0].to(whole)))
    return before, after, ""


def _ridge(sums: _Sums, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor, float, float]:
    """Weights ``[g, o, f]`` and bias ``[g, o]`` that predict the last o variables from the first f, and errors.

    Minimises the mean squared error plus λ‖W − W₀‖² times the mean variance of the predictors.
    """
    features = weight.shape[2]
    mean, covariance = sums.mean, sums.covariance
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


class _Sums:
    """Moments of g independent sets of variables at once, from samples ``[n, g, w]``.

    Products run in float32 about the first batch's means and are summed in float64.
    """

    def __init__(self) -> None:
        self.count = 0

    def update(self, samples: Tensor) -> None:
        home = accumulation_device(samples.device)
        with true_float32(samples.device):
            rows = samples.float().transpose(0, 1)
            if not self.count:
                blocks, width = len(rows), rows.shape[2]
                self.about = rows.mean(1, keepdim=True)
                self.total = torch.zeros(blocks, width, dtype=torch.float64, device=home)
                self.products = torch.zeros(blocks, width, width, dtype=torch.float64, device=home)
            rows = rows - self.about
            self.count += rows.shape[1]
            self.total += rows.sum(1).to(home)
            product = symmetric_product(rows[0].T, rows[0])[None] if len(rows) == 1 else rows.mT @ rows
            self.products += product.to(home)

    @property
    def mean(self) -> Tensor:
        """``[g, w]``."""
        return self.about[:, 0].to(self.total) + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """``[g, w, w]``."""
        off = self.total / self.count
        return self.products / self.count - off[:, :, None] * off[:, None, :]


def _numbered(signals: Iterable[Signals]) -> Iterator[tuple[int, Signals]]:
    first = 0
    for signal in signals:
        yield first, signal
        first += len(signal.dense_input)


def _places(first: int, count: int, total: int, positions: int) -> tuple[Tensor, Tensor]:
    """Rows of a batch, and which of ``total`` positions are sampled in each."""
    places = sample_positions(np.arange(first, first + count), total, positions)
    return torch.arange(count), torch.arange(total).expand(count, -1) if places is None else places


def _same(signal: Signals) -> bool:
    """Whether nothing upstream has changed, so that there is nothing to make up for."""
    return signal.slim_input.shape == signal.dense_input.shape and torch.equal(signal.slim_input, signal.dense_input)


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def _bias(layer: nn.Module, weight: Tensor) -> Tensor:
    """``[g, o]`` bias of a layer with these ``[g, o, …]`` weights, zeros where it has none."""
    bias = weight.new_zeros(weight.shape[:2])
    return bias if layer.bias is None else bias + layer.bias.double().reshape(bias.shape)  # type: ignore[operator,union-attr]


def _write(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    add_bias(layer)
    layer.weight.copy_(weight.reshape(layer.weight.shape))  # type: ignore[operator,union-attr,arg-type]
    layer.bias.copy_(bias.flatten())  # type: ignore[operator,union-attr]
