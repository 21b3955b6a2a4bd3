"""The verbs that run a Trainer: LightningCLI with this package's defaults and one more check.

Apart from ``main`` because importing LightningCLI takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import chanaxes_pl.data
import chanaxes_pl.tracking.tracker  # noqa: F401  so that --data DigitsDataModule and the like need no module names
from chanaxes_pl.analysis.text import describe_lesions, describe_pruning
from chanaxes_pl.lesions.damage_table import LesionExperiment
from chanaxes_pl.models.checkpoints import load_weights, read_checkpoint
from chanaxes_pl.prune_module import Experiment, PruneModule
from chanaxes_pl.pruning.grid import PruningExperiment
from chanaxes_pl.run_folder import RunFolder

# What `fabric run` tells its processes, and the Trainer argument that means the same.
FABRIC_RUN = {
    "LT_ACCELERATOR": "accelerator",
    "LT_STRATEGY": "strategy",
    "LT_DEVICES": "devices",
    "LT_NUM_NODES": "num_nodes",
    "LT_PRECISION": "precision",
}


class _Parser(LightningArgumentParser):
    """A parser whose errors are not preceded by fifty lines of usage."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the message that follows names the key at fault and points to ``--help``."""


class PruningTrainer(Trainer):
    """A Trainer with the verbs ``lesion`` and ``prune``, for checkpoints of the model that the config names."""

    def lesion(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        out: str | None = None,
        **options: Any,
    ) -> None:
        """Lesion the channels of a checkpoint one by one, and set the damage beside their axes.

        Args:
            model: the network of the checkpoint.
            datamodule: data whose test images are the evaluation data.
            ckpt_path: path of the checkpoint.
            weights_only: ignored, for configs that fit saved; checkpoints are never unpickled here.
            out: folder for lesions.parquet and lesions.png; default the checkpoint's run folder.
        """
        self._experiment("lesion", lambda: LesionExperiment(**options), model, datamodule, ckpt_path, out)

    def prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        out: str | None = None,
        lr: float = 0.01,
        **options: Any,
    ) -> None:
        """Prune a checkpoint by every score, under every allocation, to every budget, and evaluate the results.

        Args:
            model: the network of the checkpoint.
            datamodule: data whose test images are the evaluation data.
            ckpt_path: path of the checkpoint.
            weights_only: ignored, for configs that fit saved; checkpoints are never unpickled here.
            out: folder for pruning.parquet and pruning.png; default the checkpoint's run folder.
            lr: largest learning rate of fine-tuning.
        """
        self._experiment("prune", lambda: PruningExperiment(**options), model, datamodule, ckpt_path, out, lr)

    def _experiment(
        self,
        verb: str,
        make: Callable[[], Experiment],
        model: LightningModule,
        datamodule: LightningDataModule | None,
        ckpt_path: str | None,
        out: str | None,
        lr: float = 0.01,
    ) -> None:
        if ckpt_path is None:
            raise ValueError(f"chanaxes {verb} needs a trained network: add --ckpt_path RUN/checkpoints/last.ckpt")
        load_weights(model, ckpt_path)
        module = PruneModule(model, make(), out=out or RunFolder.of_checkpoint(ckpt_path).path, lr=lr)
        # The config's loggers and callbacks are those of a training run: they would begin another one.
        self.loggers = []
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # which Lightning does not declare
        callbacks[:] = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
        self.test(module, datamodule=datamodule)
        if self.is_global_zero:
            pruned = isinstance(module.experiment, PruningExperiment)
            stem, describe = ("pruning", describe_pruning) if pruned else ("lesions", describe_lesions)
            print(describe(module.table))
            print(f"table:  {module.folder / stem}.parquet\nfigure: {module.folder / stem}.png")


