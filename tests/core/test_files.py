"""What is written is there whole or not at all, and a pruned network only with the plan that it belongs to."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from torch import nn

from chanaxes_pl.core.files import replacing, set_aside
from chanaxes_pl.pruning.slim_file import Plan, load_slim, save_slim
from tests.pruning.test_slim_file import Grouped, Tied, halved, logits, trained


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, Plan]:
    slim, plan = halved(trained(Grouped()), biases=("stem",))
    save_slim(tmp_path / "saved" / "slim", slim, plan)
    return tmp_path / "saved" / "slim", slim, plan


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(path: Path) -> None:
    with replacing(path) as draft:
        draft.write_text("second")
        raise KeyboardInterrupt


def test_an_interrupted_draft_disappears(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as draft:
        draft.write_text("first")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "first"
    assert listed(path.parent) == ["file"]


def test_an_earlier_file_is_set_aside_under_the_next_number(tmp_path):
    assert set_aside(tmp_path / "table.csv") is None
    for text in ("first", "second"):
        (tmp_path / "table.csv").write_text(text)
        kept = set_aside(tmp_path / "table.csv")
        assert kept is not None
        assert kept.read_text() == text
    assert listed(tmp_path) == ["table-1.csv", "table-2.csv"]


def test_an_error_without_a_path_gets_that_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left: '.*table.csv'"), replacing(tmp_path / "table.csv"):
        raise OSError(28, "No space left")
    assert listed(tmp_path) == []


def test_two_drafts_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        first.write_text("outer")
        second.write_text("inner")
    assert (tmp_path / "file").read_text() == "outer"
    assert listed(tmp_path) == ["file"]


@pytest.mark.parametrize("path", ["file/below", "file/deep/below"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=rf"{path} cannot be written: .*/file.* is a file, expected a folder"):
        interrupted(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


class WithState(Grouped):
    def get_extra_state(self) -> dict:
        return {"seen": 3}

    def set_extra_state(self, state: dict) -> None:
        """Not kept."""


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            Grouped,
            "removes 2 of 4 units of 'stem', but stem.weight has 8 of 8 channels left in Grouped; pass",
        ),
        (
            Tied,
            r"'scale' is missing in Tied, and \[\] in the plan's dense network: expected the plan and",
        ),
        (WithState, "WithState's state dict holds '_extra_state', which is no parameter or buffer"),
        (partial(Grouped, bias=True), "has 8 of 8 channels left in Grouped; pass the pruned model with its own plan"),
    ],
)
def test_a_model_that_is_not_the_plans_is_not_saved(saved, tmp_path, model, match):
    with pytest.raises(ValueError, match=match):
        save_slim(tmp_path / "new", model(), saved[2])
    assert listed(tmp_path) == ["saved"]


@pytest.mark.parametrize("notes", [{"loss": float("nan")}, {"model": Grouped}])
def test_notes_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path, notes):
    slim, plan = halved(Grouped(), **notes)
    with pytest.raises(ValueError, match=r"save_slim\('.*new'\): the plan holds something that JSON cannot .* notes"):
        save_slim(tmp_path / "new", slim, plan)
    assert not list(tmp_path.iterdir())


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


STEPS = ["pathlib.Path.write_bytes", "os.fsync", "pathlib.Path.replace"]


@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch, step):
    path, slim, _ = saved
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="No space left"):
            save_slim(path, *halved(trained(Grouped())))
    assert listed(path.parent) == ["slim.safetensors"]
    assert logits(load_slim(path, Grouped())).equal(logits(slim))
