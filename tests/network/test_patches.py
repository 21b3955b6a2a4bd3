"""What a convolution reads at each of its positions, for every kind of stride, dilation and padding."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.network.sampling import Window, convolved, patch_means, patches
from tests.helpers.networks import SameConv


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


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("stride", [1, 2, (3, 2)])
@pytest.mark.parametrize("groups", [1, 3])
@torch.no_grad()
def test_what_a_convolution_reads_that_pads_in_its_forward(size, stride, groups):
    inputs = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    layer = SameConv(3, 6, (3, 4), stride, dilation=(2, 1), groups=groups).double()
    output = layer(inputs)
    assert output.shape[2:] == tuple(-(-s // step) for s, step in zip(size, layer.stride, strict=True))
    read, window = convolved(layer, inputs)
    assert window.outputs(read.shape[2:]) == tuple(output.shape[2:])
    places = torch.arange(output.shape[2:].numel()).expand(2, -1)
    found = patches(window, read, torch.arange(2), places, output.shape[2:]).reshape(2, places.shape[1], groups, -1)
    weights = layer.weight.flatten(1).reshape(groups, 6 // groups, -1)
    outputs = torch.einsum("npgf,gcf->ngcp", found, weights).flatten(1, 2) + layer.bias[:, None]
    torch.testing.assert_close(outputs.reshape(output.shape), output)
    means = patch_means(window, read, output.shape[2:]).reshape(2, groups, -1)
    torch.testing.assert_close(means, found.mean(1))


@pytest.mark.parametrize("padding", [0, 1, (1, 2), "valid", "same"])
@torch.no_grad()
def test_padding_that_the_convolution_in_a_forward_adds(padding):
    class Own(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, weight=self.weight, dilation=2, padding=padding)

    inputs, layer = torch.randn(1, 2, 7, 9), Own(2, 3, (3, 2), bias=False)
    read, window = convolved(layer, inputs)
    assert read is inputs
    plain = nn.Conv2d(2, 3, (3, 2), padding=padding, dilation=2)
    assert window == Window.of(plain)
    assert window.outputs((7, 9)) == tuple(plain(inputs).shape[2:])


def twice(layer, x):
    return F.conv2d(F.conv2d(x, layer.weight, padding=1), layer.weight)


def none(layer, x):
    return x @ layer.weight[0, 0]


def pointwise(layer, x):
    return F.conv2d(x, layer.weight.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("forward", [twice, none, pointwise])
def test_a_forward_without_the_one_convolution_of_its_layer_is_not_understood(forward):
    layer = type("Own", (nn.Conv2d,), {"forward": forward})(3, 3, 3)
    assert convolved(layer, torch.randn(2, 3, 3, 3)) is None
