"""Compensation: what can be made up for is, exactly; every fit is the least squares that it claims to be."""

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from chanaxes_pl.compensation import layerwise as home
from chanaxes_pl.compensation import pairing
from chanaxes_pl.compensation.layerwise import RIDGE, compensate, kept_channels, reestimate_norms
from chanaxes_pl.compensation.pairing import Seen, paired
from chanaxes_pl.units.groups import executed_layers, find_units
from chanaxes_pl.units.removal import Group, remove
from tests.helpers.networks import NETS, ONE, Net, build, halves, head, pooled

BATCHES = torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(6)).split(40)
OTHERS = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def cut(model: nn.Module, kept: Mapping[str, Tensor], groups: Iterable[Group]) -> nn.Module:
    slim = copy.deepcopy(model)
    remove(slim, groups, kept)
    return slim


@torch.no_grad()
def duplicate(model: nn.Module, group: Group, unit: int, double: int) -> None:
    """Let one unit compute what another does."""
    for part in group.cuts:
        if not part.reads and part.dimension is not None:
            tensor = model.state_dict(keep_vars=True)[part.path].movedim(part.dimension, 0)
            tensor[part.indices[double]] = tensor[part.indices[unit]]


EXACT = [  # network, group, kinds that can make up for it
    ("flattening", "body.0.0", ("fold", "refit")),  # read by a strided convolution
    ("flattening", "body.2.0", ("fold", "refit")),  # at all positions, by a Linear
    ("flattening", "hidden", ("fold", "refit")),
    ("concatenating", "stem.0", ("fold", "refit")),
    ("concatenating", "second.0", ("fold", "refit")),
    ("grouped", "stem.0", ("fold", "refit")),  # a residual sum
    ("grouped", "mix.0", ("fold", "refit")),
    ("grouped", "down.0", ("refit",)),  # read by a grouped convolution
    ("normed", "up", ("fold", "refit")),  # one vector a token
    ("squeezing", "stem.0", ("fold", "refit")),  # behind a gate
    ("resnet18", "conv1", ("fold", "refit")),
    ("inverted", "expand.0", ("fold", "refit")),  # through a depthwise layer
    ("convnext block", "block.block.3", ("fold", "refit")),  # channels last
]


@pytest.mark.parametrize(("name", "of", "compensation"), [(n, g, s) for n, g, kinds in EXACT for s in kinds])
@torch.no_grad()
def test_a_duplicate_is_made_up_for_exactly(name, of, compensation):
    model = build(name)
    groups = find_units(model, ONE).groups
    group = groups[of]
    duplicate(model, group, 0, group.size - 1)
    kept = {of: torch.arange(group.size - 1)}
    slim = cut(model, kept, groups.values())
    wanted, without = model(OTHERS), slim(OTHERS)
    # Shrinkage leaves an error in proportion to λ; much below 1e-4, rounding in float32 leaves a larger one.
    report = compensate(slim, model, groups.values(), kept, BATCHES, compensation, ridge=1e-4, positions=64)
    spread = (wanted - wanted.mean(0)).abs().max()  # logits of random networks hardly depend on the image
    error = (slim(OTHERS) - wanted).abs().max()
    assert error < 2e-3 * spread
    assert error < 0.03 * (without - wanted).abs().max()
    assert report.after.max() < 1e-6


@pytest.mark.parametrize("compensation", RIDGE)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_fit_helps_and_so_do_all_together(name, compensation):
    model = build(name)
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups, share=0.7)
    slim = cut(model, kept, groups)
    images = torch.cat(BATCHES)
    wanted, without = model(images), slim(images)
    report = compensate(slim, model, groups, kept, BATCHES, compensation)
    assert (slim(images) - wanted).square().mean() < 0.75 * (without - wanted).square().mean()
    assert list(report.columns) == ["layer", "before", "after", "reason"]
    assert list(report.layer) == executed_layers(model, ONE)
    fitted = report[report.reason == ""]
    assert (fitted.after <= fitted.before * (1 + 1e-9)).all()
    assert (fitted.before > 0).sum() > len(fitted) / 3
    grouped = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    expected = grouped if compensation == "fold" else set()
    assert set(report.layer[report.reason != ""]) == expected
    assert report.reason[report.reason != ""].str.contains("read groups of inputs, which have nothing to fold").all()


