"""When the tracker measures, and what it logs where."""

import itertools

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from chanaxes_pl import AxisTracker, compute_axes, read_run
from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.tracking.schedules import Schedule
from tests.helpers.training import QUIET, STEPS, WIDTHS, RecordingLogger, Small, build, images, loaders, trainer

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

NETWORK_KEYS = {
    "rho",
    "rho_null",
    "rho_disattenuated",
    "dead",
    "at_ceiling",
    "rho_pairs/input_capture-target_excess",
    "rho_pairs/peer_overlap-task_information",
    "rho_pairs/peer_overlap-target_excess",
    "rho_pairs/local_axis-target_axis",
    "task_mass/duplicate",
    "task_mass/nonreplaceable",
    "reliability/input_capture",
    "reliability/peer_overlap",
    "reliability/task_information",
    "reliability/target_excess",
    "reliability/peer_r2",
    "seconds",
    "time_share",
}
LAYER_KEYS = {f"layer/{layer}/{what}" for layer in WIDTHS for what in ("rho", "rho_axes", "dead")}


def keys(prefix: str = "axis") -> set[str]:
    return {f"{prefix}/{key}" for key in NETWORK_KEYS | LAYER_KEYS}


def measured(folder) -> list[tuple[float, int]]:
    """The (epoch, step) of each table in a folder; every channel of every layer once in each."""
    table = read_run(folder)
    channels = [(layer, channel) for layer, width in WIDTHS.items() for channel in range(width)]
    for _, rows in table.groupby("step"):
        assert list(rows[["layer", "channel"]].itertuples(index=False, name=None)) == channels
    return list(table[["epoch", "step"]].drop_duplicates().itertuples(index=False, name=None))


def rhos(tracker) -> list[float]:
    return main_correlation(tracker.correlations)["rho"].tolist()


