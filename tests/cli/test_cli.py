"""The command: its verbs, its errors, and launches of several processes."""

import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from chanaxes_pl.cli import main as cli

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits" / "resnet18.yaml")
BORING = "lightning.pytorch.demos.boring_classes"

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")


@pytest.fixture
def chanaxes(monkeypatch, tmp_path):
    """Run the command, in a folder of its own."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # raised by LightningCLI's own calls
    monkeypatch.setenv("WANDB_MODE", "offline")  # written by WandbLogger: monkeypatch puts it back
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["chanaxes", *arguments])
        cli.main()

    return run


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_overview_lists_every_verb(chanaxes, capsys, arguments):
    chanaxes(*arguments)
    lines = capsys.readouterr().out.splitlines()
    for verb in [*cli.TRAINER_VERBS, *cli.VERBS]:
        assert sum(line.startswith(f"  {verb} ") for line in lines) == 1


def test_overview_does_not_wait_for_torch():
    code = "import sys; from chanaxes_pl.cli.main import main; main(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("verb", "nearest"), [("fti", "fit"), ("Validate", "validate"), ("tset", "test")])
def test_unknown_verb_gets_the_nearest(chanaxes, capsys, verb, nearest):
    with pytest.raises(SystemExit) as exit:
        chanaxes(verb)
    assert exit.value.code == 2
    assert f"error: unknown verb '{verb}'; did you mean '{nearest}'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_targets_exist(verb):
    module, function = cli.VERBS[verb].target.split(":")
    assert callable(getattr(import_module(module), function))


def test_quick_verbs_parse_their_functions_flags(chanaxes, monkeypatch, capsys, tmp_path):
    (tmp_path / "quick_verb.py").write_text("def shout(times: int, word: str = 'a'):\n    print(word * times)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "shout", cli.Verb("quick_verb:shout", "repeat a word"))
    chanaxes("shout", "3", "--word", "ho")
    assert capsys.readouterr().out == "hohoho\n"
    with pytest.raises(SystemExit):
        chanaxes("shout", "--help")
    assert "usage: chanaxes shout" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("out of range"), FileNotFoundError("no such folder")])
def test_errors_of_a_verb_are_one_message_and_status_2(chanaxes, monkeypatch, capsys, tmp_path, error):
    (tmp_path / f"failing_{type(error).__name__}.py").write_text(
        f"def fail():\n    raise {type(error).__name__}({str(error)!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "fail", cli.Verb(f"failing_{type(error).__name__}:fail", "fail"))
    with pytest.raises(SystemExit) as exit:
        chanaxes("fail")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def print_config(chanaxes, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        chanaxes("fit", *arguments, "--print_config")
    assert not exit.value.code
    return capsys.readouterr().out


def test_print_config_round_trip(chanaxes, capsys, tmp_path):
    printed = print_config(chanaxes, capsys, "--config", DIGITS, "--model.lr", "0.3")
    config = yaml.safe_load(printed)
    assert config["model"]["init_args"]["lr"] == 0.3
    assert config["model"]["init_args"]["backbone"] == "resnet18"
    (tmp_path / "printed.yaml").write_text(printed)
    assert print_config(chanaxes, capsys, "--config", "printed.yaml") == printed


def test_the_last_logger_and_callback_can_be_changed_by_flags(chanaxes, capsys):
    flags = ["--trainer.logger.offline=false", "--trainer.callbacks.schedule=log", "--data.batch_size=32"]
    config = yaml.safe_load(print_config(chanaxes, capsys, "--config", DIGITS, *flags))
    assert config["trainer"]["logger"][-1]["init_args"]["offline"] is False
    assert config["trainer"]["callbacks"][-1]["init_args"]["schedule"] == "log"
    assert config["data"]["init_args"]["batch_size"] == 32


def test_model_is_the_classifier_unless_named(chanaxes, capsys):
    flags = ["--model.backbone=vgg16_bn", "--model.num_classes=10", "--data=DigitsDataModule"]
    config = yaml.safe_load(print_config(chanaxes, capsys, *flags))
    assert config["model"]["class_path"] == "chanaxes_pl.models.Classifier"
    assert config["data"]["class_path"] == "chanaxes_pl.data.DigitsDataModule"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_any_module_and_datamodule_will_do(chanaxes, tmp_path):
    own = [f"--model={BORING}.BoringModel", f"--data={BORING}.BoringDataModule"]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    chanaxes("fit", *own, *quiet, "--trainer.max_steps=1")
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=0-step=1.ckpt"]


@pytest.mark.parametrize(
    ("flag", "quoted"), [("--model.widht=2", "'widht' is not accepted"), ("--trainer.max_epoks=2", "max_epoks=2")]
)
def test_misspelt_key_gets_a_short_error(chanaxes, capsys, flag, quoted):
    with pytest.raises(SystemExit) as exit:
        chanaxes("fit", "--config", DIGITS, flag)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert quoted in message
    assert len(message.splitlines()) < 15


def launch(monkeypatch, **variables: str) -> None:
    """Pretend to be the first of two processes that torchrun started."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**ranks, **variables}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("verb", "variables", "flags"),
    [
        ("fit", {}, []),  # torchrun
        ("validate", {}, []),
        ("fit", {"LT_CLI_USED": "1", "LT_DEVICES": "2"}, ["--trainer.devices=1"]),  # fabric run
    ],
)
def test_side_by_side_training_is_refused(chanaxes, monkeypatch, capsys, tmp_path, verb, variables, flags):
    launch(monkeypatch, **variables)
    with pytest.raises(SystemExit) as exit:
        chanaxes(verb, "--config", DIGITS, "--trainer.accelerator=cpu", *flags)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "2 processes were launched, but the Trainer knows of 1" in message
    assert "add --trainer.strategy ddp --trainer.devices 2" in message
    assert f"chanaxes {verb} … --trainer.strategy ddp --trainer.devices 2" in message
    assert not list(tmp_path.iterdir())