def taken_for(task: home._Task, _name: str, first: int, seen: Seen, gave: Tensor) -> home._Goal:
    return home._dense_outputs(task, first, seen, gave)


@torch.no_grad()
def test_fits_see_the_errors_upstream():
    """Fitting each layer to what the uncompensated network gives it, and putting the fits together, is worse."""
    model = build("concatenating")
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    slim, pieces, images = cut(model, kept, groups), cut(model, kept, groups), torch.cat(BATCHES)
    channels = kept_channels(model, groups, kept)
    compensate(slim, model, groups, kept, BATCHES)
    for name in executed_layers(model, ONE):
        alone = cut(model, kept, groups)
        layer, original = alone.get_submodule(name), model.get_submodule(name)
        shape, many = home._shape(layer, original, "refit"), 16 * len(images)
        task = home._Task(name, layer, original, *channels[name], None, 1, 16, RIDGE["refit"], shape, many, many)
        take = partial(taken_for, task)
        for _, goals in paired(model, alone, BATCHES, [name], take, images=len(images)):
            home._refit(task, goals)
        fitted, layer = alone.get_submodule(name), pieces.get_submodule(name)
        layer.weight, layer.bias = fitted.weight, fitted.bias
    wanted = model(images)
    in_order, apart = ((net(images) - wanted).square().mean() for net in (slim, pieces))
    assert in_order < 0.9 * apart


def branch(inputs: int, channels: int, norm: bool) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
    return nn.Sequential(*(layers if norm else layers[:1]))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shortcut", ["identity", "convolution"])
