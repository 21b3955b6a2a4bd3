"""Units of coupled channels, their removal, and a mask that computes the same."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import ProxyTypes, ReferenceType

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.network.batches import logits_of
from chanaxes_pl.network.hooks import hooked, observed, same_outputs
from chanaxes_pl.network.layers import channel_count

#: Errors that a network may raise on other images, or with fewer channels, than it was written for.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)

# What a copy of a model never changes, or what copy.deepcopy shares.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.ndarray, torch.dtype, torch.device)
_ATOMIC = (type, FunctionType, BuiltinFunctionType, ReferenceType, property, range)
# What leads on to other parts of a model; an object of another class is copied or shared as a whole.
_OPEN = (dict, list, tuple, set, frozenset, deque, partial, MethodType, nn.Module)


@dataclass(frozen=True, eq=False)
class Cut:
    """Removal of units from one module or parameter.

    Attributes:
        path: name of the module or parameter in the model.
        function: function that removes indices from the module in place, from torch-pruning or this module.
        dimension: dimension of a bare parameter to cut; ``None`` for a module.
        indices: ``[U, k]``, indices that go with each unit.
    """

    path: str
    function: Callable[..., Any]
    dimension: int | None
    indices: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Dependency group: the units of some coupled layers.

    Attributes:
        name: name of the first layer that produces the channels.
        size: U, the number of units.
        producers: layer name → ``[U, k]``, output channels of each unit; k > 1 only around grouped convolutions.
        consumers: layer name → ``[U, k]``, inputs that read each unit; k > 1 also behind a flattened map.
        layer_norms: module name → ``[U, k]``, normalised features of each unit.
        cuts: removal of units from every module and parameter that they touch.
    """

    name: str
    size: int
    producers: dict[str, Tensor]
    consumers: dict[str, Tensor]
    layer_norms: dict[str, Tensor]
    cuts: tuple[Cut, ...]


