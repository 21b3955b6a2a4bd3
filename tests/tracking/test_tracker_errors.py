"""Bad input and bad luck: errors that name the way out, and trainings that go on."""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from chanaxes_pl import AxisTracker, read_run
from chanaxes_pl.tables import read_parquet, write_parquet
from chanaxes_pl.tracking.schedules import Schedule
from tests.helpers.training import QUIET, STEPS, RecordingLogger, Small, build, images, loaders, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def train(root: Path, *callbacks, model=None, **settings) -> Small:
    model = model or build(dropout=0.0)
    trainer(root, *callbacks, **settings).fit(model, **loaders())
    return model


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    ["epochs", "", "log ", "0 steps", "-1 epochs", "1.5 epochs", "often", 0, -2, True, 1.5, None, [1, -1], [0.5]],
)
def test_a_schedule_that_means_nothing_is_quoted_with_those_that_do(schedule):
    with pytest.raises(ValueError, match=r"AxisTracker\(schedule=.*\): expected 'epoch', 'log'.*'n steps'") as error:
        AxisTracker(schedule=schedule)
    assert f"schedule={schedule!r}" in str(error.value)


MEANINGFUL = [
    *("epoch", "log", 3, "3 epochs", "1 epoch", "500 steps", [0, 10], (1, 2), range(3)),
    *(np.int64(2), np.array([1, 4]), [np.int64(1), 5], torch.tensor([1, 2])),
]


@pytest.mark.parametrize("schedule", MEANINGFUL, ids=repr)
def test_schedules_that_mean_something_are_taken(schedule):
    assert Schedule.parse(schedule).due(step=0, epoch=0, epoch_ends=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": 0}, r"AxisTracker\(positions=0\): expected a whole number above 0, 'all' or 'mean'"),
        ({"positions": "most"}, r"AxisTracker\(positions='most'\)"),
        ({"probe_size": 2}, r"AxisTracker\(probe_size=2\): expected at least 3 images"),
        ({"target": "margin"}, r"AxisTracker\(target='margin'\): expected 'auto', 'logit_margin'"),
        ({"noise": "mode"}, r"AxisTracker\(noise='mode'\): expected 'median', 'mean'"),
    ],
)
def test_settings_out_of_range_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        AxisTracker(**settings)


def test_numbers_of_numpy_are_settings_that_a_checkpoint_can_hold():
    settings = AxisTracker(positions=np.int64(4), probe_size=np.int32(40)).settings
    assert [type(value) for value in (settings.positions, settings.probe_size)] == [int, int]


@pytest.mark.parametrize("layers", [None, 3, ["net.0", 1], [torch.nn.Conv2d(1, 1, 1)]])
def test_layers_of_another_type_are_answered_with_those_that_are_taken(tmp_path, layers):
    with pytest.raises(TypeError, match=r"AxisTracker\(layers=.*\): expected 'auto', .* globs .* a mapping from names"):
        train(tmp_path, AxisTracker(layers=layers))


@pytest.mark.parametrize("gives", [lambda logits, labels: logits, lambda logits, labels: (logits, labels, 3)])
def test_a_step_that_gives_no_pair_is_told_so(tmp_path, gives):
    tracker = AxisTracker(step=lambda module, batch: gives(module(batch[0]), batch[1]))
    with pytest.raises(ValueError, match=r"AxisTracker\(step=… gave a .*\): expected a pair \(outputs, labels\)"):
        train(tmp_path, tracker)


def test_a_misspelt_kind_of_layers_is_answered_with_the_right_one(tmp_path):
    with pytest.raises(ValueError, match=r"AxisTracker\(layers='covn'\): no tracked module; .*net\.0.*mean 'conv'\?"):
        train(tmp_path, AxisTracker(layers="covn"))


# --- probe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 1])
def test_without_validation_images_a_warning_names_the_ways_to_give_some(tmp_path, epochs):
    tracker = AxisTracker()
    with pytest.warns(UserWarning, match=r"measured on training images.*pass probe=.*probe_dataloader\(\)"):
        trainer(tmp_path, tracker, max_epochs=epochs).fit(build(), loaders()["train_dataloaders"])
    assert tracker.table["task_information"].notna().all()


