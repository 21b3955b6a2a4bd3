"""Pruned networks on disk that are missing, damaged, edited, mixed up or hostile."""

import copy
import json
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from chanaxes_pl import prune
from chanaxes_pl.models import Classifier, build_backbone
from chanaxes_pl.pruning import slim_file
from chanaxes_pl.pruning.slim_file import Plan, fill, load_slim, save_slim
from tests.pruning.test_slim_file import SETTINGS, Grouped, Tied, halved, same_bits, trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Plan]:
    folder = tmp_path_factory.mktemp("saved")
    slim, plan = halved(trained(Grouped()), biases=("stem",))
    save_slim(folder / "slim", slim, plan)
    return folder / "slim.safetensors", slim, plan


@pytest.fixture
def file(saved, tmp_path: Path) -> Path:
    """A file of its own, to be damaged."""
    return Path(shutil.copy(saved[0], tmp_path))


def refused(path: Path, match: str, model: nn.Module | None = None, error: type[Exception] = ValueError) -> None:
    """Loading fails with this message in one line, and leaves the model that it was given as it was."""
    model = Grouped() if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(error, match=match) as info:
        load_slim(path, model)
    assert path.name in str(info.value)
    assert "\n" not in str(info.value)
    assert same_bits(model, before)
    assert model.training


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return content.metadata()


def forge(file: Path, text: str | None = None, tensors: dict[str, Tensor] | None = None) -> None:
    """Put another plan or other tensors into a file, with the digest that they should have."""
    text = metadata_of(file)["plan"] if text is None else text
    tensors = safetensors.torch.load(file.read_bytes()) if tensors is None else tensors
    metadata = {"plan": text, "sha256": slim_file._digest(text, tensors)}
    file.write_bytes(safetensors.torch.save(tensors, metadata))


def edit(file: Path, **changes) -> None:
    """Change entries of a plan on disk, as who knows the format would."""
    forge(file, json.dumps(json.loads(metadata_of(file)["plan"]) | changes))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_path_without_a_name_is_refused(saved):
    with pytest.raises(ValueError, match=r"load_slim\('.'\): expected the path of a file, such as 'half'"):
        load_slim(".")
    with pytest.raises(ValueError, match=r"save_slim\('.'\): expected the path of a file"):
        save_slim(".", *saved[1:])


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "slim", r"there is no \S+slim\.safetensors; expected a file", error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_cut_off_file_is_refused(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    refused(file, r"slim\.safetensors: not a whole safetensors file .*cut off")


def test_a_header_of_any_size_is_not_read(file):
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(file, "its header has 1099511627776 bytes: expected at most 16777216")


def test_tensors_without_a_plan_are_refused(file):
    file.write_bytes(safetensors.torch.save({"x": torch.ones(2)}))
    refused(file, "its metadata holds no plan; expected a file of slim.save")


def test_one_changed_bit_is_noticed(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(file, "its tensors or its plan do not match its sha256")


def test_a_plan_of_another_save_is_noticed(saved, file):
    content = safetensors.torch.load(file.read_bytes())
    other = metadata_of(file) | {"plan": halved(Grouped(), biases=("stem",), budget=0.5)[1].to_json()}
    file.write_bytes(safetensors.torch.save(content, other))
    refused(file, "its tensors or its plan do not match its sha256")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "the plan is not JSON"),
        ('{"version": 1, "ke', "the plan is not JSON"),
        ("[" * 100_000, "the plan is not JSON"),
        ('{"version": ' + "9" * 5000 + "}", "the plan is not JSON"),
        ("[1, 2]", r"the plan is \[1, 2\]: expected version, kept, sizes"),
        ('{"kept": {}}', r"the plan is \{'kept': \{\}\}: expected version, kept"),
        ('{"version": 1}', "the plan has version 1, but this release of chanaxes_pl reads version 2"),
        ('{"version": true}', "the plan has version True"),
        ('{"version": 2}', "the plan lacks 'attributes'"),
    ],
)
def test_a_plan_that_is_none_is_refused(file, text, match):
    forge(file, text)
    refused(file, rf"slim\.safetensors: {match}")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"macs": ', '"macs": 5, "macs": ', "not laid out as save_slim writes it"),
        ('"notes": {}', '"notes": {"loss": NaN}', "not JSON"),
        ('"notes": {}', '"notes": {"loss": 1e400}', "not JSON"),
        ('"notes": {}', '"notes": {}, "more": 1', "has an unknown entry 'more'"),
    ],
)
def test_json_that_no_save_writes_is_refused(file, old, new, match):
    text = metadata_of(file)["plan"]
    assert old in text
    forge(file, text.replace(old, new, 1))
    refused(file, match)


