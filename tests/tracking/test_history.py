"""A history that one feeds by hand: the run folder of a training loop of one's own."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from chanaxes_pl import AxisTracker, History, compute_axes, read_run, read_runs
from chanaxes_pl.cli.report import report
from tests.helpers.training import QUIET, STEPS, build, images, loaders, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
AXES = compute_axes(build(), images(), resamples=20)


def train(model, optimiser, loader, history, epochs=2, backward=torch.Tensor.backward, start=0, probe=None):
    """A plain loop, measured before training and after every epoch."""
    probe, step = probe or images(), start * len(loader)
    if not start:
        history.add(0, 0, compute_axes(model, probe))
    for epoch in range(start, epochs):
        for pictures, labels in loader:
            optimiser.zero_grad()
            backward(nn.functional.cross_entropy(model(pictures), labels))
            optimiser.step()
            step += 1
        history.add(step, epoch + 1, compute_axes(model, probe))


def plain(history, **settings):
    model = build(dropout=0.0)
    optimiser = model.configure_optimizers()
    train(model, optimiser, loaders()["train_dataloaders"], history, **settings)
    return model, optimiser


def with_fabric(history):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model = build(dropout=0.0)
    model, optimiser = fabric.setup(model, model.configure_optimizers())
    loader = fabric.setup_dataloaders(loaders()["train_dataloaders"])
    train(model, optimiser, loader, history, backward=fabric.backward)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The same training under a Trainer."""
    tracker = AxisTracker()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path_factory.mktemp("tracked"), tracker).fit(build(dropout=0.0), **loaders())
    return tracker


def test_a_plain_loop_leaves_the_tables_of_a_tracker(tmp_path, tracked):
    history = History(tmp_path / "mine", about={"data": "made up", "seed": 0})
    plain(history)
    table = read_run(history.folder)
    pd.testing.assert_frame_equal(table.drop(columns="run"), read_run(tracked.folder).drop(columns="run"))
    assert (history.folder, set(table["run"]), history.run) == (tmp_path / "mine/axis", {"mine"}, "mine")
    assert history.checkpoints == [(0, 0), (1, STEPS), (2, 2 * STEPS)]
    pd.testing.assert_frame_equal(history.table, table.query("step == 8").reset_index(drop=True))
    measured = [name for name in tracked.correlations if name not in ("run", "low", "high")]
    pd.testing.assert_frame_equal(history.correlations[measured], tracked.correlations[measured])
    about = json.loads((history.folder / "about.json").read_text())
    assert (about["data"], about["seed"], "torch" in about["versions"]) == ("made up", 0, True)


def test_a_fabric_loop_leaves_the_same_table(tmp_path, tracked):
    history = History(tmp_path / "mine")
    with_fabric(history)
    found = read_run(history.folder).assign(layer=lambda t: t["layer"].str.removeprefix("_forward_module."))
    assert set(found["layer"]) == {"net.0", "net.4"}
    pd.testing.assert_frame_equal(found.drop(columns="run"), read_run(tracked.folder).drop(columns="run"))


def test_the_report_shows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain(History("runs/mine", about={"data": "made up"}))
    (run,) = read_runs(["runs/mine"]).each
    assert (run.steps, run.about["data"]) == ([0, STEPS, 2 * STEPS], "made up")
    report("runs/mine")
    page = (tmp_path / "runs/mine/report/index.html").read_text()
    assert "runs/mine" in page
    assert "made up" in page
    assert "Axis correlation" in page
    capsys.readouterr()
    report("runs/mine", text=True)
    assert "at initialisation" in capsys.readouterr().out


def test_in_memory_it_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = History()
    history.add(0, 0, AXES)
    assert (history.folder, history.table["step"].unique().tolist(), os.listdir()) == (None, [0], [])
    assert history.correlations["low"].notna().any()


def test_two_histories_of_one_folder_and_two_names(tmp_path):
    for history in (History(tmp_path), History(tmp_path), History(tmp_path, name="other")):
        history.add(0, 0, AXES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["axis", "axis-1", "other"]


def test_a_resumed_loop_continues_its_tables(tmp_path):
    whole = History(tmp_path / "whole")
    plain(whole, epochs=3)
    first = History(tmp_path / "mine")
    model, optimiser = plain(first, epochs=1)
    saved = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": first.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    first.add(STEPS + 1, 1.25, AXES)  # lost when the process died
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    model = build(dropout=0.0)
    optimiser = model.configure_optimizers()
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    history = History(tmp_path / "mine")
    history.load_state_dict(saved["history"])
    train(model, optimiser, loaders()["train_dataloaders"], history, epochs=3, start=1)
    found, expected = read_run(history.folder), read_run(whole.folder)
    pd.testing.assert_frame_equal(found.drop(columns="run"), expected.drop(columns="run"), rtol=1e-6, atol=1e-12)
    assert history.folder == first.folder
    assert [path.name for path in (history.folder / "set-aside").iterdir()] == [f"step-{STEPS + 1:09d}.parquet"]


def test_a_measurement_of_the_same_step_takes_the_place_of_the_last_where_asked(tmp_path):
    history = History(tmp_path)
    history.add(0, 0, AXES)
    history.add(5, 1, AXES)
    other = replace(AXES, table=AXES.table.assign(input_capture=1.0))
    history.add(5, 1, other, replace=True)
    assert history.checkpoints == [(0, 0), (1, 5)]
    assert (read_run(tmp_path / "axis").query("step == 5")["input_capture"] == 1).all()
    assert history.correlations.groupby("step").size().nunique() == 1
    history.add(np.int64(6), np.float64(1.5), AXES)
    assert history.checkpoints[-1] == (1.5, 6)


@pytest.mark.parametrize(
    ("step", "epoch", "message"),
    [
        (5, 2, r"History.add\(step=5\): expected the number of optimiser steps so far, a whole number from 6 on; beg"),
        (4, 2, r"step=4\): .* from 6 on"),
        (-1, 2, r"step=-1\)"),
        (7.5, 2, r"step=7.5\): expected .*a whole number"),
        (True, 2, r"step=True\)"),
        (7, float("nan"), r"History.add\(epoch=nan\): expected the passes over the training data so far, such as 0.5"),
        (7, -1, r"epoch=-1\)"),
        (7, float("inf"), r"epoch=inf\)"),
        (7, "two", r"epoch='two'\)"),
    ],
)
def test_a_time_that_is_none_is_refused_and_nothing_changes(step, epoch, message):
    history = History()
    history.add(5, 1, AXES)
    with pytest.raises(ValueError, match=message):
        history.add(step, epoch, AXES)
    assert (history.checkpoints, history.last_step) == ([(1, 5)], 5)


def test_what_are_no_axes_are_refused():
    with pytest.raises(TypeError, match=r"History.add\(axes: a DataFrame\): expected what compute_axes"):
        History().add(0, 0, AXES.table)  # type: ignore[arg-type]


def test_axes_of_another_network_are_refused():
    history = History()
    history.add(0, 0, AXES)
    with pytest.raises(ValueError, match=r"History.add: other channels than in step 0, in net\.4: expected the same"):
        history.add(1, 1, compute_axes(build(width=9), images()))
    with pytest.raises(ValueError, match=r"in net\.9: .*begin another History"):
        history.add(1, 1, compute_axes(build(), images(), layers="conv+linear"))


@pytest.mark.parametrize("name", ["a/b", "", ".."])
def test_a_name_that_is_no_folders_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"History\(name='{name}'\): expected the name of a folder"):
        History(tmp_path, name=name)


