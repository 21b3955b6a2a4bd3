"""With a tracker or without one: the same training. Killed, resumed or on two processes: the same table."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl import AxisTracker, read_run
from tests.helpers.training import QUIET, STEPS, Small, build, images, loaders, trainer

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]
ROOT = Path(__file__).parents[2]


# --- non-invasive ---------------------------------------------------------------------------------------------------


class Flags(L.Callback):
    """Notes every module's train/eval flag after each batch, before any other callback of the end of a batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append({name: module.training for name, module in pl_module.named_modules()})


class DrawsANumber(L.Callback):
    def on_train_batch_end(self, *args):
        torch.rand(1)


class DrawsANumpyNumber(L.Callback):
    def on_train_batch_end(self, *args):
        np.random.rand()  # noqa: NPY002


class ForgetsTrainMode(L.Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.eval()


class ThawsBatchNorm(L.Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.frozen.training = True


def trained(root, *callbacks, dropout=0.3, backend=None, **settings) -> dict:
    """All that a training leaves behind."""
    L.seed_everything(7, verbose=False)
    model, flags = build(dropout=dropout, backend=backend), Flags()
    fitter = trainer(root, *callbacks, flags, **settings)
    fitter.fit(model, **loaders(shuffle=True))
    return {
        "weights and buffers": {k.replace("_orig_mod.", ""): v for k, v in model.state_dict().items()},
        "optimiser": fitter.optimizers[0].state_dict(),
        "losses": model.losses,
        "order": model.seen,
        "flags": flags.seen,
        "last flags": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "numpy position": np.random.get_state()[2],  # noqa: NPY002
        "python": random.getstate(),
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(first: dict, second: dict) -> list[str]:
    return [key for key in first if not same(first[key], second[key])]


CASES = {
    "float32": {},
    "mixed precision": {"precision": "bf16-mixed"},
    "accumulated gradients": {"accumulate_grad_batches": 2},
    "compiled": {"backend": "aot_eager", "dropout": 0.0},
    "compiled with dropout": {"backend": "eager"},
    "sanity checking": {"num_sanity_val_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_with_and_without_a_tracker(tmp_path, case):
    bare = trained(tmp_path / "bare", **CASES[case])
    tracker = AxisTracker(schedule="1 steps")
    tracked = trained(tmp_path / "tracked", tracker, **CASES[case])
    assert differences(bare, tracked) == []
    steps = 2 * STEPS // CASES[case].get("accumulate_grad_batches", 1)
    assert [step for _, step in tracker._history.checkpoints] == list(range(steps + 1))


class Augmented(torch.utils.data.Dataset):
    """Images that draw from every global stream."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        image, label = images()[index]
        return image + torch.rand(1) + np.random.rand() + random.random(), label  # noqa: NPY002


def test_a_probe_that_draws_random_numbers_draws_none_of_the_trainings(tmp_path):
    bare = trained(tmp_path / "bare")
    assert differences(bare, trained(tmp_path / "tracked", AxisTracker(Augmented(), schedule="1 steps"))) == []


def test_mixed_precision_does_change_the_training_that_is_compared(tmp_path):
    assert "losses" in differences(trained(tmp_path), trained(tmp_path, precision="bf16-mixed"))


@pytest.mark.parametrize(
    ("callback", "changed"),
    [
        (DrawsANumber, {"losses", "torch", "weights and buffers", "optimiser"}),
        (DrawsANumpyNumber, {"numpy position"}),
        (ForgetsTrainMode, {"losses", "flags"}),
        (ThawsBatchNorm, {"losses", "flags"}),
    ],
)
def test_a_callback_that_leaves_a_trace_is_found_out(tmp_path, callback, changed):
    assert changed <= set(differences(trained(tmp_path), trained(tmp_path, callback())))


def test_a_tracker_leaves_no_hook_and_no_flag_behind(tmp_path):
    model, tracker = build(), AxisTracker(probe=images())
    trainer(tmp_path, tracker).fit(model, loaders()["train_dataloaders"])
    assert not any(module._forward_hooks for module in model.modules())
    assert model.net.training
    assert not model.frozen.training
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- resume ---------------------------------------------------------------------------------------------------------


def fit(root, epochs=2, resume=None, tracker=None, **settings):
    """A training without chance, so that it can be resumed exactly; returns its tracker and its ModelCheckpoint."""
    tracker = tracker or AxisTracker()
    saver = ModelCheckpoint(dirpath=Path(root) / "saved", save_top_k=-1, every_n_epochs=1, filename="{step}")
    model = build(dropout=0.0)
    trainer(root, tracker, saver, max_epochs=epochs, **settings).fit(
        model, **loaders(), ckpt_path=resume, weights_only=True if resume else None
    )
    return tracker


def assert_same_run(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.drop(columns="run"), other.drop(columns="run"), rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    tracker = fit(tmp_path_factory.mktemp("straight"), epochs=4)
    return read_run(tracker.folder), tracker


def test_resumed_in_a_new_version_folder_is_the_same_table(tmp_path, straight):
    first = fit(tmp_path, logger=CSVLogger(tmp_path, name="run"))
    second = fit(tmp_path, 4, tmp_path / "saved" / f"step={2 * STEPS}.ckpt", logger=CSVLogger(tmp_path, name="run"))
    assert (first.folder.parent.name, second.folder.parent.name) == ("version_0", "version_1")
    table = read_run(second.folder)
    assert_same_run(table, straight[0])
    assert set(table["run"]) == {"run/version_0"}
    pd.testing.assert_frame_equal(
        second.correlations.drop(columns="run"), straight[1].correlations.drop(columns="run"), rtol=1e-6
    )


def test_resumed_in_the_same_folder_is_the_same_table(tmp_path, straight):
    first = fit(tmp_path)
    second = fit(tmp_path, 4, tmp_path / "saved" / f"step={2 * STEPS}.ckpt")
    assert second.folder == first.folder
    assert_same_run(read_run(second.folder), straight[0])


def test_tables_of_a_lost_timeline_are_set_aside(tmp_path, straight):
    fit(tmp_path, epochs=3)
    folder = fit(tmp_path, 4, tmp_path / "saved" / f"step={STEPS}.ckpt").folder
    assert_same_run(read_run(folder), straight[0])
    aside = sorted(path.name for path in (folder / "set-aside").iterdir())
    assert aside == [f"step-{step:09d}.parquet" for step in (2 * STEPS, 3 * STEPS)]


def test_resuming_never_mixes_in_the_tables_of_another_run(tmp_path, straight):
    other = fit(tmp_path, tracker=AxisTracker(positions=4))
    theirs = read_run(other.folder)
    fit(tmp_path)
    resumed = fit(tmp_path, 4, tmp_path / "saved" / f"step={2 * STEPS}-v1.ckpt")
    assert resumed.folder != other.folder
    assert_same_run(read_run(resumed.folder), straight[0])
    pd.testing.assert_frame_equal(read_run(other.folder), theirs)


def test_checkpoints_hold_tensors_and_builtins_only(tmp_path):
    fit(tmp_path)
    saved = torch.load(tmp_path / "saved" / f"step={2 * STEPS}.ckpt", weights_only=True)
    state = saved["callbacks"]["AxisTracker(axis)"]
    assert state["layers"] == {"net.0": 6, "net.4": 8}
    assert state["history"]["checkpoints"] == [[0.0, 0], [1.0, STEPS], [2.0, 2 * STEPS]]


def test_monitored_values_are_there_right_after_resuming(tmp_path):
    class Monitor(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.first = getattr(self, "first", None) or dict(trainer.callback_metrics)

    before, after = AxisTracker(schedule=2), Monitor()
    fit(tmp_path, tracker=before)
    fitter = trainer(tmp_path, AxisTracker(schedule=2), after, max_epochs=3)
    fitter.fit(build(dropout=0.0), **loaders(), ckpt_path=tmp_path / "saved" / f"step={2 * STEPS}.ckpt")
    rho = before.correlations.query("layer == 'network' and local == 'input_capture' and target == 'task_information'")
    assert float(after.first["axis/rho"]) == pytest.approx(rho["rho"].iloc[-1], nan_ok=False)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    fit(tmp_path)
    saved = tmp_path / "saved" / f"step={STEPS}.ckpt"
    with pytest.raises(ValueError, match=r"followed other layers .*2 before, 3 now.*: net\.9: new\. Resume with"):
        fit(tmp_path, 4, saved, tracker=AxisTracker(layers="conv+linear"))
    with pytest.raises(ValueError, match=r"net\.4: gone"):
        fit(tmp_path, 4, saved, tracker=AxisTracker(layers="net.0"))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    fit(tmp_path)
    path = tmp_path / "saved" / f"step={STEPS}.ckpt"
    saved = torch.load(path, weights_only=True)
    wide = Small(width=10)
    saved["state_dict"] = wide.state_dict()
    saved["optimizer_states"] = [wide.configure_optimizers().state_dict()]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"net\.4: 8 channels, now 10"):
        trainer(tmp_path, AxisTracker(), max_epochs=4).fit(wide, **loaders(), ckpt_path=path)


def test_a_cut_off_table_is_moved_away_and_training_goes_on(tmp_path):
    broken = fit(tmp_path).folder / f"step-{STEPS:09d}.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="not a whole Parquet file.*moved to .*set-aside.*, training goes on"):
        tracker = fit(tmp_path, 4, tmp_path / "saved" / f"step={2 * STEPS}.ckpt")
    assert (broken.parent / "set-aside" / broken.name).exists()
    assert read_run(tracker.folder)["step"].unique().tolist() == [0, 2 * STEPS, 3 * STEPS, 4 * STEPS]


def test_resuming_where_the_old_tables_are_gone_warns_of_the_gap(tmp_path):
    folder = fit(tmp_path).folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with pytest.warns(UserWarning, match="lacks step-000000000.*cannot give them: .* a gap of 3 checkpoints"):
        tracker = fit(tmp_path, 4, tmp_path / "saved" / f"step={2 * STEPS}.ckpt")
    assert read_run(tracker.folder)["step"].unique().tolist() == [3 * STEPS, 4 * STEPS]
    assert tracker.correlations["step"].unique().tolist() == [0, STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]
    assert (tracker.correlations["run"] == tmp_path.name).all()


# --- a killed process -----------------------------------------------------------------------------------------------

KILLED_STEPS = 12


def fit_alike_batches(root: Path, resume: Path | None = None, pause: float = 0.0) -> AxisTracker:
    """All batches alike, so that it does not matter which of them an epoch that is resumed midway sees again."""

    class Pause(L.Callback):
        def on_train_batch_end(self, *args):
            time.sleep(pause)

    batch = images(8, 1)[:]
    data = torch.utils.data.TensorDataset(*(torch.cat([part] * 6) for part in batch))
    tracker = AxisTracker(probe=images(), schedule="1 steps")
    saver = ModelCheckpoint(dirpath=root / "saved", save_last=True, every_n_train_steps=4)
    trainer(root, tracker, saver, Pause()).fit(
        build(dropout=0.0),
        torch.utils.data.DataLoader(data, batch_size=8),
        ckpt_path=resume,
        weights_only=True if resume else None,
    )
    return tracker


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_killed_training_resumes_to_the_table_of_an_uninterrupted_one(tmp_path):
    code = "import sys, pathlib; from tests.tracking.test_tracker_invariants import fit_alike_batches as fit; "
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code} fit(pathlib.Path(sys.argv[1]), pause=0.3)", tmp_path], cwd=ROOT
    )
    beyond = tmp_path / "axis" / "step-000000006.parquet"  # the checkpoint before it is that of step 4
    patience = time.monotonic() + 60
    while not beyond.exists():
        assert child.poll() is None, "the training ended by itself"
        assert time.monotonic() < patience
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    resumed = fit_alike_batches(tmp_path, tmp_path / "saved" / "last.ckpt")
    whole = fit_alike_batches(tmp_path / "whole")
    table = read_run(resumed.folder)
    assert table["step"].unique().tolist() == list(range(KILLED_STEPS + 1))
    assert_same_run(table, read_run(whole.folder))
    assert (resumed.folder / "set-aside" / beyond.name).exists()


# --- two processes --------------------------------------------------------------------------------------------------


class WritesWhatItHolds(L.Callback):
    """Forked processes return nothing: this is how they tell."""

    def __init__(self, tracker, folder):
        self.tracker, self.folder = tracker, folder

    def on_train_end(self, trainer, pl_module):
        rank = trainer.global_rank
        self.tracker.table.to_parquet(self.folder / f"rank-{rank}.parquet")
        told = {
            "writes": str(self.tracker.folder),
            "rho": float(trainer.callback_metrics["axis/rho"]),
            "pid": os.getpid(),
        }
        (self.folder / f"rank-{rank}.json").write_text(json.dumps(told))


class Stays(Small):
    """Learns nothing: AdamW makes a full step of a gradient that is only rounding, such as of a bias before a norm."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("count", [40, 101])
def test_one_process_and_two_give_the_same_table(tmp_path, count):
    """The probe is shared between the processes, evenly or not; training is none of the tracker's business here."""
    tables = {}
    for world, settings in {1: {}, 2: {"devices": 2, "strategy": "ddp_fork"}}.items():
        folder = tmp_path / str(world)
        folder.mkdir()
        tracker = AxisTracker(probe=images(count), alignment=True)
        told = WritesWhatItHolds(tracker, folder)
        torch.manual_seed(0)
        model = Stays(dropout=0.0)
        fitter = trainer(folder, tracker, told, max_epochs=1, limit_train_batches=1, **settings)
        fitter.fit(model, torch.utils.data.DataLoader(identical_images(), batch_size=8))
        tables[world] = read_run(folder / "axis")
    assert_same_run(tables[2], tables[1])
    assert tables[2]["step"].unique().tolist() == [0, 1]
    ranks = [json.loads((tmp_path / "2" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["pid"] != ranks[1]["pid"]
    assert [rank["writes"] == "None" for rank in ranks] == [False, True]
    assert ranks[0]["rho"] == ranks[1]["rho"]
    frames = [pd.read_parquet(tmp_path / "2" / f"rank-{rank}.parquet").drop(columns="run") for rank in (0, 1)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def identical_images():
    """32 copies of one image: every process sees the same batch, and one process the same as two."""
    pictures, labels = images(1, 1)[:]
    return torch.utils.data.TensorDataset(pictures.expand(32, -1, -1, -1), labels.expand(32))
