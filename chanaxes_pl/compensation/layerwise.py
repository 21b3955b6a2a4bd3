"""Compensation: fit the remaining weights to the dense network's activations, without labels and without training.

Layers are fitted one by one in forward order, on the same images in both networks. ``fold`` predicts a layer's dense
inputs from its remaining inputs at the same position, and folds the coefficients into the weights. ``refit`` solves
for the weights whose outputs are closest to the dense outputs. Both are ridge regressions that shrink towards the
current weights. Such layer-wise reconstruction follows He, Zhang and Sun (2017) and Luo, Wu and Lin (2017). A fit sees
the inputs that the pruned network really gives, so it also corrects errors made upstream. ``refit`` minds what a ReLU
behind the layer cuts off, as Zhang, Zou, He and Sun (2016) do.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chanaxes_pl.compensation.pairing import Seen, paired
from chanaxes_pl.compensation.ridge import Ridge, Solution, held_bytes, ridge_bytes, samples_within
from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.memory import GIGABYTE, MEMORY, check_memory
from chanaxes_pl.core.moments import Moments, accumulation_device, true_float32
from chanaxes_pl.core.progress import bar
from chanaxes_pl.network.hooks import calls, observed, same_outputs
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED, by_position, why_not_affine
from chanaxes_pl.network.sampling import local_samples, patches, sample_positions
from chanaxes_pl.units.flow import LAYERS, goes_by_groups
from chanaxes_pl.units.groups import executed_layers
from chanaxes_pl.units.removal import Group, add_bias, row_scales

#: A key of :data:`RIDGE`.
Compensation = Literal["fold", "refit"]
#: Kind of compensation → its ridge λ, as a share of the mean variance of the regressors.
RIDGE: dict[Compensation, float] = {"fold": 1e-3, "refit": 1e-2}
#: Number of positions per image that a fit uses.
POSITIONS = 16
# The check that a layer is affine uses this many images, and tolerates this share of the largest output.
_CHECKED = 4
_CHECK_SHARE = 1e-3
# The rest of the memory is for what the C library holds between blocks that are in use.
_FOR_TENSORS = 0.8
# Samples are held where that leaves some of the memory for activations.
_MOST_HELD = 0.6
# No layer is fitted to fewer samples than this to save memory.
_FEWEST = 1000
# Numbers of a weight that are widened to float64 at a time.
_WIDENED = 1 << 23


def compensate(
    slim: nn.Module,
    dense: nn.Module,
    groups: Iterable[Group],
    kept: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    compensation: Compensation = "refit",
    *,
    ridge: float | None = None,
    positions: int = POSITIONS,
    images: int | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> pd.DataFrame:
    """Fit every layer of a pruned network, in place, to its activations in the dense network.

    Memory is bounded whatever the number of images. Equations take up to half of ``memory``; the rest is for images in
    a list, for the activations of the batch that runs, for what layers ahead are fitted to, and for batches that wait
    for the next layer. What has no room there is computed again, at the cost of time alone: see :func:`paired`. A layer
    is fitted to fewer samples only if its equations would not fit otherwise, with a warning, and as if nothing were cut
    off behind it if its samples would not.

    Args:
        slim: pruned copy of ``dense``, after :func:`remove`; its layers gain a bias.
        dense: dense network; it does not change.
        groups: the dense network's groups.
        kept: group name → the units that stayed.
        batches: calibration set: unlabelled images ``[B, …]`` on the networks' device, iterated more than once.
        compensation: ``"fold"`` or ``"refit"``.
        ridge: λ; default from :data:`RIDGE`.
        positions: number of local samples per image, the same in both networks.
        images: number of images in the batches, if it is known; else they are read once more, to be counted.
        memory: gigabytes (10⁹ bytes) to take beside the networks, on their device.
        progress: whether to show a progress bar in a terminal.

    Returns:
        One row per layer: ``layer``; ``before`` and ``after``, the mean squared error of the fitted quantity (outputs
        for ``refit``, inputs for ``fold``), without what is cut off in both networks, as a share of its variance in the
        dense network; ``reason``, why the layer was not fitted, or empty.

    Raises:
        ValueError: if the kind of compensation is unknown, or ``memory`` has no room for the activations of one image
            or the equations of a layer.
    """
    if compensation not in RIDGE:
        raise ArgumentError(f"compensation={compensation!r}", f"expected {' or '.join(map(repr, RIDGE))}")
    check_memory(memory)
    image, limit = next(iter(batches))[:1], GIGABYTE * memory
    refused = _refusals(dense, slim, image)
    images = sum(map(len, batches)) if images is None else images
    groups = list(groups)
    channels = kept_channels(dense, groups, kept)
    side = "input" if compensation == "fold" else "output"
    places, left = (_positions(model, image, side) for model in (dense, slim))
    for name in refused:
        if places.get(name) != left.get(name) and not refused[name]:
            refused[name] = "some of its positions are channels that are gone"
    listed = sum(batch.nbytes for batch in batches) if isinstance(batches, Sequence) else 0
    tasks, scales, equations = {}, row_scales(groups, kept), 0
    for name in (name for name, why in refused.items() if not why):
        layer, original = slim.get_submodule(name), dense.get_submodule(name)
        shape = _shape(layer, original, compensation)
        each, total = places[name]
        possible = images * each * min(positions, total)
        itemsize = torch.promote_types(layer.weight.dtype, torch.float32).itemsize  # type: ignore[union-attr,arg-type]
        samples = _samples(name, shape, possible, memory, itemsize)
        needed = ridge_bytes(shape, samples, itemsize)
        more = held_bytes(shape, samples, itemsize) if compensation == "refit" else 0
        hold = needed + more <= limit / 2 and needed + more + listed <= _MOST_HELD * limit
        equations = max(equations, needed + more if hold else needed)
        strength = RIDGE[compensation] if ridge is None else ridge
        inputs, outputs = channels[name]
        factors = scales.get(f"{name}.weight", {})
        scale = torch.tensor([factors.get(output, 1.0) for output in outputs.tolist()]) if factors else None
        tasks[name] = _Task(
            name=name,
            layer=layer,
            original=original,
            inputs=inputs,
            outputs=outputs,
            scale=scale,
            rows=each,
            positions=positions,
            ridge=strength,
            shape=shape,
            samples=samples,
            hold=hold,
            possible=possible,
        )
    fit, take = (_fold, _dense_inputs) if compensation == "fold" else (_refit, _dense_outputs)
    layers, room = list(tasks), _FOR_TENSORS * limit - equations - listed
    strange = set()

    def taken(name: str, first: int, seen: Seen, gave: Tensor) -> _Goal:
        if not first and not _is_affine(tasks[name].original, seen.read, gave):
            strange.add(name)
        return take(tasks[name], first * tasks[name].rows, seen, gave)

    rows = [_row(name, reason=why) for name, why in refused.items() if why]
    with observed(dense), observed(slim):
        steps = paired(dense, slim, batches, layers, taken, images=images, memory=room)
        for name, goals in bar(steps, compensation, "layer", total=len(layers), shown=progress):
            goals = chain([next(goals)], goals)  # the first one tells
            if name in strange:
                found = math.nan, math.nan, "its output is not its weight times its input plus its bias"
            else:
                found = fit(tasks[name], goals)
            rows.append(_row(name, *found))
    return pd.DataFrame(rows)


def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the running statistics of every BatchNorm as the mean over some batches.

    Args:
        model: model to change in place; its modes and the norms' momentum stay as they were.
        batches: unlabelled images ``[B, …]`` on the model's device.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with observed(model, buffers=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.training = True
        try:
            for number, images in enumerate(batches):
                if not number or len(images) > 1:  # values of one image alone may have no variance
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
                assert isinstance(layer, CONVOLUTIONS + TRANSPOSED)
                inputs = masks[name][0].view(layer.groups, -1)
                inputs[indices[gone].flatten() // (layer.out_channels // layer.groups)] = False
    return {name: (inputs.nonzero()[:, 0], outputs.nonzero()[:, 0]) for name, (inputs, outputs) in masks.items()}


@dataclass(frozen=True, eq=False)
class _Task:
    """A layer to fit.

    Attributes:
        name: name of the layer.
        layer: slim layer.
        original: dense layer.
        inputs: inputs that stay.
        outputs: outputs that stay.
        scale: ``[outputs]``, factors that go with outputs which removal rescales; ``None`` if there are none.
        rows: number of rows of what it reads for an image, which may be frames or windows.
        positions: number of local samples per row, at most.
        ridge: λ.
        shape: number of blocks, of inputs and of errors in each, as for :class:`Ridge`.
        samples: number of samples that memory has room for.
        hold: whether a :class:`Ridge` may hold them.
        possible: number of samples that there are.
    """

    name: str
    layer: nn.Module
    original: nn.Module
    inputs: Tensor
    outputs: Tensor
    scale: Tensor | None
    rows: int
    positions: int
    ridge: float
    shape: tuple[int, int, int]
    samples: int
    possible: int
    hold: bool = True

    def in_blocks(self, values: Tensor) -> Tensor:
        """Values ``[n, C]`` of the outputs, or inputs, as ``[n, G, O]``."""
        return values.view(len(values), self.shape[0], self.shape[2])


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


class _Goal(NamedTuple):
    """What a layer is to be fitted to, for one batch, and the dense input that belongs to it.

    Attributes:
        first: number of the batch's first row.
        values: ``[n, C]``, samples of the dense outputs that stay, or of the dense inputs.
        size: spatial size of the dense output.
        sums: sums of the dense input by channel, by which its like is known.
        beside: ``[n, C]``, samples of what is added to these outputs, see :class:`Passed`; ``None`` if not known.
        counts: ``[C]``, for which of them that counts; ``None`` for all.
    """

    first: int
    values: Tensor
    size: torch.Size
    sums: Tensor
    beside: Tensor | None = None
    counts: Tensor | None = None


class _Sample(NamedTuple):
    """What a layer is fitted with, for some samples.

    Attributes:
        inputs: ``[n, G, F]``, what it reads.
        errors: ``[n, C]``, what it lacks.
        serving: between which values every change serves, see :class:`Ridge`.
        wanted: what the errors are errors of.
    """

    inputs: Tensor
    errors: Tensor
    serving: tuple[Tensor, Tensor] | None
    wanted: Tensor

    def of(self, rows: Tensor) -> _Sample:
        """Some of the samples."""
        serving = None if self.serving is None else (self.serving[0][rows], self.serving[1][rows])
        return _Sample(self.inputs[rows], self.errors[rows], serving, self.wanted[rows])


def _is_affine(layer: nn.Module, read: Tensor, gave: Tensor) -> bool:
    """Return whether a layer's output on the first images is what its class computes from its input."""
    return same_outputs(type(layer).forward(layer, read[:_CHECKED]), gave[:_CHECKED], _CHECK_SHARE)


