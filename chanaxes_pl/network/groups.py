"""Dependency groups: which channels can only be removed together. Only this module uses torch-pruning.

A *unit* is a set of coupled channels: a channel of a layer, of the norm behind it and of every layer that a residual
sum couples to it, with the inputs that read it. A :class:`Group` holds all units of a set of coupled layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_pruning import ops

from chanaxes_pl.core.errors import ArgumentError, InputError, naming, nearest
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.network.batches import logits_of
from chanaxes_pl.network.hooks import calls
from chanaxes_pl.network.layers import CONVOLUTIONS
from chanaxes_pl.network.removal import (
    FAILURES,
    Cut,
    Group,
    clone,
    cut_instance_norm,
    cut_layer_norm,
    disagreement,
    remove,
)

_LAYERS = (*CONVOLUTIONS, nn.Linear)
_PRODUCES = (tp.prune_conv_out_channels, tp.prune_depthwise_conv_out_channels, tp.prune_linear_out_channels)
_CONSUMES = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
# Modules that act on every channel separately, so that removing one does not change the others.
_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_CUTTABLE = (nn.Parameter, *_LAYERS, *_CHANNELWISE, nn.LayerNorm)


# A trial removal keeps these shares of each group's units, because some errors show only if few units stay.
_KEPT = (1 / 2, 1 / 12)
# Its logits must agree to this share of the largest one, by the precision that the network computes in.
_AGREE = {torch.float64: 1e-8, torch.float32: 1e-4}
# Cuts of torch-pruning that are wrong → the functions that replace them.
_CUTS: dict[Callable[..., Any], Callable[..., Any]] = {
    tp.prune_layernorm_out_channels: cut_layer_norm,
    tp.prune_instancenorm_out_channels: cut_instance_norm,
}


@dataclass(frozen=True, eq=False)
class Units:
    """All units of a network.

    Attributes:
        groups: name → group of units that can be removed, in the order of execution.
        fixed: name of any other layer → why its channels stay.
    """

    groups: dict[str, Group]
    fixed: dict[str, str]

    def protect(self, patterns: str | Sequence[str]) -> Units:
        """Return the units without the groups that have a producer whose name matches one of some globs.

        Raises:
            ValueError: if a pattern matches no layer.
        """
        patterns = [patterns] if isinstance(patterns, str) else patterns
        names = [name for group in self.groups.values() for name in group.producers] + list(self.fixed)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ArgumentError(f"protect={pattern!r}", f"matches no layer; {nearest(pattern, names)}")
        kept, hit = {}, []
        for name, group in self.groups.items():
            if any(fnmatchcase(producer, pattern) for producer in group.producers for pattern in patterns):
                hit += list(group.producers)
            else:
                kept[name] = group
        return replace(self, groups=kept, fixed=self.fixed | dict.fromkeys(hit, "protected by name"))


def find_units(model: nn.Module, example: Tensor) -> Units:
    """Find the units of a model with torch-pruning's dependency graph, and try their removal on a copy.

    Args:
        model: model to search; it does not change. Of what it gives, only the logits count, see :func:`logits_of`.
        example: ``[B, …]``, an input of the model, on its device.

    Raises:
        ValueError: if the model does not run on the example, or has no channels that can be removed.
    """
    with naming("find_units"):
        copied = clone(model).eval().requires_grad_(True)
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            output = logits_of(_run(copied, example))
            if not isinstance(output, Tensor) or output.grad_fn is None:
                raise InputError(
                    f"{type(model).__name__}(images) gave {type(output).__name__} without a gradient: expected "
                    "logits that autograd can follow back to the weights"
                )
            graph = tp.DependencyGraph()
            graph.build_dependency(copied, example_inputs=(example,), output_transform=logits_of, verbose=False)
        names = {module: name for name, module in copied.named_modules()}
        parameters = {parameter: name for name, parameter in copied.named_parameters()}
        order = {name: place for place, name in enumerate(executed_layers(copied, example))}
        groups, fixed = {}, {}
        for found in graph.get_all_groups():
            producers = [names[dep.target.module] for dep, _ in found.items if dep.handler in _PRODUCES]
            reason = _why_fixed(found)
            if reason or not producers:
                fixed |= dict.fromkeys(producers, reason)
                continue
            group = _group(found, names, parameters, order)
            groups[group.name] = group
        groups = {name: groups[name] for name in sorted(groups, key=order.__getitem__)}
        fixed |= _unreached(copied, {*fixed, *(name for group in groups.values() for name in group.producers)}, order)
        groups, refused = _tried(copied, example, groups)
        fixed |= refused
        if not groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(fixed.items())[:3])
            raise InputError(f"{type(model).__name__} has no channels that can be removed ({why or 'no layers'})")
        return Units(groups, fixed)


def _run(model: nn.Module, example: Tensor) -> Any:
    try:
        return model(example)
    except FAILURES as error:
        raise InputError(
            f"{type(model).__name__} does not run on a {example.dtype} batch of shape "
            f"{tuple(example.shape)} ({error}); pass example_input=a batch of images as the model takes them"
        ) from error


def executed_layers(model: nn.Module, example: Tensor) -> list[str]:
    """List the names of the convolutions and Linear layers in the order in which they run in eval mode."""
    return [call.name for call in calls(model, lambda: model(example)) if isinstance(call.module, _LAYERS)]


def _why_fixed(found: tp.dependency.Group) -> str:
    """Return why a group of torch-pruning cannot be cut, or an empty string."""
    targets = [(dep.target, dep.handler) for dep, _ in found.items]
    if any(isinstance(node.module, ops._OutputOp) for node, _ in targets):
        return "its channels are the network's output"
    if not any(handler in _CONSUMES for _, handler in targets):
        return "no convolution or Linear layer reads it"
    for node, _ in targets:
        if isinstance(node.module, nn.LayerNorm) and len(node.module.normalized_shape) > 1:
            return f"it passes a LayerNorm over {tuple(node.module.normalized_shape)}, which mixes channels"
        # All other modules here are torch-pruning's own stand-ins for operations without weights.
        module, home = node.module, type(node.module).__module__
        if isinstance(module, _CUTTABLE) or home.startswith("torch_pruning"):
            continue
        if any(True for _ in module.parameters()):
            return f"it passes {type(module).__name__}, which mixes channels"
    channels = len(found[0].idxs)
    size = channels // _folds(found)
    if size < 2:
        return "it has a single unit"
    if any(len(item.idxs) % size for item in found.items if isinstance(item.dep.target.module, _CUTTABLE)):
        return "its readers take uneven parts of it"
    return ""


def _unreached(model: nn.Module, known: Container[str], ran: Container[str]) -> dict[str, str]:
    """Return why the layers that torch-pruning misses are fixed; autograd does not lead to them."""
    return {
        name: "no gradient leads from the logits to it"
        if name in ran
        else "the forward pass in eval mode does not call it"
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and name not in known
    }


def _tried(model: nn.Module, example: Tensor, groups: dict[str, Group]) -> tuple[dict[str, Group], dict[str, str]]:
    """Return the groups that can be removed without error, and why the layers of the others are fixed.

    torch-pruning follows shapes. Only a trial shows whether a plain function reorders or mixes channels, or depends on
    their number.

    Args:
        model: copy of the model; its weights are overwritten.
        example: ``[B, …]``, an input of the model.
        groups: name → group.
    """
    generator = torch.Generator().manual_seed(0)
    images = _trial_images(example, generator)
    _shuffle_weights(model, generator)
    exact, reason = _exactness(model, images)
    if reason:
        return {}, {name: reason for group in groups.values() for name in group.producers}
    sound: list[Group] = []
    fixed: dict[str, str] = {}
    # Try all groups at once; if that fails, try each half, down to the groups at fault.
    waiting = [list(groups.values())] if groups else []
    while waiting:
        part = waiting.pop()
        reason = _misfit(model, images, [*sound, *part], exact)
        if not reason:
            sound += part
        elif len(part) == 1:
            fixed |= dict.fromkeys(part[0].producers, reason)
        else:
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
    return {group.name: group for group in sound}, fixed


def _trial_images(example: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Make a batch of noise, shaped like the example, for each trial; integers stay within the example's range."""
    home = accumulation_device(example.device)
    batches = []
    for _ in _KEPT:
        noise = torch.rand(example.shape, generator=generator, dtype=torch.float64).to(home)
        if not example.is_floating_point():
            low, high = int(example.min()), int(example.max())
            noise = (low + noise * (high - low + 1)).floor().to(example.dtype)
        batches.append(noise)
    return batches


