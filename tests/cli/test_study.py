"""``make study``: a real make, killed in the middle of a training, goes on and repeats nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chanaxes_pl.analysis.runs import read_runs
from tests.cli.test_configs import write_dataset
from tests.helpers.killing import kill_once_there

ROOT = Path(__file__).parents[2]
EPOCHS = 8
FIT = (
    f"--trainer.max_epochs {EPOCHS} --trainer.limit_train_batches 2 --trainer.log_every_n_steps 1 "
    "--data.batch_size 16 --trainer.precision 32-true --trainer.callbacks.init_args.probe_size 40"
)
STEPS = ["fit", "test", "lesion", "protocol", "compensation", "selection", "polish"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(study: Path, *arguments: str) -> list[str]:
    """The command, of this tree and this interpreter, with one network and one seed of it."""
    variables = {"STUDY": study, "STUDY_DATA": study.parent / "images", "STUDY_FIT": FIT, "STUDY_CACHE": ""}
    variables |= {"STUDY_NETWORKS": "resnet18", "STUDY_SEEDS": "0", "STUDY_EXTRA": "", "TOY": "1"}
    variables |= {"BIN": Path(sys.executable).parent, "STUDY_TABLES": study / "tables"}
    given = [f"{name}={value}" for name, value in variables.items()]
    return ["make", "-C", str(ROOT), "--old-file", ".venv/.ready", *given, *arguments]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


def call(study: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(make(study, *arguments), env=environment(), capture_output=True, text=True, timeout=300)


def test_a_killed_training_goes_on_and_what_is_done_stays(tmp_path):
    write_dataset("cifar100", tmp_path / "images")
    study = tmp_path / "study"
    run = study / "resnet18" / "seed_0"
    kill_once_there(make(study, str(run / "test.done")), run / "checkpoints" / "last.ckpt", environment())
    reached = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < 2 * EPOCHS
    assert not (run / "fit.done").exists()
    first = (run / "axis" / "step-000000000.parquet").stat()

    again = call(study, str(run / "test.done"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Restored all states from the checkpoint" in (study / "logs" / "resnet18-seed_0-fit.log").read_text()
    assert (run / "axis" / "step-000000000.parquet").stat().st_mtime_ns == first.st_mtime_ns
    runs = read_runs([run])
    assert runs.steps == [0, 1, *range(2, 2 * EPOCHS + 1, 2)]
    logged = runs.each[0].scalars
    # Lightning logs an epoch's means after its checkpoint: an epoch killed between the two has no row, never two.
    epochs = logged.dropna(subset=["train/loss"])["epoch"].tolist()
    assert epochs in (whole := list(range(EPOCHS)), [epoch for epoch in whole if epoch != reached // 2 - 1])
    assert logged["test/top1"].notna().sum() == 1

    third = call(study, str(run / "test.done"))
    assert third.returncode == 0
    assert "is up to date" in third.stdout


def test_a_training_without_a_checkpoint_is_begun_anew_and_each_step_has_its_command(tmp_path):
    study = tmp_path / "study"
    planned = call(study, "--dry-run", "study-steps")
    assert planned.returncode == 0, planned.stderr
    run = study / "resnet18" / "seed_0"
    assert f"test -f {run}/checkpoints/last.ckpt || rm -rf {run}" in planned.stdout
    for step, verb in zip(STEPS, ["fit", "test", "lesion", *["prune"] * 4], strict=True):
        assert f"touch {run}/{step}.done" in planned.stdout
        assert f"chanaxes {verb} --config configs/study/resnet18.yaml --run {run}" in planned.stdout
    assert f"chanaxes report {run} --out {study}/resnet18/report" in planned.stdout


def test_one_network_has_its_tables_before_the_next_is_trained(tmp_path):
    study = tmp_path / "study"
    planned = call(study, "--dry-run", "study-networks", "STUDY_NETWORKS=vgg16_bn resnet18")
    assert planned.returncode == 0, planned.stderr
    steps = [f"touch {study}/{name}.done" for name in ("vgg16_bn/seed_0/fit", "vgg16_bn/tables", "resnet18/seed_0/fit")]
    places = [planned.stdout.index(step) for step in steps]
    assert places == sorted(places)


def test_nothing_is_left_to_do_once_every_step_is_done(tmp_path):
    study = tmp_path / "study"
    run = study / "resnet18" / "seed_0"
    run.mkdir(parents=True)
    for step in [*STEPS, "../tables"]:
        assert call(study, "--question", "study-steps").returncode == 1
        (run / f"{step}.done").touch()
    assert "chanaxes" not in call(study, "--dry-run", "study-steps").stdout
    shutil.rmtree(run)
    assert "chanaxes fit" in call(study, "--dry-run", "study-steps").stdout
