"""Units of coupled channels, their removal, and a mask that computes the same."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.network.batches import FAILURES, logits_of
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import hooked, observed, same_outputs
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED, channel_count, crashes_channels_last
from chanaxes_pl.units.flow import LAYER_NORMS, goes_by_groups, width


@dataclass(frozen=True, eq=False)
class Cut:
    """Removal of units along one dimension of a tensor, or of the features of a norm.

    Attributes:
        path: name of the parameter, buffer or norm in the model.
        dimension: dimension of the tensor; ``None`` for the features of a norm.
        indices: ``[U, k]``, indices that go with each unit.
        reads: whether these are the columns of a weight that read the units, or the rows of a weight, or of its bias,
            whose outputs a product sums over.
        scaled: indices that are multiplied by √(share of the units that stays), because the code divides by its root.
    """

    path: str
    dimension: int | None
    indices: Tensor
    reads: bool
    scaled: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Dependency group: the units of some coupled layers.

    Attributes:
        name: name of the first layer that produces the channels; a further group of that layer adds ``#2``.
        size: U, the number of units.
        producers: layer name → ``[U, k]``, output channels of each unit; k > 1 around grouped convolutions and heads.
        consumers: layer name → ``[U, k]``, inputs that read each unit; k > 1 also behind a flattened map.
        layer_norms: name of a norm over the units → ``[U, k]``, normalised features of each unit.
        cuts: removal of units from every tensor and norm that they touch.
        attributes: names of integer attributes that shrink alike, such as a number of heads.
    """

    name: str
    size: int
    producers: dict[str, Tensor]
    consumers: dict[str, Tensor]
    layer_norms: dict[str, Tensor]
    cuts: tuple[Cut, ...]
    attributes: tuple[str, ...] = ()

    @property
    def layer(self) -> str:
        """Name of the first layer that produces the channels."""
        return self.name.partition("#")[0]

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the modules that compute something else, or whose parameters a function reads, with masked units."""
        read = (cut.path.rpartition(".")[0] for cut in self.cuts if cut.reads)
        return tuple(dict.fromkeys([*self.consumers, *self.layer_norms, *read]))


def remove(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> None:
    """Remove units from a model in place.

    Args:
        model: model with the class and shapes that the groups were found in.
        groups: the model's groups.
        kept: group name → ``[r]``, the units that stay; a group that is not named stays whole.
    """
    tensors: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    norms: dict[str, int] = Counter()
    groups = list(groups)
    attributes: list[tuple[str, int, int]] = []
    for group, gone in _gone(groups, kept):
        for cut in group.cuts:
            if cut.dimension is None:
                norms[cut.path] += cut.indices[gone].numel()
            else:
                tensors[cut.path, cut.dimension].append(cut.indices[gone].flatten())
        attributes += [(path, group.size - len(gone), group.size) for path in group.attributes]
    holders = _holders(model, (path for path, _ in tensors))
    scales = row_scales(groups, kept)
    for (path, dimension), parts in tensors.items():
        old = holders[path][0]
        if dimension == 0:
            old = _scaled(old, scales.get(path))
        slim = old.detach().index_select(dimension, _rest(old.shape[dimension], torch.cat(parts)).to(old.device))
        slim = slim.contiguous(memory_format=memory_format(old))
        slim = nn.Parameter(slim, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else slim
        for module, leaf in holders[path][1]:
            setattr(module, leaf, slim)
        holders[path] = slim, holders[path][1]
    for name, module in model.named_modules():
        resize(module, width(module) - norms[name] if name in norms else None)
    for path, left, size in attributes:
        home, _, leaf = path.rpartition(".")
        module = model.get_submodule(home)
        setattr(module, leaf, getattr(module, leaf) * left // size)
    avoid_crash(model)


def without(model: nn.Module, groups: Sequence[Group], removed: np.ndarray) -> nn.Module:
    """Return a copy of a model without the first units of each group.

    Args:
        model: dense network; it does not change.
        groups: its removable groups.
        removed: ``[G]``, how many units each group loses.
    """
    slim = clone(model)
    remove(slim, groups, {g.name: torch.arange(int(lost), g.size) for g, lost in zip(groups, removed, strict=True)})
    return slim


def row_scales(groups: Iterable[Group], kept: Mapping[str, Tensor]) -> dict[str, dict[int, float]]:
    """Return the factors of rows that :func:`remove` multiplies: name of the tensor → row → factor."""
    scales: dict[str, dict[int, float]] = {}
    for group, gone in _gone(groups, kept):
        for cut in group.cuts:
            if cut.scaled:
                scales[cut.path] = dict.fromkeys(cut.scaled, math.sqrt(1 - len(gone) / group.size))
    return scales


def _scaled(tensor: Tensor, scales: Mapping[int, float] | None) -> Tensor:
    """Return a tensor with some of its rows multiplied by factors."""
    if not scales:
        return tensor
    scaled = tensor.detach().clone()
    for row, factor in scales.items():
        scaled[row] *= factor
    return nn.Parameter(scaled, requires_grad=tensor.requires_grad)


def _holders(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]]:
    """Return some parameters and buffers by name, with every module and attribute that holds each."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        home, _, leaf = path.rpartition(".")
        tensors[path] = getattr(model.get_submodule(home), leaf)
    found: dict[int, list[tuple[nn.Module, str]]] = {id(tensor): [] for tensor in tensors.values()}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in found:
                found[id(tensor)].append((module, leaf))
    return {path: (tensor, found[id(tensor)]) for path, tensor in tensors.items()}


