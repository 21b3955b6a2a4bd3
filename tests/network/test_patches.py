"""What a convolution reads at each of its positions, for every kind of stride, dilation and padding."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.network.sampling import patches


def all_places(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, torch.Size]:
    output = layer(inputs)
    size = output.shape[2:]
    found = patches(layer, inputs, torch.arange(len(inputs)), torch.arange(size.numel()).expand(len(inputs), -1), size)
    return found.reshape(len(inputs), size.numel(), inputs.shape[1], -1), size


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (1, 2), "same"])
@torch.no_grad()
def test_patches_are_those_of_unfold(stride, dilation, mode, padding):
    kernel = (3, 2)
    if padding == "same":  # of odd kernels: torch warns of a copy otherwise
        stride, kernel = 1, (3, 5)
    inputs = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, padding_mode=mode)
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)
    wanted = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    found, size = all_places(layer, inputs)
    assert torch.equal(found.flatten(2).mT, wanted)
    outputs = found.flatten(2) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(outputs.mT.reshape(2, 4, *size), layer(inputs))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
@pytest.mark.parametrize("padding", [0, 1, "same"])
@torch.no_grad()
def test_patches_in_other_dimensions(kind, padding):
    dimensions = 1 if kind is nn.Conv1d else 3
    inputs = torch.randn(2, 3, *(7, 6, 5)[:dimensions], generator=torch.Generator().manual_seed(0))
    layer = kind(3, 2, 3, stride=1 if padding == "same" else 2, padding=padding, dilation=1)
    found, size = all_places(layer, inputs)
    border = 0 if padding == 0 else 1
    for image, channel in product(range(2), range(3)):
        padded = F.pad(inputs[image, channel], [border] * 2 * dimensions)
        for number, place in enumerate(np.ndindex(*size)):
            corner = [layer.stride[0] * at for at in place]
            wanted = padded[tuple(slice(at, at + 3) for at in corner)]
            assert torch.equal(found[image, number, channel], wanted.flatten())


def test_patches_at_some_places_of_some_images():
    inputs = torch.arange(2 * 16.0).reshape(2, 1, 4, 4)
    places = torch.tensor([[0, 3], [2, 2]])
    found = patches(nn.Conv2d(1, 1, 2, stride=2), inputs, torch.tensor([1, 0]), places, (2, 2))
    assert found[:, 0].tolist() == [[16, 17, 20, 21], [26, 27, 30, 31], [8, 9, 12, 13], [8, 9, 12, 13]]
