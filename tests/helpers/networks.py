"""Networks to prune: the four backbones at quarter width, and some whose channels couple in other ways."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlock

from chanaxes_pl.models import BACKBONES, build_backbone
from chanaxes_pl.units.removal import Group

CLASSES = 7
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(4))
ONE = IMAGES[:1]


class Net(nn.Module):
    """Named layers and a function over them."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class SameConv(nn.Conv2d):
    """Convolution that pads in its forward so that only its stride makes the map smaller, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
            padding = [total // 2, total - total // 2, *padding]
        return self._conv_forward(F.pad(x, padding), self.weight, self.bias)


def block(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    options = {"padding": kernel // 2, "bias": False} | options
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def head(channels: int) -> nn.Linear:
    return nn.Linear(channels, CLASSES)


def grouped() -> nn.Module:
    """ResNeXt-like: a residual bottleneck around a grouped convolution."""

    def forward(net, x):
        x = net.stem(x)
        return net.head(pooled(x + net.up(net.mix(net.down(x)))))

    return Net(
        forward,
        stem=block(3, 16, stride=2),
        down=block(16, 12, 1),
        mix=block(12, 12, groups=3, stride=1),
        up=nn.Sequential(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)),
        head=head(16),
    )


def concatenating() -> nn.Module:
    """DenseNet-like: every layer reads all maps before it."""

    def forward(net, x):
        maps = [net.stem(x)]
        for layer in (net.first, net.second, net.third):
            maps.append(layer(torch.cat(maps, 1)))
        return net.head(pooled(torch.cat(maps, 1)))

    layers = {"first": block(10, 6), "second": block(16, 4), "third": block(20, 6)}
    return Net(forward, stem=block(3, 10, stride=2), **layers, head=head(26))


def flattening() -> nn.Module:
    """VGG-like: a 2×2 map goes into a Linear."""

    def forward(net, x):
        return net.head(net.hidden(net.body(x).flatten(1)).relu())

    body = nn.Sequential(block(3, 8, stride=2), nn.MaxPool2d(4), block(8, 10, stride=2))
    return Net(forward, body=body, hidden=nn.Linear(40, 12), head=head(12))


def normed() -> nn.Module:
    """Tokens with a learnt position, LayerNorms and a residual, channels last."""

    def forward(net, x):
        x = net.stem(x).flatten(2).mT + net.position
        x = x + net.down(torch.relu(net.up(net.norm(x))))
        return net.head(net.last(x).mean(1))

    return Net(
        forward,
        stem=nn.Conv2d(3, 12, 8, stride=8),
        position=nn.Parameter(torch.zeros(1, 16, 12)),
        norm=nn.LayerNorm(12),
        up=nn.Linear(12, 20),
        down=nn.Linear(20, 12),
        last=nn.LayerNorm(12),
        head=head(12),
    )


def squeezing() -> nn.Module:
    """A squeeze-and-excitation gate, a depthwise layer with a multiplier, and one that reads the image."""

    def forward(net, x):
        x = net.stem(net.image(x))
        x = x * net.gate(x)
        return net.head(pooled(net.wide(net.narrow(x))))

    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1), nn.Sigmoid())
    wide = block(4, 16, groups=4)
    return Net(
        forward,
        image=block(3, 6, groups=3, stride=2),
        stem=block(6, 12),
        gate=gate,
        narrow=block(12, 4),
        wide=wide,
        head=head(16),
    )


def inverted() -> nn.Module:
    """MobileNetV2-like: a residual around an expansion, a depthwise layer and a projection."""

    def forward(net, x):
        x = net.stem(x)
        return net.head(pooled(x + net.project(net.deep(net.expand(x)))))

    return Net(
        forward,
        stem=block(3, 8, stride=2),
        expand=block(8, 18, 1),
        deep=block(18, 18, groups=18),
        project=nn.Sequential(nn.Conv2d(18, 8, 1, bias=False), nn.BatchNorm2d(8)),
        head=head(8),
    )


def convnext() -> nn.Module:
    """One block of torchvision's ConvNeXt between a stem of patches and the logits."""

    def forward(net, x):
        return net.head(pooled(net.block(net.stem(x))))

    return Net(forward, stem=nn.Conv2d(3, 10, 4, stride=4), block=CNBlock(10, 0.5, 0.0), head=head(10))


ODD: dict[str, Callable[[], nn.Module]] = {
    "grouped": grouped,
    "concatenating": concatenating,
    "flattening": flattening,
    "normed": normed,
    "squeezing": squeezing,
    "inverted": inverted,
    "convnext block": convnext,
}
NETS = (*BACKBONES, *ODD)


def build(name: str, seed: int = 0) -> nn.Module:
    """One of :data:`NETS` in eval mode, with random norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_backbone(name, CLASSES, 0.25) if name in BACKBONES else ODD[name]()
        return unsettled(model).eval()


@torch.no_grad()
def unsettled(model: nn.Module) -> nn.Module:
    """With norms, biases and layer scales that are far from what they are born with."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and module.weight is not None:
            module.weight.uniform_(0.7, 1.3)
            if not isinstance(module, nn.RMSNorm):
                module.bias.uniform_(-0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.7, 1.4)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.fill_(0.5)
        if name == "position":
            parameter.uniform_(-1, 1)
    return model


def halves(groups: Iterable[Group], seed: int = 0, share: float = 0.5) -> dict[str, Tensor]:
    """A random half of the units of every group."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(group.size * share))].sort().values
        for group in groups
    }


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