class Watch(L.Callback):
    """What a callback that monitors would see: ``axis/rho`` at the start, after each batch and at epochs' ends."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, trainer, *args):
        self.batches.append(float(trainer.callback_metrics["axis/rho"]))

    def on_train_epoch_end(self, trainer, *args):
        self.epochs.append(float(trainer.callback_metrics["axis/rho"]))


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("epoch", [(0, 0), (1, 4), (2, 8), (3, 12)]),
        (2, [(0, 0), (2, 8)]),
        ("2", [(0, 0), (2, 8)]),
        ("3 epochs", [(0, 0), (3, 12)]),
        ("3 steps", [(0, 0), (0.75, 3), (1.5, 6), (2.25, 9), (3, 12)]),
        ("log", [(0, 0), (0.25, 1), (0.5, 2), (1, 4), (2, 8), (3, 12)]),
        ([2, 5, 99], [(0, 0), (0.5, 2), (1.25, 5)]),
        ([], [(0, 0)]),
    ],
)
def test_each_schedule_measures_at_its_steps_and_at_initialisation(tmp_path, schedule, expected):
    tracker = AxisTracker(schedule=schedule)
    trainer(tmp_path, tracker, max_epochs=3).fit(build(), **loaders())
    assert measured(tracker.folder) == expected
    assert tracker.correlations[["epoch", "step"]].drop_duplicates().values.tolist() == [list(at) for at in expected]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("1 steps", [(0, 0), (0.5, 1), (1, 2), (1.5, 3), (2, 4)]),
        ("log", [(0, 0), (0.5, 1), (1, 2), (2, 4)]),
        ([0, 1], [(0, 0), (0.5, 1)]),
    ],
)
def test_accumulated_gradients_count_optimiser_steps_and_repeat_none(tmp_path, schedule, expected):
    tracker = AxisTracker(schedule=schedule)
    trainer(tmp_path, tracker, accumulate_grad_batches=2).fit(build(), **loaders())
    assert measured(tracker.folder) == expected


def test_the_first_table_is_that_of_random_initialisation(tmp_path):
    tracker = AxisTracker()
    trainer(tmp_path, tracker, max_epochs=1).fit(build(), **loaders())
    first = read_run(tracker.folder).query("step == 0").drop(columns=["run", "epoch", "step"])
    pd.testing.assert_frame_equal(first, compute_axes(build(), images()).table)


def test_the_last_table_is_that_of_the_trained_network(tmp_path):
    tracker, model = AxisTracker(), build()
    trainer(tmp_path, tracker).fit(model, **loaders())
    after = compute_axes(model, images()).table
    pd.testing.assert_frame_equal(tracker.table.drop(columns=["run", "epoch", "step"]), after)
    pd.testing.assert_frame_equal(read_run(tracker.folder).query("step == 8").reset_index(drop=True), tracker.table)
    assert not compute_axes(build(), images()).table.equals(after)


def test_sanity_checking_adds_no_row(tmp_path):
    tracker, logger = AxisTracker(), RecordingLogger(tmp_path)
    trainer(tmp_path, tracker, num_sanity_val_steps=2, logger=logger).fit(build(), **loaders())
    assert [step for step, _ in logger.of()] == [0, 4, 8]
    assert measured(tracker.folder) == [(0, 0), (1, 4), (2, 8)]


def test_limited_batches_are_whole_epochs(tmp_path):
    tracker = AxisTracker(schedule="1 steps")
    trainer(tmp_path, tracker, limit_train_batches=2).fit(build(), **loaders())
    assert measured(tracker.folder) == [(0, 0), (0.5, 1), (1, 2), (1.5, 3), (2, 4)]


def test_a_fast_development_run_measures_and_leaves_nothing(tmp_path):
    tracker, logger = AxisTracker(), RecordingLogger(tmp_path)
    trainer(tmp_path, tracker, fast_dev_run=True, logger=logger).fit(build(), **loaders())
    assert tracker.correlations["step"].unique().tolist() == [0, 1]
    assert logger.rows == []
    assert list(tmp_path.iterdir()) == []
    assert tracker.folder is None


class Data(L.LightningDataModule):
    """Offers a probe of its own, or only validation images."""

    def __init__(self, probe: bool):
        super().__init__()
        if probe:
            self.probe_dataloader = lambda: DataLoader(images(24, 3), batch_size=8)

    def train_dataloader(self):
        return loaders()["train_dataloaders"]

    def val_dataloader(self):
        return loaders()["val_dataloaders"]


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize(
    ("given", "how", "expected"),
    [
        ({}, {"datamodule": Data(probe=True)}, images(24, 3)),
        ({}, {"datamodule": Data(probe=False)}, images()),
        ({}, loaders(), images()),
        ({"probe": images(30, 5)}, {"datamodule": Data(probe=True)}, images(30, 5)),
        ({"probe": DataLoader(images(30, 5), batch_size=7)}, loaders(), images(30, 5)),
        ({"probe": images(30, 5)}, {"train_dataloaders": loaders()["train_dataloaders"]}, images(30, 5)),
    ],
    ids=["datamodule's", "datamodule's validation", "validation", "given first", "given loader", "no validation"],
)
def test_the_probe_is_the_given_one_else_the_datamodules_else_the_validation_images(
    tmp_path, given, how, expected, epochs
):
    """Also where not one epoch is trained: initialisation is measured all the same."""
    tracker, logger = AxisTracker(**given), RecordingLogger(tmp_path)
    trainer(tmp_path, tracker, max_epochs=epochs, logger=logger).fit(build(), **how)
    table = read_run(tracker.folder).query("step == 0").drop(columns=["run", "epoch", "step"])
    pd.testing.assert_frame_equal(table, compute_axes(build(), expected).table)
    assert [step for step, _ in logger.of()] == [0, 4][: epochs + 1]


def test_two_trackers_have_two_folders_and_two_prefixes(tmp_path):
    one, other = AxisTracker(), AxisTracker(name="even", schedule=2)
    logger = RecordingLogger(tmp_path)
    trainer(tmp_path, one, other, logger=logger).fit(build(), **loaders())
    assert (one.folder, other.folder) == (tmp_path / "recorded/version_0/axis", tmp_path / "recorded/version_0/even")
    assert (measured(one.folder), measured(other.folder)) == ([(0, 0), (1, 4), (2, 8)], [(0, 0), (2, 8)])
    assert [step for step, row in logger.rows if row.keys() == keys("axis") | {"epoch"}] == [0, 4, 8]
    assert [step for step, row in logger.rows if row.keys() == keys("even") | {"epoch"}] == [0, 8]


def test_two_trackers_of_one_name_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `AxisTracker`.*state_key"):
        trainer(tmp_path, AxisTracker(), AxisTracker(layers="conv+linear"))


def test_predicting_measures_nothing(tmp_path):
    tracker, logger = AxisTracker(), RecordingLogger(tmp_path)
    trainer(tmp_path, tracker, logger=logger).predict(build(), loaders()["val_dataloaders"])
    assert (len(tracker.correlations), logger.of(), list(tmp_path.rglob("*.parquet"))) == (0, [], [])


def test_a_tracker_that_follows_a_second_training_begins_anew(tmp_path):
    tracker = AxisTracker()
    trainer(tmp_path, tracker).fit(build(), **loaders())
    first, before = tracker.folder, read_run(tracker.folder)
    trainer(tmp_path, tracker, max_epochs=1).fit(build(width=5), **loaders())
    assert tracker.folder != first
    assert tracker.correlations["step"].unique().tolist() == [0, 4]
    assert read_run(tracker.folder)["step"].unique().tolist() == [0, 4]
    pd.testing.assert_frame_equal(read_run(first), before)


def test_a_trainer_that_goes_on_continues_its_table(tmp_path):
    tracker, model = AxisTracker(), build()
    fitter = trainer(tmp_path, tracker)
    fitter.fit(model, **loaders())
    first = tracker.folder
    fitter.fit_loop.max_epochs = 3
    fitter.fit(model, **loaders())
    assert tracker.folder == first
    assert measured(first) == [(0, 0), (1, 4), (2, 8), (3, 12)]
    assert tracker.correlations["step"].unique().tolist() == [0, 4, 8, 12]


def test_nothing_is_written_where_nothing_is_to_be_saved(tmp_path):
    tracker = AxisTracker(save=False)
    trainer(tmp_path, tracker).fit(build(), **loaders())
    assert (tracker.folder, list(tmp_path.rglob("*"))) == (None, [])
    assert tracker.table["step"].unique().tolist() == [8]


def test_a_new_run_never_writes_among_an_earlier_ones_tables(tmp_path):
    folders = []
    for _ in range(3):
        tracker = AxisTracker()
        trainer(tmp_path, tracker, max_epochs=1).fit(build(), **loaders())
        folders.append(tracker.folder.name)
    assert folders == ["axis", "axis-1", "axis-2"]


def test_augmenting_hooks_see_validation_while_the_probe_runs(tmp_path):
    stages = []

    class Augmented(type(build())):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            stages.append(self.trainer.training)
            return (torch.zeros_like(batch[0]), batch[1]) if self.trainer.training else batch

    torch.manual_seed(0)
    tracker = AxisTracker(schedule=[])
    trainer(tmp_path, tracker, max_epochs=1).fit(Augmented(), **loaders())
    assert set(stages) == {True, False}
    pd.testing.assert_frame_equal(
        tracker.table.drop(columns=["run", "epoch", "step"]), compute_axes(build(), images()).table
    )


# --- logging --------------------------------------------------------------------------------------------------------


def test_every_logger_gets_the_same_bounded_rows_with_their_epoch(tmp_path):
    loggers = [RecordingLogger(tmp_path), RecordingLogger(tmp_path)]
    tracker = AxisTracker(schedule="log")
    trainer(tmp_path, tracker, logger=loggers).fit(build(), **loaders())
    rows = loggers[0].of()
    assert rows == loggers[1].of()
    assert [(row["epoch"], step) for step, row in rows] == [(0, 0), (0.25, 1), (0.5, 2), (1, 4), (2, 8)]
    assert all(row.keys() == keys() | {"epoch"} for _, row in rows)
    assert [row["axis/rho"] for _, row in rows] == rhos(tracker)
    assert all(type(value) is float for _, row in rows for value in row.values())
    assert all(row["axis/seconds"] > 0 and 0 < row["axis/time_share"] <= 1 for _, row in rows)


def test_rows_of_layers_are_those_of_the_tables(tmp_path):
    tracker, logger = AxisTracker(), RecordingLogger(tmp_path)
    trainer(tmp_path, tracker, max_epochs=1, logger=logger).fit(build(), **loaders())
    last = logger.of()[-1][1]
    here = tracker.correlations.query("step == 4")
    for layer in WIDTHS:
        assert last[f"axis/layer/{layer}/rho"] == main_correlation(here, layer)["rho"].item()
        assert last[f"axis/layer/{layer}/dead"] == tracker.table.query("layer == @layer")["dead"].sum()


def test_csv_holds_the_rows(tmp_path):
    tracker = AxisTracker()
    trainer(tmp_path, tracker, logger=CSVLogger(tmp_path, name="run")).fit(build(), **loaders())
    rows = pd.read_csv(tmp_path / "run/version_0/metrics.csv").dropna(subset="axis/seconds")
    assert keys() <= set(rows)
    assert rows[["epoch", "step"]].values.tolist() == [[0, 0], [1, 4], [2, 8]]
    assert rows["axis/rho"].tolist() == pytest.approx(rhos(tracker), rel=1e-6, nan_ok=True)
    assert tracker.folder == tmp_path / "run/version_0/axis"


@pytest.mark.parametrize(("schedule", "at_end"), [("epoch", [1, 2, 3]), ("1 steps", [4, 8, 12]), (2, [0, 1, 1])])
def test_monitors_see_the_last_measurement_at_every_batch_and_epoch(tmp_path, schedule, at_end):
    tracker, watch = AxisTracker(schedule=schedule), Watch()
    trainer(tmp_path, tracker, watch, max_epochs=3).fit(build(), **loaders())
    values = rhos(tracker)
    assert watch.epochs == pytest.approx([values[number] for number in at_end])
    assert watch.batches[0] == pytest.approx(values[1 if schedule == "1 steps" else 0])


def test_model_checkpoint_keeps_the_epoch_of_the_highest_correlation(tmp_path):
    tracker = AxisTracker()
    saver = ModelCheckpoint(
        tmp_path / "best", "{step}", monitor="axis/rho", mode="max", save_on_train_epoch_end=True, save_top_k=1
    )
    trainer(tmp_path, tracker, saver, max_epochs=4).fit(build(), **loaders())
    values = rhos(tracker)[1:]
    assert float(saver.best_model_score) == pytest.approx(max(values))
    assert saver.best_model_path.endswith(f"step={STEPS * (1 + values.index(max(values)))}.ckpt")


def test_early_stopping_stops_by_an_axis_correlation(tmp_path):
    tracker = AxisTracker()
    stopper = EarlyStopping("axis/rho", mode="max", patience=1, min_delta=2.0, check_on_train_epoch_end=True)
    fitter = trainer(tmp_path, tracker, stopper, max_epochs=9)
    fitter.fit(build(), **loaders())
    assert fitter.current_epoch == 2
    assert float(stopper.best_score) == pytest.approx(rhos(tracker)[1])


@pytest.mark.parametrize(
    ("spec", "asked", "due"),
    [
        ([1, 3, 5, 9], [2, 4, 6, 8], [2, 4, 6]),
        ("3 steps", [2, 4, 6, 8], [4, 6]),
        ("log", [2, 4, 6, 8, 12, 24], [2, 4, 8, 24]),
        ("log", [3, 6, 9, 12, 15], [3, 6, 9]),
        ([3, 4], [3, 3, 4], [3, 4]),
    ],
)
def test_what_comes_due_between_two_batches_is_due(spec, asked, due):
    """A batch may take several optimiser steps, or none."""
    schedule = Schedule.parse(spec)
    found = [now for before, now in itertools.pairwise([0, *asked]) if schedule.due(now, 0, False, before)]
    assert found == due


class ByHand(Small):
    """Steps an optimiser that Lightning does not know."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.own = getattr(self, "own", torch.optim.SGD(self.parameters(), 0.01))
        self.own.zero_grad()
        super().training_step(batch, batch_idx).backward()
        self.own.step()


