"""The run folder: which tables are a run's, what a second training into it does, and names that lead out of it."""

import multiprocessing
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl import AxisTracker, read_run
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.axes import Axes
from chanaxes_pl.run_folder import RunFolder, checkpoint_path
from chanaxes_pl.tracking.history import History
from tests.analysis.test_runs import write_run
from tests.helpers import cases as zoo
from tests.helpers.training import QUIET, build, loaders, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def test_the_newest_training_is_read_with_a_note_and_each_can_be_named(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 4))
    write_run(run, tracker="axis-1", steps=(0, 5))
    write_run(run, tracker="axis-10", steps=(0, 6))
    (newest,) = read_runs([run]).each
    assert (newest.tracker, newest.steps) == ("axis-10", [0, 6])
    (note,) = newest.notes
    assert note == (
        f"{run} holds 3 trainings, and this is the newest, axis-10; pass {run}/axis or {run}/axis-1 to see an older one"
    )
    for name, steps in {"axis": [0, 4], "axis-1": [0, 5]}.items():
        (named,) = read_runs([run / name]).each
        assert (named.tracker, named.steps, named.notes) == (name, steps, ())


def test_two_trainings_of_one_folder_can_be_set_side_by_side(tmp_path):
    run = write_run(tmp_path / "run")
    write_run(run, seed=1, tracker="axis-1")
    assert [each.name for each in read_runs([run / "axis", run / "axis-1"]).each] == ["run/axis", "run/axis-1"]


def test_a_trackers_own_name_may_end_in_a_number(tmp_path):
    run = write_run(tmp_path / "run", tracker="label-2")
    assert RunFolder(run).trackers == {"label-2": [run / "label-2"]}
    assert read_runs([run]).each[0].notes == ()


def test_a_second_training_takes_the_number_after_the_highest(tmp_path):
    run = RunFolder(tmp_path / "run")
    folders = [run.create_tracker("axis") for _ in range(3)]
    folders[1].rmdir()
    (run.path / "axis-x").mkdir()
    assert [folder.name for folder in folders] == ["axis", "axis-1", "axis-2"]
    assert run.create_tracker("axis").name == "axis-3"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", "c:x", "a\0b"])
def test_a_trackers_name_cannot_lead_out_of_the_run_folder(tmp_path, name):
    with pytest.raises(ValueError, match=r"AxisTracker\(name=.*\): expected the name of a folder in the run folder"):
        AxisTracker(name=name)
    with pytest.raises(ValueError, match="expected the name of a folder"):
        RunFolder(tmp_path / "run").create_tracker(name)
    assert list(tmp_path.iterdir()) == []


def write_tables(folder: Path, mark: int, ready) -> None:
    """What one of two trainings does, several times over: open its folder when both are there, then write."""
    for trial in range(8):
        history = History()
        ready.wait(120)
        history.open(RunFolder(folder / str(trial)), "axis", f"run {mark}")
        for step in range(3):
            history.add(step, step, Axes(pd.DataFrame(zoo.synthetic_layer(0, 4)).assign(at_ceiling=mark), 0))


def test_two_processes_that_start_at_once_write_into_two_folders(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(2)
    both = [spawn.Process(target=write_tables, args=(tmp_path, mark, ready)) for mark in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]
    for trial in range(8):
        folders = RunFolder(tmp_path / str(trial)).trackers["axis"]
        marks = [
            [pd.read_parquet(path)["at_ceiling"].iloc[0] for path in folder.glob("*.parquet")] for folder in folders
        ]
        assert sorted(marks) == [[1, 1, 1], [2, 2, 2]]


def test_a_run_that_goes_on_stays_in_its_folder_though_a_newer_one_is_beside_it(tmp_path):
    tracker, model = AxisTracker(), build()
    fitter = trainer(tmp_path, tracker, max_epochs=1)
    fitter.fit(model, **loaders())
    write_run(tmp_path, tracker="axis-1")
    fitter.fit_loop.max_epochs = 2
    fitter.fit(model, **loaders())
    assert tracker.folder == tmp_path / "axis"
    assert read_run(tmp_path / "axis")["step"].unique().tolist() == [0, 4, 8]
    assert not checkpoint_path(tmp_path / "axis-2", 0).exists()


def test_a_run_without_a_name_has_that_of_its_folder(tmp_path):
    logger = CSVLogger(tmp_path / "mine", "", "")
    trainer(tmp_path, AxisTracker(), logger=logger, max_epochs=1).fit(build(), **loaders())
    assert read_run(tmp_path / "mine" / "axis")["run"].unique().tolist() == ["mine"]
