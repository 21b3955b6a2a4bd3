"""Units of coupled channels, their removal for good, and the mask that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.network.hooks import hooked, observed, same_outputs
from chanaxes_pl.network.layers import channel_count

#: What a network may raise that is given other images, or fewer channels, than it was written for.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True, eq=False)
class Cut:
    """What removal does to one module or parameter.

    Attributes:
        path: its name in the model.
        function: removes indices from the module in place; torch-pruning's, or one of ours where that is wrong.
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


def clone(model: nn.Module) -> nn.Module:
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
        keep = _rest(parameter.shape[cut.dimension], indices).to(parameter.device)
        slim = parameter.detach().index_select(cut.dimension, keep)
        setattr(model.get_submodule(home), leaf, nn.Parameter(slim))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # torch-pruning makes the new ones trainable
    avoid_crash(model)


def avoid_crash(model: nn.Module) -> None:
    """Give up NHWC order in networks that have become too narrow for it on a CPU."""
    if not crashes_channels_last(model):
        return
    model.to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if getattr(module, "memory_format", None) is torch.channels_last:  # a classifier lays its images out by it
            module.memory_format = torch.contiguous_format  # type: ignore[assignment]


def add_bias(layer: nn.Module) -> None:
    """Give a convolution or Linear layer a bias of zeros, where it has none.

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
    blanks = ((model.get_submodule(name), partial(_blank, torch.cat(parts))) for name, parts in read.items())
    norms = ((model.get_submodule(name), partial(_norm_rest, torch.cat(parts))) for name, parts in normed.items())
    with hooked(blanks, before=True), hooked(norms):
        yield


def disagreement(
    model: nn.Module, slim: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor], images: Tensor, share: float
) -> str:
    """Why a slim network does not compute what the dense one does without the removed units; empty where it does.

    Args:
        model: the dense network; left as it is.
        slim: a copy of it after :func:`remove`; left as it is.
        groups: of the model.
        kept: what the slim network kept of them.
        images: ``[B, …]``, on the device of both.
        share: of the largest logit by which logits may differ.
    """
    groups = list(groups)
    with observed(model), observed(slim):
        try:
            found = slim(images)
            with masked(model, groups, kept):
                wanted = model(images)
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

    torch-pruning's own function keeps the order of a Python set: it shuffles scale and shift where few features stay.
    """
    keep = _rest(norm.normalized_shape[-1], gone)
    _cut_tensors(norm, ("weight", "bias"), keep)
    norm.normalized_shape = (len(keep),)


def cut_instance_norm(norm: nn.modules.instancenorm._InstanceNorm, gone: Sequence[int]) -> None:
    """Remove channels from an InstanceNorm, in place; torch-pruning's own function leaves running statistics whole."""
    keep = _rest(norm.num_features, gone)
    _cut_tensors(norm, ("weight", "bias", "running_mean", "running_var"), keep)
    norm.num_features = len(keep)


def _rest(size: int, gone: Sequence[int]) -> Tensor:
    """``[size − len(gone)]``: the other indices, ascending."""
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
    """A LayerNorm's output over the features that stay, 0 for the others."""
    # Subclasses that torchvision and others call LayerNorm2d take [B, C, H, W].
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
    """Name of a layer that corrupts the heap in PyTorch's CPU kernels (seen in 2.15) when maps are in NHWC order.

    These are strided 1×1 convolutions of fewer than 8 inputs: wrong silently, or a crash later. Empty if there is none.
    """
    for name, layer in network.named_modules():
        narrow = isinstance(layer, nn.Conv2d) and layer.in_channels < 8 and layer.groups == 1
        if narrow and layer.kernel_size == (1, 1) and layer.stride != (1, 1):
            return name
    return ""
