"""Units: what is masked is what is removed, nothing else changes, and what cannot be removed stays."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models import convnext_tiny

from chanaxes_pl.models import BACKBONES, Classifier
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import masked, remove
from tests.helpers.networks import IMAGES, NETS, ONE, Net, build, halves, head, pooled, relative_error, unsettled

OUTPUT = "its channels are the network's output"
READERS = "no convolution or Linear layer reads it"


@torch.no_grad()
def both(model: nn.Module, kept: dict[str, Tensor], groups) -> tuple[Tensor, Tensor]:
    """Logits of the masked network, and of the slim one."""
    slim = copy.deepcopy(model)
    remove(slim, groups, kept)
    with masked(model, groups, kept):
        return model(IMAGES), slim(IMAGES)


@pytest.mark.parametrize("name", NETS)
def test_masked_and_slim_give_the_same_logits(name):
    model = build(name)
    groups = find_units(model, ONE).groups.values()
    for seed in range(2):
        kept = halves(groups, seed)
        hidden, slim = both(model, kept, groups)
        assert relative_error(slim, hidden) < 1e-5
        assert relative_error(hidden, model(IMAGES).detach()) > 1e-2


@pytest.mark.parametrize("name", NETS)
def test_each_group_by_itself_down_to_one_unit(name):
    model = build(name)
    groups = find_units(model, ONE).groups
    for group in list(groups.values())[:: 3 if name in BACKBONES else 1]:
        hidden, slim = both(model, {group.name: torch.tensor([group.size // 2])}, groups.values())
        assert relative_error(slim, hidden) < 1e-5


def test_a_removal_is_seen_by_the_weights_that_stay():
    model = build("concatenating")
    groups = find_units(model, ONE).groups.values()
    slim = copy.deepcopy(model)
    remove(slim, groups, {"stem.0": torch.tensor([1, 4]), "second.0": torch.tensor([3])})
    inputs = [1, 4, *range(10, 16), 19, *range(20, 26)]
    assert torch.equal(slim.head.weight, model.head.weight[:, inputs])
    assert torch.equal(slim.third[0].weight, model.third[0].weight[:, inputs[:9]])
    assert torch.equal(slim.stem[1].running_var, model.stem[1].running_var[[1, 4]])


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "normed"])
def test_a_mask_leaves_no_trace(name):
    model = build(name)
    units = find_units(model, ONE)
    groups, kept = units.groups.values(), halves(units.groups.values())
    with torch.no_grad():
        before, state = model(IMAGES), copy.deepcopy(model.state_dict())
        with masked(model, groups, kept):
            assert not torch.equal(model(IMAGES), before)
        assert torch.equal(model(IMAGES), before)
        with pytest.raises(KeyError, match="on purpose"), masked(model, groups, kept):
            raise KeyError("on purpose")
        assert torch.equal(model(IMAGES), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_mask_of_all_units_and_of_none_changes_nothing():
    model = build("mobilenet_v2")
    groups = find_units(model, ONE).groups.values()
    whole = {group.name: torch.arange(group.size) for group in groups}
    with torch.no_grad():
        for kept in (whole, {}):
            hidden, slim = both(model, kept, groups)
            assert torch.equal(hidden, model(IMAGES))
            assert torch.equal(slim, hidden)


def test_finding_leaves_the_model_as_it_is():
    model = build("resnet18").requires_grad_(False)
    model.fc.requires_grad_(True)
    model.train()
    model.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    training = [module.training for module in model.modules()]
    stream = torch.get_rng_state()
    units = find_units(model, ONE)
    assert list(units.groups) == list(find_units(build("resnet18"), ONE).groups)
    assert [module.training for module in model.modules()] == training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_removal_keeps_frozen_parameters_frozen():
    model = build("normed").requires_grad_(False)
    groups = find_units(model, ONE).groups.values()
    remove(model, groups, halves(groups))
    assert not any(p.requires_grad for p in model.parameters())
    assert model.position.shape == (1, 16, 6)


def test_residual_sums_tie_their_producers():
    units = find_units(build("resnet18"), ONE)
    first = next(iter(units.groups.values()))
    assert first.name == "conv1"
    assert list(first.producers) == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert list(first.consumers) == ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]
    assert list(units.groups)[1:4] == ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]
    assert units.fixed == {"fc": OUTPUT}


def test_a_depthwise_layer_goes_with_its_expansion():
    group = find_units(build("mobilenet_v2"), ONE).groups["features.2.conv.0.0"]
    assert list(group.producers) == ["features.2.conv.0.0", "features.2.conv.1.0"]
    assert list(group.consumers) == ["features.2.conv.2"]


def test_units_of_grouped_layers_take_one_channel_of_each_group():
    groups = find_units(build("grouped"), ONE).groups
    assert groups["down.0"].producers["down.0"].tolist() == [[u, u + 4, u + 8] for u in range(4)]
    assert groups["mix.0"].consumers["up.0"].tolist() == [[u, u + 4, u + 8] for u in range(4)]
    assert list(groups["stem.0"].producers) == ["stem.0", "up.0"]


def test_a_flattened_map_is_read_at_all_its_positions():
    group = find_units(build("flattening"), ONE).groups["body.2.0"]
    assert group.consumers["hidden"].tolist() == [[4 * u + p for p in range(4)] for u in range(10)]


@pytest.mark.parametrize("name", NETS)
def test_groups_come_in_order_of_execution(name):
    model, ran = build(name), []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for layer_name, layer in layers.items():
        layer.register_forward_hook(lambda *_, layer_name=layer_name: ran.append(layer_name))
    model(ONE)
    units = find_units(build(name), ONE)
    places = [ran.index(group) for group in units.groups]
    assert places == sorted(places)
    producers = [name for group in units.groups.values() for name in group.producers]
    assert sorted([*producers, *units.fixed]) == sorted(ran)
    assert units.fixed[ran[-1]] == OUTPUT


def test_protection_by_glob():
    units = find_units(build("resnet18"), ONE)
    rest = units.protect(["layer1.*"])
    assert not any(name.startswith("layer1") for group in rest.groups.values() for name in group.producers)
    assert rest.fixed["conv1"] == rest.fixed["layer1.0.conv1"] == "protected by name"
    assert len(rest.groups) == len(units.groups) - 3
    assert units.fixed == {"fc": OUTPUT}
    assert set(units.protect(["fc"]).groups) == set(units.groups)
    with pytest.raises(ValueError, match=r"protect='conv9': matches no layer; did you mean 'conv1'"):
        units.protect(["conv1", "conv9"])


def test_what_does_not_run_is_an_error():
    with pytest.raises(
        ValueError, match=r"find_units: _ResNet does not run on a torch.float32 batch of shape \(1, 5, 32"
    ):
        find_units(build("resnet18"), torch.zeros(1, 5, 32, 32))
    with pytest.raises(ValueError, match=r"find_units: Net\(images\) gave dict: expected logits"):
        find_units(Net(lambda net, x: {"features": net.head(pooled(x))}, head=head(3)), ONE)
    with pytest.raises(ValueError, match=r"Net has no channels that can be removed \(head: its channels are the"):
        find_units(Net(lambda net, x: net.head(pooled(x)), head=head(3)), ONE)


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def between(function: Callable[[Net, Tensor], Tensor], outputs: int = 8, inputs: int = 8, **layers) -> nn.Module:
    """``a``, then a function, then ``b``."""
    return Net(
        lambda net, x: net.head(pooled(net.b(function(net, net.a(x))).relu())),
        a=conv(3, outputs),
        b=conv(inputs, 6),
        head=head(6),
        **layers,
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 8, stride=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.b, self.c, self.head = nn.Linear(8, 6), nn.Linear(6, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.c(self.b(x).relu())).mean(1))


def own_attention() -> nn.Module:
    def forward(net, x):
        x = net.b(x).flatten(2).mT
        x = x + net.o((net.a(x) @ net.k(x).mT).softmax(-1) @ net.v(x))
        return net.head(x.mean(1))

    layers = {"o": nn.Linear(4, 6), "a": nn.Linear(6, 4), "k": nn.Linear(6, 4), "v": nn.Linear(6, 4)}
    return Net(forward, b=nn.Conv2d(3, 6, 8, stride=8), **layers, head=head(6))


def with_an_output_inside() -> nn.Module:
    def forward(net, x):
        x = net.a(x)
        return pooled(x + net.c(net.b(x).relu()))

    return Net(forward, a=conv(3, 8), b=conv(8, 6), c=conv(6, 8))


MIXES, RUNS, SINGLE = "mixes them)", "does not run without", "it has a single unit ("
FIXED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group_norm": (lambda: between(lambda n, x: F.group_norm(x, 1)), SINGLE + "Net normalises them together)"),
    "LayerNorm over maps": (
        lambda: between(lambda n, x: n.n(x), n=nn.LayerNorm([8, 32, 32])),
        SINGLE + "n (LayerNorm) normalises them together)",
    ),
    "RMSNorm over maps": (
        lambda: between(lambda n, x: n.n(x), n=nn.RMSNorm([8, 32, 32])),
        SINGLE + "n (RMSNorm) normalises them together)",
    ),
    "circular padding of channels": (
        lambda: between(
            lambda n, x: F.pad(x.flatten(2).mT, (1, 1), mode="circular").mT.unflatten(2, (32, 32)), inputs=10
        ),
        SINGLE + "Net mixes its positions)",
    ),
    "rms_norm": (
        lambda: between(lambda n, x: F.rms_norm(x.movedim(1, -1), (8,)).movedim(-1, 1)),
        SINGLE + "Net normalises them together)",
    ),
    "softmax over channels": (lambda: between(lambda n, x: x.softmax(1)), MIXES),
    "mean over channels": (
        lambda: between(lambda n, x: x * x.mean(1, keepdim=True)),
        SINGLE + "mean in Net mixes them)",
    ),
    "a gate expanded to a fixed number": (
        lambda: between(lambda n, x: x * n.n(x).sigmoid().expand(-1, 8, -1, -1), n=conv(8, 1)),
        RUNS,
    ),
    "two halves": (lambda: between(lambda n, x: x[:, :4] * x[:, 4:].sigmoid(), 8, 4), RUNS),
    "roll": (lambda: between(lambda n, x: x.roll(1, 1)), "it passes roll in Net"),
    "sort": (lambda: between(lambda n, x: x.sort(1).values), "it passes sort in Net"),
    "permutation": (lambda: between(lambda n, x: x[:, [3, 1, 0, 2, 7, 6, 5, 4]]), RUNS),
    "fixed number of channels": (
        lambda: between(lambda n, x: x * torch.arange(1.0, 9.0)[:, None, None]),
        "Net combines it with values that no layer gives (mul)",
    ),
    "weights outside of layers": (
        lambda: between(lambda n, x: F.conv2d(x, n.w), 8, 8, w=nn.Parameter(torch.ones(8, 8, 1, 1))),
        READERS,
    ),
    "network's output": (with_an_output_inside, OUTPUT),
}
#: What stands between two layers → how it is made, and the number of units and the channels of each.
REMOVED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "GroupNorm": (lambda: between(lambda n, x: n.n(x), n=nn.GroupNorm(2, 8)), 2, 4),
    "GroupNorm without weights": (lambda: between(lambda n, x: n.n(x), n=nn.GroupNorm(2, 8, affine=False)), 2, 4),
    "GroupNorm of one group": (lambda: between(lambda n, x: n.n(x), n=nn.GroupNorm(1, 8)), 8, 1),
    "GroupNorm of each channel": (lambda: between(lambda n, x: n.n(x), n=nn.GroupNorm(8, 8)), 8, 1),
    "RMSNorm over positions": (lambda: between(lambda n, x: n.n(x), n=nn.RMSNorm(32)), 8, 1),
    "LayerNorm over positions": (lambda: between(lambda n, x: n.n(x), n=nn.LayerNorm(32)), 8, 1),
    "LayerNorm without weights": (
        lambda: between(lambda n, x: n.n(x.movedim(1, -1)).movedim(-1, 1), n=nn.LayerNorm(8, elementwise_affine=False)),
        8,
        1,
    ),
    "ConvTranspose2d": (lambda: between(lambda n, x: n.n(x), n=nn.ConvTranspose2d(8, 8, 2)), 8, 1),
    "ConvTranspose2d, grouped": (lambda: between(lambda n, x: n.n(x), n=nn.ConvTranspose2d(8, 8, 2, groups=2)), 4, 2),
    "ConvTranspose2d, depthwise": (lambda: between(lambda n, x: n.n(x), n=nn.ConvTranspose2d(8, 8, 2, groups=8)), 8, 1),
    "glu": (lambda: between(lambda n, x: F.glu(x, 1), 8, 4), 4, 2),
    "gated halves": (lambda: between(lambda n, x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1)), 8, 4), 4, 2),
    "channel shuffle": (lambda: between(lambda n, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), 4, 2),
    "pixel shuffle": (lambda: between(lambda n, x: F.pixel_shuffle(x, 2), 8, 2), 2, 4),
    "flip": (lambda: between(lambda n, x: x.flip(1)), 8, 1),
    "circular padding": (lambda: between(lambda n, x: n.n(x), n=nn.CircularPad2d((1, 2, 0, 1))), 8, 1),
    "a convolution of circular maps": (
        lambda: between(lambda n, x: n.n(x), 8, 8, n=conv(8, 8, groups=8, padding_mode="circular")),
        8,
        1,
    ),
    "padding of maps": (lambda: between(lambda n, x: F.pad(x, (1, 2, 0, 1))), 8, 1),
    "unfolded patches": (
        lambda: Net(
            lambda net, x: net.head(net.b(F.unfold(net.a(x), 2, stride=2).mT).relu().mean(1)),
            a=nn.Conv2d(3, 8, 8, stride=8),
            b=nn.Linear(32, 6),
            head=head(6),
        ),
        8,
        1,
    ),
    "flattened channels last": (
        lambda: Net(
            lambda net, x: net.head(net.b(net.a(x).movedim(1, -1).flatten(1)).relu()),
            a=nn.Conv2d(3, 8, 16, stride=16),
            b=nn.Linear(32, 6),
            head=head(6),
        ),
        8,
        1,
    ),
    "depthwise multiplier": (lambda: between(lambda n, x: n.n(x), 8, 16, n=conv(8, 16, groups=8)), 8, 1),
    "a gate of one channel": (lambda: between(lambda n, x: x * n.n(x).sigmoid(), n=conv(8, 1)), 8, 1),
    "an expanded gate of one channel": (
        lambda: between(lambda n, x: x * n.n(x).sigmoid().expand_as(x), n=conv(8, 1)),
        8,
        1,
    ),
    "an expanded gate per channel": (
        lambda: between(lambda n, x: x * n.n(pooled(x)).sigmoid()[..., None, None].expand_as(x), n=nn.Linear(8, 8)),
        8,
        1,
    ),
    "one kernel for every channel": (
        lambda: between(
            lambda n, x: F.conv2d(x, n.k.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1]),
            k=nn.Parameter(torch.rand(1, 1, 3, 3)),
        ),
        8,
        1,
    ),
    "a gate per channel": (
        lambda: between(lambda n, x: x * n.n(pooled(x)).sigmoid()[..., None, None], n=nn.Linear(8, 8)),
        8,
        1,
    ),
    "a norm of each map": (lambda: between(lambda n, x: x / x.norm(dim=(2, 3), keepdim=True)), 8, 1),
    "resized maps": (lambda: between(lambda n, x: F.interpolate(x, scale_factor=2, mode="bilinear")), 8, 1),
    "written in place": (lambda: between(lambda n, x: x.clone().relu_().add_(1)), 8, 1),
}


def test_queries_and_keys_of_one_head_go_together():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = own_attention().eval()
    units = find_units(model, ONE)
    assert list(units.groups["a"].producers) == ["a", "k"]
    assert list(units.groups["v"].consumers) == ["o"]
    assert units.groups["a"].consumers == {}
    assert units.groups["a"].masks == ("a", "k")
    groups = units.groups.values()
    for seed in range(3):
        hidden, slim = both(model, halves(groups, seed), groups)
        assert relative_error(slim, hidden) < 1e-5
        assert relative_error(hidden, model(IMAGES).detach()) > 1e-2


@pytest.mark.parametrize("name", REMOVED)
def test_what_goes_together_is_removed_together(name):
    make, size, channels = REMOVED[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = unsettled(make()).eval()
    units = find_units(model, ONE)
    assert "a" not in units.fixed
    assert units.groups["a"].producers["a"].shape == (size, channels)
    groups = units.groups.values()
    for seed in range(4):
        hidden, slim = both(model, halves(groups, seed), groups)
        assert relative_error(slim, hidden) < 1e-5
        assert relative_error(hidden, model(IMAGES).detach()) > 1e-3


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(conv(3, 8)), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.LazyLinear(3)
    )


@pytest.mark.parametrize("make", [Attention, weight_normed], ids=["attention", "weight norm"])
def test_units_are_those_of_the_network_with_plain_weights(make):
    model = make().eval()
    model(ONE)
    found, wanted = find_units(model, ONE), find_units(plain(model), ONE)
    assert plain(model) is not model
    assert list(found.groups) == list(wanted.groups)
    assert found.fixed == wanted.fixed
    assert found.groups


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_removed_is_fixed_with_the_reason(name):
    make, reason = FIXED[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().eval()
    units = find_units(model, ONE)
    assert reason in units.fixed["a"]
    groups = units.groups.values()
    for seed in range(3):
        hidden, slim = both(model, halves(groups, seed), groups)
        assert relative_error(slim, hidden) < 1e-5


def test_reasons_are_found_whatever_the_weights():
    """Where a new network's layer scales or zeros hide a wrong removal, weights of the trial's own show it."""
    model = between(lambda n, x: x[:, [3, 1, 0, 2, 7, 6, 5, 4]]).eval()
    nn.init.zeros_(model.b.weight)
    assert list(find_units(model, torch.zeros(1, 3, 32, 32)).groups) == ["b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_have_the_same_units(dtype):
    wanted = find_units(build("resnet18"), ONE)
    found = find_units(build("resnet18").to(dtype), ONE.to(dtype))
    assert list(found.groups) == list(wanted.groups)


def test_a_classifier_that_runs_channels_last():
    """Kept to the narrow: with fewer than 8 inputs, a strided 1×1 convolution would crash in that order."""
    model = Classifier("resnet18", 7, width=0.125, channels_last=True)
    units = find_units(model, ONE)
    assert next(iter(units.groups)) == "network.conv1"
    assert model.memory_format == torch.channels_last


def kinds() -> nn.Module:
    """Each kind of module that removal cuts, wide enough for a Python set of a few indices to lose their order."""

    def forward(net, x):
        x = net.instance(net.prelu(net.batch(net.conv(x))))
        x = net.norm((net.deep(x) + net.shift).movedim(1, -1)).relu()
        return net.head(net.inner(x).mean((1, 2)))

    norms = {"batch": nn.BatchNorm2d(384), "norm": nn.LayerNorm(384)}
    norms |= {"instance": nn.InstanceNorm2d(384, affine=True, track_running_stats=True)}
    layers = {"conv": nn.Conv2d(3, 384, 4, stride=4), "deep": nn.Conv2d(384, 384, 1, groups=384)}
    layers |= {"inner": nn.Linear(384, 6), "prelu": nn.PReLU(384), "head": head(6)}
    return Net(forward, **layers, **norms, shift=nn.Parameter(torch.rand(384, 1, 1)))


@torch.no_grad()
def test_every_kind_of_cut_keeps_the_order_of_what_stays():
    """Of LayerNorm(384) with 20 kept, torch-pruning's own function shuffles scale and shift."""
    model = kinds().eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    (group, *_) = find_units(model, ONE).groups.values()
    assert group.size == 384
    assert len(group.cuts) == 20
    stays = torch.arange(3, 384, 19)
    assert len(stays) in (20, 21)
    slim = copy.deepcopy(model)
    remove(slim, [group], {group.name: stays})
    for name, tensor in slim.state_dict().items():
        whole = model.state_dict()[name]
        side = 1 if name == "inner.weight" else 0
        wanted = whole if name.startswith(("head", "inner.bias")) or not whole.ndim else whole.index_select(side, stays)
        assert torch.equal(tensor, wanted), name
    assert slim.norm.normalized_shape == (len(stays),)
    assert slim.instance.num_features == slim.batch.num_features == slim.prelu.num_parameters == len(stays)
    hidden, cut = both(model, {group.name: stays}, [group])
    assert relative_error(cut, hidden) < 1e-5


