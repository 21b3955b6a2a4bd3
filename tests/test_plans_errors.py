"""Pruned networks on disk that are missing, damaged, edited, mixed up or hostile; and writing that fails half-way."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from chanaxes_pl.pruning.plan_json import Plan
from chanaxes_pl.pruning.plans import apply_plan, load_slim, save_slim
from tests.test_plans import Grouped, Tied, halved, logits, trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Plan]:
    folder = tmp_path_factory.mktemp("saved")
    slim, plan = halved(trained(Grouped()), biases=("stem",))
    save_slim(folder / "slim", slim, plan)
    return folder, slim, plan


@pytest.fixture
def pair(saved, tmp_path: Path) -> Path:
    """The path of a pair of its own, to be damaged."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "slim"


def refused(path: Path, match: str, model: nn.Module | None = None, error: type[Exception] = ValueError) -> None:
    """Loading fails with this message, and leaves the model that it was given as it was."""
    model = Grouped() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        load_slim(path, model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert model.training


def edit(path: Path, **changes) -> None:
    """Change entries of a plan on disk by hand."""
    file = path.with_suffix(".json")
    content = json.loads(file.read_text())
    content["plan"] |= changes
    file.write_text(json.dumps(content))


def forge(path: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into a pair, with the digest that they should have."""
    data = safetensors.torch.save(tensors)
    path.with_suffix(".safetensors").write_bytes(data)
    file = path.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        ([".json"], r"there is no \S+slim\.json; expected the two files"),
        ([".safetensors"], r"there is no \S+slim\.safetensors; expected the two files"),
        ([".json", ".safetensors"], r"there is no \S+slim\.safetensors and no \S+slim\.json; expected"),
    ],
)
def test_a_missing_file_is_named(pair, gone, match):
    for suffix in gone:
        pair.with_suffix(suffix).unlink()
    refused(pair, match, error=FileNotFoundError)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON .*it was cut off"),
        ('{"version": 1, "sha', "not JSON .*it was cut off"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", r"holds \[1, 2\]: expected version, sha256 and plan"),
        ('{"version": 1, "plan": {}}', "holds .*: expected version, sha256 and plan"),
        ('{"version": 2, "sha256": "", "plan": {}}', "a plan of version 2, but this release .* reads version 1"),
        ('{"version": 1, "sha256": "", "plan": []}', r"the plan is \[\]: expected \{kept, sizes, "),
        ('{"version": 1, "sha256": "", "plan": {"kept": {}}}', "the plan lacks sizes, input_shape, .*save_slim"),
    ],
)
def test_a_plan_file_that_is_none_is_refused(pair, text, match):
    pair.with_suffix(".json").write_text(text)
    refused(pair, rf"slim\.json: {match}")


@pytest.mark.parametrize(
    ("entry", "value", "match"),
    [
        ("kept", [1, 2], r"kept is \[1, 2\]: expected \{group: \[unit, …\]\}"),
        ("kept", {"stem": [0, True]}, "kept is .*expected"),
        ("kept", {"stem": [0, 1.5]}, "kept is .*expected"),
        ("sizes", {"stem": "8"}, r"sizes is \{'stem': '8'\}: expected \{group: units\}"),
        ("input_shape", [3, 0, 32], r"input_shape is \[3, 0, 32\]: expected \[C, H, W\]"),
        ("shapes", None, "shapes is None: expected"),
        ("biases", "stem", r"biases is 'stem': expected \[layer, …\]"),
        ("backbone", "resnet18", "backbone is 'resnet18': expected .* or null"),
        ("macs", -1, "macs is -1: expected a count"),
        ("dense_macs", 1e6, "dense_macs is 1000000.0: expected a count"),
        ("notes", list(range(99)), r"notes is \[0, 1, .*…: expected"),
    ],
)
def test_an_entry_of_another_kind_is_quoted(pair, entry, value, match):
    edit(pair, **{entry: value})
    refused(pair, match)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_cut_off_tensors_are_refused(pair, keep):
    file = pair.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    refused(pair, r"slim\.safetensors: no whole safetensors file .*cut off")


def test_one_changed_bit_is_noticed(pair):
    file = pair.with_suffix(".safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(pair, r"its sha256 is \w{12}…, but slim\.json was written with \w{12}…: .*of different saves")


def test_files_of_two_saves_are_not_mixed(saved, pair):
    _, slim, plan = saved
    other = trained(Grouped())
    apply_plan(other, plan)  # the same shapes, other numbers
    save_slim(pair.with_name("other"), other, plan)
    pair.with_name("other.safetensors").replace(pair.with_suffix(".safetensors"))
    refused(pair, "of different saves")
    assert not logits(other.eval()).equal(logits(slim))


# --- code in the files ------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_pickle_is_refused_and_nothing_in_it_runs(pair, tmp_path, write, suffix):
    mark, file = tmp_path / "mark", pair.with_suffix(suffix)
    with file.open("wb") as stream:
        write(Bomb(mark), stream)
    refused(pair, "Pickles, such as torch.save writes, are never opened" if suffix == ".safetensors" else "not JSON")
    assert not mark.exists()
    with file.open("rb") as stream:
        torch.load(stream, weights_only=False) if write is torch.save else pickle.load(stream)
    assert mark.exists()  # it would have gone off


# --- plans edited by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({"stem": [0, 4]}, r"kept\['stem'\] holds unit 4: expected units from 0 to 3"),
        ({"stem": [-1, 2]}, r"kept\['stem'\] holds unit -1: expected units from 0 to 3"),
        ({"stem": [0, 2, 2]}, r"kept\['stem'\] holds 2 before 2: expected ascending units, each once"),
        ({"stem": [2, 0]}, r"kept\['stem'\] holds 2 before 0: expected ascending"),
        ({"stem": []}, r"kept\['stem'\] is empty: expected at least one unit of 0 to 3"),
        ({"stemm": [0]}, r"kept names 'stemm', which is not in sizes; did you mean 'stem'\?"),
        ({"stem": [0]}, r"do not fit .*norm.weight is float \[4\] in slim.safetensors and float \[2\] in the prun"),
    ],
)
def test_impossible_units_are_named(saved, pair, kept, match):
    assert saved[2].sizes == {"stem": 4, "mix": 6}  # pairs of channels, around a convolution of two groups
    edit(pair, kept={"stem": [0, 2], "mix": [0, 2, 4]} | kept)
    refused(pair, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sizes": {"stem": 9, "mix": 6}}, r"sizes\['stem'\] is 9, but Grouped has \d units there"),
        ({"kept": {}, "sizes": {"stam": 4}}, r"Grouped has no group 'stam' to prune; did you mean 'stem'\?"),
        ({"biases": ["stemm"]}, r"biases names 'stemm', which is no layer of Grouped; did you mean 'stem'\?"),
        ({"biases": []}, r"stem.bias is float \[4\] in slim.safetensors and missing in the pruned network"),
        ({"input_shape": [2, 32, 32]}, r"Grouped does not run on a torch.float32 batch of shape \(1, 2, 32, 32\)"),
    ],
)
def test_a_plan_that_was_changed_does_not_load(pair, changes, match):
    edit(pair, **changes)
    refused(pair, match)


@pytest.mark.parametrize(
    ("backbone", "match"),
    [
        ({"name": "resnet19", "num_classes": 7}, "which cannot be built .*unknown backbone 'resnet19'"),
        ({"name": "resnet18", "classes": 7}, "which cannot be built .*unexpected keyword"),
        ({"name": "resnet18", "num_classes": "7"}, "which cannot be built"),
        ({"name": "resnet18", "num_classes": 7}, "the plan is for another network than this _ResNet: .*and 130 more"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_quoted(pair, backbone, match):
    edit(pair, backbone=backbone)
    with pytest.raises(ValueError, match=match):
        load_slim(pair)


# --- the wrong network ------------------------------------------------------------------------------------------------


def test_a_network_of_other_shapes_is_refused(pair):
    differ = r"stem.weight is \[10, 3, 3, 3\] in Grouped and \[8, 3, 3, 3\] in the plan"
    match = rf"another network than this Grouped: {differ}, .*and 3 more; pass a model built with the settings"
    refused(pair, match, model=Grouped(10))


def test_a_network_that_is_slim_already_is_refused(pair):
    with pytest.raises(ValueError, match="before any pruning"):
        load_slim(pair, load_slim(pair, Grouped()))


def test_applying_a_plan_to_another_network_leaves_it_alone(saved):
    model = Tied()
    with pytest.raises(ValueError, match="resume: the plan is for another network than this Tied: scale is missing"):
        apply_plan(model, saved[2], "resume")
    assert list(model.state_dict()) == list(Tied().state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("head.bias"), r"head.bias is missing in slim.safetensors and float \[5\]"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"extra is float \[2\] in slim.safetensors and missing"),
        (
            lambda tensors: tensors.update(scale=torch.ones(2)),
            r"scale is float \[2\] in .* and float \[\] in the pruned",
        ),
        (lambda tensors: tensors.update(scale=torch.tensor(2)), r"scale is integer \[\] in .* and float \[\] in the"),
    ],
)
def test_tensors_of_another_network_are_named(saved, pair, change, match):
    tensors = dict(saved[1].state_dict())
    change(tensors)
    forge(pair, tensors)
    refused(pair, match)


def test_a_weight_that_is_no_longer_shared_is_refused(tmp_path):
    save_slim(tmp_path / "slim", *halved(trained(Tied(tied=False)), only="body.0"))
    refused(tmp_path / "slim", r"first.weight and last.weight are one tensor in Tied, but differ in slim", model=Tied())
