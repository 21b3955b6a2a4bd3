"""Two networks side by side show what layers see, whatever the memory."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from chanaxes_pl.compensation import pairing as home
from chanaxes_pl.compensation.pairing import Seen, paired
from chanaxes_pl.models import Classifier
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.tracing import PartialForward
from chanaxes_pl.units.groups import executed_layers, find_units
from chanaxes_pl.units.removal import remove
from tests.helpers import networks as pruned
from tests.helpers.networks import IMAGES, ONE, Net, halves, head, pooled
from tests.network.test_tracing import Overwriting, Standardized

BATCHES = IMAGES.split(4)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    names = dict(model.named_modules()).keys()  # an attention's own layers are there in a plain copy alone
    groups = [g for g in find_units(model, ONE).groups.values() if {*g.producers, *g.consumers} <= names]
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


def copied(_name: str, _first: int, seen: Seen, gave: Tensor) -> tuple[Tensor, Tensor]:
    return seen.read.clone(), gave.clone()


def side_by_side(
    dense: nn.Module, slim: nn.Module, batches: Iterable[Tensor], layers: Sequence[str], memory: float = math.inf
) -> Iterator[tuple[str, Iterator[tuple[tuple[Tensor, Tensor], Seen]]]]:
    return paired(dense, slim, batches, layers, copied, images=len(IMAGES), memory=memory)


def activations(dense: nn.Module, slim: nn.Module, layers: Sequence[str]) -> dict[str, list[tuple[Tensor, ...]]]:
    """What each layer reads and gives in the dense network, and reads in the slim one, batch by batch."""
    return {
        name: [(*taken, seen.read.clone()) for taken, seen in at]
        for name, at in side_by_side(dense, slim, BATCHES, layers)
    }


@pytest.fixture(params=["traced", "whole passes"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "whole passes":
        monkeypatch.setattr(home._Traced, "of", lambda *_: None)
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
    for name, at in side_by_side(dense, slim, BATCHES, layers):
        found[name] = [seen.read.clone() for _, seen in at]
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
    assert home._Traced.of(dense, layers, ONE) is None
    whole, found = hooked(dense, layers), activations(dense, slim, layers)
    for layer in layers:
        for signal, (read, gave) in zip(found[layer], whole[layer], strict=True):
            assert torch.equal(signal[0], read)
            assert torch.equal(signal[1], gave)
    assert not any(module._forward_hooks for module in dense.modules())


@torch.no_grad()
def test_a_classifier_is_traced():
    model = Classifier("resnet18", 7, width=0.125).eval()
    assert home._Traced.of(model, executed_layers(model, ONE), ONE) is not None


@torch.no_grad()
def test_a_trace_is_compared_at_the_scale_of_the_logits():
    """Twice the activations make twice the logits, however small these are."""
    model = UNTRACEABLE["another path for stand-ins"]().eval()
    model.head.weight.mul_(1e-6)
    model.head.bias.zero_()
    assert home._Traced.of(model, executed_layers(model, ONE), ONE) is None


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
        assert (home._Traced.of(model, layers, ONE) is not None) == traced
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
    for number, (name, at) in enumerate(side_by_side(dense, slim, BATCHES, layers)):
        found[name] = [seen.read.clone() for _, seen in at] if number % 2 else [next(at)[1].read.clone()]
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


class Ran(NamedTuple):
    """With how many images the layers of both networks ran, in order."""

    dense: list[int]
    slim: list[int]


def with_changes(
    name: str, memory: float, batches: Iterable[Tensor] = BATCHES
) -> tuple[dict[str, tuple[Tensor, ...]], Ran]:
    """What all layers read and give while each is changed in its turn, and how often that made them run."""
    dense, slim = pair(pruned.build(name))
    layers, found, runs = executed_layers(dense, ONE), {}, Ran([], [])
    for model, ran in zip((dense, slim), runs, strict=True):
        for layer in layers:
            model.get_submodule(layer).register_forward_hook(lambda _, inputs, __, ran=ran: ran.append(len(inputs[0])))
    for layer, at in side_by_side(dense, slim, batches, layers, memory):
        parts = [(*taken, seen.read.clone()) for taken, seen in at]
        found[layer] = tuple(torch.cat(signals) for signals in zip(*parts, strict=True))
        slim.get_submodule(layer).weight.mul_(1.1)
    return found, runs


def bytes_of_one(name: str) -> int:
    """What one image takes on its way through the wider of two networks."""
    dense, slim = pair(pruned.build(name))
    traces = [home._Traced.of(model, executed_layers(model, ONE), ONE).trace for model in (dense, slim)]
    return max(
        *(home._largest_call(model, ONE) for model in (dense, slim)),
        *(home._bytes_and_work(trace, ONE)[0] for trace in traces),
    )


@pytest.mark.parametrize("images", [1, 3, 20])
@pytest.mark.parametrize("name", ["resnet18", "concatenating", "inverted", "convnext block"])
@torch.no_grad()
def test_a_bound_on_memory_changes_no_activation(name, images, path):
    wanted, _ = with_changes(name, math.inf)
    found, _ = with_changes(name, images * (bytes_of_one(name) if path == "traced" else 1e6))
    assert list(found) == list(wanted)
    for layer, signals in found.items():
        for part, whole in zip(signals, wanted[layer], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_room_for_all_both_networks_run_once():
    _, runs = with_changes("resnet18", math.inf)
    layers = len(executed_layers(pruned.build("resnet18"), ONE))
    assert runs.dense[5 * layers :] == layers * [4] + layers * [2]  # after five looks at one image
    assert sorted(runs.slim[-2 * (layers - 1) :]) == (layers - 1) * [2] + (layers - 1) * [4]  # nobody asks for the last
    assert set(runs.slim[: -2 * (layers - 1)]) == {1}


@torch.no_grad()
def test_without_room_every_layer_takes_a_pass_of_its_own():
    _, runs = with_changes("resnet18", bytes_of_one("resnet18"))
    layers, images = len(executed_layers(pruned.build("resnet18"), ONE)), len(IMAGES)
    assert set(runs.dense) == set(runs.slim) == {1}
    assert len(runs.dense) == 5 * layers + images * layers * (layers + 1) // 2  # five looks at one image
    assert len(runs.slim) == 4 * layers + images * layers * (layers - 1) // 2  # four looks


@torch.no_grad()
def test_the_more_room_the_fewer_runs():
    one = bytes_of_one("resnet18")
    runs = [with_changes("resnet18", images * one)[1] for images in (1, 3, 4, 5, 8, 12, 20)]
    dense, slim = ([sum(ran[side]) for ran in runs] for side in (0, 1))
    assert dense == sorted(dense, reverse=True)
    assert slim == sorted(slim, reverse=True)
    assert len(set(dense)) > 3
    assert len(set(slim)) > 2


@torch.no_grad()
def test_what_is_kept_stays_within_the_bound(monkeypatch):
    seen, wait = [], home._Waiting._wait

    def watched(self: home._Waiting, *args: Any) -> None:
        wait(self, *args)
        values = [waits.place.values for waits in self._waits.values()]
        seen.append((home._bytes_of(values), self._used, sum(map(home._bytes_of, kept[-1]._held.values())), self._room))

    kept, run = [], home._Ahead._run

    def noted(self: home._Ahead, *args: Any) -> None:
        kept.append(self)
        run(self, *args)

    monkeypatch.setattr(home._Waiting, "_wait", watched)
    monkeypatch.setattr(home._Ahead, "_run", noted)
    with_changes("concatenating", 12 * bytes_of_one("concatenating"))
    assert all(values <= used and used + taken <= room for values, used, taken, room in seen)
    assert max(values for values, *_ in seen) > 0
    assert max(taken for *_, taken, _ in seen) > 0


def waits(number: int, size: int, saved: float) -> home._Waits:
    return home._Waits(home._Place(number, {}), size, saved)


@pytest.mark.parametrize("room", [0, 5, 7, 12, 19, 30, 41])
@pytest.mark.parametrize(("size", "saved"), [(4, 10.0), (9, 12.0), (3, 2.0), (5, 40.0)])
def test_batches_wait_where_that_saves_the_most_work(room, size, saved):
    """Against all that they could do (move, stay where they are, run from the image again), but for one batch."""
    old = {0: (3, 4.0), 1: (3, 4.0), 2: (6, 11.0), 4: (1, 0.5)}
    waiting = object.__new__(home._Waiting)
    waiting._waits = {number: waits(number, *each) for number, each in old.items()}
    waiting._parts = home._Parts([torch.zeros(1)] * 5, 1)
    assert len(list(waiting._parts)) == 5
    moves, stays = waiting._plan(waits(9, size, saved), room)

    def of(plan: tuple[str, ...]) -> tuple[int, float]:
        each = {"move": lambda _: (size, saved), "stay": lambda number: old.get(number, (0, 0.0)), "": lambda _: (0, 0)}
        chosen = [each[what](number) for number, what in enumerate(plan)]
        return sum(bytes_ for bytes_, _ in chosen), sum(work for _, work in chosen)

    best = max(of(plan)[1] for plan in product(("move", "stay", ""), repeat=5) if of(plan)[0] <= room)
    found = of(tuple("move" if n in moves else "stay" if n in stays else "" for n in range(5)))
    assert not set(moves) & set(stays)
    assert found[0] <= room
    assert found[1] >= best - max(saved, 11.0)


@torch.no_grad()
def test_images_are_read_again_only_for_what_runs_again():
    dense, _ = pair(pruned.build("concatenating"))
    layers = len(executed_layers(dense, ONE))
    plenty, little = Counted(), Counted()
    with_changes("concatenating", math.inf, plenty)
    with_changes("concatenating", bytes_of_one("concatenating"), little)
    assert plenty.reads == 3  # for one image, for the dense and for the slim network
    assert little.reads == 1 + layers


@torch.no_grad()
def test_an_image_that_has_no_room_is_refused_with_what_it_takes(path):
    dense, slim = pair(pruned.build("concatenating"))
    with pytest.raises(ValueError, match=r"1e-06 GB are left for activations, .* one image take \d\S+ GB in Net or"):
        list(side_by_side(dense, slim, BATCHES, executed_layers(dense, ONE), 1e3))


def test_memory_is_counted_once_for_all_that_share_it():
    map_ = torch.zeros(4, 8)
    values = {"a": map_, "b": [map_[:1], (map_.T, 3)], "c": nn.Parameter(torch.zeros(100)), "d": torch.zeros(2)}
    assert home._bytes_of(values) == 4 * (4 * 8 + 2)