def _dense_outputs(task: _Task, first: int, seen: Seen, gave: Tensor) -> _Goal:
    """What :func:`_refit` needs."""
    kept, after = task.outputs.to(gave.device), seen.after
    values = _sampled(task, first, gave)[:, kept]
    goal = _Goal(first, values, gave.shape[2:], _sums(task, seen.read))
    if after is None or after.beside is None or after.beside.shape != gave.shape or task.scale is not None:
        return goal
    beside = _sampled(task, first, after.beside)[:, kept]
    return goal._replace(beside=beside, counts=None if after.counts is None else after.counts[kept])


def _dense_inputs(task: _Task, first: int, seen: Seen, gave: Tensor) -> _Goal:
    """What :func:`_fold` needs."""
    return _Goal(first, _sampled(task, first, seen.read), gave.shape[2:], _sums(task, seen.read))


def _sampled(task: _Task, first: int, signal: Tensor) -> Tensor:
    """Return samples ``[n, C]`` of an input or output of a layer, whose first row has a number in the whole set."""
    maps = by_position(task.layer, signal, len(signal), task.name)
    return local_samples(maps, *_places(first, len(maps), maps.shape[2], task.positions))


def _sums(task: _Task, read: Tensor) -> Tensor:
    maps = by_position(task.layer, read, len(read), task.name)
    return maps.to(accumulation_device(maps.device)).sum((0, 2), dtype=torch.float64)


