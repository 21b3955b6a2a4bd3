"""Networks of the zoo: which they are, and how each is built with random weights. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: in its source.
        family: of architectures.
        source: ``"timm"``, ``"torchvision"``, ``"segmentation"`` (of torchvision) or ``"own"``.
        pixels: side of an image: 64, or the least that the network takes.
        options: further arguments of its constructor.
    """

    name: str
    family: str
    source: str
    pixels: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Return the name in the table; torchvision and timm share some names."""
        return self.name if self.source == "timm" else f"{self.source}/{self.name}"


class SuperResolution(nn.Module):
    """Residual blocks without norms, and a pixel shuffle (after EDSR, arXiv 1707.02921)."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.up(x + first))


class UNet(nn.Module):
    """Encoder, decoder with transposed convolutions and GroupNorms, and concatenations between them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())

        self.down = nn.ModuleList([block(3, width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(width * 2 * scale, width * scale, 2, stride=2) for scale in (2, 1))
        self.join = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.out(x)


class Generator(nn.Module):
    """Autoencoder whose decoder is transposed convolutions with BatchNorms (after DCGAN, arXiv 1511.06434)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            parts += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        for inputs, outputs in zip(widths[:1:-1], widths[-2:0:-1], strict=True):
            parts += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.parts = nn.Sequential(*parts, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Recurrent(nn.Module):
    """Convolutions, and a GRU that reads their map row by row."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.rows = nn.GRU(2 * width, 48, batch_first=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.rows(self.features(x).mean(3).mT)
        return self.head(rows[:, -1])


_OWN: dict[str, Callable[[], nn.Module]] = {
    "super_resolution": SuperResolution,
    "unet_groupnorm": UNet,
    "generator": Generator,
    "conv_gru": Recurrent,
}

# Families in timm → their networks, each with the pixels that it needs if 64 are too few. Where all of a family are of
# one kind one stands for it; where they differ in what matters to pruning (norms, splits, squeezes), several do.
_TIMM = {
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "coatnet": "coatnet_pico_rw_224",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnextv2_atto",
    "crossvit": "crossvit_tiny_240:240",
    "cspnet": "cs3darknet_s",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224 deit3_small_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46_c",
    "dpn": "dpn68",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformerv2_s0",
    "efficientnet": "efficientnet_b0 efficientnet_b0_gn tf_efficientnet_b0",
    "efficientnetv2": "tf_efficientnetv2_b0",
    "efficientvit": "efficientvit_m0 efficientvit_b0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_100 ghostnetv2_100",
    "gmlp": "gmlp_ti16_224",
    "hardcorenas": "hardcorenas_a",
    "hiera": "hiera_tiny_224",
    "hrnet": "hrnet_w18_small",
    "inception_next": "inception_next_atto",
    "lambda": "lambda_resnet26t",
    "lcnet": "lcnet_050",
    "levit": "levit_128s",
    "maxvit": "maxvit_pico_rw_256",
    "metaformer": "caformer_s18",
    "mixer": "mixer_s32_224",
    "mixnet": "mixnet_s",
    "mobilenetv3": "tf_mobilenetv3_small_075",
    "mobilenetv4": "mobilenetv4_conv_small",
    "mobileone": "mobileone_s0",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvit": "mvitv2_tiny",
    "nfnet": "nfnet_l0 nf_regnet_b0 nf_resnet26",
    "pit": "pit_ti_224",
    "poolformer": "poolformer_s12",
    "pvt": "pvt_v2_b0",
    "regnet": "regnetz_b16",
    "repvgg": "repvgg_a0",
    "res2net": "res2net50_14w_8s",
    "resmlp": "resmlp_12_224",
    "resnest": "resnest14d",
    "resnet": "ecaresnet26t resnet50_gn seresnet18",
    "resnetv2": "resnetv2_50x1_bit",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42b",
    "sequencer": "sequencer2d_s",
    "sknet": "skresnet18",
    "swin": "swin_tiny_patch4_window7_224",
    "tinynet": "tinynet_e",
    "tnt": "tnt_s_patch16_224",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vit": "vit_tiny_patch16_224 vit_relpos_small_patch16_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_dw",
    "xception": "xception41",
    "xcit": "xcit_nano_12_p16_224",
}
_TORCHVISION = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "efficientnetv2": "efficientnet_v2_s",
    "googlenet": "googlenet",
    "inception": "inception_v3:96",
    "maxvit": "maxvit_t:224",
    "mnasnet": "mnasnet0_5",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet50 resnext50_32x4d",
    "shufflenet": "shufflenet_v2_x1_0",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_t swin_v2_t",
    "vgg": "vgg11 vgg11_bn",
    "vit": "vit_b_16",
}
_SEGMENTATION = {
    "fcn": "fcn_resnet50",
    "deeplabv3": "deeplabv3_mobilenet_v3_large",
    "lraspp": "lraspp_mobilenet_v3_large",
}
# Constructor arguments beside the number of classes.
_OPTIONS: dict[str, dict[str, Any]] = {
    "torchvision/googlenet": {"aux_logits": True, "init_weights": True},
    "torchvision/inception_v3": {"aux_logits": True, "init_weights": True},
    "torchvision/vit_b_16": {"image_size": 64},
    "segmentation/fcn_resnet50": {"aux_loss": True},
}


def _listed(source: str, families: dict[str, str]) -> list[Network]:
    found = []
    for family, names in families.items():
        for entry in names.split():
            name, _, pixels = entry.partition(":")
            found.append(Network(name, family, source, int(pixels or 64), _OPTIONS.get(f"{source}/{name}", {})))
    return found


#: Network's id → the network.
NETWORKS: dict[str, Network] = {
    network.id: network
    for network in [
        *_listed("own", {name: name for name in _OWN}),
        *_listed("torchvision", _TORCHVISION),
        *_listed("segmentation", _SEGMENTATION),
        *_listed("timm", _TIMM),
    ]
}


def build(network: Network, seed: int = 0) -> nn.Module:
    """Build a network with random weights, in eval mode.

    What the constructor sets to a constant (gains of the last norm of a block at 0, layer scales at 1e-6) becomes
    random too, so that every path matters.
    """
    torch.manual_seed(seed)
    model = _constructed(network).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() < 2 or bool((parameter != parameter.flatten()[0]).any()):
                continue
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
            else:
                bias = name.endswith("bias")
                parameter.copy_(torch.randn_like(parameter) * 0.1 if bias else 0.5 + torch.rand_like(parameter))
    return model


def _constructed(network: Network) -> nn.Module:
    if network.source == "own":
        return _OWN[network.name]()
    if network.source == "torchvision":
        return torchvision.models.get_model(network.name, weights=None, num_classes=CLASSES, **network.options)
    if network.source == "segmentation":
        return torchvision.models.get_model(
            network.name, weights=None, weights_backbone=None, num_classes=CLASSES, **network.options
        )
    with contextlib.redirect_stdout(io.StringIO()):
        import timm
    options = {"pretrained": False, "num_classes": CLASSES, **network.options}
    try:
        return timm.create_model(network.name, img_size=network.pixels, **options)
    except TypeError:  # a network for images of any size
        return timm.create_model(network.name, **options)


def batch_of(network: Network, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random images ``[count, 3, H, W]`` and labels: classes, maps of classes, or images like the output."""
    generator = torch.Generator().manual_seed(seed)
    side = network.pixels
    images = torch.randn(count, 3, side, side, generator=generator)
    if network.source == "segmentation":
        return images, torch.randint(CLASSES, (count, side, side), generator=generator)
    if network.source == "own" and network.name != "conv_gru":
        scale = 2 if network.name == "super_resolution" else 1
        return images, torch.randn(count, 3, side * scale, side * scale, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)
