"""Two networks side by side: what each layer reads and gives, in both ways of getting there."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanaxes_pl.models import Classifier
from chanaxes_pl.network.groups import executed_layers, find_units
from chanaxes_pl.network.removal import remove
from chanaxes_pl.pruning import lockstep as home
from chanaxes_pl.pruning.lockstep import lockstep
from tests.helpers.networks import IMAGES, NETS, ONE, Net, build, halves, head, pooled

BATCHES = IMAGES.split(4)


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


def signals(dense: nn.Module, slim: nn.Module, layers: Sequence[str]) -> dict[str, list[tuple[Tensor, ...]]]:
    return {
        name: [tuple(part.clone() for part in signal) for signal in at]
        for name, at in lockstep(dense, slim, BATCHES, layers)
    }


@pytest.fixture(params=["traced", "whole passes"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "whole passes":
        monkeypatch.setattr(home, "_traced", lambda *_: None)
    return request.param


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_signals_are_what_the_layers_see(name, path):
    dense, slim = pair(build(name))
    layers = executed_layers(dense, ONE)
    layers = layers if name in ("resnet18", "concatenating") else layers[::4]
    whole, cut = hooked(dense, layers), hooked(slim, layers)
    found = signals(dense, slim, layers)
    assert list(found) == layers
    for layer in layers:
        for signal, (read, gave), (read_slim, _) in zip(found[layer], whole[layer], cut[layer], strict=True):
            assert torch.equal(signal[0], read)
            assert torch.equal(signal[1], gave)
            assert torch.equal(signal[2], read_slim)


@torch.no_grad()
def test_a_change_is_seen_by_all_layers_behind_it(path):
    dense, slim = pair(build("concatenating"))
    layers = executed_layers(dense, ONE)
    before = signals(dense, slim, layers)
    found = {}
    for name, at in lockstep(dense, slim, BATCHES, layers):
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
    dense, slim = pair(build("vgg16_bn"))
    layers = executed_layers(dense, ONE)
    runs = []
    dense.features[0].register_forward_hook(lambda _, inputs, __: runs.append(len(inputs[0])))
    signals(dense, slim, layers)
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
    assert home._traced(dense, layers, ONE) is None
    whole, found = hooked(dense, layers), signals(dense, slim, layers)
    for layer in layers:
        for signal, (read, gave) in zip(found[layer], whole[layer], strict=True):
            assert torch.equal(signal[0], read)
            assert torch.equal(signal[1], gave)
    assert not any(module._forward_hooks for module in dense.modules())


@torch.no_grad()
def test_a_classifier_is_traced():
    model = Classifier("resnet18", 7, width=0.125).eval()
    assert home._traced(model, executed_layers(model, ONE), ONE) is not None
