"""Backbones at any width and for any image size.

The networks are torchvision's, with the same module names and initialisation, and two more arguments: ``width``
multiplies every channel count, and ``image_size`` chooses the stem:

============= ============================== ============================== =============
backbone      up to 32×32                    up to 64×64                    larger
============= ============================== ============================== =============
resnet18      3×3 stem, no max pooling       the same with stride 2         torchvision's
vgg16_bn      global pooling and one Linear  the same                       torchvision's
mobilenet_v2  stem and second stage stride 1 second stage stride 1          torchvision's
convnext_tiny torchvision's                  torchvision's                  torchvision's
============= ============================== ============================== =============

With stride 2 at 64×64, the maps and the cost of ResNet-18 and MobileNetV2 are those at 32×32.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG, cfgs, make_layers

Backbone = Literal["resnet18", "vgg16_bn", "mobilenet_v2", "convnext_tiny"]
SMALL, MEDIUM = 32, 64  # the largest image sides, in pixels, of the two small stems


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _check_size(name: str, image_size: int) -> None:
    if image_size < SMALL:
        raise ValueError(f"{name} at image_size={image_size}: it halves the maps five times and needs at least {SMALL}")


class _ResNet(ResNet):
    """ResNet-18 whose stages are ``width`` times as wide."""

    def __init__(self, num_classes: int, width: float, image_size: int) -> None:
        self._width = width  # read by _make_layer, which torchvision's constructor calls
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        if image_size <= MEDIUM:
            self.maxpool = nn.Identity()
            self._replace_stem(kernel=3, stride=1 if image_size <= SMALL else 2)
        elif width != 1:
            self._replace_stem(kernel=7, stride=2)
        if width != 1:
            self.fc = nn.Linear(_scaled(512, width), num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:  # the first stage reads the stem, whose width torchvision fixes at 64
            self.inplanes = _scaled(64, self._width)
        return super()._make_layer(block, _scaled(planes, self._width), *args, **kwargs)

    def _replace_stem(self, kernel: int, stride: int) -> None:
        channels = _scaled(64, self._width)
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(channels)


def resnet18(num_classes: int, width: float = 1.0, image_size: int = 32) -> nn.Module:
    """ResNet-18 for ``[batch, 3, image_size, image_size]`` images; see :func:`build_backbone`.

    >>> resnet18(100, width=0.25).conv1.weight.shape
    torch.Size([16, 3, 3, 3])
    """
    return _ResNet(num_classes, width, image_size)


def vgg16_bn(num_classes: int, width: float = 1.0, image_size: int = 32) -> nn.Module:
    """VGG-16 with BatchNorm for ``[batch, 3, image_size, image_size]`` images; see :func:`build_backbone`.

    Up to 64×64 the head is global average pooling and one ``Linear``.
    """
    _check_size("vgg16_bn", image_size)
    features = make_layers([v if v == "M" else _scaled(int(v), width) for v in cfgs["D"]], batch_norm=True)
    if image_size > MEDIUM and width == 1:
        return VGG(features, num_classes)
    with torch.device("meta"):  # the constructor's own head, 120 million weights, is never used
        network = VGG(features, num_classes)
    last, hidden = _scaled(512, width), _scaled(4096, width)
    if image_size > MEDIUM:
        sizes = {0: (last * 7 * 7, hidden), 3: (hidden, hidden), 6: (hidden, num_classes)}
        for index, (inputs, outputs) in sizes.items():
            network.classifier[index] = _vgg_linear(inputs, outputs)
    else:
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(_vgg_linear(last, num_classes))
    return network


def _vgg_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, 0, 0.01)  # as torchvision's VGG does
    nn.init.zeros_(linear.bias)
    return linear


def mobilenet_v2(num_classes: int, width: float = 1.0, image_size: int = 32) -> nn.Module:
    """MobileNetV2 for ``[batch, 3, image_size, image_size]`` images; see :func:`build_backbone`.

    Channel counts are torchvision's: multiples of 8, and at least 1280 before the classifier. The last map is 4×4
    both at 32×32 and at 64×64.
    """
    small = image_size <= MEDIUM
    stages = [  # expansion, channels, blocks, stride of the first block
        [1, 16, 1, 1],
        [6, 24, 2, 1 if small else 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    network = MobileNetV2(num_classes, width_mult=width, inverted_residual_setting=stages)
    if image_size <= SMALL:
        cast(nn.Conv2d, network.get_submodule("features.0.0")).stride = (1, 1)
    return network


def convnext_tiny(num_classes: int, width: float = 1.0, image_size: int = 32) -> nn.Module:
    """ConvNeXt-T for ``[batch, 3, image_size, image_size]`` images; see :func:`build_backbone`.

    Every size has the 4×4 patch stem: the last map is 1×1 at 32×32 and 2×2 at 64×64.
    """
    _check_size("convnext_tiny", image_size)
    sizes = [_scaled(channels, width) for channels in (96, 192, 384, 768)]
    stages = [
        CNBlockConfig(channels, following, blocks)
        for channels, following, blocks in zip(sizes, [*sizes[1:], None], (3, 3, 9, 3), strict=True)
    ]
    return ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=num_classes)


BACKBONES: dict[Backbone, Callable[[int, float, int], nn.Module]] = {
    "resnet18": resnet18,
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": mobilenet_v2,
    "convnext_tiny": convnext_tiny,
}


def build_backbone(name: Backbone, num_classes: int, width: float = 1.0, image_size: int = 32) -> nn.Module:
    """A randomly initialised network from ``[batch, 3, image_size, image_size]`` images to logits.

    Args:
        name: name of the network.
        num_classes: number of logits.
        width: multiplier of every channel count; 1 gives torchvision's network.
        image_size: side of the images in pixels, which chooses the stem; images of other sizes run too.

    Returns:
        The network; its attribute ``backbone_arguments`` is a dict of these arguments.

    Raises:
        ValueError: for an unknown name, fewer than 2 classes, a width that is not positive, or images that are too
            small: VGG-16 and ConvNeXt-T need at least 32×32.

    >>> images = torch.zeros(2, 3, 32, 32)
    >>> build_backbone("mobilenet_v2", num_classes=10, width=0.5)(images).shape
    torch.Size([2, 10])
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(BACKBONES)}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: expected at least 2")
    if not 0 < width < math.inf:
        raise ValueError(f"width={width}: expected a positive number, 1 for torchvision's channel counts")
    if image_size < 1:
        raise ValueError(f"image_size={image_size}: expected at least 1 pixel")
    network = BACKBONES[name](num_classes, width, image_size)
    arguments = {"name": name, "num_classes": num_classes, "width": width, "image_size": image_size}
    network.backbone_arguments = arguments  # type: ignore[assignment]  # no tensor: not in the state dict
    return network