class OwnNorm(nn.LayerNorm):
    """Channels last like its parent, by a forward pass of its own, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class MapNorm(nn.LayerNorm):
    """Over the channels of a map ``[B, C, H, W]``, as torchvision has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OwnRMSNorm(nn.RMSNorm):
    """By PyTorch's function rather than that of ``nn.functional``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class MapRMSNorm(nn.RMSNorm):
    """Over the channels of a map ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def with_norm(norm: type[nn.Module], affine: bool = True) -> nn.Module:
    """A norm between two convolutions of 8 channels, in the layout that it takes."""

    def normed(net, x):
        return net.n(x) if norm in (MapNorm, MapRMSNorm) else net.n(x.movedim(1, -1)).movedim(-1, 1)

    return unsettled(between(normed, n=norm(8, elementwise_affine=affine))).eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm, MapNorm, nn.RMSNorm, OwnRMSNorm, MapRMSNorm])
def test_layer_norms_of_any_layout_can_be_cut(norm, affine):
    model = with_norm(norm, affine)
    groups = find_units(model, ONE).groups
    assert list(groups["a"].layer_norms) == ["n"]
    for seed in range(3):
        hidden, slim = both(model, halves(groups.values(), seed), groups.values())
        assert relative_error(slim, hidden) < 1e-5


