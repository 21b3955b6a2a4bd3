"""Which modules are tracked, under what names, and how their outputs become samples of channels."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.moments import true_float32

# Numbers summed in double at a time on a CPU.
_CACHED = 1 << 17
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = {"conv": CONVOLUTIONS, "conv+linear": (*CONVOLUTIONS, nn.Linear)}
#: ``"conv"``, ``"conv+linear"``, a glob or several over layer names, or ``(name, module) → bool``.
LayerSpec = str | Sequence[str] | Callable[[str, nn.Module], bool]


def select_layers(model: nn.Module, layers: LayerSpec = "conv", caller: str = "select_layers") -> dict[str, nn.Module]:
    """The tracked modules of a model, by their own names in it.

    Trackable are modules that are affine in their input: ``Conv1d/2d/3d`` of any groups, and ``Linear``.
    A wrapper that ``torch.compile`` put around a module does not show in the name.

    Args:
        model: any module.
        layers: ``"conv"``, ``"conv+linear"``, a glob or a list of globs over names
            (``"layer[34].*"``), or a function ``(name, module) → bool``.
        caller: how an error names the call.

    Raises:
        ValueError: if nothing matches; the message names the layers there are.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> list(select_layers(model)), list(select_layers(model, "conv+linear"))
        (['0'], ['0', '3'])
    """
    trackable = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in model.named_modules()
        if isinstance(module, _KINDS["conv+linear"])
    }
    if callable(layers):
        chosen = {name: module for name, module in trackable.items() if layers(name, module)}
    elif isinstance(layers, str) and layers in _KINDS:
        chosen = {name: module for name, module in trackable.items() if isinstance(module, _KINDS[layers])}
    else:
        globs = [layers] if isinstance(layers, str) else list(layers)
        chosen = {n: m for n, m in trackable.items() if any(fnmatchcase(n, g) for g in globs)}
    if not chosen:
        raise ValueError(f"{caller}(layers={layers!r}): no tracked module; {_what_there_is(trackable, layers)}")
    return chosen


def _what_there_is(trackable: dict[str, nn.Module], layers: LayerSpec) -> str:
    if not trackable:
        return "the model has no Conv1d, Conv2d, Conv3d or Linear layer"
    names = list(trackable)
    wanted = [layers] if isinstance(layers, str) else [] if callable(layers) else list(layers)
    near = [hit for want in wanted for hit in difflib.get_close_matches(want, [*_KINDS, *names], n=2)]
    begin = f"expected 'conv', 'conv+linear', a glob over names or a function; names begin with {', '.join(names[:3])}"
    return begin + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def channel_count(layer: nn.Module) -> int:
    """Output features of a tracked layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def by_position(layer: nn.Module, tensor: Tensor, images: int, name: str) -> Tensor:
    """A layer's output (or input) as ``[B, C, P]``: images, channels, positions; a view wherever strides allow.

    Args:
        layer: the module it belongs to.
        tensor: ``[B, C, *spatial]`` of a convolution, ``[B, *positions, C]`` of a Linear.
        images: B, the number of images in the batch.
        name: the layer's name, for the error.

    Raises:
        ValueError: if the first dimension is not the batch.
    """
    convolution = isinstance(layer, CONVOLUTIONS)
    if tensor.ndim < (3 if convolution else 2) or len(tensor) != images:
        raise ValueError(
            f"layer {name!r} gave an output of shape {tuple(tensor.shape)} for a batch of {images} images: "
            f"expected {'[B, C, *spatial]' if convolution else '[B, …, C]'} with B = {images}; "
            "leave the layer out with layers=[…]"
        )
    if convolution:
        return tensor.flatten(2)
    return tensor[:, :, None] if tensor.ndim == 2 else tensor.flatten(1, -2).transpose(1, 2)


def widens_pointwise(layer: nn.Module) -> bool:
    """Whether a layer maps each position's input by one matrix to more channels than it has inputs.

    The moments of such an output follow exactly from those of the narrower input, at a fraction of the work.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features < layer.out_features
    return (
        isinstance(layer, CONVOLUTIONS)
        and layer.in_channels < layer.out_channels
        and layer.groups == 1
        and set(layer.kernel_size) == {1} == set(layer.stride)
        and set(layer.padding) == {0}
    )


def affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``[C, F]`` and bias ``[C]`` of a layer for which :func:`widens_pointwise` holds."""
    weight = layer.weight.detach().flatten(1)  # type: ignore[operator]
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()  # type: ignore[operator]
    return weight, bias