def test_a_folder_that_cannot_be_made_is_named_with_the_cure(tmp_path):
    (tmp_path / "file").write_text("no folder")
    history = History(tmp_path / "file")
    with pytest.raises(OSError, match=r"History cannot write its tables to .*file/axis.*: give it another folder"):
        history.add(0, 0, AXES)
    assert history.checkpoints == []


def test_about_may_be_any_mapping(tmp_path):
    history = History(tmp_path, about=MappingProxyType({"seed": 3}))
    plain(history)
    assert json.loads((history.folder / "about.json").read_text())["seed"] == 3


def test_what_about_cannot_be_json_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"History\(about=.*\): expected what JSON can hold \(Object of type float32"):
        History(tmp_path, about={"lr": np.float32(0.1)})
    assert not list(tmp_path.iterdir())


def steps(folder) -> list[int]:
    return sorted(set(read_run(folder / "axis")["step"]))


def test_going_back_within_a_process_sets_later_tables_aside(tmp_path):
    history = History(tmp_path)
    for step in (0, 10):
        history.add(step, step / 10, AXES)
    state = history.state_dict()
    history.add(20, 2, AXES)
    history.load_state_dict(state)
    assert steps(tmp_path) == [0, 10]
    history.add(15, 1.5, AXES)
    assert steps(tmp_path) == [0, 10, 15]
    assert [step for _, step in history.checkpoints] == [0, 10, 15]
    assert [path.name for path in (tmp_path / "axis" / "set-aside").iterdir()] == ["step-000000020.parquet"]


def test_nothing_that_was_set_aside_is_written_over(tmp_path):
    history = History(tmp_path)
    history.add(0, 0, AXES)
    start = history.state_dict()
    for _ in range(3):
        history.load_state_dict(start)
        history.add(10, 1, AXES)
    names = sorted(path.name for path in (tmp_path / "axis" / "set-aside").iterdir())
    assert names == ["step-000000010-1.parquet", "step-000000010.parquet"]


def test_going_on_from_a_state_whose_tables_were_set_aside_is_warned_of(tmp_path):
    history = History(tmp_path)
    for step in (0, 10, 20):
        history.add(step, step / 10, AXES)
    last = history.state_dict()
    history.load_state_dict({**last, "checkpoints": last["checkpoints"][:1]})
    again = History(tmp_path)
    again.load_state_dict(last)
    with pytest.warns(UserWarning, match=r"lacks step-000000010.parquet, step-000000020.parquet, .*a gap of 2 check"):
        again.add(30, 3, AXES)


def test_a_folder_stays_where_it_was_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    history = History("mine")
    history.add(0, 0, AXES)
    monkeypatch.chdir(tmp_path / "other")
    history.add(1, 1, AXES)
    assert read_run(tmp_path / "mine" / "axis")["step"].unique().tolist() == [0, 1]
    assert not list((tmp_path / "other").iterdir())


def test_two_tables_of_one_step_are_refused(tmp_path):
    history = History(tmp_path)
    history.add(0, 0, AXES)
    shutil.copy(tmp_path / "axis" / "step-000000000.parquet", tmp_path / "axis" / "step-000000007.parquet")
    text = r"axis: step-000000000.parquet, step-000000007.parquet all hold step 0; expected the tables of one run"
    with pytest.raises(ValueError, match=text):
        read_run(tmp_path / "axis")
    with pytest.raises(FileNotFoundError, match=r"holds no step-\*.parquet: .*; did you mean .*axis\?"):
        read_run(tmp_path)


def test_steps_of_more_digits_come_last(tmp_path):
    history = History(tmp_path)
    for step in (2, 10**9 - 1, 10**9):
        history.add(step, step / 10, AXES)
    assert read_run(tmp_path / "axis")["step"].unique().tolist() == [2, 10**9 - 1, 10**9]