@pytest.mark.parametrize(
    ("entry", "value", "match"),
    [
        ("kept", [1, 2], r"kept is \[1, 2\]: expected \{group: \[unit, …\]\}"),
        ("kept", {"stem": [0, True]}, "kept is .*expected"),
        ("kept", {"stem": [0, 1.5]}, "kept is .*expected"),
        ("sizes", {"stem": "8"}, r"sizes is \{'stem': '8'\}: expected \{group: units\}"),
        ("input_shape", [3, 0, 32], r"input_shape is \[3, 0, 32\]: expected \[C, H, W\]"),
        ("shapes", None, "shapes is None: expected"),
        ("norms", {"norm": -1}, r"norms is \{'norm': -1\}: expected \{norm: features\}"),
        ("backbone", "resnet18", "backbone is 'resnet18': expected .* or null"),
        ("macs", -1, "macs is -1: expected a count"),
        ("dense_macs", 1e6, "dense_macs is 1000000.0: expected a count"),
        ("notes", list(range(99)), r"notes is \[0, 1, .*…: expected"),
    ],
)
def test_an_entry_of_another_kind_is_quoted(file, entry, value, match):
    edit(file, **{entry: value})
    refused(file, match)


# --- code in the file -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_is_refused_and_nothing_in_it_runs(file, tmp_path, write):
    mark = tmp_path / "mark"
    with file.open("wb") as stream:
        write(Bomb(mark), stream)
    refused(file, "Pickles, such as those of torch.save, are never opened")
    assert not mark.exists()
    with file.open("rb") as stream:
        torch.load(stream, weights_only=False) if write is torch.save else pickle.load(stream)
    assert mark.exists()  # it would have gone off


# --- plans edited by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({"stem": [0, 4]}, r"kept\['stem'\] holds unit 4: expected units from 0 to 3"),
        ({"stem": [0, 2, 2]}, r"kept\['stem'\] holds 2 before 2: expected ascending units, each once"),
        ({"stem": [2, 0]}, r"kept\['stem'\] holds 2 before 0: expected ascending"),
        ({"stem": []}, r"kept\['stem'\] is empty: expected at least one unit of 0 to 3"),
        ({"stemm": [0]}, r"kept names 'stemm', which is not in sizes; did you mean 'stem'\?"),
    ],
)
def test_impossible_units_are_named(saved, file, kept, match):
    assert saved[2].sizes == {"stem": 4, "mix": 6}  # pairs of channels, around a convolution of two groups
    edit(file, kept={"stem": [0, 2], "mix": [0, 2, 4]} | kept)
    refused(file, match)


@pytest.mark.parametrize(
    ("entry", "change", "match"),
    [
        ("sizes", {"stem": 9}, "the plan removes 7 of 9 units of 'stem', but stem.weight has 4 of 8 channels left"),
        ("sizes", {"stam": 4}, r"sizes names 'stam', which is no layer; did you mean 'stem'\?"),
        ("shapes", {"stem.weight": [2, 3, 3, 3]}, r"'stem.weight' is \[4, 3, 3, 3\] in .*, and \[2, 3, 3, 3\] in the"),
        ("shapes", {"head.weight": [10**12, 12]}, r"head.weight' is \[5, 12\] in Grouped and \[1000000000000, 12\] in"),
        ("shapes", {"head.weight": [5, 12, 1]}, r"'head.weight' is \[5, 6\] in .*, and \[5, 12, 1\] in the plan's"),
        ("shapes", {"more": [1]}, r"'more' is missing in .*, and \[1\] in the plan's"),
        ("norms", {"norm": 4}, "norms gives 'norm' 4 features; expected a norm of Grouped without weights"),
    ],
)
def test_a_plan_that_does_not_fit_the_tensors_is_refused(file, entry, change, match):
    plan = json.loads(metadata_of(file)["plan"])
    edit(file, **{entry: plan[entry] | change})
    refused(file, match)