def test_validation_that_is_switched_off_is_named_too(tmp_path):
    with pytest.warns(UserWarning, match=r"no validation \(no loader, no validation_step, or limit_val_batches=0\)"):
        train(tmp_path, AxisTracker(), limit_val_batches=0)


def test_a_probe_of_another_type_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"AxisTracker\(probe=3\): expected a Dataset, a DataLoader, or an iterable"):
        train(tmp_path, AxisTracker(probe=3))
    with pytest.raises(ValueError, match=r"AxisTracker: a batch is an object of type int: expected \(images, labels\)"):
        train(tmp_path, AxisTracker(probe=[1, 2, 3]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images(2))


@pytest.mark.parametrize("probe", [images(2), DataLoader(Stream(), batch_size=2)], ids=["indexed", "streamed"])
def test_two_images_are_too_few(tmp_path, probe):
    with pytest.raises(ValueError, match=r"AxisTracker: the probe holds 2 images, expected at least 3"):
        train(tmp_path, AxisTracker(probe=probe))


class Dicts(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        torch.rand(1)
        image, label = images()[index]
        return {"picture": image, "label": label}


def test_a_batch_of_another_kind_needs_a_step(tmp_path):
    message = (
        r"a batch has the keys picture, label: 0 for the images and 1 for the labels.*"
        r"pass step=lambda module, batch: \(module\(batch\['image'\]\), batch\['label'\]\)"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path, AxisTracker(probe=Dicts()))
    tracker = AxisTracker(probe=Dicts(), step=lambda module, batch: (module(batch["picture"]), batch["label"]))
    train(tmp_path, tracker)
    plain = AxisTracker()
    train(tmp_path / "plain", plain)
    pd.testing.assert_frame_equal(tracker.table.drop(columns="run"), plain.table.drop(columns="run"))


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_no_class_are_named(tmp_path, label):
    pictures, labels = images()[:]
    labels[5] = label
    message = f"label {label}, but the logits have 4 classes: expected labels from 0 to 3"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, AxisTracker(probe=TensorDataset(pictures, labels)))


def test_a_probe_that_fails_leaves_the_network_and_the_trainer_as_they_were(tmp_path):
    class Before(L.Callback):
        def on_train_start(self, *args):
            self.numbers = torch.get_rng_state()

    model, before = build(), Before()
    fitter = trainer(tmp_path, before, AxisTracker(probe=Dicts()))
    with pytest.raises(ValueError, match="a batch has the keys picture, label"):
        fitter.fit(model, **loaders())
    assert model.net.training
    assert not model.frozen.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before.numbers)
    assert torch.is_grad_enabled()


# --- run folder -----------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path):
    (tmp_path / "file").write_text("no folder")
    model = build()
    with pytest.raises(OSError, match=r"cannot write its tables to .*file.*axis.*default_root_dir.*save=False"):
        train(tmp_path / "file", AxisTracker(), model=model)
    assert model.losses == []


