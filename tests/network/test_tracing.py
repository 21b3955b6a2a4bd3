"""A part of a network run again gives what running everything gives."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl.models import BACKBONES, Classifier, build_backbone
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.tracing import PartialForward, edited
from tests.helpers import training as small
from tests.helpers.networks import IMAGES

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


class Encoder(nn.Module):
    """A module of torch's own whose members are in no trace, and a weight that a function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.weight, self.head = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.stem(x).flatten(2).mT).mean(1)
        return self.head(x) + F.linear(x, self.weight)


@torch.no_grad()
def test_what_changes_inside_a_module_of_torchs_own_counts():
    model, images = build(Encoder).eval(), batch()
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        assert forward.partial
        for name in ("body.linear1", "body", "stem", "head"):
            agree(model, images, forward, name)


@torch.no_grad()
def test_a_weight_that_a_function_reads_counts_where_its_module_is_named():
    model, images = build(Encoder).eval(), batch()
    with observed(model):
        forward = PartialForward(model)
        before = forward.run(images)
        model.weight.mul_(2)
        found = forward.rerun([""])
        torch.testing.assert_close(found, model(images), rtol=1e-12, atol=1e-12)
        assert not found.allclose(before)


OVERWRITING = {
    "out=": lambda y: torch.clamp(y, min=0, out=y),
    "out= of a product": lambda y: torch.mul(y, -0.5, out=y),
    "inplace by name": lambda y: F.relu(y, inplace=True),
    "inplace by place": lambda y: F.leaky_relu(y, 0.01, True),
}


@pytest.mark.parametrize("name", OVERWRITING)
@torch.no_grad()
def test_a_value_that_is_overwritten_after_it_was_read_is_what_was_read(name):
    """``gate`` read the convolution's output before it was overwritten; run again, it reads the same."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            gate = self.gate(y)
            return self.head((OVERWRITING[name](y) * gate.sigmoid()).mean((2, 3)))

    torch.manual_seed(0)
    model = Overwrites().eval()
    images = torch.randn(4, 3, 8, 8)
    forward = PartialForward(model)
    forward.run(images)
    model.gate.weight.mul_(2.0)
    torch.testing.assert_close(forward.rerun(["gate"]), model(images))