def test_a_training_whose_steps_nobody_counts_is_warned_of(tmp_path):
    tracker = AxisTracker()
    with pytest.warns(UserWarning, match=r"counted no optimiser step, so only random .*self.optimizers\(\)"):
        trainer(tmp_path, tracker).fit(ByHand(), **loaders())
    assert [step for _, step in tracker._history.checkpoints] == [0]


def test_widths_and_settings_that_are_numpy_numbers_leave_a_checkpoint_that_loads(tmp_path):
    model = build()
    model.net[0] = torch.nn.Conv2d(3, np.int64(6), 3)
    fitter = trainer(tmp_path, AxisTracker(noise=np.float64(0.5)), max_epochs=1)
    fitter.fit(model, **loaders())
    fitter.save_checkpoint(tmp_path / "here.ckpt")
    state = torch.load(tmp_path / "here.ckpt", weights_only=True)["callbacks"]["AxisTracker(axis)"]
    assert (state["fingerprint"]["noise"], state["layers"]) == (0.5, WIDTHS)


def test_layers_none_of_which_runs_are_warned_of():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    model.unused = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 9), torch.nn.Conv2d(64, 64, 9))
    model.forward = lambda images: model[1](model[0](images))
    with pytest.warns(UserWarning, match=r"reached none of the 2 tracked layers \(unused.0, unused.1\).*with layers="):
        compute_axes(model, images())