@torch.no_grad()
def test_a_layer_that_completes_a_sum_makes_up_for_the_other_term(shortcut, norm, monkeypatch):
    """Against least squares on the whole sum, from the signals of plain forward passes."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.before(net.stem(x).relu()).relu()
        inside = net.last(net.first(x).relu())
        return net.head(pooled((inside + net.short(x)).tanh()))

    torch.manual_seed(0)
    model = Net(
        forward,
        stem=nn.Conv2d(3, 12, 3, stride=4),
        before=nn.Conv2d(12, 8, 3, padding=1),
        first=branch(8, 12, norm),
        last=branch(12, 10 if shortcut == "convolution" else 8, norm),
        short=branch(8, 10, norm) if shortcut == "convolution" else nn.Identity(),
        head=head(10 if shortcut == "convolution" else 8),
    ).eval()
    groups = find_units(model, ONE).groups
    kept = {"stem": torch.arange(6), "first.0": torch.arange(3)}
    own, images = int(shortcut == "convolution"), torch.cat(BATCHES)

    def terms(net: nn.Module) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = net.before(net.stem(images).relu()).relu()
        hidden = net.first(x).relu()
        return (net.last(hidden), net.short(x)), (hidden, x)[own]

    def errors() -> tuple[Tensor, Tensor]:
        """Of the sum after a fit, and the least that its last layer can leave."""
        slim = cut(model, kept, groups.values())
        compensate(slim, model, groups.values(), kept, BATCHES, ridge=1e-9, positions=64)
        found, read = terms(slim)
        wanted = sum(terms(model)[0]).double() - found[1 - own]
        patches = nn.functional.unfold(read, 3, padding=1).double()  # [B, F, P]
        rows = torch.cat([patches, torch.ones_like(patches[:, :1])], 1).transpose(0, 1).flatten(1).T
        goals = wanted.flatten(2).transpose(0, 1).flatten(1).T
        least = rows @ torch.linalg.lstsq(rows, goals).solution - goals
        return (found[own] - wanted).square().mean(), least.square().mean()

    found, least = errors()
    monkeypatch.setattr(pairing, "passage", lambda *_: None)
    without, _ = errors()
    assert found < 1.001 * least
    assert without > 1.02 * least


@pytest.mark.parametrize("compensation", RIDGE)
@pytest.mark.parametrize("name", ["resnet18", "concatenating", "normed"])
def test_with_nothing_removed_nothing_changes(name, compensation):
    model = build(name)
    groups = find_units(model, ONE).groups.values()
    slim = copy.deepcopy(model)
    report = compensate(slim, model, groups, {g.name: torch.arange(g.size) for g in groups}, BATCHES, compensation)
    state = model.state_dict()
    assert list(slim.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in slim.state_dict().items())
    assert (report.before == 0).all()
    assert (report.after == 0).all()


@pytest.mark.parametrize("compensation", RIDGE)
def test_layers_before_the_first_removal_are_left_alone(compensation):
    model = build("vgg16_bn")
    groups = find_units(model, ONE).groups.values()
    kept = {"features.14": torch.arange(40)}
    slim = cut(model, kept, groups)
    whole = copy.deepcopy(slim)
    compensate(slim, model, groups, kept, BATCHES[2:], compensation)
    changed = [name for name, value in whole.state_dict().items() if not torch.equal(value, slim.state_dict()[name])]
    assert changed[0] == "features.17.weight"
    assert not any("running" in name or name.startswith("features.14") for name in changed)


@pytest.mark.parametrize("compensation", RIDGE)
@pytest.mark.parametrize("name", ["resnet18", "normed", "grouped", "inverted"])
def test_a_network_that_cannot_be_traced_gets_the_same_weights(name, compensation, monkeypatch):
    model = build(name)
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    images = [batch[:12] for batch in BATCHES[:2]]
    traced, whole = cut(model, kept, groups), cut(model, kept, groups)
    monkeypatch.setattr(pairing, "passage", lambda *_: None)  # what follows is known from a trace alone
    first = compensate(traced, model, groups, kept, images, compensation)
    monkeypatch.setattr(pairing._Traced, "of", lambda *_: None)
    second = compensate(whole, model, groups, kept, images, compensation)
    pd.testing.assert_frame_equal(first, second)
    for key, value in traced.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compensation", RIDGE)
def test_a_depthwise_layer_with_one_channel_left(compensation):
    model = build("inverted")
    groups = find_units(model, ONE).groups
    name = next(name for name, group in groups.items() if name.startswith("expand"))
    slim = cut(model, {name: torch.tensor([2])}, groups.values())
    report = compensate(slim, model, groups.values(), {name: torch.tensor([2])}, BATCHES, compensation)
    depthwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert depthwise
    assert set(report.layer[report.reason != ""]) == (depthwise if compensation == "fold" else set())


def test_a_layer_that_runs_twice_is_reported():
    twice, last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(), last, nn.ReLU())
    model = Net(lambda net, x: net.head(pooled(net.body(x))), body=net, head=head(6)).eval()
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    slim = cut(model, kept, groups)
    before = slim.body[2].weight.clone()
    report = compensate(slim, model, groups, kept, BATCHES).set_index("layer")
    assert report.reason["body.2"] == "runs more than once in a forward pass"
    assert report.loc["body.2", ["before", "after"]].isna().all()
    assert (report.reason == "").sum() == 3
    assert torch.equal(slim.body[2].weight, before)


def test_the_networks_modes_and_the_dense_one_are_as_before():
    model = build("resnet18")
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    slim = cut(model, kept, groups).train()
    model.train()
    model.bn1.eval()
    state, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    norms = {key: value.clone() for key, value in slim.state_dict().items() if "running" in key}
    compensate(slim, model, groups, kept, BATCHES)
    assert [m.training for m in model.modules()] == modes
    assert all(m.training for m in slim.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(slim.state_dict()[key], value) for key, value in norms.items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(m._forward_hooks for net in (model, slim) for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in slim.parameters())


@pytest.mark.parametrize("compensation", RIDGE)
@torch.no_grad()
def test_signals_that_do_not_vary_give_no_figure_and_no_harm(compensation):
    model = build("concatenating")
    model.first[1].weight.zero_()
    model.second[0].weight.zero_()
    model.second[1].bias.fill_(-50)
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    slim = cut(model, kept, groups)
    report = compensate(slim, model, groups, kept, BATCHES, compensation).set_index("layer")
    assert all(value.isfinite().all() for value in slim.state_dict().values())
    if compensation == "refit":
        assert np.isnan(report.before["second.0"])
        assert report.reason["second.0"] == "what it was to be fitted to does not vary"
    assert report[["before", "after"]].isna().any(axis=1).equals(report.reason != "")


def test_an_unknown_strength_is_refused():
    model = build("grouped")
    with pytest.raises(ValueError, match=r"compensation='bend': expected 'fold' or 'refit'"):
        compensate(model, model, [], {}, BATCHES, "bend")


def test_depthwise_layers_lose_inputs_with_their_outputs():
    model = build("squeezing")
    groups = find_units(model, ONE).groups.values()
    kept = {"stem.0": torch.tensor([0, 2, 4]), "narrow.0": torch.tensor([1, 2])}
    channels = {name: [part.tolist() for part in both] for name, both in kept_channels(model, groups, kept).items()}
    assert channels["image.0"] == [[0, 1, 2], [0, 1, 2, 3, 4, 5]]  # it reads the image, which stays
    assert channels["wide.0"] == [[1, 2], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert channels["head"][0] == channels["wide.0"][1]
    mobile = build("mobilenet_v2")
    groups = find_units(mobile, ONE).groups.values()
    channels = kept_channels(mobile, groups, {"features.2.conv.0.0": torch.tensor([3, 5])})
    assert [part.tolist() for part in channels["features.2.conv.1.0"]] == [[3, 5], [3, 5]]


def statistics_of(model: nn.Module, norm: Callable[[nn.Module], nn.Module]) -> tuple[Tensor, Tensor]:
    """Means over batches of the mean and the unbiased variance that a norm reads, when all norms use their batch's."""
    twin, read = copy.deepcopy(model).train(), []
    norm(twin).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].transpose(0, 1).flatten(1)))
    for images in BATCHES:
        twin(images)
    return tuple(torch.stack(parts).mean(0) for parts in ([x.mean(1) for x in read], [x.var(1) for x in read]))


