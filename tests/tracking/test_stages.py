"""Evaluating, tuning, training twice, and flags of the Trainer: one clean table each, and the same training."""

import lightning.pytorch as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, Subset

from chanaxes_pl import AxisTracker, compute_axes, read_run
from chanaxes_pl.analysis.runs import read_runs
from tests.helpers.training import QUIET, STEPS, RecordingLogger, Small, build, images, loaders, trainer
from tests.tracking.test_tracker import measured, rhos
from tests.tracking.test_tracker_invariants import Augmented, differences, trained

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]
KEYS = ["run", "epoch", "step"]


def assert_is_table_of(tracker, model, folder, epoch, step, probe=None):
    """One checkpoint in ``folder``, of ``model``."""
    table = read_run(folder)
    assert table[["epoch", "step"]].drop_duplicates().values.tolist() == [[epoch, step]]
    pd.testing.assert_frame_equal(table.drop(columns=KEYS), compute_axes(model, probe or images()).table)
    pd.testing.assert_frame_equal(tracker.table, table)


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluated_network_has_a_table(tmp_path, verb):
    tracker, model, logger = AxisTracker(), build(), RecordingLogger(tmp_path)
    fitter = trainer(tmp_path, tracker, logger=logger)
    getattr(fitter, verb)(model, DataLoader(images(), batch_size=16), verbose=False)
    assert tracker.folder == tmp_path / "recorded/version_0" / verb / "axis"
    assert_is_table_of(tracker, model, tracker.folder, 0, 0)
    assert tracker.correlations["step"].unique().tolist() == [0]
    assert float(fitter.callback_metrics["axis/rho"]) == pytest.approx(rhos(tracker)[0])
    assert logger.of() == []
    assert model.net.training
    (run,) = read_runs([tracker.folder.parent]).each
    assert run.about["weights"] == "those evaluated"


def test_images_that_a_test_is_given_are_the_probe_only_where_there_is_no_other(tmp_path):
    other = images(30, 5)
    for name, probe in {"own": other, "test": None}.items():
        tracker, model = AxisTracker(probe=probe), build()
        trainer(tmp_path / name, tracker).test(model, DataLoader(images(24, 3), batch_size=8), verbose=False)
        assert_is_table_of(tracker, model, tracker.folder, 0, 0, probe or images(24, 3))
    tracker, model = AxisTracker(), build()
    fitter = trainer(tmp_path / "trained", tracker, max_epochs=1)
    fitter.fit(model, **loaders())
    fitter.test(model, DataLoader(images(24, 3), batch_size=8), verbose=False)
    assert_is_table_of(tracker, model, tmp_path / "trained/test/axis", 1, STEPS)


def test_evaluating_after_training_leaves_its_tables_as_they_are(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1)
    tracker, model = AxisTracker(), build()
    fitter = trainer(tmp_path, tracker, saver)
    fitter.fit(model, **loaders())
    folder, before, rho = tracker.folder, read_run(tracker.folder), rhos(tracker)
    fitter.validate(model, loaders()["val_dataloaders"], verbose=False)
    assert_is_table_of(tracker, model, tmp_path / "validate/axis", 2, 2 * STEPS)
    saved = tmp_path / "saved" / f"step={STEPS}.ckpt"
    fitter.test(model, loaders()["val_dataloaders"], verbose=False, ckpt_path=saved, weights_only=True)
    assert_is_table_of(tracker, model, tmp_path / "test/axis", 1, STEPS)
    assert (tracker.folder, rhos(tracker)) == (folder, rho)
    pd.testing.assert_frame_equal(read_run(folder), before)
    assert [run.steps for run in read_runs([tmp_path]).each] == [[0, STEPS, 2 * STEPS]]
    fitter.fit_loop.max_epochs = 3
    fitter.fit(model, **loaders())
    assert measured(folder) == [(0, 0), (1, 4), (2, 8), (3, 12)]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("with_tracker", [True, False])
def test_a_checkpoint_that_is_evaluated_has_its_own_step(tmp_path, with_tracker):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer(tmp_path, saver, *([AxisTracker()] if with_tracker else [])).fit(build(), **loaders())
    tracker, model = AxisTracker(), build(dropout=0.0)
    fitter = trainer(tmp_path / "new", tracker)
    fitter.validate(model, loaders()["val_dataloaders"], tmp_path / "saved/last.ckpt", verbose=False, weights_only=True)
    assert_is_table_of(tracker, model, tracker.folder, 2 if with_tracker else 1, 2 * STEPS)


