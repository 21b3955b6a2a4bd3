"""``chanaxes prune`` and ``chanaxes lesion``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as L
import pandas as pd
import pytest
import torch
import wandb
import yaml
from torch.utils.data import DataLoader

from chanaxes_pl.cli import main as cli
from chanaxes_pl.models import Classifier
from tests.helpers.killing import kill_once_there
from tests.helpers.training import Small, images, trainer

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits" / "resnet18.yaml")
CONFIG = ["--config", DIGITS]
TINY = ["--probe_size=40", "--trainer.limit_test_batches=2", "--trainer.enable_progress_bar=false"]
PRUNE = [
    "--budgets=[0.6]",
    "--round_to=4",
    "--scores=[l1,random]",
    "--allocations=[uniform]",
    "--compensate=[false,fold]",
]
LESION = ["--layers=[network.conv1]", "--channels=3", "--operations=[zero,mean]"]

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")


@pytest.fixture
def chanaxes(monkeypatch, tmp_path):
    """Run the command, in a folder of its own."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # raised by LightningCLI's own calls
    for variable, value in {"WANDB_MODE": "offline", "PL_GLOBAL_SEED": "0"}.items():
        monkeypatch.setenv(variable, value)  # written by WandbLogger and the command: monkeypatch puts them back
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["chanaxes", *arguments, "--trainer.accelerator=cpu"])
        cli.main()

    yield run
    wandb.finish()
    wandb.teardown()


def save(folder: Path) -> str:
    """A checkpoint of an untrained Classifier of the digits' config."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier("resnet18", 10, width=0.25, channels_last=True)
    fitter: L.Trainer = trainer(folder)
    fitter.strategy.connect(classifier)
    fitter.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return str(folder / "checkpoints" / "last.ckpt")


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return save(tmp_path / "run")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_prune_writes_into_the_run_folder_and_nothing_else(chanaxes, checkpoint, tmp_path, capsys):
    chanaxes("prune", *CONFIG, *TINY, *PRUNE, "--ckpt_path", checkpoint)
    assert files(tmp_path) == ["run/checkpoints/last.ckpt", "run/pruning.parquet", "run/pruning.png"]
    table = pd.read_parquet(tmp_path / "run" / "pruning.parquet")
    assert table["score"].tolist() == ["dense", "l1", "l1", "random", "random"]
    assert table["compensate"].tolist() == ["", "none", "fold", "none", "fold"]
    assert table["macs_share"][1:].to_list() == pytest.approx([0.6] * 4, abs=0.03)
    told = capsys.readouterr().out
    assert f"table:  {tmp_path / 'run' / 'pruning.parquet'}" in told
    assert f"figure: {tmp_path / 'run' / 'pruning.png'}" in told


def test_a_killed_grid_goes_on_where_it_was(chanaxes, checkpoint, tmp_path):
    asked = ["prune", *CONFIG, *TINY, *PRUNE, "--ckpt_path", checkpoint]
    rows = tmp_path / "run" / "pruning-unfinished-0.parquet"
    command = [sys.executable, "-m", "chanaxes_pl", *asked, "--scores=[l1,l2,fpgm,lamp]", "--trainer.accelerator=cpu"]
    kill_once_there(command, rows, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert files(tmp_path / "run") == ["checkpoints/last.ckpt", "pruning-unfinished-0.parquet"]
    made = pd.read_parquet(rows).assign(margin=-7.0)  # to be known again
    made.to_parquet(rows)
    chanaxes(*asked)
    table = pd.read_parquet(tmp_path / "run" / "pruning.parquet")
    assert table["score"].tolist() == ["dense", "l1", "l1", "random", "random"]
    assert table["margin"].eq(-7.0).sum() == made["score"].isin(table["score"]).sum()
    assert files(tmp_path / "run") == ["checkpoints/last.ckpt", "pruning.parquet", "pruning.png"]


def test_lesion_writes_where_it_is_told(chanaxes, checkpoint, tmp_path):
    chanaxes("lesion", *CONFIG, *TINY, *LESION, "--ckpt_path", checkpoint, "--out=there")
    assert files(tmp_path) == ["run/checkpoints/last.ckpt", "there/lesions.parquet", "there/lesions.png"]
    table = pd.read_parquet(tmp_path / "there" / "lesions.parquet")
    assert table["layer"].tolist() == ["network.conv1"] * 3
    assert {"zero_loss", "mean_loss", "input_capture"} <= set(table)


def test_few_lesions_are_described_without_correlations(chanaxes, checkpoint, tmp_path, capsys):
    chanaxes("lesion", *CONFIG, *TINY, *LESION, "--ckpt_path", checkpoint, "--out=there")
    capsys.readouterr()
    few = ["--layers=[network.conv1]", "--channels=2", "--operations=[zero]"]
    with pytest.warns(UserWarning, match="is written, without a figure .* lesion more channels a layer"):
        chanaxes("lesion", *CONFIG, *TINY, *few, "--ckpt_path", checkpoint, "--out=there")
    told = capsys.readouterr().out
    assert "2 lesioned channels; mean change of cross-entropy in nats: removed" in told
    assert "no correlations with the axes: no layer has 3 channels for which zero_loss are defined" in told
    assert "table:  there/lesions.parquet" in told
    assert "figure" not in told
    assert not (tmp_path / "there" / "lesions.png").exists()  # the earlier one is of other lesions


class Own(Small):
    """A module whose checkpoints hold settings and do not name its class: those of a Trainer without the command."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(0.0, width=width)
        self.save_hyperparameters()