def test_fabric_runs_flags_are_the_trainers_defaults(chanaxes, monkeypatch, capsys):
    flags = {"ACCELERATOR": "cpu", "STRATEGY": "ddp", "DEVICES": "2", "NUM_NODES": "3", "PRECISION": "bf16-mixed"}
    for name, value in flags.items():
        monkeypatch.setenv(f"LT_{name}", value)

    def trainer(*arguments: str) -> dict:
        printed = yaml.safe_load(print_config(chanaxes, capsys, "--config", DIGITS, *arguments))["trainer"]
        return {name: str(printed[name.lower()]) for name in flags}

    assert trainer()["DEVICES"] == "auto"  # left over in the environment: not a launch
    monkeypatch.setenv("LT_CLI_USED", "1")
    assert trainer() == flags
    assert trainer("--trainer.devices=4") == flags | {"DEVICES": "4"}


def test_fabric_run_trains_one_model_on_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    launcher = [scripts / "fabric", "run", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    command = [scripts / "chanaxes", "fit", "--config", DIGITS, "--trainer.max_steps=2", "--data.batch_size=8"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.callbacks.probe_size=32"]
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "--main-port", str(port), "--", *command, *quiet],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MEMBER: 2/2" in done.stderr
    assert [path.name for path in tmp_path.rglob("version_*")] == ["version_0"]
    assert [path.name for path in tmp_path.rglob("last.ckpt")] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([], []),
        (["--text"], ["--text=true"]),
        (["--text", "--against", "l2"], ["--against", "l2", "--text=true"]),
        (["--text", "RUN"], ["RUN", "--text=true"]),
        (["A", "--text", "B"], ["A", "B", "--text=true"]),
        (["--text", "false", "--all_checkpoints"], ["--text", "false", "--all_checkpoints=true"]),
        (["--out", "--text=true"], ["--out", "--text=true"]),
    ],
)
def test_a_switch_needs_no_value(given, read):
    assert cli._switched(given) == read


def test_text_of_what_is_no_run_is_one_line(chanaxes, capsys, tmp_path):
    with pytest.raises(SystemExit):
        chanaxes("report", str(tmp_path / "none"), "--text")
    assert capsys.readouterr().err.startswith("error: ")