def _shape(layer: nn.Module, original: nn.Module, compensation: Compensation) -> tuple[int, int, int]:
    """Return the number of blocks, of inputs and of errors in each, that the fit of a layer has."""
    weight, whole = layer.weight, original.weight
    assert isinstance(weight, Tensor)
    assert isinstance(whole, Tensor)
    if compensation == "fold":
        return 1, weight.shape[1], whole.shape[1]
    blocks = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    return blocks, weight[0].numel(), len(weight) // blocks


def _samples(name: str, shape: tuple[int, int, int], possible: int, memory: float, itemsize: int) -> int:
    """Return how many samples a layer can be fitted to in half of the memory.

    Raises:
        ValueError: if they are too few.
    """
    samples = samples_within(shape, possible, GIGABYTE * memory / 2, itemsize)
    if samples < min(possible, _FEWEST):
        least = 2 * ridge_bytes(shape, min(possible, _FEWEST), itemsize) / GIGABYTE
        raise ArgumentError(
            f"memory={memory:g}", f"expected at least {_up(least)} GB, half of it for the {shape[1]} inputs of {name!r}"
        )
    if samples < possible:
        needed = 2 * ridge_bytes(shape, possible, itemsize) / GIGABYTE
        warnings.warn(
            f"layer {name!r} has {shape[1]} inputs and is fitted to {samples} of {possible} samples, which memory="
            f"{memory:g} has room for; memory={_up(needed)} has room for all",
            stacklevel=3,
        )
    return samples