@pytest.mark.parametrize("norm", [OwnNorm, MapNorm, OwnRMSNorm, MapRMSNorm])
def test_a_map_as_wide_as_its_channels_does_not_hide_where_they_are(norm):
    groups = find_units(with_norm(norm), ONE[..., :8, :8]).groups
    assert list(groups["a"].layer_norms) == ["n"]


class ByFunction(nn.Module):
    """Root mean square norm by PyTorch's function, in a class of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, ByFunction])
def test_heads_whose_queries_and_keys_are_normalised_go_as_a_whole(norm):
    def forward(net, x):
        x = net.a(x).flatten(2).mT
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        x = F.scaled_dot_product_attention(net.over_q(q), net.over_k(k), v).transpose(1, 2).flatten(2)
        return net.head(net.o(x).mean(1))

    layers = {"a": nn.Conv2d(3, 6, 8, stride=8), "o": nn.Linear(12, 8), "head": head(8)}
    layers |= {name: nn.Linear(6, 12) for name in "qkv"} | {"over_q": norm(4), "over_k": norm(4)}
    groups = find_units(unsettled(Net(forward, **layers)).eval(), ONE).groups
    assert groups["q"].size == 3
    assert set(groups["q"].producers) == {"q", "k", "v"}


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2): each map's norm over the mean of all maps' norms."""

    def __init__(self, channels: int, strength: float) -> None:
        super().__init__()
        self.weight, self.strength = nn.Parameter(torch.ones(channels)), strength

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        share = size / (size.mean(1, keepdim=True) + 1e-6)
        return x + self.strength * self.weight[:, None, None] * x * share


