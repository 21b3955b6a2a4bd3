"""Pruned networks on disk: what is loaded is what was saved, or an error says why not."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chanaxes_pl.models import BACKBONES, Classifier, build_backbone
from chanaxes_pl.pruning.slim_file import Plan, fill, load_slim, save_slim
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.macs import count_macs
from chanaxes_pl.units.removal import add_bias, remove

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
    plan = Plan.of(dense, slim, groups, kept, input_shape=example.shape[1:], notes=notes, **macs)
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
    assert [path.name for path in tmp_path.iterdir()] == ["slim.safetensors"]


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
    with pytest.raises(ValueError, match=r"pass a newly built model: load_slim\(path, MyNet\(\)\)"):
        load_slim(grouped[0] / "slim")


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
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
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["slim-0.5.safetensors"]
    assert logits(load_slim(tmp_path / "new" / "slim-0.5", Grouped())).equal(logits(slim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
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


def test_a_bias_is_added_once():
    model = Grouped()
    before = model.mix.bias.clone()
    for layer in (model.stem, model.mix):
        add_bias(layer)
    assert model.stem.bias.equal(torch.zeros(8))
    assert model.mix.bias.equal(before)


def modules_of(model: nn.Module) -> list[str]:
    """Every module with the sizes that it holds."""
    return [f"{name} {module!r}" for name, module in model.named_modules()]


@pytest.mark.parametrize("name", BACKBONES)
def test_filling_gives_every_module_the_sizes_that_removal_gives(name):
    slim, plan = halved(build_backbone(name, **SETTINGS))
    model = build_backbone(name, **SETTINGS)
    fill(model, plan, slim.state_dict())
    assert modules_of(model) == modules_of(slim)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in slim.parameters()]


class Norms(nn.Module):
    """Norms without weights, whose width no tensor tells, a PReLU and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.instance, self.act = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.PReLU(8)
        self.deep, self.batch = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False)
        self.mix, self.layer, self.head = nn.Linear(8, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.deep(self.act(self.instance(self.stem(x)))))
        return self.head(self.layer(self.mix(x.mean((2, 3)))))


def test_norms_without_weights_take_on_the_width_that_the_plan_tells(tmp_path):
    slim, plan = halved(trained(Norms()))
    assert plan.norms == {"instance": 4, "batch": 4, "layer": slim.layer.normalized_shape[0]}
    save_slim(tmp_path / "slim", slim, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_slim(tmp_path / "slim", Norms())
        assert logits(loaded).equal(logits(slim))
    assert modules_of(loaded) == modules_of(slim)


class Kinds(Grouped):
    """Buffers of every dtype that safetensors holds, without dimensions, strided, and in NHWC order."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(-6, 6).reshape(3, 4).T
        for index, dtype in enumerate(DTYPES):
            self.register_buffer(f"strided{index}", values.to(dtype).T.contiguous().T)
            self.register_buffer(f"scalar{index}", torch.ones((), dtype=dtype))
        self.register_buffer("nhwc", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.register_buffer("empty", torch.zeros(0, 3))


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*INTEGERS, *FLOATS, torch.bool, torch.complex64]


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks hold the same tensors, NaN by NaN."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        (ours[name].dtype, ours[name].shape, bits(ours[name])) == (tensor.dtype, tensor.shape, bits(tensor))
        for name, tensor in theirs.items()
    )


def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path):
    slim, plan = halved(Kinds())
    save_slim(tmp_path / "slim", slim, plan)
    assert same_bits(load_slim(tmp_path / "slim", Kinds()), slim)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_weights_that_are_no_numbers_come_back_as_they_were(grouped, value, tmp_path):
    slim = copy.deepcopy(grouped[1])
    slim.stem.weight.data[0] = value
    save_slim(tmp_path / "slim", slim, grouped[2])
    assert same_bits(load_slim(tmp_path / "slim", Grouped()), slim)


def test_a_nan_in_a_shared_weight_stays_shared(tmp_path):
    slim, plan = halved(Tied(), only="body.0")
    slim.first.weight.data[0] = float("nan")
    save_slim(tmp_path / "slim", slim, plan)
    loaded = load_slim(tmp_path / "slim", Tied())
    assert same_bits(loaded, slim)
    assert loaded.last.weight is loaded.first.weight


def test_what_was_shared_and_differs_in_the_file_is_no_longer_shared(tmp_path):
    slim, plan = halved(trained(Tied(tied=False)), only="body.0")
    save_slim(tmp_path / "slim", slim, plan)
    assert same_bits(load_slim(tmp_path / "slim", Tied()), slim)


def test_a_loaded_classifier_evaluates_and_is_on_the_cpu(tmp_path):
    slim, plan = halved(trained(Classifier("resnet18", **SETTINGS)))
    save_slim(tmp_path / "slim", slim, plan)
    loaded = load_slim(tmp_path / "slim")
    assert loaded.device == torch.device("cpu")
    loaded.val_accuracy.update(logits(loaded), torch.arange(4))
    assert 0 <= float(loaded.val_accuracy.compute()["val/top1"]) <= 1
    assert not [name for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()) if tensor.is_meta]


def test_a_backbone_with_another_activation_is_not_built_from_its_arguments():
    network = build_backbone("resnet18", **SETTINGS)
    network.relu = nn.SiLU()
    assert halved(network)[1].backbone is None


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
        norms=draw(st.dictionaries(NAMES, COUNTS, max_size=3)),
        backbone=draw(st.none() | st.dictionaries(NAMES, JSON, max_size=3)),
        macs=draw(COUNTS),
        dense_macs=draw(COUNTS),
        notes=draw(st.dictionaries(NAMES, JSON, max_size=3)),
    )


@given(plans())
def test_a_plan_survives_json(plan):
    assert Plan.from_json(plan.to_json()) == plan