def clone(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares no module, parameter, buffer or container with it.

    What leads from one part of the model to another leads to the same part of the copy: tied parameters, modules in
    plain lists and dicts, bound methods such as hooks. Tensors that an operation gave, such as the last logits, are
    copied without their history, and gradients are left out. A Trainer is left as ``None``. What cannot be copied is
    shared with the model: locks, open files, generators, and an object that holds such a thing, unless a module is in
    it too. Data sets and their loaders are shared as well. Functions and weak references lead where they led.

    Raises:
        ValueError: if an object in the model refuses to be copied.
    """
    memo, _alive = _kept_apart(model)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # of any __deepcopy__ or __setstate__
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): expected a module that "
            "copy.deepcopy takes; keep what cannot be copied out of it, or give its class a __getstate__ without it"
        ) from error


def _kept_apart(model: nn.Module) -> tuple[dict[int, Any], list[Any]]:
    """Return the memo of ``copy.deepcopy``: what stands for each object that is not copied as usual.

    The ids in it hold as long as the second result lives.
    """
    memo: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        stand_in, parts = _taken(value)
        if parts is None:
            memo[id(value)] = stand_in
        elif isinstance(value, _OPEN) or not _is_shared(parts):
            waiting += parts
        else:
            memo[id(value)] = value
    return memo, list(seen.values())


def _is_shared(parts: Iterable[Any]) -> bool:
    """Return whether an object of such parts is shared: some part cannot be copied, and none is of a model."""
    seen: dict[int, Any] = {}
    waiting, shared = list(parts), False
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (nn.Module, nn.Parameter)):
            return False
        stand_in, inside = _taken(value)
        shared = shared or (inside is None and (stand_in is None or stand_in is value))
        waiting += inside or ()
    return shared


def _taken(value: Any) -> tuple[Any, list[Any] | None]:
    """Return what stands for a value in a copy, and ``None``; where it is copied as usual, the parts to go on with."""
    if isinstance(value, ProxyTypes):
        return (None if isinstance(value, Trainer) else value), None
    if isinstance(value, Trainer):
        return None, None
    if isinstance(value, Tensor):
        # Of tensors, deepcopy refuses those with a history, and copies gradients; of parameters it does neither.
        if isinstance(value, nn.Parameter) or (value.is_leaf and value.grad is None):
            return value, []
        return value.detach().clone().requires_grad_(value.is_leaf and value.requires_grad), None
    if isinstance(value, torch.Generator):
        return value.clone_state(), None
    if isinstance(value, dict):
        return value, [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value, list(value)
    if isinstance(value, MethodType):
        return value, [value.__self__]
    if isinstance(value, nn.Module):
        return value, [vars(value)]
    if isinstance(value, (Dataset, DataLoader)):
        return value, None
    if isinstance(value, _ATOMIC) or hasattr(value, "__deepcopy__"):
        return value, []
    try:
        made = value.__reduce_ex__(4)
    except Exception:  # whatever its class raises, copy.deepcopy would raise
        return value, None
    return value, [] if isinstance(made, str) else [list(p) if isinstance(p, Iterator) else p for p in made[1:]]


def remove(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> None:
    """Remove units from a model in place.

    Args:
        model: model with the class and shapes that the groups were found in.
        groups: the model's groups.
        kept: group name → ``[r]``, the units that stay; a group that is not named stays whole.
    """
    # One cut per module and side: the reader of a concatenation loses inputs of several groups, and cuts shift indices.
    cuts: dict[tuple[str, Callable[..., Any]], tuple[Cut, list[Tensor]]] = {}
    for group, gone in _gone(groups, kept):
        for cut in group.cuts:
            cuts.setdefault((cut.path, cut.function), (cut, []))[1].append(cut.indices[gone].flatten())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    for cut, parts in cuts.values():
        indices = sorted(set(torch.cat(parts).tolist()))
        if cut.dimension is None:
            cut.function(model.get_submodule(cut.path), indices)
            continue
        home, _, leaf = cut.path.rpartition(".")
        parameter = model.get_parameter(cut.path)
        keep = _rest(parameter.shape[cut.dimension], indices).to(parameter.device)
        slim = parameter.detach().index_select(cut.dimension, keep)
        setattr(model.get_submodule(home), leaf, nn.Parameter(slim))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # torch-pruning makes the new ones trainable
    avoid_crash(model)


def avoid_crash(model: nn.Module) -> None:
    """Convert a network to NCHW order if it has become too narrow for NHWC on a CPU."""
    if not crashes_channels_last(model):
        return
    model.to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if getattr(module, "memory_format", None) is torch.channels_last:  # a Classifier lays out its images by it
            module.memory_format = torch.contiguous_format  # type: ignore[assignment]


def add_bias(layer: nn.Module) -> None:
    """Give a convolution or Linear layer a bias of zeros if it has none.

    Example:
        >>> layer = nn.Conv2d(3, 2, 1, bias=False)
        >>> add_bias(layer)
        >>> layer.bias
        Parameter containing:
        tensor([0., 0.], requires_grad=True)
    """
    if layer.bias is None:
        assert isinstance(layer.weight, Tensor)
        layer.bias = nn.Parameter(layer.weight.new_zeros(channel_count(layer)))


@contextmanager
def masked(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Mask units of a model inside the block, so that it computes what it would after :func:`remove`.

    The consumers of a masked unit read 0, and a LayerNorm runs over the features that stay.

    Args:
        model: model with the class and shapes that the groups were found in.
        groups: the model's groups.
        kept: group name → ``[r]``, the units that stay; a group that is not named stays whole.
    """
    read: dict[str, list[Tensor]] = {}
    normed: dict[str, list[Tensor]] = {}
    for group, gone in _gone(groups, kept):
        for home, members in ((read, group.consumers), (normed, group.layer_norms)):
            for name, indices in members.items():
                home.setdefault(name, []).append(indices[gone].flatten())
    blanks = ((model.get_submodule(name), partial(_blank, torch.cat(parts))) for name, parts in read.items())
    norms = ((model.get_submodule(name), partial(_norm_rest, torch.cat(parts))) for name, parts in normed.items())
    with hooked(blanks, before=True), hooked(norms):
        yield


def disagreement(
    model: nn.Module, slim: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor], images: Tensor, share: float
) -> str:
    """Return how a slim network differs from the masked dense network, or an empty string if it does not.

    Args:
        model: dense network; it does not change.
        slim: copy of the dense network after :func:`remove`; it does not change.
        groups: the dense network's groups.
        kept: group name → the units that the slim network kept.
        images: ``[B, …]`` images on the device of both networks.
        share: share of the largest logit by which logits may differ.
    """
    groups = list(groups)
    with observed(model), observed(slim):
        try:
            found = logits_of(slim(images))
            with masked(model, groups, kept):
                wanted = logits_of(model(images))
        except FAILURES as error:
            return f"the network does not run without some of its channels ({error})"
    if same_outputs(found, wanted, share):
        return ""
    if found.shape != wanted.shape:
        return f"without some of its channels logits are {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return f"removing some of its channels changes how the others are used: logits are off by {off:.1g} of the largest"