@torch.no_grad()
def test_norms_are_estimated_anew():
    model = build("resnet18").train()
    model.layer2.eval()
    model.bn1.momentum = 0.3
    modes = [m.training for m in model.modules()]
    wanted = [statistics_of(model, norm) for norm in (lambda m: m.bn1, lambda m: m.layer4[1].bn2)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    reestimate_norms(model, BATCHES)
    for norm, (mean, variance) in zip((model.bn1, model.layer4[1].bn2), wanted, strict=True):
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)
    assert [m.training for m in model.modules()] == modes
    assert [model.bn1.momentum, model.layer4[1].bn2.momentum] == [0.3, 0.1]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        reestimate_norms(model, [torch.zeros(2, 5, 32, 32)])
    assert [m.training for m in model.modules()] == modes
    assert model.bn1.momentum == 0.3


# ---------------------------------------------------------------- layers that are not what their class says


class Cosine(nn.Linear):
    """A cosine classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Causal(nn.Conv2d):
    """Pads on two sides only before it runs as its class does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0, 2, 0)))


def classes(last: nn.Module, middle: nn.Module | None = None) -> nn.Module:
    return Net(
        lambda net, x: net.last(pooled(net.middle(net.first(x).relu()).relu())),
        first=nn.Conv2d(3, 12, 3),
        middle=middle or nn.Conv2d(12, 8, 3),
        last=last,
    )


def masked() -> nn.Module:
    return torch_prune.random_unstructured(nn.Linear(8, 6), "weight", 0.5)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(8, 6)
    layer.forward = lambda x: F.linear(x.tanh(), layer.weight, layer.bias)
    return layer


def with_hook(prepared: bool) -> nn.Module:
    layer = nn.Linear(8, 6)
    if prepared:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))
    else:
        layer.register_forward_hook(lambda _, __, output: output.tanh())
    return layer


NOT_AFFINE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "cosine head": (lambda: classes(Cosine(8, 6)), "last", "Cosine has a forward of its own"),
    "causal convolution": (lambda: classes(head(8), Causal(12, 8, 3)), "middle", "Causal has a forward of its own"),
    "forward of an instance": (lambda: classes(replaced_forward()), "last", "Linear has a forward of its own"),
    "pruning mask": (lambda: classes(masked()), "last", "computed from other parameters"),
    "weight norm": (lambda: classes(parametrizations.weight_norm(nn.Linear(8, 6))), "last", "other parameters"),
    "pre-hook": (lambda: classes(with_hook(True)), "last", "a forward hook"),
    "hook": (lambda: classes(with_hook(False)), "last", "a forward hook"),
}