@torch.no_grad()
def _shuffle_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Set random float64 weights, so that every path matters: new ConvNeXts scale all their blocks by 1e-6."""
    device = next(model.parameters()).device
    model.eval().to(accumulation_device(device)).double().to(memory_format=torch.contiguous_format)
    if hasattr(model, "memory_format"):  # a Classifier lays out its images by it
        model.memory_format = torch.contiguous_format  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.reset_running_stats()
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        fan = parameter[0].numel() if parameter.ndim > 1 else 0
        parameter.copy_((noise - 0.5) * math.sqrt(24 / fan) if fan else 0.5 + noise)  # He et al. (2015), uniform


class _Narrowing(TorchDispatchMode):
    """Recorder of the dtypes to which a forward pass rounds values of a wider dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        widest = max((_bits(value) for value in tree_leaves((args, kwargs))), default=0)
        self.dtypes |= {value.dtype for value in tree_leaves(output) if 0 < _bits(value) < widest}
        return output


def _bits(value: Any) -> int:
    return torch.finfo(value.dtype).bits if isinstance(value, Tensor) and value.is_floating_point() else 0


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def _exactness(model: nn.Module, images: list[Tensor]) -> tuple[float, str]:
    """Return the share of the largest logit to which a network is exact in its widest dtype, or why it cannot be tried.

    Args:
        model: model; it is converted to that dtype.
        images: batches; floating ones are converted to that dtype.
    """
    failure = ""
    for dtype in _AGREE:
        model.double() if dtype == torch.float64 else model.float()  # these leave complex weights alone
        images[:] = [batch.to(dtype) if batch.is_floating_point() else batch for batch in images]
        try:
            with _Narrowing() as narrowing:
                model(images[0])
        except FAILURES as error:
            failure = failure or f"a removal cannot be tried, because the network does not run in float64 ({error})"
            continue
        coarse = narrowing.dtypes - _AGREE.keys()
        if coarse:
            return 0.0, f"the network rounds to {coarse.pop()} internally, which is too coarse to try a removal"
        return max(_AGREE[found] for found in (dtype, *narrowing.dtypes)), ""
    return 0.0, failure