def cut_layer_norm(norm: nn.LayerNorm, gone: Sequence[int]) -> None:
    """Remove features from a LayerNorm over one dimension, in place.

    torch-pruning's own function uses the order of a Python set, which shuffles scale and shift if few features stay.
    """
    keep = _rest(norm.normalized_shape[-1], gone)
    _cut_tensors(norm, ("weight", "bias"), keep)
    norm.normalized_shape = (len(keep),)


def cut_instance_norm(norm: nn.modules.instancenorm._InstanceNorm, gone: Sequence[int]) -> None:
    """Remove channels from an InstanceNorm in place; torch-pruning's own function keeps all running statistics."""
    keep = _rest(norm.num_features, gone)
    _cut_tensors(norm, ("weight", "bias", "running_mean", "running_var"), keep)
    norm.num_features = len(keep)


def _rest(size: int, gone: Sequence[int]) -> Tensor:
    """Return the other indices, ascending, ``[size − len(gone)]``."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[list(gone)] = False
    return stays.nonzero()[:, 0]


def _cut_tensors(module: nn.Module, names: Iterable[str], keep: Tensor) -> None:
    for name in names:
        if (whole := getattr(module, name)) is not None:
            slim = whole.detach().index_select(0, keep.to(whole.device))
            setattr(module, name, nn.Parameter(slim) if isinstance(whole, nn.Parameter) else slim)


def _gone(groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Iterator[tuple[Group, Tensor]]:
    for group in groups:
        if group.name in kept and len(kept[group.name]) < group.size:
            mask = torch.ones(group.size, dtype=torch.bool)
            mask[kept[group.name]] = False
            yield group, mask.nonzero()[:, 0]


def _blank(gone: Tensor, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = inputs
    dimension = -1 if isinstance(layer, nn.Linear) else 1
    return (first.index_fill(dimension, gone.to(first.device), 0.0), *others)


def _norm_rest(gone: Tensor, norm: nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return a LayerNorm's output over the features that stay, and 0 for the others."""
    # Subclasses such as torchvision's LayerNorm2d take [B, C, H, W].
    own = type(norm).forward is not nn.LayerNorm.forward
    channel = 1 if own and inputs[0].ndim == 4 and inputs[0].shape[1] == norm.normalized_shape[0] else -1
    features = inputs[0].movedim(channel, -1)
    mask = torch.ones(features.shape[-1], dtype=torch.bool, device=features.device)
    mask[gone] = False
    weight, bias = (None if p is None else p[mask] for p in (norm.weight, norm.bias))
    rest = F.layer_norm(features[..., mask], (int(mask.sum()),), weight, bias, norm.eps)
    whole = torch.zeros_like(features)
    whole[..., mask] = rest
    return whole.movedim(-1, channel)


def crashes_channels_last(network: nn.Module) -> str:
    """Return the name of a layer that corrupts the heap in PyTorch's CPU kernels (seen in 2.15) with NHWC maps, or "".

    Such layers are strided 1×1 convolutions with fewer than 8 inputs; they give wrong outputs, or crash later.
    """
    for name, layer in network.named_modules():
        narrow = isinstance(layer, nn.Conv2d) and layer.in_channels < 8 and layer.groups == 1
        if narrow and layer.kernel_size == (1, 1) and layer.stride != (1, 1):
            return name
    return ""
