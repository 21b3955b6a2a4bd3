"""Which channels can only be removed together: the only door to torch-pruning.

A *unit* is a set of coupled channels: the channel of a layer, of the norm behind it, of every layer that a residual
sum ties to it, and the inputs that read it. A :class:`Group` holds all units of a set of coupled layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from chanaxes_pl.network.layers import CONVOLUTIONS
from chanaxes_pl.network.removal import Cut, Group, masked, remove, twin

_LAYERS = (*CONVOLUTIONS, nn.Linear)
_PRODUCES = (tp.prune_conv_out_channels, tp.prune_depthwise_conv_out_channels, tp.prune_linear_out_channels)
_CONSUMES = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
# Act on every channel by itself, so that a removed channel leaves the others as they are.
_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_CUTTABLE = (nn.Parameter, *_LAYERS, *_CHANNELWISE, nn.LayerNorm)


# What a network may raise that is given other images, or fewer channels, than it was written for.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
# A removal may change the trial's logits by this share of the largest, against the same channels at 0.
_AGREE = 1e-4


@dataclass(frozen=True, eq=False)
class Units:
    """All units of a network.

    Attributes:
        groups: those that can be removed, by name, in order of execution.
        fixed: why the channels of other layers stay, by the layer's name.
    """

    groups: dict[str, Group]
    fixed: dict[str, str]

    def protect(self, patterns: Sequence[str], caller: str = "protect") -> Units:
        """Without the groups that have a producer whose name matches one of some globs.

        Raises:
            ValueError: if a pattern matches no layer.
        """
        names = [name for group in self.groups.values() for name in group.producers] + list(self.fixed)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=2) or names[:3]
                raise ValueError(
                    f"{caller}(protect={pattern!r}): matches no layer; did you mean {' or '.join(map(repr, near))}?"
                )
        kept, hit = {}, []
        for name, group in self.groups.items():
            if any(fnmatchcase(producer, pattern) for producer in group.producers for pattern in patterns):
                hit += list(group.producers)
            else:
                kept[name] = group
        return replace(self, groups=kept, fixed=self.fixed | dict.fromkeys(hit, "protected by name"))


def find_units(model: nn.Module, example: Tensor, caller: str = "find_units") -> Units:
    """The units of a model, from torch-pruning's dependency graph of one forward pass, each tried out on a copy.

    Args:
        model: left as it is.
        example: ``[B, …]``, an input of the model, on its device.
        caller: how an error names the call.

    Raises:
        ValueError: if the model does not run on the example, or has no channels that could be removed.
    """
    copied = twin(model).eval().requires_grad_(True)
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        output = _run(copied, example, caller)
        if not isinstance(output, Tensor) or output.grad_fn is None:
            raise ValueError(
                f"{caller}: {type(model).__name__}(images) gave {type(output).__name__} without a gradient: expected "
                "logits that autograd can follow back to the weights"
            )
        graph = tp.DependencyGraph()
        graph.build_dependency(copied, example_inputs=(example,), verbose=False)
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
    groups, refused = _tried(copied, example, groups)
    fixed |= refused
    if not groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(fixed.items())[:3])
        raise ValueError(f"{caller}: {type(model).__name__} has no channels that can be removed ({why or 'no layers'})")
    return Units(groups, fixed)


# Within one layer, by itself: no average over a group (there is one member), no division by its mean.
_PLAIN: dict[str, Any] = {"group_reduction": "mean", "normalizer": None}
#: Baselines that torch-pruning has.
LIBRARY_SCORES: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.MagnitudeImportance(p=1, **_PLAIN),
    "l2": lambda: tp.importance.MagnitudeImportance(p=2, **_PLAIN),
    "bn_scale": lambda: tp.importance.BNScaleImportance(**_PLAIN),
    "fpgm": lambda: tp.importance.FPGMImportance(**_PLAIN),
    "lamp": lambda: tp.importance.LAMPImportance(),
    "taylor": lambda: tp.importance.TaylorImportance(**_PLAIN),
}


def library_importance(score: str, module: nn.Module) -> Tensor:
    """``[C]``: torch-pruning's score of a module's output channels; low = remove.

    Args:
        score: a key of :data:`LIBRARY_SCORES`.
        module: a convolution or Linear, with gradients for ``"taylor"``; for ``"bn_scale"`` the BatchNorm behind it.
    """
    function: Callable[..., Any] = tp.prune_conv_out_channels
    if isinstance(module, nn.Linear):
        function = tp.prune_linear_out_channels
    elif score == "bn_scale":
        function = tp.prune_batchnorm_out_channels
    node = tp.dependency.Node(module, None)
    channels = list(range(len(module.weight)))  # type: ignore[arg-type]
    group = tp.dependency.Group()
    group.add_dep(tp.dependency.Dependency(function, function, node, node), channels)
    group[0].root_idxs = channels
    importance = LIBRARY_SCORES[score]()(group)
    return importance.detach()


def _run(model: nn.Module, example: Tensor, caller: str) -> Any:
    try:
        return model(example)
    except _FAILURES as error:
        raise ValueError(
            f"{caller}: {type(model).__name__} does not run on a {example.dtype} batch of shape "
            f"{tuple(example.shape)} ({error}); pass example_input=a batch of images as the model takes them"
        ) from error


def executed_layers(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the convolutions and Linear layers in the order in which they run."""
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return names