HUGE = 10**12


@pytest.mark.parametrize("network", [build_backbone, Classifier])
@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": HUGE},
        {"num_classes": 10**4000},
        {"num_classes": -1},
        {"num_classes": True},
        {"num_classes": "7"},
        {"num_classes": None},
        {"width": 1e6},
        {"width": 1e300},
        {"width": 10**400},
        {"width": 1e-300},
        {"width": [1]},
        {"image_size": HUGE},
        {"image_size": {}},
        {"name": "resnet19", "backbone": "resnet19"},
        {"name": ["resnet18"], "backbone": ["resnet18"]},
        {"classes": 7},
        {"self": 7},
    ],
)
def test_a_hostile_backbone_is_refused_without_memory(tmp_path, network, change):
    slim, plan = halved(network("resnet18", **SETTINGS | {"width": 0.05}), only="conv1")
    save_slim(tmp_path / "slim", slim, plan)
    file = tmp_path / "slim.safetensors"
    assert plan.backbone
    own = {name: value for name, value in change.items() if name in plan.backbone or name in ("classes", "self")}
    edit(file, backbone=plan.backbone | own)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"slim\.safetensors: (backbone is|the plan is for another)"):
        load_slim(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7


def test_a_backbone_whose_dense_shapes_are_huge_too_takes_no_memory(tmp_path):
    """The plan tells the truth about a network that no machine could hold; the tensors are a slice of it."""
    settings = {"name": "resnet18", "num_classes": 10**9, "width": 1e4, "image_size": 32}
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_backbone(**settings).state_dict().items()}
    tensors = {
        name: torch.ones([min(side, 2) for side in shape], dtype=torch.float32 if shape else torch.int64)
        for name, shape in shapes.items()
    }
    plan = Plan(kept={}, sizes={}, input_shape=(3, 32, 32), shapes=shapes, backbone=settings, macs=1, dense_macs=1)
    file = tmp_path / "huge.safetensors"
    file.write_bytes(
        safetensors.torch.save(tensors, {"plan": plan.to_json(), "sha256": slim_file._digest(plan.to_json(), tensors)})
    )
    loaded = load_slim(file)
    assert sum(tensor.numel() for tensor in loaded.state_dict().values()) == sum(map(torch.numel, tensors.values()))


# --- the wrong network ------------------------------------------------------------------------------------------------


def test_a_network_of_other_shapes_is_refused(file):
    differ = r"'stem.weight' is \[10, 3, 3, 3\] in Grouped and \[8, 3, 3, 3\] in the plan"
    match = rf"another network than this Grouped: {differ}, .*and 3 more; pass a model built with the settings"
    refused(file, match, model=Grouped(10))


def test_a_network_that_is_slim_already_is_refused(file):
    with pytest.raises(ValueError, match="before any pruning"):
        load_slim(file, load_slim(file, Grouped()))


def test_filling_another_network_leaves_it_alone(saved):
    model = Tied()
    with pytest.raises(ValueError, match="the plan is for another network than this Tied: 'scale' is missing"):
        fill(model, saved[2], saved[1].state_dict())
    assert list(model.state_dict()) == list(Tied().state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("head.bias"), r"'head.bias' is missing in slim.safetensors, and \[5\]"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"'extra' is \[2\] in slim.safetensors, and missing"),
        (lambda tensors: tensors.update(scale=torch.ones(2)), r"'scale' is \[2\] in .*, and \[\] in the plan's"),
        (lambda tensors: tensors.update(scale=torch.tensor(2)), "'scale' is torch.int64, but torch.float32 in Grouped"),
    ],
)
def test_tensors_of_another_network_are_named(saved, file, change, match):
    tensors = dict(saved[1].state_dict())
    change(tensors)
    forge(file, tensors=tensors)
    refused(file, match)


def test_a_bias_that_no_layer_could_get_is_refused(tmp_path):
    class Table(Grouped):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 2)

    save_slim(tmp_path / "slim", *halved(Table()))
    file = tmp_path / "slim.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    forge(file, tensors=tensors | {"stem.bias": torch.ones(3)})
    refused(file, r"'stem.bias' is \[3\] in slim.safetensors, and missing in the plan's", model=Table())
    forge(file, tensors=tensors | {"table.bias": torch.ones(6)})
    refused(file, "'table.bias' is no bias that a layer of Table could get", model=Table())


