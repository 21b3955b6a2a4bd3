"""Every config, through the real command: two steps of training on synthetic images, and what they leave behind."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
import yaml
from PIL import Image

from chanaxes_pl import read_run
from chanaxes_pl.cli import main as cli
from tests.helpers.training import FLAGS

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
SMALL = FLAGS | {"trainer.max_steps": 2, "trainer.callbacks.init_args.probe_size": 24, "model.width": 0.25}
DATA = {  # flags that each data set needs beside those
    "cifar10": {"data.val_size": 0.5},
    "cifar100": {"data.val_size": 0.5},
    "tiny_imagenet": {"data.val_size": 0.5},
    "imagenet100": {"data.val_size": 0.5, "data.num_workers": 0, "data.image_size": 64},
    "digits": {},
    "study": {},  # train on all their images
}
IMAGES = {"CIFAR100DataModule": "cifar100", "TinyImageNetDataModule": "tiny_imagenet"}  # of a study's config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


@pytest.fixture
def wandb_offline(monkeypatch):
    """WandbLogger writes WANDB_MODE into the environment: put it back, and end the run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()
    wandb.teardown()


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def write_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for index in range(count):
        Image.fromarray(pixels[index]).save(folder / f"{index}.png")


def write_dataset(dataset: str, root: Path) -> None:
    """Two training images and one test image a class, laid out as the data module expects."""
    if dataset == "tiny_imagenet":
        names = [f"n{index:08}" for index in range(20)]
        for name in names:
            write_images(root / "train" / name / "images", 2, 64)
        write_images(root / "val" / "images", 20, 64)
        lines = [f"{index}.png\t{name}\t0\t0\t63\t63\n" for index, name in enumerate(names)]
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
        (root / "wnids.txt").write_text("\n".join(names))
    elif dataset != "digits":
        classes = 10 if dataset == "cifar10" else 100
        side, test = (72, "val") if dataset == "imagenet100" else (32, "test")
        for index in range(classes):
            write_images(root / "train" / f"class{index:03}", 4 if classes == 10 else 2, side)
            write_images(root / test / f"class{index:03}", 1, side)


def chanaxes(monkeypatch, *arguments: str, **flags) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # raised by LightningCLI's own calls
    given = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr("sys.argv", ["chanaxes", *arguments, *given])
    cli.main()


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_leave_tables_checkpoints_and_logs(name, tmp_path, monkeypatch, wandb_offline):
    monkeypatch.chdir(tmp_path)
    dataset = name.split("/")[0]
    flags = SMALL | DATA[dataset]
    if dataset != "digits":
        module = load(name)["data"]["class_path"].split(".")[-1]
        write_dataset(IMAGES[module] if dataset == "study" else dataset, tmp_path / "images")
        flags["data.root"] = tmp_path / "images"
    validates = load(name)["data"]["init_args"].get("val_size") != 0
    if not validates:
        flags.pop("data.val_size", None)
        del flags["trainer.limit_val_batches"]
    chanaxes(monkeypatch, "fit", "--config", str(FOLDER / name), **flags)

    folder = tmp_path / load(name)["trainer"]["default_root_dir"]
    assert sorted(path.name for path in folder.iterdir()) == ["version_0", "wandb"]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    run = folder / "version_0"
    other = set() if dataset == "study" else {"best.ckpt" if validates else "epoch=00.ckpt"}
    checkpoints = {*other, "last.ckpt"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == checkpoints
    with (run / "metrics.csv").open() as file:
        logged = {key for row in csv.DictReader(file) for key, value in row.items() if value}
    assert {"train/loss", "train/top1"} < logged
    assert validates == ({"val/loss", "val/top1", "val/top5"} < logged)
    assert set(read_run(run / "axis")["step"]) >= {0, 2}
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "images"}  # no litter


@pytest.mark.parametrize("name", CONFIGS)
def test_begins_with_its_command_hardware_time_and_result(name):
    comment = [line for line in (FOLDER / name).read_text().split("\n\n")[0].splitlines() if line[0] == "#"]
    assert any(f"chanaxes fit --config configs/{name}" in line for line in comment)
    for word in ("# Hardware: ", "# Time:     ", "# Result:   "):
        assert any(line.startswith(word) for line in comment)


def test_each_config_has_a_run_folder_of_its_own_for_all_it_writes():
    folders = []
    for name in CONFIGS:
        trainer = load(name)["trainer"]
        folders.append(trainer["default_root_dir"])
        assert {logger["init_args"]["save_dir"] for logger in trainer["logger"]} == {folders[-1]}
    assert len(set(folders)) == len(CONFIGS)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("cifar") and "quarter" not in name])
def test_cifar_follows_the_papers_recipe(name):
    config = load(name)
    recipe = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
    assert recipe.items() <= config["model"]["init_args"].items()
    assert (config["trainer"]["max_epochs"], config["data"]["init_args"]["batch_size"]) == (200, 128)
    assert config["model"]["init_args"]["backbone"] == Path(name).stem


def test_last_is_the_last_epochs_checkpoint_also_where_it_was_not_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load("digits/resnet18.yaml")
    best = config["trainer"]["callbacks"][0]["init_args"]
    best |= {"monitor": "epoch", "mode": "min"}  # so that the first is the best
    Path("config.yaml").write_text(yaml.safe_dump(config))
    flags = SMALL | {"trainer.max_steps": -1, "trainer.max_epochs": 3, "trainer.logger": "false"}
    chanaxes(monkeypatch, "fit", "--config", "config.yaml", **flags | {"trainer.default_root_dir": "run"})
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in Path("run").rglob("*.ckpt")}
    assert steps == {"best": 2, "last": 6}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_interrupted_run_resumes_to_the_same_network_and_is_tested(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load("digits/resnet18.yaml")
    checkpoint, *_ = config["trainer"]["callbacks"]
    checkpoint["init_args"] |= {"filename": "{epoch}", "save_top_k": -1}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    flags = SMALL | {"trainer.max_steps": -1, "trainer.max_epochs": 3, "trainer.logger": "false"}

    def run(verb: str, folder: str, **more) -> None:
        arguments = flags | {"trainer.default_root_dir": folder} | more
        chanaxes(monkeypatch, verb, "--config", "config.yaml", **arguments)

    run("fit", "unbroken")
    run("fit", "resumed", ckpt_path="unbroken/checkpoints/epoch=0.ckpt", weights_only="true")
    unbroken, resumed = (
        torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True) for folder in ("unbroken", "resumed")
    )
    assert unbroken["global_step"] == resumed["global_step"] == 6
    for key, value in unbroken["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][key], value, rtol=0, atol=0, msg=key)

    capsys.readouterr()
    run("test", "resumed", ckpt_path="resumed/checkpoints/last.ckpt")  # in a folder that holds a config already
    assert "test/top1" in capsys.readouterr().out
    assert yaml.safe_load(Path("resumed/config.yaml").read_text())["ckpt_path"] == "resumed/checkpoints/last.ckpt"
