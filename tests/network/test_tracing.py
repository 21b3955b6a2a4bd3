"""A part of a network run again gives what running everything gives; two networks side by side show what layers see."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.models import BACKBONES, Classifier, build_backbone
from chanaxes_pl.network import tracing as home
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.tracing import PartialForward, edited, paired_activations
from chanaxes_pl.units.groups import executed_layers, find_units
from chanaxes_pl.units.removal import remove
from tests.helpers import networks as pruned
from tests.helpers import training as small
from tests.helpers.networks import IMAGES, ONE, Net, halves, head, pooled

BATCHES = IMAGES.split(4)


def lived_in(model: nn.Module) -> nn.Module:
    """A random network whose norms have seen images and whose weights are of some use: no channel is like another."""
    generator = torch.Generator().manual_seed(7)
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.2, 0.5, generator=generator)
        norm.momentum = 1.0
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.data.uniform_(0.2, 1.0, generator=generator)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model.double().train()(batch(16))
    for norm in norms:
        norm.momentum = 0.1
    return model


def backbone(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lived_in(build_backbone(name, 10, 0.25, 32))


def batch(n: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Branching(nn.Module):
    """Which convolution comes second depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.yes, self.no = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3), nn.Conv2d(5, 6, 3)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = self.yes(x) if x.mean() > 0 else self.no(x)
        return self.out(F.relu(x).mean((2, 3)))


class Overwriting(nn.Module):
    """Overwrites its activations in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, padding=1)
        self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x.mul_(2.0)
        torch.sigmoid_(x)
        y = self.second(x)
        self.relu(y)
        y += x
        F.relu(y, inplace=True)
        F.elu(input=y, inplace=True)
        return self.out(torch.abs_(y).mean((2, 3)))


class Alias(nn.Module):
    """Overwrites an activation through a view of it, which its graph does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x.flatten(2).mul_(3.0)
        return self.out(x.mean((2, 3)))