@pytest.mark.parametrize("compensation", RIDGE)
@pytest.mark.parametrize("name", NOT_AFFINE)
@torch.no_grad()
def test_layers_that_are_not_affine_are_left_out_with_the_reason(name, compensation):
    make, layer, reason = NOT_AFFINE[name]
    torch.manual_seed(0)
    model = make().eval()
    slim = copy.deepcopy(model)
    slim.first.weight[::3] = 0  # what follows sees an error
    slim.first.bias[::3] = 0
    state, images = copy.deepcopy(slim.state_dict()), torch.cat(BATCHES)
    wanted, without = model(images), slim(images)
    report = compensate(slim, model, [], {}, BATCHES, compensation).set_index("layer")
    assert reason in report.reason[layer]
    assert report.loc[layer, ["before", "after"]].isna().all()
    assert (report.reason == "").sum() == 2
    assert all(torch.equal(v, state[key]) for key, v in slim.state_dict().items() if key.startswith(layer))
    assert (slim(images) - wanted).square().mean() < 0.9 * (without - wanted).square().mean()


class Tied(nn.Module):
    """Two layers of one weight, or a weight that is read by a function as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.last = head(8)
        if how == "one parameter":
            self.b.weight = self.a.weight
        elif how == "one memory":
            self.b.weight = nn.Parameter(self.a.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x).relu()).relu()
        x = F.conv2d(x, self.a.weight) if self.how == "a function" else self.b(x)
        return self.last(pooled(x.relu()))


@pytest.mark.parametrize("compensation", RIDGE)
@pytest.mark.parametrize("how", ["one parameter", "one memory", "a function"])
@torch.no_grad()
def test_tied_weights_are_left_out_with_the_reason(how, compensation):
    torch.manual_seed(0)
    model = Tied(how).eval()
    slim = copy.deepcopy(model)
    slim.stem.weight[::3] = 0
    state = copy.deepcopy(slim.state_dict())
    report = compensate(slim, model, [], {}, BATCHES, compensation).set_index("layer")
    tied = [name for name in ("a", "b") if name in report.index]
    assert len(tied) == (1 if how == "a function" else 2)
    assert report.reason[tied].str.contains("read elsewhere too").all()
    assert (report.reason.drop(index=tied) == "").all()
    assert torch.equal(slim.a.weight, state["a.weight"])
    assert torch.equal(slim.b.weight, state["b.weight"])


def test_a_shape_that_is_asked_for_is_no_use_of_a_weight():
    model = classes(head(8))
    model.function = lambda net, x: net.last(
        pooled(net.middle(net.first(x.to(net.first.weight.dtype)).relu()).relu())[:, : net.last.weight.shape[1]]
    )
    report = compensate(copy.deepcopy(model), model, [], {}, BATCHES)
    assert (report.reason == "").all()


@torch.no_grad()
def test_a_call_that_gives_something_else_is_seen_as_it_runs():
    """A hook on all modules is seen on none of them."""
    model = classes(head(8)).eval()
    slim = copy.deepcopy(model)
    slim.first.weight[::3] = 0
    doubled = nn.modules.module.register_module_forward_hook(
        lambda layer, _, output: 2 * output if isinstance(layer, nn.Linear) else None
    )
    try:
        report = compensate(slim, model, [], {}, BATCHES).set_index("layer")
    finally:
        doubled.remove()
    assert report.reason["last"] == "its output is not its weight times its input plus its bias"
    assert (report.reason.drop(index="last") == "").all()


# ---------------------------------------------------------------- in bounded memory


@pytest.mark.parametrize(
    ("name", "compensation", "memory"),
    [
        *[("concatenating", kind, 0.0025) for kind in RIDGE],
        *[("flattening", kind, 0.0023) for kind in RIDGE],
        ("resnet18", "refit", 0.0223),  # half of it for the equations of the widest layer
        ("resnet18", "fold", 0.009),
    ],
)
def test_a_bound_on_memory_gives_the_same_weights(name, compensation, memory, monkeypatch):
    model = build(name)
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    large, small = cut(model, kept, groups), cut(model, kept, groups)
    monkeypatch.setattr(home, "held_bytes", lambda *_: 0)  # what is fitted depends on whether samples are held
    monkeypatch.setattr(home, "_MOST_HELD", np.inf)
    wanted, waited, plan = compensate(large, model, groups, kept, BATCHES, compensation), [], pairing._Waiting._plan

    def watched(self: pairing._Waiting, *args: Any) -> tuple[Collection[int], Collection[int]]:
        moves, stays = plan(self, *args)
        waited.append(len(moves) / self._parts.count)
        return moves, stays

    monkeypatch.setattr(pairing._Waiting, "_plan", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compensate(small, model, groups, kept, BATCHES, compensation, memory=memory)
    assert 0.1 < np.mean(waited) < 0.99
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-3)
    with torch.no_grad():
        rest, logits = large(OTHERS) - small(OTHERS), large(OTHERS)
    assert rest.abs().max() < 2e-3 * (logits - logits.mean(0)).abs().max()


@pytest.mark.parametrize("compensation", RIDGE)
def test_a_layer_with_more_inputs_than_samples_is_fitted_as_one_with_each_sample_twice(compensation):
    """The former is solved in the samples, the latter in the inputs."""
    model = build("flattening")
    groups = find_units(model, ONE).groups.values()
    kept, images = halves(groups), BATCHES[0][:14]
    few, many = cut(model, kept, groups), cut(model, kept, groups)
    first = compensate(few, model, groups, kept, [images], compensation, positions=64)
    second = compensate(many, model, groups, kept, [images, images], compensation, positions=64)
    pd.testing.assert_frame_equal(first, second, rtol=1e-3, atol=1e-6)
    for key, value in few.state_dict().items():
        torch.testing.assert_close(many.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_equations_without_room_take_fewer_samples_and_say_so(monkeypatch):
    monkeypatch.setattr(home, "_FEWEST", 100)
    model = build("grouped")
    model.head = nn.Linear(16 * 256, 7)
    model.function = lambda net, x: net.head((y := net.stem(x)).add(net.up(net.mix(net.down(y)))).flatten(1))
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups, share=0.7)
    images = torch.cat([*BATCHES, *BATCHES, *BATCHES])
    images = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).split(48)
    results = {}
    for memory in (2.0, 0.018):
        slim = cut(model, kept, groups)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = compensate(slim, model, groups, kept, images, memory=memory).set_index("layer")
        results[memory] = float((slim(OTHERS) - model(OTHERS)).square().mean())
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == (memory < 1)
        assert report.reason["head"] == ""
    assert re.fullmatch(
        r"layer 'head' has 2816 inputs and is fitted to 1\d\d of 288 samples, which memory=0\.018 has room for; "
        r"memory=0\.0\d+ has room for all",
        texts[0],
    )
    assert results[0.018] < 1.5 * results[2.0]


def test_memory_without_room_for_equations_is_refused_with_what_they_take():
    model = build("concatenating")
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    message = r"memory=0\.0001: expected at least 0\.00\d+ GB, half of it for the \d+ inputs of 'stem\.0'"
    with pytest.raises(ValueError, match=message):
        compensate(cut(model, kept, groups), model, groups, kept, BATCHES, memory=1e-4)


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), "2", None, True])
def test_memory_that_is_no_size_is_refused(memory):
    model = build("grouped")
    with pytest.raises(ValueError, match=rf"memory={re.escape(repr(memory))}: expected gigabytes, a number above 0"):
        compensate(model, model, [], {}, BATCHES, memory=memory)


@torch.no_grad()
def test_a_channel_that_is_gone_and_never_varied_changes_no_other(monkeypatch):
    """Its norm multiplies by hundreds what is constant, so that all others look as if next to nothing passed."""
    found = []
    for variance in (1.0, 0.0):
        torch.manual_seed(0)
        model = Net(
            lambda net, x: net.head(pooled((net.last(net.first(x := net.stem(x).relu()).relu()) + x).relu())),
            stem=nn.Conv2d(3, 8, 3, stride=4),
            first=branch(8, 12, True),
            last=branch(12, 8, True),
            head=head(8),
        ).eval()
        conv, norm = model.last[0], model.last[1]
        norm.weight.fill_(0.1)
        conv.weight[3], norm.running_mean[3], norm.weight[3] = 0.0, 0.0, 1.0
        norm.running_var[3] = variance
        groups = find_units(model, ONE).groups.values()
        kept = {"stem": torch.tensor([0, 1, 2, 4, 5, 6, 7]), "first.0": torch.arange(6)}
        slim = cut(model, kept, groups)
        compensate(slim, model, groups, kept, BATCHES)
        found.append(slim.last[0].weight.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


class Clips(nn.Module):
    """Frames are images of the convolutions: rows of a layer are more than images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x.flatten(0, 1)).relu()).relu()).relu()
        return self.head(x.mean((2, 3)).unflatten(0, (-1, 4)).mean(1))