# --- a thousand damaged files -----------------------------------------------------------------------------------------

VALUES: list[Any] = [-1, 0, 3, 10**9, 10**30, 1.5, True, None, "x", "", [], {}, [1], {"stem": [0]}, [[]], "NaN" * 99]


def flipped(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(damaged)


def cut(data: bytes, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(data)), rng.randint(1, 200)
    return data[:at] + rng.choice([b"", data[at + count :], rng.randbytes(count) + data[at:]])


def changed(value: Any, rng: random.Random) -> Any:
    """Some JSON with one of its entries removed, replaced, swapped, repeated or nested."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        value = copy.copy(value)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        other = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if (kind := rng.random()) < 0.15:
            del value[key]
        elif kind < 0.3:
            value[key], value[other] = value[other], value[key]
        elif isinstance(value, list) and kind < 0.4:
            value.append(value[key])
        else:
            value[key] = changed(value[key], rng)
        return value
    return rng.choice([*VALUES, [value], {"a": value}, value])


def header_changed(data: bytes, rng: random.Random) -> bytes:
    """Another header: names, dtypes, shapes, offsets or metadata."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(changed(json.loads(data[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def plan_changed(data: bytes, rng: random.Random) -> bytes:
    """Another plan, with its own digest."""
    size, tensors = int.from_bytes(data[:8], "little"), safetensors.torch.load(data)
    plan = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["plan"])
    text = json.dumps(changed(plan, rng))
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text))] + rng.choice(["[" * 9999, "9" * 9999, "1e999", "NaN", "\x00", "é"])
    return safetensors.torch.save(tensors, {"plan": text, "sha256": slim_file._digest(text, tensors)})


@pytest.mark.parametrize("damage", [flipped, cut, header_changed, plan_changed])
@pytest.mark.parametrize(("own", "count"), [(True, 225), (False, 25)])
def test_a_damaged_file_loads_as_it_was_or_ends_in_a_value_error(
    tmp_path, saved, damage: Callable[[bytes, random.Random], bytes], own, count
):
    """A thousand files in all, of a network of one's own and of one that the plan builds."""
    file, slim = tmp_path / "slim.safetensors", saved[1]
    data, rng = saved[0].read_bytes(), random.Random(0)
    if not own:
        slim, plan = halved(build_backbone("resnet18", **SETTINGS | {"width": 0.02}), only="conv1")
        save_slim(file, slim, plan)
        data = file.read_bytes()
    errors = []
    tracemalloc.start()
    for _ in range(count):
        file.write_bytes(damage(data, rng))
        try:
            assert same_bits(load_slim(file, Grouped() if own else None), slim)
        except ValueError as error:
            errors.append(str(error))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7
    assert len(errors) > count / 2
    assert all(error.startswith(str(file)) and "\n" not in error for error in errors)


class Named(nn.Module):
    """Its layers have two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU())
        self.last, self.head = self.base[2:], nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.base[:2](x)).mean((2, 3)))


class Buffered(nn.Module):
    """Scales channels by a buffer that its state dict has or leaves out."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.register_buffer("gain", torch.rand(1, 8, 1, 1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu() * self.gain).mean((2, 3)))


def test_a_layer_of_two_names_gets_its_bias_under_both(tmp_path):
    images = torch.randn(32, 3, 8, 8)
    slim = prune(Named(), [images], budget=0.5)
    slim.save(tmp_path / "slim")
    assert torch.equal(load_slim(tmp_path / "slim", Named())(images), slim.model(images))


def test_a_buffer_that_has_lost_channels_and_is_not_saved_is_named(tmp_path):
    images = torch.randn(32, 3, 8, 8)
    saved = prune(Buffered(True), [images], budget=0.5)
    saved.save(tmp_path / "slim")
    assert torch.equal(load_slim(tmp_path / "slim", Buffered(True))(images), saved.model(images))
    with pytest.raises(ValueError, match=r"the buffers gain of Buffered have lost channels, .*persistent=True"):
        prune(Buffered(False), [images], budget=0.5).save(tmp_path / "other")
    assert not (tmp_path / "other.safetensors").exists()