class Standardized(nn.Conv2d):
    """A convolution of a class of its own: hooks on it have to fire."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = Standardized(3, 5, 1), nn.Conv2d(5, 5, 3), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(F.relu(self.again(self.first(x)))).mean((2, 3)))


def build(module: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module().double()


def swapped(output: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return output.flip(dim) + 0.5


def agree(model: nn.Module, images: torch.Tensor, forward: PartialForward, name: str) -> None:
    """An edited output, and a hooked module, give the same in part and as a whole; and it makes a difference."""
    dim = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
    edit = partial(swapped, dim=dim)
    with edited(model, {name: edit}):
        whole = model(images)
        torch.testing.assert_close(forward.rerun([name]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forward.rerun(edits={name: edit}), whole, rtol=1e-12, atol=1e-12)
    assert not whole.allclose(model(images))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_run_again_in_part(name):
    model, images = backbone(name), batch()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.LayerNorm))]
    with observed(model):
        forward = PartialForward(model)
        assert forward.run(images).equal(model(images))
        assert forward.partial
        before = forward.rerun()
        for layer in [*layers[:3], *layers[3::4], layers[-1]]:
            agree(model, images, forward, layer)
        assert forward.rerun().equal(before)
        assert forward.rerun([layers[0]]).equal(before)  # from the beginning: nothing kept has been overwritten


@pytest.mark.parametrize(
    ("module", "partial"), [(Branching, False), (Overwriting, True), (Alias, False), (Twice, True), (small.Small, True)]
)
def test_other_networks_run_again_in_part_or_as_a_whole(module, partial):
    model, images = build(module), batch(side=8)
    with observed(model):
        forward = PartialForward(model)
        assert forward.run(images).equal(model(images))
        assert forward.partial == partial
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and name != "no":
                agree(model, images, forward, name)


def test_an_earlier_and_a_later_edit_both_count():
    model, images = build(Twice), batch(side=8)
    edits = {"first": swapped, "again": torch.sin}
    with observed(model), edited(model, edits):
        whole = model(images)
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        torch.testing.assert_close(forward.rerun(edits=edits), whole, rtol=1e-12, atol=1e-12)


def test_only_what_lies_downstream_runs():
    model, images = backbone("resnet18"), batch(2)
    ran = []
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        handles = [
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d)
        ]
        forward.rerun(edits={"layer4.0.conv1": swapped})
        assert ran == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
        ran.clear()
        forward.rerun(["layer4.0.conv2"])
        assert ran == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
    for handle in handles:
        handle.remove()


def test_the_next_batch_takes_the_place_of_the_last():
    model = backbone("mobilenet_v2")
    with observed(model):
        forward = PartialForward(model)
        forward.run(batch(4))
        images = batch(3, side=48)
        forward.run(images)
        agree(model, images, forward, "features.3.conv.0.0")


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_networks_run_again_in_part(whole):
    model, images = backbone("resnet18"), batch(2)
    if whole:
        model, name = torch.compile(model, backend="eager"), "_orig_mod.layer2.0.conv1"
    else:
        model.layer2 = torch.compile(model.layer2, backend="eager")
        name = "layer2._orig_mod.0.conv1"
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        assert forward.partial
        agree(model, images, forward, name)


def test_a_lightning_module_runs_again_in_part():
    model, images = lived_in(Classifier("resnet18", 10, width=0.25)), batch(2)
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        assert forward.partial
        agree(model, images, forward, "network.layer1.0.conv1")


def broken(output: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("module", [Branching, Overwriting])
def test_flags_and_hooks_are_as_before_after_an_error(module):
    model, images = build(module), batch(side=8)
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        with pytest.raises(ZeroDivisionError):
            forward.rerun(edits={"first": broken})
        with pytest.raises(ZeroDivisionError), edited(model, {"first": broken}):
            forward.rerun(["first"])
        with pytest.raises(AttributeError, match="nowhere"), edited(model, {"first": broken, "nowhere": broken}):
            pass
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == hooks
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))
    assert model.training


def test_rerun_before_run_says_so():
    with pytest.raises(RuntimeError, match=r"before PartialForward\.run\(images\): there is no batch"):
        PartialForward(nn.Linear(2, 2)).rerun()


# ---------------------------------------------------------------- two networks side by side


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    groups = find_units(model, ONE).groups.values()
    slim = copy.deepcopy(model)
    remove(slim, groups, halves(groups))
    return model.eval(), slim.eval()


def hooked(model: nn.Module, layers: Sequence[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Input and output of each layer, batch by batch, kept before anything overwrites them."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append((inputs[0].clone(), output.clone()))
        )
        for name in layers
    ]
    for images in BATCHES:
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def activations(dense: nn.Module, slim: nn.Module, layers: Sequence[str]) -> dict[str, list[tuple[Tensor, ...]]]:
    return {
        name: [tuple(part.clone() for part in signal) for signal in at]
        for name, at in paired_activations(dense, slim, BATCHES, layers)
    }


@pytest.fixture(params=["traced", "whole passes"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "whole passes":
        monkeypatch.setattr(home, "_checked_trace", lambda *_: None)
    return request.param


@pytest.mark.parametrize("name", pruned.NETS)
@torch.no_grad()
def test_activations_are_what_the_layers_see(name, path):
    dense, slim = pair(pruned.build(name))
    layers = executed_layers(dense, ONE)
    layers = layers if name in ("resnet18", "concatenating") else layers[::4]
    whole, cut = hooked(dense, layers), hooked(slim, layers)
    found = activations(dense, slim, layers)
    assert list(found) == layers
    for layer in layers:
        for signal, (read, gave), (read_slim, _) in zip(found[layer], whole[layer], cut[layer], strict=True):
            assert torch.equal(signal[0], read)
            assert torch.equal(signal[1], gave)
            assert torch.equal(signal[2], read_slim)


@torch.no_grad()
def test_a_change_is_seen_by_all_layers_behind_it(path):
    dense, slim = pair(pruned.build("concatenating"))
    layers = executed_layers(dense, ONE)
    before = activations(dense, slim, layers)
    found = {}
    for name, at in paired_activations(dense, slim, BATCHES, layers):
        found[name] = [signal.slim_input.clone() for signal in at]
        if name == "first.0":
            slim.get_submodule(name).weight.mul_(2)
    changed = [
        name for name in layers if not all(torch.equal(a, b[2]) for a, b in zip(found[name], before[name], strict=True))
    ]
    assert changed == ["second.0", "third.0", "head"]
    after = hooked(slim, layers)
    assert all(torch.equal(a, b[0]) for name in layers for a, b in zip(found[name], after[name], strict=True))


@torch.no_grad()
def test_a_traced_network_runs_once_a_batch():
    dense, slim = pair(pruned.build("vgg16_bn"))
    layers = executed_layers(dense, ONE)
    runs = []
    dense.features[0].register_forward_hook(lambda _, inputs, __: runs.append(len(inputs[0])))
    activations(dense, slim, layers)
    assert runs[-2:] == [4, 2]
    assert runs.count(4) == 1


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Net(
        lambda net, x: net.head(pooled(net.b(function(net.a(x)).relu()).relu())),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(8, 6, 3),
        head=head(6),
    )


class Encoder(nn.Module):
    """Linear layers inside a module of torch's, which a trace does not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))


