"""A plain network computes what its model computes, with weights that can be cut."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from chanaxes_pl.units.plain import PlainAttention, plain
from tests.helpers.networks import ONE, Net, build, head, pooled

ATTENTION = {"embed_dim": 12, "num_heads": 3}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["itself", "another", "unbatched", "masks", "a mask per head", "weights", "per head"])
def test_attention_is_the_same(case, batch_first, bias):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(**ATTENTION, bias=bias, batch_first=batch_first).eval()
    if bias:
        nn.init.normal_(attention.in_proj_bias)
    x, y = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    x, y = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    inputs = (x, y, y) if case == "another" else (x, x, x)
    options: dict[str, object] = {"need_weights": case in ("weights", "per head", "another")}
    if case == "unbatched":
        inputs = (torch.randn(5, 12),) * 3
    if case == "masks":
        options |= {"attn_mask": torch.rand(5, 5) > 0.8, "key_padding_mask": torch.arange(5).expand(2, 5) > 3}
    if case == "a mask per head":
        options |= {"attn_mask": torch.rand(6, 5, 5) > 0.8}
    if case == "per head":
        options |= {"average_attn_weights": False}
    with torch.no_grad():
        wanted, shares = attention(*inputs, **options)
        found, own = PlainAttention(attention)(*inputs, **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(own, shares)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019) with a gain."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(1 + torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * weight / (weight.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padding(Standardised):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def conv() -> nn.Conv2d:
    return nn.Conv2d(6, 5, 3, padding=1)


def masked_conv() -> nn.Conv2d:
    layer = conv()
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


LAYERS = {
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "a mask": masked_conv,
    "standardised": lambda: Standardised(6, 5, 3, padding=1),
    "old weight_norm": lambda: weight_norm(conv()),
    "old spectral_norm": lambda: spectral_norm(conv()),
}


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_computed_weights_are_written_out(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model = Net(lambda net, x: net.head(pooled(net.b(net.a(x)))), a=nn.Conv2d(3, 6, 3), b=layer, head=head(5)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = plain(model)
    assert type(found.b) is nn.Conv2d
    assert {name for name, _ in found.b.named_parameters()} == {"weight", "bias"}
    with torch.no_grad():
        torch.testing.assert_close(found(ONE), model(ONE))
    assert model.b is layer
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_is_plain_stays():
    model = build("resnet18")
    assert plain(model) is model
    pads = Net(lambda net, x: net.head(pooled(net.a(x))), a=Padding(3, 6, 3), head=head(6))
    assert plain(pads) is pads


class Computes(nn.Conv2d):
    """Computes its weight, and may do something with its output."""

    def __init__(self, kind: str) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.kind, self.norm = kind, nn.BatchNorm2d(8)
        self.norm.running_var.fill_(9.0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        if self.kind == "of its input":
            weight = weight * (1 + x.abs().mean())
        y = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        more = {"relu": y.relu(), "gain": 3 * y, "sum": x + y, "norm": self.norm(y)}
        return more.get(self.kind, y)


@pytest.mark.parametrize("kind", ["alone", "relu", "gain", "sum", "norm", "of its input"])
@torch.no_grad()
def test_a_convolution_that_does_more_than_compute_its_weight_stays(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Computes(kind), nn.Conv2d(8, 4, 3)).eval()
    images = torch.randn(4, 3, 9, 9)
    found = plain(model)
    torch.testing.assert_close(found(images), model(images), rtol=1e-4, atol=1e-5)
    assert (type(found[1]) is nn.Conv2d) == (kind == "alone")