class TrainerCLI(LightningCLI):
    """``chanaxes fit | validate | test | lesion | prune``, parsed from ``sys.argv`` and run.

    The model is a :class:`Classifier` unless ``--model`` names another LightningModule; ``--data`` names a
    DataModule. Under ``fabric run`` that command's flags are the Trainer's defaults.

    Raises:
        SystemExit: with status 2 for arguments that do not parse.
        ValueError: for a launch of several processes that the Trainer does not know of: each would train its own
            model, side by side.
    """

    def __init__(self) -> None:
        launched = os.environ.get("LT_CLI_USED") == "1"
        super().__init__(
            LightningModule,
            subclass_mode_model=True,
            trainer_class=PruningTrainer,
            trainer_defaults={
                argument: os.environ[variable]
                for variable, argument in FABRIC_RUN.items()
                if launched and variable in os.environ
            },
            seed_everything_default=0,
            # each run has a folder of its own; one that asks for no logger may run again in the same
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are verbs, each with the arguments that the command line leaves out."""
        verbs = LightningCLI.subcommands()
        ours = {verb: {"model", "datamodule"} for verb in ("lesion", "prune")}
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")} | ours

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make ``--model.backbone`` and the like mean :class:`Classifier` where no class is named; add ``--run``."""
        parser.set_defaults({"model": {"class_path": "chanaxes_pl.models.Classifier"}})
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="folder of this run: fit writes all into it, and goes on there where it was interrupted; the other "
            "verbs take the network that was trained in it",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Find what ``--run`` names, and refuse a damaged checkpoint before Lightning takes the model's settings."""
        super().parse_arguments(parser, args)
        verb = self.config["subcommand"]
        if self.config[verb].run is not None:
            _enter(self.config[verb], verb)
        if verb in ("lesion", "prune") and self.config[verb].ckpt_path is not None:
            read_checkpoint(self.config[verb].ckpt_path)

    def after_instantiate_classes(self) -> None:
        """Stop early if more processes were launched than the Trainer knows of."""
        environment = TorchElasticEnvironment()
        if environment.detect() and environment.world_size() > self.trainer.world_size:
            _refuse(str(self.subcommand), environment.world_size(), self.trainer.world_size)
        run = self.config[str(self.subcommand)].run
        if run is not None and self.subcommand == "fit" and self.trainer.is_global_zero:
            RunFolder(Path(run)).keep_scalars()


def _enter(config: Any, verb: str) -> None:
    """Give a verb the folder that ``--run`` names, for all that it writes, and the network that is in it."""
    run = RunFolder(Path(config.run))
    folder, last = run.path, run.last_checkpoint
    if config.ckpt_path is None and last.is_file():
        config.ckpt_path = str(last)
    elif config.ckpt_path is None and verb != "fit":
        raise ValueError(f"--run {folder}: no {last}; expected the folder of a training that kept one")
    elif config.ckpt_path is None and run.trackers:
        raise ValueError(
            f"--run {folder}: a training there was interrupted before its first checkpoint, and cannot go on; remove "
            "the folder to begin again, or name another one"
        )
    if verb not in ("lesion", "prune"):  # which write beside the checkpoint, and keep no logger
        _log_into(folder if verb == "fit" else folder / verb, config.trainer, verb)


def _log_into(folder: Path, trainer: Any, verb: str) -> None:
    """Let the Trainer and its loggers have one folder; the first logger decides on that of checkpoints and tables."""
    trainer.default_root_dir = str(folder)
    if trainer.logger is False:
        return
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    classes = [str(getattr(logger, "class_path", logger)).rpartition(".")[2] for logger in loggers]
    if classes[0] not in ("CSVLogger", "TensorBoardLogger"):
        raise ValueError(
            f"--run {folder}: expected a CSVLogger or TensorBoardLogger as the first of the loggers, whose folder all "
            f"else goes to, or --trainer.logger false; chanaxes {verb} got {', '.join(classes)}"
        )
    for logger, name in zip(loggers, classes, strict=True):
        options = logger.init_args
        if name == "WandbLogger":
            options.save_dir, options.name = str(folder), "/".join(folder.parts[-2:])
        elif "version" in options:
            options.save_dir, options.name = str(folder.parent.parent), folder.parent.name
            options.version = folder.name


def _refuse(verb: str, launched: int, known: int) -> NoReturn:
    nodes = int(os.environ.get("LT_NUM_NODES", "1"))
    devices = launched // nodes
    raise ValueError(
        f"{launched} processes were launched, but the Trainer knows of {known}: each would run the "
        f"whole of `chanaxes {verb}` by itself.\n"
        f"Either add --trainer.strategy ddp --trainer.devices {devices} to this command, or let the Trainer "
        f"launch the processes: chanaxes {verb} … --trainer.strategy ddp --trainer.devices {devices}"
    )