def doubled_unless_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else 2 * x


def scaled_by(factor: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    return x * factor(x)


UNTRACEABLE: dict[str, Callable[[], nn.Module]] = {
    "a branch on values": lambda: between(lambda x: x if x.mean() > 1e9 else 2 * x),
    "len": lambda: between(partial(scaled_by, len)),
    "a loop over images": lambda: between(lambda x: torch.stack(list(x))),
    "a table of sizes": lambda: between(partial(scaled_by, lambda x: {30: 2.0}[x.shape[2]])),
    "a tensor of some size": lambda: between(lambda x: x + torch.ones(x.shape[0], 1, 1, 1)),
    "another path for stand-ins": lambda: between(doubled_unless_tensor),
    "layers inside a module of torch's": Encoder,
}


@pytest.mark.parametrize("name", UNTRACEABLE)
@torch.no_grad()
def test_what_cannot_be_traced_runs_whole(name):
    dense, slim = pair(UNTRACEABLE[name]().eval())
    layers = executed_layers(dense, ONE)
    assert home._checked_trace(dense, layers, ONE) is None
    whole, found = hooked(dense, layers), activations(dense, slim, layers)
    for layer in layers:
        for signal, (read, gave) in zip(found[layer], whole[layer], strict=True):
            assert torch.equal(signal[0], read)
            assert torch.equal(signal[1], gave)
    assert not any(module._forward_hooks for module in dense.modules())


@torch.no_grad()
def test_a_classifier_is_traced():
    model = Classifier("resnet18", 7, width=0.125).eval()
    assert home._checked_trace(model, executed_layers(model, ONE), ONE) is not None


@torch.no_grad()
def test_a_trace_is_compared_at_the_scale_of_the_logits():
    """Twice the activations make twice the logits, however small these are."""
    model = UNTRACEABLE["another path for stand-ins"]().eval()
    model.head.weight.mul_(1e-6)
    model.head.bias.zero_()
    assert home._checked_trace(model, executed_layers(model, ONE), ONE) is None


class Optional(nn.Module):
    """Takes more than images, all of it with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), Standardized(8, 6, 3), head(6)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.head(pooled(self.b(scale * self.a(x)).relu()))


class Variadic(Optional):
    """Takes any number of arguments."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0])


class Listed(Optional):
    """Keeps a layer where the model does not know it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.hidden[0](x))


@pytest.mark.parametrize(
    ("module", "traced"), [(Optional, True), (Variadic, False), (Listed, False), (Overwriting, True)]
)
@torch.no_grad()
def test_both_ways_of_running_take_the_same_networks(module, traced):
    model = module().eval()
    layers = executed_layers(model, ONE)
    with observed(model):
        forward = PartialForward(model)
        assert forward.run(ONE).equal(model(ONE))
        assert forward.partial == traced
        assert (home._checked_trace(model, layers, ONE) is not None) == traced
    whole, found = hooked(model, layers), activations(model, copy.deepcopy(model), layers)
    for layer in layers:
        for seen, (read, gave) in zip(found[layer], whole[layer], strict=True):
            assert torch.equal(seen[0], read)
            assert torch.equal(seen[1], gave)


@torch.no_grad()
def test_layers_whose_activations_nobody_asks_for_are_passed():
    dense, slim = pair(pruned.build("concatenating"))
    layers = executed_layers(dense, ONE)
    wanted, found = activations(dense, slim, layers), {}
    for number, (name, at) in enumerate(paired_activations(dense, slim, BATCHES, layers)):
        found[name] = [seen.slim_input.clone() for seen in at] if number % 2 else [next(at).slim_input.clone()]
    for name, seen in found.items():
        assert all(torch.equal(part, whole[2]) for part, whole in zip(seen, wanted[name], strict=False))


# ---------------------------------------------------------------- in bounded memory


class Counted:
    """Batches that count how often they are read."""

    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        yield from BATCHES


def with_changes(
    name: str, memory: float, batches: Iterable[Tensor] = BATCHES
) -> tuple[dict[str, tuple[Tensor, ...]], list[int]]:
    """What all layers read and give while each is changed in its turn; with how many images the dense ones run."""
    dense, slim = pair(pruned.build(name))
    layers, found, runs = executed_layers(dense, ONE), {}, []
    for layer in layers:
        dense.get_submodule(layer).register_forward_hook(lambda _, inputs, __: runs.append(len(inputs[0])))
    for layer, at in paired_activations(dense, slim, batches, layers, memory):
        parts = [tuple(part.clone() for part in signal) for signal in at]
        found[layer] = tuple(torch.cat(signals) for signals in zip(*parts, strict=True))
        slim.get_submodule(layer).weight.mul_(1.1)
    return found, runs


def bytes_of_one(name: str) -> int:
    dense, slim = pair(pruned.build(name))
    layers = executed_layers(dense, ONE)
    return sum(home._most_bytes(home._checked_trace(model, layers, ONE), ONE) for model in (dense, slim))


@pytest.mark.parametrize("images", [1, 3, 20])
@pytest.mark.parametrize("name", ["resnet18", "concatenating", "inverted", "convnext block"])
@torch.no_grad()
def test_a_bound_on_memory_changes_no_activation(name, images, path):
    wanted, _ = with_changes(name, math.inf)
    memory = images * bytes_of_one(name) if path == "traced" else 1e6 * images
    found, _ = with_changes(name, memory)
    assert list(found) == list(wanted)
    for layer, signals in found.items():
        for part, whole in zip(signals, wanted[layer], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batches_without_room_run_again_from_where_they_had_room():
    name, one = "resnet18", bytes_of_one("resnet18")
    layers = len(executed_layers(pruned.build(name), ONE))
    runs = {images: with_changes(name, images * one)[1] for images in (1, 3, 20)}
    checks = 3 * layers  # of the trace, and for the sizes of one image
    assert runs[20][checks:] == 3 * layers * [2]  # an eighth of the memory at once; all wait
    assert all(size == 1 for size in runs[1] + runs[3])
    assert len(runs[1]) - checks == 6 * layers * (layers + 1) // 2  # none ever waits
    assert 6 * layers < len(runs[3]) - checks < 6 * layers * (layers + 1) // 4


@torch.no_grad()
def test_what_waits_stays_within_the_bound(monkeypatch):
    seen, wait = [], home._Waiting._wait

    def watched(self: home._Waiting, *args: Any) -> None:
        wait(self, *args)
        held = [place.values for places in self._places.values() for place in places]
        seen.append((home._bytes_of(held), self._used, self._room))

    monkeypatch.setattr(home._Waiting, "_wait", watched)
    with_changes("concatenating", 4 * bytes_of_one("concatenating"))
    assert all(held <= used <= max(room, 0) for held, used, room in seen)
    assert max(held for held, _, _ in seen) > 0


@torch.no_grad()
def test_images_are_read_again_only_for_batches_that_do_not_wait():
    dense, _ = pair(pruned.build("concatenating"))
    layers = len(executed_layers(dense, ONE))
    plenty, little = Counted(), Counted()
    with_changes("concatenating", math.inf, plenty)
    with_changes("concatenating", bytes_of_one("concatenating"), little)
    assert plenty.reads == 2  # the first for one image
    assert little.reads == 1 + layers


@torch.no_grad()
def test_an_image_that_has_no_room_is_refused_with_what_it_takes(path):
    dense, slim = pair(pruned.build("concatenating"))
    with pytest.raises(ValueError, match=r"1e-06 GB are left for activations, .* one image take \d\S+ GB in Net and"):
        list(paired_activations(dense, slim, BATCHES, executed_layers(dense, ONE), 1e3))


def test_memory_is_counted_once_for_all_that_share_it():
    map_ = torch.zeros(4, 8)
    values = {"a": map_, "b": [map_[:1], (map_.T, 3)], "c": nn.Parameter(torch.zeros(100)), "d": torch.zeros(2)}
    assert home._bytes_of(values) == 4 * (4 * 8 + 2)