def _up(gigabytes: float) -> str:
    """Return a number of gigabytes with two digits, rounded up."""
    return f"{gigabytes * 1.05:.2g}"


def _positions(model: nn.Module, image: Tensor, side: str) -> dict[str, tuple[int, int]]:
    """Return for one image the rows of each layer's input or output, and the number of positions in each row."""
    counts = {}
    for call in calls(model, lambda: model(image)):
        shape = call.input_shape if side == "input" else call.output_shape
        positions = shape[2:] if isinstance(call.module, CONVOLUTIONS) else shape[1:-1]
        counts[call.name] = math.prod(shape[:1]), math.prod(positions)
    return counts


def _row(layer: str, before: float = math.nan, after: float = math.nan, reason: str = "") -> dict[str, object]:
    reason = reason or ("what it was to be fitted to does not vary" if math.isnan(before) else "")
    return {"layer": layer, "before": before, "after": after, "reason": reason}


def _refit(task: _Task, goals: Iterable[tuple[_Goal, Seen]]) -> tuple[float, float, str]:
    """Fit a layer's weights and bias so that its inputs x in the slim network give its dense outputs y.

    Minimises E‖y − Wx − b‖² + λ v ‖W − W₀‖² over W and b, separately for each group of a grouped convolution. W₀ are
    the current weights, v is the mean variance of x. A layer that completes a residual sum makes up for what the other
    term lacks too: y is the dense sum less the slim network's other term. This is the reconstruction of He, Zhang and
    Sun (2017), who treat residual sums so, with ridge. Where a function behind the layer is flat, as a ReLU is below 0,
    an output counts only by how far it lies outside of the flat part.

    Returns:
        The error before and after, and why the layer could not be fitted, else empty; see :func:`compensate`.
    """
    layer, (blocks, features, outputs) = task.layer, task.shape
    kind = torch.promote_types(layer.weight.dtype, torch.float32)  # type: ignore[union-attr,arg-type]
    weight = layer.weight.to(kind).reshape(blocks, outputs, features)  # type: ignore[operator,union-attr]
    bias = weight.new_zeros(blocks, outputs) if layer.bias is None else layer.bias.to(kind).reshape(blocks, outputs)  # type: ignore[operator,union-attr]

    def sample(goal: _Goal, seen: Seen) -> _Sample:
        read = seen.read
        if isinstance(layer, CONVOLUTIONS):
            places = _places(goal.first, len(read), goal.size.numel(), task.positions)
            inputs = patches(layer, read, *places, goal.size)
        else:
            inputs = _sampled(task, goal.first, read)
        given, added, flat = goal.values.to(kind), 0.0, None
        given = given if task.scale is None else given * task.scale.to(given)
        if seen.after is not None:
            flat = seen.after.flat
            if goal.beside is not None and seen.after.beside is not None:
                added = _sampled(task, goal.first, seen.after.beside)
                lacks = goal.beside - added
                given = given + (lacks if goal.counts is None else torch.where(goal.counts, lacks, 0.0))
            elif seen.after.beside is not None:
                flat = None  # it is of a sum with something unknown
        inputs = inputs.to(kind).reshape(len(given), blocks, features)
        made = torch.baddbmm(bias[:, None], inputs.transpose(0, 1), weight.mT).transpose(0, 1)
        errors = given - made.flatten(1)
        serving = None if flat is None else _serving(errors, given + added, flat)
        return _Sample(inputs, errors, serving, given)

    solution, shares = _solve(task, goals, sample)
    if solution is None:
        return 0.0, 0.0, ""
    fitted = layer.weight.reshape(blocks, outputs, features)  # type: ignore[operator,union-attr]
    for columns, change in solution.changes():
        fitted[..., columns] = change + fitted[..., columns].to(change)
    _write(layer, fitted, bias.to(solution.offset) + solution.offset)
    return *shares, ""


