"""``--run FOLDER``: one folder for all that a run writes, and for what is done to its network."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import wandb
import yaml

from chanaxes_pl import read_run
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.cli import main as cli
from chanaxes_pl.report.sections import accuracy
from tests.helpers.training import FLAGS

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "resnet18.yaml"
SMALL = FLAGS | {"trainer.callbacks.init_args.probe_size": 32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # to the test's, where nothing is saved
]


@pytest.fixture
def chanaxes(monkeypatch, tmp_path):
    """Run the command, in a folder of its own."""
    for variable, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PL_GLOBAL_SEED": "0"}.items():
        monkeypatch.setenv(variable, value)  # written by WandbLogger and the command: monkeypatch puts them back
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # raised by LightningCLI's own calls
    monkeypatch.chdir(tmp_path)

    def run(verb: str, *arguments: str, config: Path = DIGITS, **flags) -> None:
        given = [f"--{name}={value}" for name, value in (SMALL | flags).items()]
        monkeypatch.setattr("sys.argv", ["chanaxes", verb, "--config", str(config), *given, *arguments])
        cli.main()
        wandb.finish()

    yield run
    wandb.finish()
    wandb.teardown()


def named(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_all_of_a_run_is_in_its_folder_and_every_verb_finds_its_network(chanaxes, tmp_path, capsys):
    run = Path("runs/digits/seed_3")
    chanaxes("fit", "--run", str(run), "--seed_everything=3", **{"trainer.max_epochs": 1})
    assert named(tmp_path) == {"runs"}
    assert named(run) == {"axis", "checkpoints", "config.yaml", "hparams.yaml", "metrics.csv", "wandb"}
    assert read_run(run / "axis")["run"].unique().tolist() == ["digits/seed_3"]

    chanaxes("test", "--run", str(run), **{"trainer.limit_test_batches": 2})
    assert {"metrics.csv", "config.yaml"} <= named(run / "test")
    assert pd.read_csv(run / "test" / "metrics.csv")["test/top1"].notna().sum() == 1
    assert yaml.safe_load((run / "test" / "config.yaml").read_text())["ckpt_path"] == str(run / "checkpoints/last.ckpt")
    (drawn, _) = accuracy(read_runs([run])).blocks
    tested = drawn.numbers[drawn.numbers["split"] == "test"]
    assert tested["epoch"].tolist() == [1]  # though the Trainer that tested it had run for none
    lesion = {"layers": "[network.conv1]", "channels": 3, "operations": "[zero]", "probe_size": 32, "scores": "[l1]"}
    chanaxes("lesion", "--run", str(run), **{"trainer.limit_test_batches": 2} | lesion)
    assert len(pd.read_parquet(run / "lesions.parquet")) == 3
    assert named(run) >= {"metrics.csv", "lesions.png"}  # what fit logged is still there

    chanaxes("lesion", "--run", str(run), **{"trainer.limit_test_batches": 2} | lesion | {"channels": 4})
    assert len(pd.read_parquet(run / "lesions.parquet")) == 4
    assert len(pd.read_parquet(run / "lesions-1.parquet")) == 3  # hours of work, perhaps
    with pytest.raises(SystemExit):
        chanaxes("test", "--run", str(run), "--data.batch_size=-1")
    assert read_runs([run]).each[0].scalars["test/top1"].notna().sum() == 1  # of the test before


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_an_interrupted_run_goes_on_in_its_folder_to_the_same_network(chanaxes, monkeypatch):
    class Killed(BaseException):
        pass

    def third_epoch(self):
        if self.current_epoch == 2:
            raise Killed

    config = yaml.safe_load(DIGITS.read_text())
    del config["trainer"]["callbacks"][0]  # of the best epoch
    Path("config.yaml").write_text(yaml.safe_dump(config))
    flags = {"trainer.max_epochs": 4, "config": Path("config.yaml")}
    chanaxes("fit", "--run", "unbroken/seed_0", **flags)
    with monkeypatch.context() as context:
        context.setattr("chanaxes_pl.models.Classifier.on_train_epoch_start", third_epoch, raising=False)
        with pytest.raises(Killed):
            chanaxes("fit", "--run", "broken/seed_0", **flags)
    wandb.finish()
    chanaxes("fit", "--run", "broken/seed_0", **flags)
    unbroken, resumed = (
        torch.load(f"{folder}/seed_0/checkpoints/last.ckpt", weights_only=True) for folder in ("unbroken", "broken")
    )
    assert unbroken["global_step"] == resumed["global_step"] == 8
    for key, value in unbroken["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][key], value, rtol=0, atol=0, msg=key)
    tables = [read_run(f"{folder}/seed_0/axis").drop(columns="run") for folder in ("unbroken", "broken")]
    pd.testing.assert_frame_equal(*tables)
    assert named(Path("broken/seed_0/checkpoints")) == {"last.ckpt"}
    assert (Path("broken/seed_0") / "metrics-1.csv").exists()


def test_a_checkpoint_that_was_cut_off_is_named_with_a_way_out(chanaxes, capsys):
    chanaxes("fit", "--run", "full", **{"trainer.max_epochs": 1})
    last = Path("full/checkpoints/last.ckpt")
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    (last.parent / "best.ckpt").write_bytes(whole)
    for verb in ("fit", "test"):
        with pytest.raises(SystemExit):
            chanaxes(verb, "--run", "full")
        told = f"error: {last}: not a whole checkpoint; it was cut off, or is of another kind; best.ckpt beside it can"
        assert told in capsys.readouterr().err


def test_settings_that_a_run_goes_on_without_are_named(chanaxes):
    chanaxes("fit", "--run", "first", **{"trainer.max_epochs": 1})
    with pytest.warns(
        UserWarning, match=r"fit goes on from .*last.ckpt with .* and not with lr=0.5 \(it has .*\); for"
    ):
        chanaxes("fit", "--run", "first", "--model.init_args.lr=0.5", **{"trainer.max_epochs": 1})


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("fit", ["--run", "cut"], "error: --run cut: a training there was interrupted before its first checkpoint"),
        (
            "test",
            ["--run", "cut"],
            "error: --run cut: no cut/checkpoints/last.ckpt; expected the folder of a training that saved one",
        ),
        ("prune", ["--run", "none"], "error: --run none: no none/checkpoints/last.ckpt"),
        ("fit", ["--run", "new", "--trainer.logger=true"], "expected a CSVLogger or TensorBoardLogger as the first"),
    ],
)
def test_errors_are_one_line(chanaxes, capsys, verb, arguments, message):
    table = Path("cut/axis/step-000000000.parquet")
    table.parent.mkdir(parents=True)
    table.touch()
    with pytest.raises(SystemExit) as exit:
        chanaxes(verb, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()
    shutil.rmtree("cut")


def test_without_loggers_the_folder_is_the_trainers(chanaxes):
    chanaxes("fit", "--run", "bare", **{"trainer.logger": "false", "trainer.max_epochs": 1})
    assert named(Path("bare")) == {"axis", "checkpoints", "config.yaml"}