@pytest.mark.parametrize("compensation", ["fold", "refit"])
@torch.no_grad()
def test_layers_with_more_rows_than_images_are_fitted_alike_whatever_the_batches(compensation):
    torch.manual_seed(0)
    model, clips, found = Clips().eval(), torch.randn(24, 4, 3, 12, 12), []
    groups = find_units(model, clips[:1]).groups.values()
    kept = halves(groups)
    for size in (24, 5):
        slim = cut(model, kept, groups)
        report = compensate(slim, model, groups, kept, clips.split(size), compensation)
        found.append((report[["before", "after"]].to_numpy(), slim(clips)))
    assert (found[0][0][1:, 1] < found[0][0][1:, 0]).all()
    np.testing.assert_allclose(found[0][0][1:], found[1][0][1:], rtol=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compensation", ["fold", "refit"])
@torch.no_grad()
def test_a_transposed_convolution_of_groups_loses_outputs_with_its_inputs(compensation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8, bias=False),
        nn.Conv2d(8, 6, 3, padding=1),
    ).eval()
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    slim = cut(model, kept, groups)
    report = compensate(slim, model, groups, kept, BATCHES, compensation).set_index("layer")
    assert slim[2].weight.shape == (4, 1, 4, 4)
    assert report.after["3"] < report.before["3"]