def _fold(task: _Task, goals: Iterable[tuple[_Goal, Seen]]) -> tuple[float, float, str]:
    """Predict a layer's dense inputs z from the remaining ones x, and fold the coefficients into its weights.

    Minimises E‖z − Rx − r‖² + λ v ‖R − R₀‖² over R and r, with one R for all positions of the kernel. R₀ passes each
    remaining input on unchanged, v is the mean variance of x. The dense weights W and bias b become WR and b + Wr.

    Returns:
        The error before and after, and why the layer could not be fitted, else empty; see :func:`compensate`.
    """
    layer, original = task.layer, task.original
    if isinstance(original, CONVOLUTIONS) and original.groups > 1:  # of which the slim layer may have a single one
        return math.nan, math.nan, "its outputs read groups of inputs, which have nothing to fold into"

    def sample(goal: _Goal, seen: Seen) -> _Sample:
        kind = torch.promote_types(seen.read.dtype, torch.float32)
        inputs, wanted = _sampled(task, goal.first, seen.read).to(kind), goal.values.to(kind)
        errors = wanted.index_add(1, task.inputs.to(inputs.device), inputs, alpha=-1)
        return _Sample(inputs[:, None], errors, None, wanted)

    solution, shares = _solve(task, goals, sample)
    if solution is None:
        return 0.0, 0.0, ""
    kept, whole = layer.weight, original.weight  # type: ignore[union-attr]
    fitted = kept.reshape(len(kept), len(task.inputs), -1)  # type: ignore[operator,arg-type]
    bias = solution.offset.new_zeros(len(fitted)) if original.bias is None else original.bias[task.outputs]  # type: ignore[index]
    bias = bias.to(solution.offset)
    scale = bias.new_ones(len(bias)) if task.scale is None else task.scale.to(bias)
    bias *= scale
    step = max(1, _WIDENED // whole[0].numel())  # type: ignore[index,operator]
    for rows in torch.arange(len(fitted)).split(step):
        dense = whole[task.outputs[rows]].to(solution.offset).flatten(2 if whole.ndim > 2 else 1)  # type: ignore[index]
        dense = dense.reshape(len(rows), whole.shape[1], -1) * scale[rows, None, None]  # type: ignore[index]
        bias[rows] += torch.einsum("ock,c->o", dense, solution.offset[0])
        for columns, change in solution.changes(dense.mT.reshape(1, -1, whole.shape[1])):  # type: ignore[index]
            change = change.reshape(len(rows), dense.shape[2], -1).mT
            fitted[rows, columns] = (change + dense[:, task.inputs[columns]]).to(fitted)
    _write(layer, fitted, bias)
    return *shares, ""


def _solve(
    task: _Task,
    goals: Iterable[tuple[_Goal, Seen]],
    sample: Callable[[_Goal, Seen], _Sample],
) -> tuple[Solution | None, tuple[float, float]]:
    """Regress the errors of a layer on its inputs, over the batches in which something upstream has changed.

    Args:
        task: what to fit.
        goals: of the layer, with what it sees in the slim network.
        sample: ``(goal, the latter)`` → what to fit.

    Returns:
        ``None`` where there are no such batches; the errors before and after as shares of the variance of the latter.
    """
    regression, spread = Ridge(task.shape, task.samples, task.hold), None
    for goal, seen in goals:
        if not _same(task, goal, seen):
            with true_float32(seen.read.device):
                found = sample(goal, seen)
            if task.samples < task.possible:  # take some of them, evenly spread over the images
                rows = torch.arange(len(found.inputs)) + goal.first * (len(found.inputs) // len(seen.read))
                found = found.of(rows * task.samples % task.possible < task.samples)
            if len(found.inputs):
                part = Moments.of(found.wanted.T[..., None])
                spread = part if spread is None else spread.merge_(part)
                errors, *serving = (task.in_blocks(values) for values in (found.errors, *(found.serving or ())))
                regression.add(found.inputs, errors, (serving[0], serving[1]) if serving else None)
            del found
        del goal, seen  # before the next ones come
    with true_float32(spread.mean.device) if spread is not None else nullcontext():
        solution = regression.solve(task.ridge)
    if solution is None or spread is None:
        return None, (0.0, 0.0)
    total = float(spread.variance.sum())
    return solution, (solution.before / total, solution.after / total) if total else (math.nan, math.nan)


def _serving(errors: Tensor, level: Tensor, flat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the least and the most of the changes ``[n, C]`` that serve a function which is flat in places.

    Args:
        errors: what a layer's outputs lack.
        level: what the function is to get.
        flat: see :class:`Passed`.
    """
    low, high = (end.to(level) for end in flat)
    below, above = level <= low, level >= high
    lower = torch.where(below, -torch.inf, torch.where(above, errors + (high - level), errors))
    upper = torch.where(above, torch.inf, torch.where(below, errors + (low - level), errors))
    return lower, upper


def _places(first: int, count: int, total: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a batch, and the positions sampled in each row, out of ``total``."""
    places = sample_positions(np.arange(first, first + count), total, positions)
    return torch.arange(count), torch.arange(total).expand(count, -1) if places is None else places


def _same(task: _Task, goal: _Goal, seen: Seen) -> bool:
    """Return whether nothing upstream has changed, so that there is nothing to compensate."""
    sums = _sums(task, seen.read)
    if sums.shape != goal.sums.shape or not torch.equal(sums, goal.sums):
        return False
    if goal.beside is None or seen.after is None or seen.after.beside is None:
        return True
    return torch.equal(goal.beside, _sampled(task, goal.first, seen.after.beside))


def _write(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    add_bias(layer)
    if weight.data_ptr() != layer.weight.data_ptr():  # type: ignore[operator,union-attr] # else it is in place already
        layer.weight.copy_(weight.reshape(layer.weight.shape))  # type: ignore[operator,union-attr,arg-type]
    layer.bias.copy_(bias.flatten())  # type: ignore[operator,union-attr,arg-type]
