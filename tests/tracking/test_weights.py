"""Which weights are measured where callbacks average them, and what a reader of the tables is told of it."""

import copy
import json

import lightning.pytorch as L
import pandas as pd
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from chanaxes_pl import AxisTracker, compute_axes, read_run
from tests.helpers.training import QUIET, STEPS, Small, build, images, loaders, trainer
from tests.tracking.test_tracker import measured
from tests.tracking.test_tracker_invariants import differences, trained

averages = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # of Lightning 2.6
pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]


class Plain(Small):
    """Without BatchNorm: SWA then has no extra epoch, and leaves its averages without having validated them."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net = nn.Sequential(
            *(nn.Identity() if isinstance(m, nn.BatchNorm2d) else m for m in self.net),
        )


def ema(**settings):
    return averages.EMAWeightAveraging(decay=0.7, **settings)


def swa():
    return StochasticWeightAveraging(0.05, swa_epoch_start=1)


class EachEpoch(averages.WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


CASES = {
    "EMA": (ema, build, "averages of EMAWeightAveraging, as in validation"),
    "EMA from step 3 on": (lambda: ema(update_starting_at_step=3), build, "averages of EMAWeightAveraging, as in val"),
    "averages of epochs": (EachEpoch, build, "averages of EachEpoch, as in validation"),
    "SWA": (swa, build, "training, at the end averages of StochasticWeightAveraging"),
    "SWA without BatchNorm": (swa, Plain, "training, at the end averages of StochasticWeightAveraging"),
    "none": (None, build, "training"),
}


def fitted(root, make, model, *more, first=False, **settings):
    tracker = AxisTracker()
    callbacks = [tracker, make()] if first else [make(), tracker]
    trainer(root, *callbacks, *more, **settings).fit(model, **loaders())
    return tracker


def table(axes_or_tracker) -> pd.DataFrame:
    return axes_or_tracker.table.drop(columns=["run", "epoch", "step"], errors="ignore")


@pytest.mark.parametrize("first", [True, False], ids=["tracker first", "tracker last"])
@pytest.mark.parametrize("case", CASES)
def test_the_last_table_is_that_of_the_network_one_gets(tmp_path, case, first):
    make, network, weights = CASES[case]
    model = network()
    tracker = fitted(tmp_path, make or L.Callback, model, first=first, max_epochs=3)
    pd.testing.assert_frame_equal(table(tracker), compute_axes(model, images()).table)
    whole = read_run(tracker.folder)
    last = whole[whole["step"] == whole["step"].max()].reset_index(drop=True)
    pd.testing.assert_frame_equal(last, tracker.table)
    assert json.loads((tracker.folder / "about.json").read_text())["weights"].startswith(weights)
    assert [step for _, step in measured_steps(tracker)][:4] == [0, STEPS, 2 * STEPS, 3 * STEPS]
    assert tracker.correlations.groupby("step")["layer"].count().nunique() == 1


def measured_steps(tracker) -> list[tuple[float, int]]:
    found = tracker.correlations[["epoch", "step"]].drop_duplicates()
    assert found["step"].is_unique
    return list(found.itertuples(index=False, name=None))


@pytest.mark.parametrize("first", [True, False], ids=["tracker first", "tracker last"])
def test_tables_are_of_the_weights_that_validation_sees(tmp_path, first):
    seen = {}

    class Copies(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            seen[trainer.global_step] = copy.deepcopy(pl_module.net)

    tracker = fitted(tmp_path, ema, build(), Copies(), first=first)
    whole = read_run(tracker.folder)
    for step, net in seen.items():
        here = whole[whole["step"] == step].drop(columns=["run", "epoch", "step"]).reset_index(drop=True)
        expected = compute_axes(net, images()).table.assign(layer=lambda t: "net." + t["layer"])
        pd.testing.assert_frame_equal(here, expected)
    assert list(seen) == [STEPS, 2 * STEPS]


@pytest.mark.parametrize("make", [ema, EachEpoch, swa])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_averaged_training_is_bit_identical_with_a_tracker(tmp_path, make):
    bare = trained(tmp_path / "bare", make())
    assert differences(bare, trained(tmp_path / "tracked", AxisTracker(schedule="1 steps"), make())) == []


def test_a_tracker_is_still_called_before_checkpoints_are_saved(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", monitor="axis/rho", save_top_k=-1, save_on_train_epoch_end=True)
    tracker, fitter_model = AxisTracker(), build()
    fitter = trainer(tmp_path, tracker, saver, ema())
    fitter.fit(fitter_model, **loaders())
    kinds = [type(callback).__name__ for callback in fitter.callbacks]
    assert kinds.index("EMAWeightAveraging") < kinds.index("AxisTracker") < kinds.index("ModelCheckpoint")
    assert len(saver.best_k_models) == 2


def test_a_schedule_without_the_end_gains_the_averaged_network(tmp_path):
    tracker, model = AxisTracker(schedule=[1]), build()
    trainer(tmp_path, tracker, ema()).fit(model, **loaders())
    assert measured(tracker.folder) == [(0, 0), (0.25, 1), (2, 8)]
    pd.testing.assert_frame_equal(table(tracker), compute_axes(model, images()).table)