@pytest.mark.parametrize("strength", [1.0, 1e-4])
def test_mixing_is_found_however_weak(strength):
    model = between(lambda n, x: n.n(x), n=ResponseNorm(8, strength))
    units = find_units(model, ONE)
    assert MIXES in units.fixed["a"]
    assert list(units.groups) == ["b"]


def test_convnext_keeps_its_logits_at_a_tenth_of_its_channels():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = unsettled(convnext_tiny(weights=None)).eval()
    groups = find_units(model, ONE).groups.values()
    hidden, slim = both(model, halves(groups, share=0.1), groups)
    assert relative_error(slim, hidden) < 1e-4


class Hard(nn.Module):
    """Holds on to a dtype inside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b, self.head = kind, conv(3, 8), conv(8, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if self.kind == "uint8" else x
        if self.kind == "float32 throughout":
            x = x.float()
        x = self.a(x)
        if self.kind == "float32 softmax":
            x = x * F.softmax(x.flatten(2), -1, dtype=torch.float32).unflatten(2, x.shape[2:]).to(x.dtype)
        if self.kind == "bfloat16 inside":
            x = x.bfloat16().to(x.dtype)
        return self.head(pooled(self.b(x)))


@pytest.mark.parametrize("kind", ["uint8", "float32 throughout", "float32 softmax"])
def test_networks_that_hold_on_to_float32_are_tried_in_it(kind):
    example = ONE.mul(50).clamp(0, 255).to(torch.uint8) if kind == "uint8" else ONE
    assert list(find_units(Hard(kind), example).groups) == ["a", "b"]


def test_half_precision_inside_is_a_reason():
    with pytest.raises(ValueError, match=r"a: the network rounds to torch.bfloat16 internally, which is too coarse"):
        find_units(Hard("bfloat16 inside"), ONE)


def test_layers_without_gradients_and_outside_of_evaluation_are_named():
    def forward(net, x):
        with torch.no_grad():
            fixed = pooled(net.frozen(x))
        if net.training:
            net.auxiliary(fixed)
        return net.head(pooled(net.a(x)) + fixed.mean())

    model = Net(forward, frozen=conv(3, 4), auxiliary=head(4), a=conv(3, 8), head=head(8)).eval()
    assert find_units(model, ONE).fixed == {
        "head": OUTPUT,
        "frozen": "it has a single unit (mean in Net mixes them)",
        "auxiliary": "the forward pass in eval mode does not call it",
    }


def test_what_only_training_expands_to_a_fixed_number_stays():
    """No trial trains, so nothing would show that a head of training runs with that number alone."""

    def forward(net, x):
        x = net.a(x)
        logits = net.head(pooled(net.b(x)))
        return (logits, net.other(pooled(x * net.gate(x).expand(-1, 8, -1, -1)))) if net.training else logits

    layers = {"a": conv(3, 8), "b": conv(8, 6), "gate": conv(8, 1), "other": head(8), "head": head(6)}
    units = find_units(Net(forward, **layers).eval(), ONE)
    assert list(units.groups) == ["b"]
    assert units.fixed["a"] == "Net combines it with values that no layer gives (mul)"


class Full(nn.Module):
    """Runs out of memory with fewer channels than it was written with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[1] < 8:
            raise torch.OutOfMemoryError("the device is full")
        return self.head(self.second(x).mean((2, 3)))


def test_a_full_device_is_not_taken_for_a_layer_that_cannot_be_pruned():
    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        find_units(Full().eval(), ONE)


RESHAPED = {
    "squeeze_": lambda y: y.mean((2, 3), keepdim=True).squeeze_(-1).squeeze_(-1),
    "unsqueeze_": lambda y: y.mean((2, 3)).unsqueeze_(1).mean(1),
    "transpose_": lambda y: y.flatten(2).transpose_(1, 2).mean(1),
    "swapaxes_": lambda y: y.flatten(2).swapaxes_(1, 2).mean(1),
    "t_": lambda y: y.mean((2, 3)).t_().t(),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_operations_that_change_a_shape_in_place_move_channels_as_others_do(name):
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.head(RESHAPED[name](net.b(net.a(x)))),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(8, 6, 3),
        head=head(6),
    ).eval()
    groups = find_units(model, ONE).groups
    assert {name: group.size for name, group in groups.items()} == {"a": 8, "b": 6}
    hidden, slim = both(model, halves(groups.values()), groups.values())
    torch.testing.assert_close(slim, hidden)
