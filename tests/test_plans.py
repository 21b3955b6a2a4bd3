"""Pruned networks on disk: what is loaded is what was saved, or an error says why not."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chanaxes_pl.models import BACKBONES, Classifier, build_backbone
from chanaxes_pl.network.groups import find_units
from chanaxes_pl.network.macs import count_macs
from chanaxes_pl.network.removal import remove
from chanaxes_pl.pruning.plan_json import Plan
from chanaxes_pl.pruning.plans import add_bias, apply_plan, load_slim, save_slim

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(8))
SETTINGS = {"num_classes": 7, "width": 0.25, "image_size": 32}


class Grouped(nn.Module):
    """A network of one's own, with a grouped convolution, a layer without a bias and a buffer."""

    def __init__(self, width: int = 8, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, bias=bias)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, 12, 3, groups=2)
        self.head = nn.Linear(12, 5)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.stem(x * self.scale)).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight, and a third that can be pruned."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        if tied:
            self.last.weight = self.first.weight
        self.body = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def trained(model: nn.Module) -> nn.Module:
    """With all weights and running statistics other than a fresh model's."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_((1 + 0.3 * noise).abs() if "var" in name else tensor + 0.1 * noise)
    return model


def halved(dense: nn.Module, biases: tuple[str, ...] = (), only: str | None = None, **notes) -> tuple[nn.Module, Plan]:
    """A copy without every second unit of all groups, or of only one, and its plan."""
    example, slim = IMAGES[:1], copy.deepcopy(dense)
    groups = find_units(dense, example).groups.values()
    kept = {group.name: torch.arange(0, group.size, 2) for group in groups if only in (None, group.name)}
    remove(slim, groups, kept)
    for name in biases:
        add_bias(slim.get_submodule(name))
        slim.get_submodule(name).bias.data.uniform_(-1, 1)
    macs = {"macs": count_macs(slim, example), "dense_macs": count_macs(dense, example)}
    plan = Plan.of(dense, groups, kept, input_shape=example.shape[1:], biases=biases, notes=notes, **macs)
    return slim.eval(), plan


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Plan]:
    folder = tmp_path_factory.mktemp("grouped")
    slim, plan = halved(trained(Grouped()), biases=("stem",), budget=0.5)
    save_slim(folder / "slim", slim, plan)
    return folder, slim, plan


# --- saved ≡ loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_loaded_backbone_gives_the_saved_logits_bit_for_bit(name, tmp_path):
    slim, plan = halved(trained(build_backbone(name, **SETTINGS)))
    assert plan.backbone == {"name": name, **SETTINGS}
    assert plan.macs < 0.5 * plan.dense_macs
    save_slim(tmp_path / "slim", slim, plan)
    for loaded in (
        load_slim(tmp_path / "slim"),
        load_slim(tmp_path / "slim", build_backbone(name, **SETTINGS)),
    ):
        assert logits(loaded).equal(logits(slim))
        assert not loaded.training
    untrained = build_backbone(name, **SETTINGS).eval()
    apply_plan(untrained, plan)
    assert not logits(untrained).equal(logits(slim))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim.json", "slim.safetensors"]


def test_loading_takes_no_random_number(tmp_path):
    slim, plan = halved(trained(build_backbone("resnet18", **SETTINGS)))
    save_slim(tmp_path / "slim", slim, plan)
    before = torch.random.get_rng_state()
    load_slim(tmp_path / "slim")
    assert torch.random.get_rng_state().equal(before)


def test_a_lightning_module_loads_into_a_fresh_one(tmp_path):
    slim, plan = halved(trained(Classifier("resnet18", **SETTINGS)))
    save_slim(tmp_path / "slim", slim, plan)
    loaded = load_slim(tmp_path / "slim", Classifier("resnet18", **SETTINGS))
    assert isinstance(loaded, Classifier)
    assert logits(loaded).equal(logits(slim))
    assert logits(load_slim(tmp_path / "slim")).equal(logits(slim))


def test_a_network_of_ones_own_has_to_be_built(grouped):
    with pytest.raises(ValueError, match=r"pass a freshly built model: load_slim\(path, MyNet\(\)\)"):
        load_slim(grouped[0] / "slim")


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_a_network_of_ones_own_loads_by_either_name(grouped, suffix):
    folder, slim, plan = grouped
    model = Grouped()
    loaded = load_slim(str(folder / f"slim{suffix}"), model)
    assert loaded is model
    assert logits(loaded).equal(logits(slim))
    assert (loaded.stem.out_channels, loaded.mix.out_channels, loaded.mix.groups) == (4, 6, 2)
    assert loaded.stem.bias.equal(slim.stem.bias)
    assert loaded.stem.bias.abs().min() > 0
    assert plan.backbone is None


def test_a_dot_in_the_name_is_no_suffix(grouped, tmp_path):
    _, slim, plan = grouped
    save_slim(tmp_path / "new" / "slim-0.5", slim, plan)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["slim-0.5.json", "slim-0.5.safetensors"]
    assert logits(load_slim(tmp_path / "new" / "slim-0.5", Grouped())).equal(logits(slim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_comes_back_in_the_dtype_it_was_saved_in(grouped, dtype, tmp_path):
    _, slim, plan = grouped
    slim = copy.deepcopy(slim).to(dtype)
    save_slim(tmp_path / "slim", slim, plan)
    loaded = load_slim(tmp_path / "slim", Grouped())
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in slim.state_dict().items()
    }
    assert loaded(IMAGES.to(dtype)).equal(slim(IMAGES.to(dtype)))
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_a_loaded_network_trains(grouped):
    loaded = load_slim(grouped[0] / "slim", Grouped()).train()
    loaded(IMAGES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_slim_network_can_be_pruned_and_saved_again(tmp_path):
    once, plan = halved(trained(build_backbone("vgg16_bn", **SETTINGS)))
    twice, second = halved(once)
    assert second.backbone is None  # build_backbone makes no network of these shapes
    save_slim(tmp_path / "once", once, plan)
    save_slim(tmp_path / "twice", twice, second)
    assert logits(load_slim(tmp_path / "twice", load_slim(tmp_path / "once"))).equal(logits(twice))


def test_a_shared_weight_is_saved_under_both_names_and_shared_again(tmp_path):
    slim, plan = halved(trained(Tied()), only="body.0")
    assert slim.last.weight is slim.first.weight
    save_slim(tmp_path / "slim", slim, plan)
    loaded = load_slim(tmp_path / "slim", Tied())
    assert logits(loaded).equal(logits(slim))
    assert loaded.last.weight is loaded.first.weight


def test_arguments_of_a_backbone_follow_a_copy_and_stay_out_of_its_state():
    network = build_backbone("resnet18", **SETTINGS)
    assert copy.deepcopy(network).backbone_arguments == {"name": "resnet18", **SETTINGS}
    assert not [name for name in network.state_dict() if "backbone" in name]
    network.fc = nn.Linear(128, 3)
    assert halved(network)[1].backbone is None


def test_a_plan_prunes_a_network_with_weights_of_its_own():
    model = Grouped()
    slim, plan = halved(model, biases=("stem",))
    apply_plan(model, plan)
    assert model.stem.weight.equal(slim.stem.weight)
    assert model.stem.bias.equal(torch.zeros(4))
    add_bias(model.mix)  # which has one already
    assert model.mix.bias.equal(slim.mix.bias)


# --- the plan itself --------------------------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=8)
COUNTS = st.integers(0, 10**12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def plans(draw) -> Plan:
    sizes = draw(st.dictionaries(NAMES, st.integers(1, 9), max_size=4))
    kept = {
        name: tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
        for name, size in sizes.items()
        if draw(st.booleans())
    }
    return Plan(
        kept=kept,
        sizes=sizes,
        input_shape=draw(st.tuples(*[st.integers(1, 300)] * 3)),
        shapes=draw(st.dictionaries(NAMES, st.lists(st.integers(0, 99), max_size=4).map(tuple), max_size=4)),
        biases=tuple(draw(st.lists(NAMES, max_size=3))),
        backbone=draw(st.none() | st.dictionaries(NAMES, JSON, max_size=3)),
        macs=draw(COUNTS),
        dense_macs=draw(COUNTS),
        notes=draw(st.dictionaries(NAMES, JSON, max_size=3)),
    )


@given(plans())
def test_a_plan_survives_json(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
