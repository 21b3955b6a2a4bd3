"""Patterns of real networks: pruned to half, the slim network is the masked one, saved and loaded alike, exported."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from chanaxes_pl import find_units, load_slim, prune
from chanaxes_pl.compensation.layerwise import compensate
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.units.macs import Macs, count_macs
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import remove, without
from tests.helpers.networks import Net, head, pooled
from tests.units.test_plain import Standardised

IMAGES = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, width: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, width, padding=width // 2, **options)


class FusedAttention(nn.Module):
    """One Linear layer for queries, keys and values, as most vision transformers have it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, channels // heads, channels
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(batch, count, self.attn_dim))


def test_a_checkpoint_without_a_plan_does_not_tell_the_number_of_heads(tmp_path):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return Net(
            lambda net, x: net.head(net.mlp(net.attention(net.stem(x).flatten(2).mT)).mean(1)),
            stem=nn.Conv2d(3, 16, 4, 4), attention=FusedAttention(16, 4), mlp=nn.Linear(16, 16), head=head(16),
        ).eval()  # fmt: skip

    slim = prune(network(), [IMAGES], budget=0.6, allocation="uniform", score="l1", compensate=False)
    assert slim.model.attention.num_heads < 4 or slim.model.attention.qkv.out_features < 48
    torch.save({"state_dict": slim.model.state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"holds no plan, which would tell num_heads of 'attention', some of whose weig"
    ):
        load_slim(tmp_path / "last.ckpt", network())


class Block(nn.Module):
    def __init__(self, attention: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(channels), attention, nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        fused = isinstance(self.attention, FusedAttention)
        x = x + (self.attention(y) if fused else self.attention(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module], channels: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.position = nn.Parameter(torch.randn(1, 17, channels))
        self.blocks = nn.Sequential(*(Block(attention(), channels) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(channels), head(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Shuffled(nn.Module):
    """Two branches, one of them kept as it is, then their channels in turn (ShuffleNet V2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(conv(half, half, 1), nn.ReLU(), conv(half, half, groups=half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        batch, channels, *sides = x.shape
        return x.view(batch, 2, channels // 2, *sides).transpose(1, 2).reshape(batch, channels, *sides)


class Ghost(nn.Module):
    """Half of its channels are cheap transforms of the other half (GhostNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.cheap = conv(inputs, outputs // 2, 1), conv(outputs // 2, outputs // 2, groups=outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return torch.cat([x, self.cheap(x).relu()], 1)


class SamePadding(nn.Conv2d):
    """Pads in its own forward pass, by what the size of the map needs."""

    def forward(self, input: Tensor) -> Tensor:
        (stride, _), (width, _), side = self.stride, self.kernel_size, input.shape[-1]  # of square maps
        need = max(0, (-(-side // stride) - 1) * stride + width - side)
        input = F.pad(input, [need // 2, need - need // 2] * 2)
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Auxiliary(nn.Module):
    """A second head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.head = conv(3, 16), conv(16, 16), head(16)
        self.auxiliary = nn.Sequential(conv(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(8))

    def forward(self, x: Tensor):
        x = self.stem(x).relu()
        logits = self.head(pooled(self.deep(x).relu()))
        return (logits, self.auxiliary(x)) if self.training else logits


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 16), nn.ReLU())
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        return self.head(pooled(self.layers[2:](x)))


def chain(*layers: nn.Module, channels: int = 16) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(channels))


def u_net() -> nn.Module:
    def forward(net, x):
        first = net.first(x).relu()
        deep = net.up(net.inner(net.down(first).relu()).relu())
        return net.last(net.joined(torch.cat([first, deep], 1)).relu())

    layers = {"first": conv(3, 16), "down": conv(16, 32, stride=2), "inner": conv(32, 32)}
    layers |= {"up": nn.ConvTranspose2d(32, 16, 2, stride=2), "joined": conv(32, 16), "last": conv(16, 2)}
    return Net(forward, **layers)


def half_weights() -> nn.Module:
    return chain(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU()).bfloat16()


def normalising() -> nn.Module:
    def forward(net, x):
        x = x.sub_(0.5).div_(0.25)
        return net.head(pooled(net.b(net.a(x).relu()).relu()))

    return Net(forward, a=conv(3, 16), b=conv(16, 16), head=head(16))


def mapping() -> nn.Module:
    def forward(net, x):
        x = net.b(net.a(x).relu()).relu()
        return {"logits": net.head(pooled(x)), "features": x}

    return Net(forward, a=conv(3, 16), b=conv(16, 16), head=head(16))


class Mixer(nn.Module):
    """Layers over positions, for which channels are positions, between layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 24, 4, stride=4), nn.LayerNorm(24), nn.Linear(24, 7)
        self.over_positions = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.over_channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.over_positions(self.norm(x).mT).mT
        return self.head((x + self.over_channels(x)).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layers over positions": Mixer,
    "fused attention": lambda: Transformer(lambda: FusedAttention(24, 6)),
    "torch's attention": lambda: Transformer(lambda: nn.MultiheadAttention(24, 6, batch_first=True)),
    "GroupNorm": lambda: chain(
        conv(3, 24), nn.GroupNorm(8, 24), nn.ReLU(), conv(24, 16), nn.GroupNorm(1, 16), nn.ReLU()
    ),
    "a U-Net": u_net,
    "PixelShuffle": lambda: nn.Sequential(conv(3, 32), nn.PixelShuffle(2), conv(8, 16), nn.ReLU(), conv(16, 3)),
    "channel shuffle": lambda: chain(conv(3, 16), Shuffled(16), Shuffled(16)),
    "ghost modules": lambda: chain(Ghost(3, 16), Ghost(16, 24), conv(24, 16)),
    "grouped": lambda: chain(conv(3, 32), conv(32, 32, groups=8), conv(32, 16, 1)),
    "a depthwise multiplier": lambda: chain(conv(3, 16), conv(16, 32, groups=16), conv(32, 16, 1)),
    "weight_norm": lambda: chain(conv(3, 16), nn.ReLU(), parametrizations.weight_norm(conv(16, 16)), nn.ReLU()),
    "weight standardisation": lambda: chain(Standardised(3, 16, 3), nn.ReLU(), Standardised(16, 16, 3, bias=False)),
    "padding in forward": lambda: chain(SamePadding(3, 16, 3, stride=2), nn.ReLU(), SamePadding(16, 16, 3), nn.ReLU()),
    "an auxiliary head": Auxiliary,
    "a sliced Sequential": Sliced,
    "bfloat16": half_weights,
    "normalising in place": normalising,
    "a mapping": mapping,
}


#: Networks of few, wide units → how far from a half one unit may be.
COARSE = {"GroupNorm": 0.1, "channel shuffle": 0.15, "grouped": 0.1, "fused attention": 0.1, "torch's attention": 0.1}


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_any_network(name, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, fresh = NETWORKS[name]().eval(), NETWORKS[name]().eval()
    images = IMAGES.bfloat16() if name == "bfloat16" else IMAGES
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    slim = prune(model, TensorDataset(images.clone()), budget=0.5)  # checks that slim and masked networks agree
    assert slim.macs / slim.dense_macs == pytest.approx(0.5, abs=COARSE.get(name, 0.03))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    def logits(network: nn.Module) -> Tensor:
        with torch.no_grad():
            found = network(images[:4].clone())
        return found["logits"] if name == "a mapping" else found

    wanted = logits(slim.model)
    assert wanted.shape == logits(model).shape
    slim.save(tmp_path / "slim")
    loaded = load_slim(tmp_path / "slim", fresh)
    assert torch.equal(logits(loaded), wanted)
    exported = torch.export.export(loaded, (images[:4].clone(),)).module()
    torch.testing.assert_close(logits(exported), wanted, atol=1e-5, rtol=1e-4)


def test_an_auxiliary_head_can_still_be_trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Auxiliary()
    slim = prune(model, TensorDataset(IMAGES), budget=0.5, allocation="uniform").model.train()
    logits, auxiliary = slim(IMAGES)
    (logits.sum() + auxiliary.sum()).backward()
    assert slim.auxiliary[0].weight.shape[1] == slim.stem.out_channels < 16
    assert slim.auxiliary[0].weight.grad is not None


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cost_of_a_cut_is_known_before_it_is_made(name):
    """Products between activations, and layers over positions, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain(NETWORKS[name]().eval())
    example = (IMAGES.bfloat16() if name == "bfloat16" else IMAGES)[:1]
    groups = list(find_units(model, example).groups.values())
    macs = Macs(model, groups, example)
    for share in (0.2, 0.5, 0.8):
        removed = np.array([min(group.size - 1, round(share * group.size)) for group in groups])
        assert macs.of(removed) == pytest.approx(count_macs(without(model, groups, removed), example), rel=0.02)
        for number, group in enumerate(groups):
            if removed[number] < group.size - 1:
                one_more = removed + (np.arange(len(groups)) == number)
                wanted = macs.of(removed) - macs.of(one_more)
                assert macs.freed(removed, number) == pytest.approx(wanted, rel=1e-6, abs=1e-6 * macs.dense)
                # The order of widths counts on this: nothing frees more after others have gone.
                for other in range(len(groups)):
                    later = removed + (np.arange(len(groups)) == other)
                    assert macs.freed(later, number) <= macs.freed(removed, number) + 1e-6 * macs.dense


def test_layers_over_positions_are_not_fitted_and_the_others_are():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixer().eval()
    for kind in ("refit", "fold"):
        report = prune(
            model, TensorDataset(IMAGES), budget=0.5, allocation="uniform", compensate=kind
        ).report.set_index("layer")
        fitted = ["patches", "over_channels.0", "over_channels.2", "head"]
        assert (report.reason[fitted] == "").all()
        assert (report.reason.drop(fitted) == "some of its positions are channels that are gone").all()


@pytest.mark.parametrize("fused", [True, False])
def test_heads_go_as_a_whole_or_get_narrower(fused):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(lambda: FusedAttention(24, 6) if fused else nn.MultiheadAttention(24, 6, batch_first=True))
    slim = prune(model.eval(), TensorDataset(IMAGES), budget=0.4, allocation="uniform").model
    attention = slim.blocks[0].attention
    into, out = (attention.qkv, attention.proj) if fused else (attention.in_proj, attention.out_proj)
    assert 0 < attention.head_dim < 4
    heads, rest = divmod(out.in_features, attention.head_dim)
    assert rest == 0
    assert 0 < heads < 6
    assert into.out_features == 3 * out.in_features
    if fused:
        assert (attention.num_heads, attention.attn_dim) == (heads, out.in_features)


@pytest.mark.parametrize("compensation", ["fold", "refit"])
def test_narrower_heads_keep_their_scale_when_they_are_fitted(compensation):
    """PyTorch divides the logits by the root of the width, so that queries shrink with it, fitted or not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(lambda: FusedAttention(24, 6)).eval()
    groups = {name: group for name, group in find_units(model, IMAGES[:1]).groups.items() if name.endswith("qkv#2")}
    kept = {name: torch.tensor([0, 1]) for name in groups}
    slim = clone(model)
    remove(slim, groups.values(), kept)
    report = compensate(slim, model, groups.values(), kept, [IMAGES], compensation).set_index("layer")
    name = "blocks.1.attention.qkv"  # its input has changed in the first block
    assert 0 < report.after[name] < 0.5
    fitted, dense = (net.get_submodule(name).weight.detach().view(3, 6, -1, 24) for net in (slim, model))
    ratio = fitted.flatten(1).norm(dim=1) / dense[:, :, :2].flatten(1).norm(dim=1)
    assert float(ratio[0]) == pytest.approx(float(ratio[1]) * 0.5**0.5, rel=0.1)
    assert float(ratio[1]) == pytest.approx(float(ratio[2]), rel=0.1)