class OwnData(L.LightningDataModule):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(), 8)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(images(16, 1), 8)


class Named:
    class Classifier(Own):
        """Has the name of the package's own class, and nothing else of it."""


@pytest.mark.parametrize("name", ["Own", "Named.Classifier"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_module_of_ones_own_that_was_trained_without_the_command_is_lesioned(chanaxes, tmp_path, capsys, name):
    fitter: L.Trainer = trainer(tmp_path)
    fitter.strategy.connect(Own(width=12))
    fitter.save_checkpoint(tmp_path / "own.ckpt")
    own = [f"--model={__name__}.{name}", "--model.width=12", f"--data={__name__}.OwnData"]
    chanaxes("lesion", *own, *TINY, "--channels=3", "--operations=[zero]", "--ckpt_path=own.ckpt", "--out=there")
    assert pd.read_parquet("there/lesions.parquet")["layer"].unique().tolist() == ["net.0", "net.4"]
    assert "lesioned channels" in capsys.readouterr().out


def refused(chanaxes, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        chanaxes(*arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("verb", ["prune", "lesion"])
def test_errors_are_one_line(chanaxes, checkpoint, tmp_path, capsys, verb):
    before = files(tmp_path)
    command = [verb, *CONFIG, *TINY]
    # Without settings: those of a Classifier's checkpoint would take the place of the config's.
    torch.save({"state_dict": Classifier("resnet18", 10, width=0.125).state_dict()}, "narrow.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(Path(checkpoint).read_bytes()[:9000])
    cases = {
        (): f"error: chanaxes {verb} needs a trained network: add --ckpt_path RUN/checkpoints/last.ckpt",
        ("--ckpt_path=gone.ckpt",): "error: gone.ckpt: no such checkpoint",
        ("--ckpt_path=narrow.ckpt",): "a checkpoint of another network than this Classifier",
        ("--ckpt_path=cut.ckpt",): "error: cut.ckpt: not a checkpoint of tensors",
    }
    if verb == "prune":
        cases[f"--ckpt_path={checkpoint}", "--scores=[l3]"] = "(score='l3'): no such score"
        cases[f"--ckpt_path={checkpoint}", "--budgets=[1.5]"] = "(budget=1.5): expected the share"
        cases[f"--ckpt_path={checkpoint}", "--round_to=0"] = "(round_to=0): expected a whole number"
        cases[f"--ckpt_path={checkpoint}", "--budget_of=flops"] = "flops"
    else:
        cases[f"--ckpt_path={checkpoint}", "--operations=[zeor]"] = "zeor"
    for flags, message in cases.items():
        error = refused(chanaxes, capsys, *command, *flags)
        assert message in error
        assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    assert set(files(tmp_path)) - set(before) == {"cut.ckpt", "narrow.ckpt"}


def test_unknown_flag_gets_a_short_error(chanaxes, capsys):
    error = refused(chanaxes, capsys, "prune", *CONFIG, "--skores=[l1]")
    assert "skores" in error
    assert len(error.splitlines()) < 15


@pytest.mark.parametrize("flag", ["--scores=l1", "--budgets=0.5"])
def test_one_value_for_a_list_is_told_how_a_list_is_written(chanaxes, capsys, flag):
    error = refused(chanaxes, capsys, "prune", *CONFIG, flag)
    assert flag[2:].split("=")[0] in error
    assert "a list is written in brackets, even a list of one: '[0.5]'" in error


@pytest.mark.parametrize("verb", ["prune", "lesion"])
def test_print_config(chanaxes, capsys, verb):
    with pytest.raises(SystemExit) as exit:
        chanaxes(verb, *CONFIG, "--probe_size=77", "--print_config")
    assert not exit.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["probe_size"] == 77
    assert config["model"]["init_args"]["backbone"] == "resnet18"
    assert {"prune": "budgets", "lesion": "operations"}[verb] in config


def test_a_run_of_fit_is_pruned_with_its_own_config(chanaxes, tmp_path):
    quick = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.callbacks.probe_size=32", "--data.batch_size=8"]
    chanaxes("fit", *CONFIG, *quick, *quiet, "--trainer.log_every_n_steps=1")
    (saved,) = tmp_path.rglob("config.yaml")
    (last,) = tmp_path.rglob("last.ckpt")
    before = files(tmp_path)
    chanaxes("prune", "--config", str(saved), *TINY, *PRUNE, "--ckpt_path", str(last))
    folder = last.parent.parent.relative_to(tmp_path)
    assert set(files(tmp_path)) - set(before) == {f"{folder}/pruning.parquet", f"{folder}/pruning.png"}