def test_evaluating_does_not_change_what_is_evaluated(tmp_path):
    def evaluated(*callbacks):
        torch.manual_seed(3)
        model = build()
        (found,) = trainer(tmp_path, *callbacks).validate(model, loaders()["val_dataloaders"], verbose=False)
        return found, torch.get_rng_state(), [p.detach() for p in model.state_dict().values()]

    bare, tracked = evaluated(), evaluated(AxisTracker(Augmented(), alignment=True))
    assert bare[0] == tracked[0]
    assert torch.equal(bare[1], tracked[1])
    assert all(torch.equal(a, b) for a, b in zip(bare[2], tracked[2], strict=True))


# --- tuning, training twice -----------------------------------------------------------------------------------------


class Tuned(Small):
    """Has a learning rate and a batch size to tune."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.lr, self.batch_size = 0.01, 8

    def train_dataloader(self):
        return DataLoader(images(8 * STEPS, 1), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(images(), batch_size=16)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def tune_rate(fitter, model):
    Tuner(fitter).lr_find(model, num_training=6, min_lr=1e-4, max_lr=1e-2, early_stop_threshold=None)


def tune_batch(fitter, model):
    Tuner(fitter).scale_batch_size(model, max_trials=2, steps_per_trial=2, init_val=4)


def tune_neither(fitter, model):
    pass


TUNERS = {
    "lr_find": (tune_rate, []),
    "scale_batch_size": (tune_batch, []),
    "both": (lambda *args: (tune_batch(*args), tune_rate(*args)), []),
    "LearningRateFinder": (tune_neither, [lambda: LearningRateFinder(1e-4, 1e-2, 6, early_stop_threshold=None)]),
    "BatchSizeFinder": (tune_neither, [lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=4)]),
}


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("case", TUNERS)
def test_tuning_leaves_no_table_and_the_same_training(tmp_path, case):
    tune, callbacks = TUNERS[case]

    def run(root, *more):
        torch.manual_seed(0)
        model = Tuned()
        fitter = trainer(root, *(make() for make in callbacks), *more, logger=CSVLogger(root, name="run"))
        tune(fitter, model)
        assert not list(root.rglob("*.parquet"))
        fitter.fit(model)
        return model, fitter

    bare, _ = run(tmp_path / "bare")
    tracker = AxisTracker()
    model, fitter = run(tmp_path / "tracked", tracker)
    assert all(torch.equal(a, b) for a, b in zip(bare.state_dict().values(), model.state_dict().values(), strict=True))
    assert (model.lr, model.batch_size) == (bare.lr, bare.batch_size)
    batches = 8 * STEPS // model.batch_size
    assert fitter.global_step == 2 * batches
    assert measured(tracker.folder) == [(0, 0), (1, batches), (2, 2 * batches)]
    assert [path.parent for path in (tmp_path / "tracked").rglob("step-*.parquet")] == 3 * [tracker.folder]
    rows = pd.read_csv(fitter.logger.log_dir + "/metrics.csv").dropna(subset="axis/rho")
    assert rows["step"].tolist() == [0, batches, 2 * batches]


def test_a_learning_rate_found_anew_in_every_epoch_costs_no_table(tmp_path):
    class EachEpoch(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            self.lr_find(trainer, pl_module)

    tracker = AxisTracker()
    fitter = trainer(tmp_path, tracker, EachEpoch(1e-4, 1e-2, 3, early_stop_threshold=None))
    fitter.fit(Tuned())
    found = measured(tracker.folder)
    assert found[0] == (0, 0)
    assert len(found) == 3
    assert found == tracker._history.checkpoints


def test_folds_of_one_logger_have_a_table_each(tmp_path):
    logger, data = CSVLogger(tmp_path, name="run"), images(48, 1)
    folds = torch.arange(48).chunk(3)
    trackers = []
    for number, fold in enumerate(folds):
        rest = torch.cat([other for place, other in enumerate(folds) if place != number])
        tracker = AxisTracker()
        trainer(tmp_path, tracker, logger=logger, max_epochs=1).fit(
            build(), DataLoader(Subset(data, rest.tolist()), 8), DataLoader(Subset(data, fold.tolist()), 8)
        )
        trackers.append(tracker)
    assert [tracker.folder.name for tracker in trackers] == ["axis", "axis-1", "axis-2"]
    assert [measured(tracker.folder) for tracker in trackers] == 3 * [[(0, 0), (1, 4)]]
    again = trainer(tmp_path, trackers[0], logger=logger, max_epochs=1)
    again.fit(build(), **loaders())
    assert (trackers[0].folder.name, measured(trackers[0].folder)) == ("axis-3", [(0, 0), (1, 4)])


# --- flags of the Trainer -------------------------------------------------------------------------------------------

FLAGS = {
    "overfit_batches": ({"overfit_batches": 2}, [(0, 0), (1, 2), (2, 4)]),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 3}, [(0, 0), (1, 2), (2, 4)]),
    "validation in mid-epoch": ({"val_check_interval": 0.5}, [(0, 0), (1, 4), (2, 8)]),
    "validation over epochs": (
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        [(0, 0), (1, 4), (2, 8)],
    ),
    "steps": ({"max_epochs": -1, "max_steps": 6}, [(0, 0), (1, 4)]),
    "reloaded": ({"reload_dataloaders_every_n_epochs": 1}, [(0, 0), (1, 4), (2, 8)]),
}


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
@pytest.mark.parametrize("case", FLAGS)
def test_flags_of_the_trainer_change_neither_table_nor_training(tmp_path, case):
    settings, expected = FLAGS[case]
    tracker = AxisTracker()
    bare, tracked = trained(tmp_path / "0", **settings), trained(tmp_path / "1", tracker, **settings)
    assert differences(bare, tracked) == []
    assert measured(tracker.folder) == expected


def test_a_barebones_trainer_is_tracked(tmp_path):
    def run(*callbacks):
        torch.manual_seed(0)
        model = build()
        fitter = L.Trainer(barebones=True, callbacks=list(callbacks), default_root_dir=tmp_path, max_epochs=2)
        fitter.fit(model, **loaders())
        return model, fitter

    tracker = AxisTracker()
    with pytest.warns(UserWarning, match="barebones"):
        (bare, _), (model, fitter) = run(), run(tracker)
    assert all(torch.equal(a, b) for a, b in zip(bare.state_dict().values(), model.state_dict().values(), strict=True))
    assert measured(tracker.folder) == [(0, 0), (1, 4), (2, 8)]
    assert float(fitter.callback_metrics["axis/rho"]) == pytest.approx(rhos(tracker)[-1])


@pytest.mark.parametrize("flags", [{}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_both_monitors_see_a_correlation_whenever_they_look(tmp_path, flags, at_epoch_end):
    def monitors(root):
        stop = EarlyStopping("axis/rho", patience=20, mode="max", check_on_train_epoch_end=at_epoch_end)
        best = ModelCheckpoint(
            root / "best", monitor="axis/rho", mode="max", save_on_train_epoch_end=at_epoch_end, save_top_k=-1
        )
        return stop, best

    settings = {"max_epochs": 3, **flags}
    stop, best = monitors(tmp_path)
    tracker = AxisTracker()
    tracked = trained(tmp_path / "1", tracker, stop, best, **settings)
    assert differences(trained(tmp_path / "0", **settings), tracked) == []
    assert float(stop.best_score) == pytest.approx(max(rhos(tracker)[0 if flags.get("val_check_interval") else 1 :]))
    assert float(best.best_model_score) == pytest.approx(float(stop.best_score))


class TestImagesAlone(L.LightningDataModule):
    """As on a machine without the training images."""

    __test__ = False

    def setup(self, stage: str) -> None:
        if stage == "fit":
            raise FileNotFoundError("train.h5 is not here")
        self.held = images(30, 5)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.trained, batch_size=16)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.held, batch_size=16)


def test_where_training_images_are_missing_a_test_is_probed_with_its_own(tmp_path):
    tracker, model = AxisTracker(), build()
    trainer(tmp_path, tracker).test(model, datamodule=TestImagesAlone(), verbose=False)
    pd.testing.assert_frame_equal(tracker.table.drop(columns=KEYS), compute_axes(model, images(30, 5)).table)


def test_a_test_without_labels_is_not_measured_and_goes_on(tmp_path):
    class Unlabelled(Small):
        def test_step(self, batch, batch_idx):
            self(batch)

    tracker = AxisTracker()
    with pytest.warns(UserWarning, match="AxisTracker: the tested network is not measured: outputs: .*labels: nothing"):
        trainer(tmp_path, tracker).test(
            Unlabelled(), DataLoader([image for image, _ in images()], batch_size=16), verbose=False
        )
    with pytest.raises(ValueError, match=r"AxisTracker: outputs: .*labels: nothing"):  # what was asked for is
        trainer(tmp_path, AxisTracker(probe=[torch.randn(8, 3, 8, 8)])).test(
            build(), DataLoader(images(), batch_size=16), verbose=False
        )