def resize(module: nn.Module, features: int | None = None) -> None:
    """Set a module's size attributes to the sizes of its tensors, or to ``features`` for a norm without weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, TRANSPOSED):
        if goes_by_groups(module):
            module.groups = len(module.weight) * module.groups // module.in_channels
        module.in_channels, module.out_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, CONVOLUTIONS):
        if goes_by_groups(module):
            module.groups = len(module.weight) * module.groups // module.out_channels
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, LAYER_NORMS):
        whole = module.normalized_shape
        bare = module.weight is None
        module.normalized_shape = (*whole[:-1], features or whole[-1]) if bare else tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        whole = module.num_channels
        module.num_channels = features or whole if module.weight is None else len(module.weight)
        if module.num_groups > 1:
            module.num_groups = module.num_groups * module.num_channels // whole
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        shown = module.weight if module.weight is not None else module.running_mean
        module.num_features = features or module.num_features if shown is None else len(shown)


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
        layer.bias = nn.Parameter(layer.weight.new_zeros(channel_count(layer)), layer.weight.requires_grad)


@contextmanager
def masked(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Mask units of a model inside the block, so that it computes what it would after :func:`remove`.

    The weights that read a masked unit are 0, and a norm over the units runs over those that stay.

    Args:
        model: model with the class and shapes that the groups were found in.
        groups: the model's groups.
        kept: group name → ``[r]``, the units that stay; a group that is not named stays whole.
    """
    read: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    normed: dict[str, list[Tensor]] = defaultdict(list)
    for group, gone in _gone(groups, kept):
        for cut in group.cuts:
            if cut.reads and cut.dimension is not None:
                read[cut.path, cut.dimension].append(cut.indices[gone].flatten())
        for name, indices in group.layer_norms.items():
            normed[name].append(indices[gone].flatten())
    holders = _holders(model, (path for path, _ in read))
    held: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    norms = ((model.get_submodule(name), partial(_norm_rest, torch.cat(parts))) for name, parts in normed.items())
    try:
        for (path, dimension), parts in read.items():
            whole, places = holders[path]
            blank = whole.detach().index_fill(dimension, torch.cat(parts).to(whole.device), 0.0)
            blank = nn.Parameter(blank, requires_grad=whole.requires_grad)
            held += [(module, leaf, module._parameters[leaf]) for module, leaf in places]
            for module, leaf in places:
                module._parameters[leaf] = blank
            holders[path] = blank, places
        with hooked(norms):
            yield
    finally:
        for module, leaf, parameter in reversed(held):
            module._parameters[leaf] = parameter


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
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            return f"the network does not run without some of its channels ({error})"
    if same_outputs(found, wanted, share):
        return ""
    if found.shape != wanted.shape:
        return f"without some of its channels logits are {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return f"removing some of its channels changes how the others are used: logits are off by {off:.1g} of the largest"


def _rest(size: int, gone: Tensor) -> Tensor:
    """Return the other indices, ascending, ``[size − len(gone)]``."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


def _gone(groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Iterator[tuple[Group, Tensor]]:
    for group in groups:
        if group.name in kept and len(kept[group.name]) < group.size:
            mask = torch.ones(group.size, dtype=torch.bool)
            mask[kept[group.name]] = False
            yield group, mask.nonzero()[:, 0]


def _norm_rest(gone: Tensor, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output of a norm over all its features, over those that stay; 0 for others."""
    mask = torch.ones(width(norm), dtype=torch.bool, device=inputs[0].device)
    mask[gone] = False
    channel = 1 if isinstance(norm, nn.GroupNorm) or _takes_maps(norm, inputs[0], output) else -1
    features = inputs[0].movedim(channel, -1)
    whole = torch.zeros_like(features)
    whole[..., mask] = _normed(norm, features[..., mask], mask)
    return whole.movedim(-1, channel)


def _takes_maps(norm: nn.Module, read: Tensor, gave: Tensor) -> bool:
    """Return whether a norm over the last dimension takes ``[B, C, H, W]``, as torchvision's LayerNorm2d does."""
    own = type(norm).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    size = width(norm)
    if not own or read.ndim != 4 or read.shape[1] != size:
        return False
    if read.shape[-1] != size:
        return True
    every = torch.ones(size, dtype=torch.bool, device=read.device)
    last, first = _normed(norm, read, every), _normed(norm, read.movedim(1, -1), every).movedim(-1, 1)
    return bool((first - gave).abs().sum() < (last - gave).abs().sum())


def _normed(norm: nn.Module, features: Tensor, mask: Tensor) -> Tensor:
    """Normalise ``[…, F]`` features, those of a norm that are in the ``[C]`` mask, over themselves."""
    assert isinstance(norm, (*LAYER_NORMS, nn.GroupNorm))
    weight, bias = (None if p is None else p[mask] for p in (norm.weight, getattr(norm, "bias", None)))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(features.movedim(-1, 1), 1, weight, bias, norm.eps).movedim(1, -1)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(features, features.shape[-1:], weight, norm.eps)
    return F.layer_norm(features, features.shape[-1:], weight, bias, norm.eps)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the format of a weight that is to have other values: NHWC where it clearly has that, else contiguous."""
    nhwc = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc and not tensor.is_contiguous() else torch.contiguous_format