class At(L.Callback):
    """Does something after one optimiser step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            self.action(pl_module)


def test_a_folder_that_is_lost_in_mid_training_costs_tables_and_not_the_training(tmp_path):
    tracker = AxisTracker()

    def lose(_):
        tracker.folder.rename(tmp_path / "kept")
        tracker.folder.write_text("no folder")

    logger = RecordingLogger()
    with pytest.warns(UserWarning, match=r"the table of step \d+ is lost, training goes on: .*step-0000000") as caught:
        model = train(tmp_path, tracker, At(STEPS + 1, lose), max_epochs=3, logger=logger)
    assert len([warning for warning in caught if "is lost" in str(warning.message)]) == 2
    assert len(model.losses) == 3 * STEPS
    assert read_run(tmp_path / "kept")["step"].unique().tolist() == [0, STEPS]
    assert [step for step, _ in logger.of()] == [0, STEPS, 2 * STEPS, 3 * STEPS]


def fail_half_way(table, path, **_):
    Path(path).write_bytes(b"PAR1 half a table")
    raise OSError(28, "No space left on device")


def test_a_crash_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    tracker, path = AxisTracker(), tmp_path / "step-000000000.parquet"
    train(tmp_path, tracker, max_epochs=1)
    table = tracker.table
    write_parquet(table, path)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail_half_way)
    with pytest.raises(OSError, match="No space left"):
        write_parquet(table.head(1), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["axis", path.name]
    pd.testing.assert_frame_equal(read_parquet(path), table)


def test_a_disk_that_fills_up_costs_one_table(tmp_path, monkeypatch):
    tracker = AxisTracker()
    acts = [At(STEPS - 1, lambda _: monkeypatch.setattr(pd.DataFrame, "to_parquet", fail_half_way))]
    acts += [At(STEPS, lambda _: monkeypatch.undo())]
    with pytest.warns(UserWarning, match="step 4 is lost, training goes on: .*No space left on device"):
        train(tmp_path, tracker, *acts)
    assert read_run(tracker.folder)["step"].unique().tolist() == [0, 2 * STEPS]
    assert sorted(path.name for path in tracker.folder.iterdir()) == [
        "about.json",
        "step-000000000.parquet",
        "step-000000008.parquet",
    ]


def test_a_half_file_is_named(tmp_path):
    (tmp_path / "step-000000000.parquet").write_bytes(b"PAR1 half a table")
    with pytest.raises(ValueError, match=r"not a whole Parquet file.*cut off"):
        read_run(tmp_path)


# --- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_is_not_finite_is_told_apart_and_training_goes_on(tmp_path, value):
    def break_late_layer(module):
        with torch.no_grad():
            module.net[4].weight.fill_(value)

    tracker, logger = AxisTracker(), RecordingLogger(tmp_path)
    act = At(2 * STEPS - 1, break_late_layer)
    model = train(tmp_path, tracker, act, max_epochs=3, logger=logger)
    assert len(model.losses) == 3 * STEPS
    table = read_run(tracker.folder)
    broken = table.query("step == 8 and layer == 'net.4'")
    assert set(broken["reason"]) == {"output not finite"}
    assert broken[["input_capture", "peer_overlap", "task_information", "target_excess"]].isna().all(axis=None)
    rows = dict(logger.of())
    assert np.isfinite(rows[STEPS]["axis/rho"])
    assert [np.isnan(rows[step]["axis/rho"]) for step in (2 * STEPS, 3 * STEPS)] == [True, True]


@pytest.mark.filterwarnings("ignore:the task variable .* is not finite")
def test_layers_before_one_that_is_not_finite_keep_their_local_values(tmp_path):
    """One channel of the second convolution: NaN from there reaches its own row, the logits and the target."""

    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.net[4].weight.data[0] = float("nan")

    tracker, logger = AxisTracker(schedule="1 steps"), RecordingLogger(tmp_path)
    train(tmp_path, Breaks(), tracker, max_epochs=1, logger=logger)
    table = read_run(tracker.folder).query("step == 1").set_index(["layer", "channel"])
    local = table[["input_capture", "peer_overlap", "peer_r2"]]
    assert np.isfinite(local.loc["net.0"]).all(axis=None)
    assert table.loc[("net.4", 0), "reason"] == "output not finite"
    assert np.isfinite(local.loc["net.4"].drop(index=0)).all(axis=None)
    assert set(table.loc["net.0", "reason"]) == {"target not finite"}
    assert table[["task_information", "target_excess"]].isna().all(axis=None)
    assert np.isnan(dict(logger.of())[1]["axis/rho"])


def test_a_target_that_does_not_vary_has_no_task_information_and_says_so(tmp_path):
    pictures, labels = images()[:]
    probe = TensorDataset(pictures, torch.zeros_like(labels))
    tracker = AxisTracker(probe=probe, target="label")
    train(tmp_path, tracker, max_epochs=1)
    assert set(tracker.table["reason"]) == {"target does not vary"}
    assert tracker.table["task_information"].isna().all()
    assert np.isfinite(tracker.table["input_capture"]).all()


def test_a_layer_that_the_network_does_not_use_says_so(tmp_path):
    model = build(dropout=0.0)
    model.spare = torch.nn.Conv2d(3, 5, 1)
    tracker = AxisTracker()
    train(tmp_path, tracker, model=model, max_epochs=1)
    spare = tracker.table.query("layer == 'spare'")
    assert set(spare["reason"]) == {"the forward pass did not reach this layer"}
    assert spare["input_capture"].isna().all()
    rho = tracker.correlations.query("step == 4 and local == 'input_capture' and target == 'task_information'")
    assert rho.set_index("layer")["rho"].isna().to_dict() == {
        "net.0": False,
        "net.4": False,
        "spare": True,
        "network": False,
    }