def test_statistics_are_reestimated_where_the_last_batch_is_one_image():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    images = torch.randn(17, 3)
    reestimate_norms(model, images.split(8))
    expected = torch.stack([model[0](part).mean(0) for part in images.split(8)[:2]]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected.detach())


def test_a_bias_of_a_frozen_layer_is_frozen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)).eval()
    model.requires_grad_(False)
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    slim = cut(model, kept, groups)
    compensate(slim, model, groups, kept, BATCHES)
    assert slim[2].bias is not None
    assert not slim[2].bias.requires_grad


class Rectified(nn.Module):
    """Layers whose outputs a function cuts off: behind a norm of either sign, behind a sum, and a Linear one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24)
        self.first, self.second = nn.Conv2d(24, 32, 3, padding=1), nn.Conv2d(32, 24, 3, padding=1)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 6)
        with torch.no_grad():
            self.norm.weight.normal_().mul_(2)
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = F.relu6(8 * (x + self.second(F.relu(self.first(x)))) - 2)
        return self.head(self.hidden(pooled(x)).relu())


@torch.no_grad()
def test_a_refit_leaves_alone_what_a_function_cuts_off(monkeypatch):
    """So what it lets through is closer to the dense network's, on other images too."""
    model = Rectified().eval()
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)

    def let_through(net: Rectified, images: Tensor) -> Tensor:
        return net.first(net.norm(net.stem(images)).relu()).relu()

    def errors() -> tuple[list[float], pd.DataFrame]:
        slim = cut(model, kept, groups)
        report = compensate(slim, model, groups, kept, BATCHES, positions=64).set_index("layer")
        rest = [let_through(model, x)[:, kept["first"]] - let_through(slim, x) for x in (torch.cat(BATCHES), OTHERS)]
        return [float(part.square().mean()) for part in rest], report

    found, report = errors()
    monkeypatch.setattr(pairing, "passage", lambda *_: None)
    without, _ = errors()
    assert all(one < 0.99 * other for one, other in zip(found, without, strict=True))
    assert (report.after <= report.before).all()


@torch.no_grad()
def test_without_room_for_its_samples_a_layer_is_fitted_as_if_nothing_were_cut_off(monkeypatch):
    model = Rectified().eval()
    groups = find_units(model, ONE).groups.values()
    kept = halves(groups)
    known = pairing.passage

    def nowhere_flat(*args: Any) -> Any:
        found = known(*args)
        return found and found._replace(flat=(-np.inf, np.inf))

    def made(owner: Any, name: str, value: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            slim = cut(model, kept, groups)
            compensate(slim, model, groups, kept, BATCHES)
        return slim(OTHERS)

    patches = [(home, "_MOST_HELD", 0.0), (home, "_MOST_HELD", 0.6), (pairing, "passage", nowhere_flat)]
    states = [made(*patch) for patch in patches]
    assert torch.equal(states[0], states[2])
    assert not torch.allclose(states[0], states[1], rtol=0.01)