def _why_fixed(found: tp.dependency.Group) -> str:
    """Why a group of torch-pruning's cannot be cut; empty where it can."""
    targets = [(dep.target, dep.handler) for dep, _ in found.items]
    if any(isinstance(node.module, ops._OutputOp) for node, _ in targets):
        return "its channels are the network's output"
    if not any(handler in _CONSUMES for _, handler in targets):
        return "no convolution or Linear layer reads it"
    for node, _ in targets:
        # Everything else that torch-pruning puts there are its own stand-ins for operations without weights.
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


def _tried(model: nn.Module, example: Tensor, groups: dict[str, Group]) -> tuple[dict[str, Group], dict[str, str]]:
    """The groups whose removal works out, and why the layers of others are fixed.

    torch-pruning follows shapes: what reorders or mixes channels by a plain function, or holds their number, shows only
    when a removal is tried.

    Args:
        model: a copy to be spoilt.
        example: ``[B, …]``.
        groups: by name.
    """
    generator = torch.Generator().manual_seed(0)
    _shuffle_weights(model, generator)
    images = example
    if example.is_floating_point():
        images = torch.rand(example.shape, generator=generator).to(example.device)
    if not _misfit(model, images, groups.values()):
        return groups, {}
    sound: dict[str, Group] = {}
    fixed: dict[str, str] = {}
    for name, group in groups.items():
        if reason := _misfit(model, images, [*sound.values(), group]):
            fixed |= dict.fromkeys(group.producers, reason)
        else:
            sound[name] = group
    return sound, fixed


@torch.no_grad()
def _shuffle_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Random float32 weights, so that no path is silent: new ConvNeXts, for one, scale all their blocks by 1e-6."""
    model.eval().float().to(memory_format=torch.contiguous_format)
    if hasattr(model, "memory_format"):  # a Classifier lays its images out by it
        model.memory_format = torch.contiguous_format  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.reset_running_stats()
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator)
        fan = parameter[0].numel() if parameter.ndim > 1 else 0
        parameter.copy_((noise - 0.5) * math.sqrt(24 / fan) if fan else 0.5 + noise)  # He et al. (2015), uniform


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def _misfit(model: nn.Module, images: Tensor, groups: Iterable[Group]) -> str:
    """What is wrong with a network that loses half of the units of some groups; empty where it is as if masked."""
    groups, generator = list(groups), torch.Generator().manual_seed(0)
    counts = {group.name: (group.size // 2 - 1) | 1 for group in groups}  # odd: not the same when read backwards
    kept = {group.name: torch.randperm(group.size, generator=generator)[: counts[group.name]] for group in groups}
    slim = twin(model)
    try:
        remove(slim, groups, kept)
        after = slim(images)
        with masked(model, groups, kept):
            before = model(images)
    except _FAILURES as error:
        return f"the network does not run without some of its channels ({error})"
    close = torch.allclose(after, before, rtol=0, atol=_AGREE * float(before.abs().max()), equal_nan=True)
    return "" if close else "without some of its channels, the others are read in another way"


def _group(found: tp.dependency.Group, names: dict, parameters: dict, order: dict[str, int]) -> Group:
    channels = len(found[0].idxs)
    folds = _folds(found)
    size = channels // folds
    # Around grouped convolutions a unit takes the same place in every group, so that groups stay of one size.
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
        cuts.append(Cut(path, handler, dimension, indices))
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
    """The number of groups of the grouped convolutions that a group touches, 1 where there is none."""
    folds = 1
    for dep, _ in found.items:
        module = dep.target.module
        depthwise = dep.handler == tp.prune_depthwise_conv_out_channels
        if isinstance(module, CONVOLUTIONS) and not depthwise and dep.handler in (*_PRODUCES, *_CONSUMES):
            folds = math.lcm(folds, module.groups)
    return folds
