"""Units of coupled channels, their removal for good, and the mask that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Cut:
    """What removal does to one module or parameter.

    Attributes:
        path: its name in the model.
        function: torch-pruning's function that cuts it.
        dimension: of a bare parameter, ``None`` for a module.
        indices: ``[U, k]``, what goes with each unit.
    """

    path: str
    function: Callable[..., Any]
    dimension: int | None
    indices: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """The units of some coupled layers.

    Attributes:
        name: of the first layer that produces the channels.
        size: U, the number of units.
        producers: layer name → ``[U, k]``, the output channels of each unit; k > 1 around grouped convolutions only.
        consumers: layer name → ``[U, k]``, the inputs that read each unit; k > 1 behind a flattened map too.
        layer_norms: module name → ``[U, k]``, the normalised features of each unit.
        cuts: all that removal changes.
    """

    name: str
    size: int
    producers: dict[str, Tensor]
    consumers: dict[str, Tensor]
    layer_norms: dict[str, Tensor]
    cuts: tuple[Cut, ...]


def twin(model: nn.Module) -> nn.Module:
    """A deep copy of a model, without the Trainer that a LightningModule may be attached to."""
    return copy.deepcopy(model, {id(getattr(model, "_trainer", None)): None})


def remove(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> None:
    """Cut units out of a model for good, in place.

    Args:
        model: of the class and shape that the groups were found in.
        groups: of the model.
        kept: group name → ``[r]``, the units that stay; a group that is not named stays whole.
    """
    # One cut a module and side: a concatenation's reader loses inputs with several groups, and numbers shift.
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
        keep = [index for index in range(parameter.shape[cut.dimension]) if index not in set(indices)]
        slim = parameter.detach().index_select(cut.dimension, torch.tensor(keep, device=parameter.device))
        setattr(model.get_submodule(home), leaf, nn.Parameter(slim))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # torch-pruning makes the new ones trainable
    _avoid_crash(model)


def _avoid_crash(model: nn.Module) -> None:
    """Give up NHWC order in networks that have become too narrow for it on a CPU."""
    if not crashes_channels_last(model):
        return
    model.to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if getattr(module, "memory_format", None) is torch.channels_last:  # a classifier lays its images out by it
            module.memory_format = torch.contiguous_format  # type: ignore[assignment]


@contextmanager
def masked(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """A model that computes what it would without some of its units, and is as before afterwards.

    What reads a unit reads 0, and a LayerNorm is taken over the features that stay: exactly what :func:`remove` does.

    Args:
        model: of the class and shape that the groups were found in.
        groups: of the model.
        kept: group name → ``[r]``, the units that stay; a group that is not named stays whole.
    """
    read: dict[str, list[Tensor]] = {}
    normed: dict[str, list[Tensor]] = {}
    for group, gone in _gone(groups, kept):
        for home, members in ((read, group.consumers), (normed, group.layer_norms)):
            for name, indices in members.items():
                home.setdefault(name, []).append(indices[gone].flatten())
    handles = []
    try:
        for name, parts in read.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(partial(_blank, torch.cat(parts))))
        for name, parts in normed.items():
            handles.append(model.get_submodule(name).register_forward_hook(partial(_norm_rest, torch.cat(parts))))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """A LayerNorm's output over the features that stay, 0 for the others."""
    # Subclasses that torchvision and others call LayerNorm2d take [B, C, H, W].
    channel = -1 if type(norm).forward is nn.LayerNorm.forward else 1
    features = inputs[0].movedim(channel, -1)
    mask = torch.ones(features.shape[-1], dtype=torch.bool, device=features.device)
    mask[gone] = False
    weight, bias = (None if p is None else p[mask] for p in (norm.weight, norm.bias))
    rest = F.layer_norm(features[..., mask], (int(mask.sum()),), weight, bias, norm.eps)
    whole = torch.zeros_like(features)
    whole[..., mask] = rest
    return whole.movedim(-1, channel)


def crashes_channels_last(network: nn.Module) -> str:
    """Name of a layer that corrupts the heap in PyTorch's CPU kernels (seen in 2.15) when maps are in NHWC order.

    These are strided 1×1 convolutions of fewer than 8 inputs: wrong silently, or a crash later. Empty if there is none.
    """
    for name, layer in network.named_modules():
        narrow = isinstance(layer, nn.Conv2d) and layer.in_channels < 8 and layer.groups == 1
        if narrow and layer.kernel_size == (1, 1) and layer.stride != (1, 1):
            return name
    return ""