def _misfit(model: nn.Module, images: list[Tensor], groups: list[Group], exact: float) -> str:
    """Return what goes wrong when many units of some groups are removed; empty if the result equals masking."""
    generator = torch.Generator().manual_seed(0)
    for share, batch in zip(_KEPT, images, strict=True):
        # An odd number, so that the units do not read the same backwards.
        kept = {g.name: torch.randperm(g.size, generator=generator)[: int(g.size * share) | 1] for g in groups}
        slim = clone(model)
        try:
            remove(slim, groups, kept)
        except FAILURES as error:
            return f"some of its channels cannot be removed ({error})"
        if reason := disagreement(model, slim, groups, kept, batch, exact):
            return reason
    return ""


def _group(found: tp.dependency.Group, names: dict, parameters: dict, order: dict[str, int]) -> Group:
    channels = len(found[0].idxs)
    folds = _folds(found)
    size = channels // folds
    # Around grouped convolutions, a unit has the same place in every group, so that groups keep equal sizes.
    unit_of = torch.arange(channels) % size
    members: dict[str, dict[str, Tensor]] = {"producers": {}, "consumers": {}, "layer_norms": {}}
    cuts = []
    for item in found.items:
        dep, idxs = item.dep, item.idxs
        module, handler = dep.target.module, dep.handler
        if not isinstance(module, _CUTTABLE) or not len(idxs):
            continue
        roots = torch.tensor(item.root_idxs)
        by_unit = torch.argsort(unit_of[roots], stable=True)
        indices = torch.tensor(idxs)[by_unit].reshape(size, -1)
        path = parameters[module] if isinstance(module, nn.Parameter) else names[module]
        dimension = dep.target.pruning_dim if isinstance(module, nn.Parameter) else None
        cuts.append(Cut(path, _CUTS.get(handler) or handler, dimension, indices))
        if handler in _PRODUCES:
            members["producers"][path] = indices
        elif handler in _CONSUMES:
            members["consumers"][path] = indices
        elif isinstance(module, nn.LayerNorm):
            members["layer_norms"][path] = indices
    for kind, held in members.items():
        members[kind] = {name: held[name] for name in sorted(held, key=lambda name: order.get(name, -1))}
    return Group(next(iter(members["producers"])), size, **members, cuts=tuple(cuts))


def _folds(found: tp.dependency.Group) -> int:
    """Return the number of groups of the grouped convolutions in a group, or 1 if there are none."""
    folds = 1
    for dep, _ in found.items:
        module = dep.target.module
        depthwise = dep.handler == tp.prune_depthwise_conv_out_channels
        if isinstance(module, CONVOLUTIONS) and not depthwise and dep.handler in (*_PRODUCES, *_CONSUMES):
            folds = math.lcm(folds, module.groups)
    return folds
