"""Samples of a layer: which positions of an image are taken, what a convolution reads there, means over positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from chanaxes_pl.core.moments import true_float32
from chanaxes_pl.core.targets import scrambled

# Numbers summed in double at a time on a CPU.
_CACHED = 1 << 17

_CONVOLVE = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
#: Names of a convolution's arguments, in their order.
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Window(NamedTuple):
    """Which places of its input a convolution reads at each position of its output; all in their order of dimensions.

    Attributes:
        kernel_size: places of the kernel.
        stride: steps between positions.
        dilation: steps between the kernel's places.
        padding: before and after each dimension, the last one first, as ``F.pad`` takes it.
        padding_mode: as a convolution has it.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Window:
        """The window of a convolution whose forward is that of its class in torch; handles ``padding="same"`` too."""
        padding = tuple(layer._reversed_padding_repeated_twice)
        return cls(layer.kernel_size, layer.stride, layer.dilation, padding, layer.padding_mode)

    def outputs(self, size: Sequence[int]) -> tuple[int, ...]:
        """How many positions an input of this size has, by dimension."""
        padded = (s + b + a for s, b, a in zip(size, self.padding[-2::-2], self.padding[::-2], strict=True))
        steps = zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple((whole - reach * (extent - 1) - 1) // step + 1 for whole, extent, step, reach in steps)


def convolved(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> tuple[Tensor, Window] | None:
    """What a layer convolves that has a forward of its own, which may pad or change its input first: it runs again.

    Args:
        layer: the layer.
        inputs: what it is given.

    Returns:
        The tensor ``[B, C, *spatial]`` that reaches the one convolution in the forward, and the window over it;
        ``None`` if there is none, or several, or one of another shape than the layer's.
    """
    with Convolutions() as seen, torch.no_grad():
        layer.forward(inputs)
    if len(seen.calls) != 1:
        return None
    dimensions, call = seen.calls[0]
    read, weight = call["input"], call["weight"]
    stride, dilation = (_each(call.get(name, 1), dimensions) for name in ("stride", "dilation"))
    kernel = tuple(weight.shape[2:])
    if (kernel, weight.shape[1], call.get("groups", 1)) != (
        layer.kernel_size,
        layer.in_channels // layer.groups,
        layer.groups,
    ):
        return None
    padding = call.get("padding", 0)
    if isinstance(padding, str):
        total = [reach * (extent - 1) * (padding == "same") for extent, reach in zip(kernel, dilation, strict=True)]
        sides = [(whole // 2, whole - whole // 2) for whole in total]
    else:
        sides = [(side, side) for side in _each(padding, dimensions)]
    return read, Window(kernel, stride, dilation, tuple(side for pair in reversed(sides) for side in pair))


class Convolutions(TorchFunctionMode):
    """Recorder of convolutions, as dimensions and the arguments by their names in :data:`ARGUMENTS`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLVE:
            self.calls.append((_CONVOLVE[func], dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


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
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | Window,
    inputs: Tensor,
    images: Tensor,
    places: Tensor,
    output_size: Sequence[int],
) -> Tensor:
    """What a convolution reads at some positions of its output.

    Args:
        layer: the convolution, or its window where it pads in a forward of its own.
        inputs: ``[B, C, *spatial]``.
        images: ``[b]``, rows of the batch.
        places: ``[b, p]``, positions of the flattened output map of each.
        output_size: of the output map.

    Returns:
        ``[b·p, C, k]``, in the order of the flattened kernel.
    """
    window = layer if isinstance(layer, Window) else Window.of(layer)
    padded = F.pad(inputs, window.padding, "constant" if window.padding_mode == "zeros" else window.padding_mode)
    size = padded.shape[2:]
    corner = np.stack(np.unravel_index(places.cpu().numpy(), tuple(output_size)), -1) * np.array(window.stride)
    steps = zip(window.kernel_size, window.dilation, strict=True)
    kernel = np.array(list(product(*(range(0, extent * step, step) for extent, step in steps))))
    reached = np.moveaxis(corner[:, :, None] + kernel, -1, 0)
    at = torch.from_numpy(np.ravel_multi_index(tuple(reached), tuple(size))).to(inputs.device)
    rows = local_samples(padded.flatten(2), images, at.flatten(1))
    return rows.reshape(-1, len(kernel), inputs.shape[1]).transpose(1, 2)


def patch_means(window: Window, inputs: Tensor, output_size: Sequence[int]) -> Tensor:
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
        before, after = window.padding[::-1][2 * dimension : 2 * dimension + 2][::-1]
        kernel = window.kernel_size[dimension], window.stride[dimension], window.dilation[dimension]
        sizes = inputs.shape[2 + dimension], output_size[dimension]
        weights = _reads(*kernel, before, after, window.padding_mode, *sizes)
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
