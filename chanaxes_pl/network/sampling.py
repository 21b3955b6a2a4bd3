"""Samples of a layer: which positions of an image are taken, what a convolution reads there, means over positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.core.moments import true_float32
from chanaxes_pl.core.targets import scrambled

# Numbers summed in double at a time on a CPU.
_CACHED = 1 << 17


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
