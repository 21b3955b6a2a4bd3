"""Units of coupled channels, their removal, and a mask that computes the same."""

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

#: Errors that a network may raise on other images, or with fewer channels, than it was written for.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


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
    """Return a deep copy of a model, without the Trainer that a LightningModule may be attached to."""
    return copy.deepcopy(model, {id(getattr(model, "_trainer", None)): None})


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