def image_means(output: Tensor) -> Tensor:
    """``[B, C]`` float64 mean over all positions of a ``[B, C, P]`` output."""
    if output.device.type == "mps":  # it has no float64
        output = output.cpu()
    if output.device.type != "cpu":
        return output.mean(-1, dtype=torch.float64)
    # torch widens before it sums: a few images at a time, so that what is widened stays in the cache.
    images = max(1, _CACHED // max(1, output[0].numel()))
    return torch.cat([part.mean(-1, dtype=torch.float64) for part in output.detach().split(images)])


def local_samples(output: Tensor, images: Tensor, positions: Tensor | None) -> Tensor:
    """Samples of a ``[B, C, P]`` output at some positions of some images, one row each.

    Args:
        output: ``[B, C, P]``.
        images: ``[b]``, rows of the batch, in the order wanted.
        positions: ``[b, p]``, the positions of each, or ``None`` for all P.

    Returns:
        ``[b·p, C]``.
    """
    if positions is None:
        return output.transpose(1, 2)[images].flatten(0, 1)
    return output[images[:, None], :, positions].flatten(0, 1)


def patches(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    inputs: Tensor,
    images: Tensor,
    places: Tensor,
    output_size: Sequence[int],
) -> Tensor:
    """What a convolution reads at some positions of its output.

    Args:
        layer: the convolution.
        inputs: ``[B, C, *spatial]``.
        images: ``[b]``, rows of the batch.
        places: ``[b, p]``, positions of the flattened output map of each.
        output_size: of the output map.

    Returns:
        ``[b·p, C, k]``, in the order of the flattened kernel.
    """
    padded = _padded(layer, inputs)
    size = padded.shape[2:]
    corner = np.stack(np.unravel_index(places.cpu().numpy(), tuple(output_size)), -1) * np.array(layer.stride)
    steps = zip(layer.kernel_size, layer.dilation, strict=True)
    kernel = np.array(list(product(*(range(0, extent * step, step) for extent, step in steps))))
    reached = np.moveaxis(corner[:, :, None] + kernel, -1, 0)
    at = torch.from_numpy(np.ravel_multi_index(tuple(reached), tuple(size))).to(inputs.device)
    rows = local_samples(padded.flatten(2), images, at.flatten(1))
    return rows.reshape(-1, len(kernel), inputs.shape[1]).transpose(1, 2)


def patch_means(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, output_size: Sequence[int]) -> Tensor:
    """What a convolution reads on average over all positions of its output.

    Args:
        layer: the convolution.
        inputs: ``[B, C, *spatial]``.
        output_size: of the output map.

    Returns:
        ``[B, C, k]``, in the order of the flattened kernel; float64 where the device has it.
    """
    means, precision = inputs, torch.float32 if inputs.device.type == "mps" else torch.float64
    # One dimension at a time: after the first, what is left to read is a line instead of a map, and may be float64.
    for dimension in reversed(range(len(output_size))):
        before, after = layer._reversed_padding_repeated_twice[::-1][2 * dimension : 2 * dimension + 2][::-1]
        kernel = layer.kernel_size[dimension], layer.stride[dimension], layer.dilation[dimension]
        sizes = inputs.shape[2 + dimension], output_size[dimension]
        weights = _reads(*kernel, before, after, layer.padding_mode, *sizes)
        kind = torch.promote_types(means.dtype, torch.float32)
        with true_float32(inputs.device):
            # The dimension's places in the kernel come last, in front of those that are done.
            means = (means.to(kind).movedim(2 + dimension, -1) @ weights.to(inputs.device, kind)).to(precision)
    done = len(output_size)
    return means.permute(0, 1, *range(1 + done, 1, -1)).flatten(2)


@lru_cache  # of one layer the same for every batch
def _reads(
    extent: int, stride: int, dilation: int, before: int, after: int, mode: str, size: int, count: int
) -> Tensor:
    """``[size, k]``: in what share of ``count`` positions a place of the kernel reads each place of the input."""
    places = torch.arange(1.0, size + 1)[None, None]  # 0 is the padding
    padded = F.pad(places, (before, after), "constant" if mode == "zeros" else mode)
    read = padded[0, 0, stride * torch.arange(count)[:, None] + dilation * torch.arange(extent)].long()
    return F.one_hot(read, size + 1)[..., 1:].double().mean(0).T


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)  # handles padding="same" too


def sample_positions(indices: np.ndarray, total: int, count: int) -> Tensor | None:
    """Which ``count`` of ``total`` positions are sampled in each image: a function of its index alone.

    Each image starts at a position hashed from its index and goes on in steps of about total/φ that
    share no factor with ``total``: its positions never repeat and lie evenly spread, and over images all
    positions come up equally often.

    Args:
        indices: ``[B]``, the images' indices in the probe set.
        total: P, positions that the layer has.
        count: p, positions wanted an image.

    Returns:
        ``[B, p]``, or ``None`` where all positions are wanted.

    Example:
        >>> import numpy as np
        >>> sample_positions(np.arange(2), 16, 4)
        tensor([[15, 10,  5,  0],
                [ 4, 15, 10,  5]])
    """
    if count >= total:
        return None
    start = scrambled(indices) % np.uint64(total)
    return torch.from_numpy((start.astype(np.int64)[:, None] + _stride(total) * np.arange(count)) % total)


@lru_cache
def _stride(total: int) -> int:
    golden = max(1, round(total * (math.sqrt(5) - 1) / 2))
    return next(s for k in range(total) for s in (golden + k, golden - k) if s > 0 and math.gcd(s, total) == 1)


def scrambled(indices: np.ndarray) -> np.ndarray:
    """``indices`` hashed to uniform uint64 (the finaliser of SplitMix64), the same on every machine."""
    with np.errstate(over="ignore"):
        z = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
