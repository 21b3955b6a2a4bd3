"""The verbs that run a Trainer: LightningCLI with this package's defaults and one more check.

They are not in ``main`` because importing LightningCLI takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

import chanaxes_pl.data
import chanaxes_pl.tracking.tracker  # noqa: F401  so that --data DigitsDataModule and the like need no module names
from chanaxes_pl.analysis.text import describe_lesions, describe_pruning
from chanaxes_pl.lesions.damage_table import LesionExperiment
from chanaxes_pl.models.checkpoints import check_whole, load_weights, read_checkpoint
from chanaxes_pl.prune_module import Experiment, PruneModule
from chanaxes_pl.pruning.grid import PruningExperiment
from chanaxes_pl.run_folder import RunFolder

# Environment variable that `fabric run` sets → the Trainer argument with the same meaning.
FABRIC_RUN = {
    "LT_ACCELERATOR": "accelerator",
    "LT_STRATEGY": "strategy",
    "LT_DEVICES": "devices",
    "LT_NUM_NODES": "num_nodes",
    "LT_PRECISION": "precision",
}


class _Parser(LightningArgumentParser):
    """Parser that does not print fifty lines of usage before an error."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the error message names the key at fault and points to ``--help``."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add how a list is written, where something else was given for it: the parser's message does not say."""
        if "Expected a <class 'collections.abc.Sequence'>" in message:
            message += "\n  a list is written in brackets, even a list of one: '[0.5]', '[\"l1\",\"taylor\"]'"
        super().error(message, ex)


class PruningTrainer(Trainer):
    """Trainer with the verbs ``lesion`` and ``prune``, for checkpoints of the model that the config names."""

    def lesion(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        out: str | None = None,
        **options: Any,
    ) -> None:
        """Lesion the channels of a checkpoint one by one, and list the damage beside their axes.

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
        """Prune a checkpoint by every score, allocation and compensation to every budget, and measure the accuracy.

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
        # The config's loggers and callbacks belong to a training run; they would start a new one.
        self.loggers = []
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
        callbacks[:] = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
        self.test(module, datamodule=datamodule)
        if self.is_global_zero:
            pruned = isinstance(module.experiment, PruningExperiment)
            stem, describe = ("pruning", describe_pruning) if pruned else ("lesions", describe_lesions)
            print(describe(module.table))
            print(f"table:  {module.folder / stem}.parquet")
            if (module.folder / f"{stem}.png").exists():
                print(f"figure: {module.folder / stem}.png")


class TrainerCLI(LightningCLI):
    """Command line of ``chanaxes fit | validate | test | lesion | prune``, parsed from ``sys.argv`` and run.

    The model is a :class:`Classifier` unless ``--model`` names another LightningModule; ``--data`` names a
    DataModule. Under ``fabric run``, that command's flags are the Trainer's defaults.

    Raises:
        SystemExit: with status 2 if arguments cannot be parsed.
        ValueError: if several processes were launched and the Trainer knows of fewer: each would train a model of its
            own.
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
            # each run has its own folder; only runs without a logger may use the same one again
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods that are verbs, each with the arguments that the command line leaves out."""
        verbs = LightningCLI.subcommands()
        ours = {verb: {"model", "datamodule"} for verb in ("lesion", "prune")}
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")} | ours

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make :class:`Classifier` the default model, so ``--model.backbone`` needs no class, and add ``--run``."""
        parser.set_defaults({"model": {"class_path": "chanaxes_pl.models.Classifier"}})
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="folder of this run: fit writes everything into it, and continues there after an interruption; the "
            "other verbs use the network that was trained in it",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Resolve ``--run``, and check the checkpoint before Lightning takes the model's settings from it."""
        super().parse_arguments(parser, args)
        verb = self.config["subcommand"]
        if self.config[verb].run is not None:
            _enter(self.config[verb], verb)
        path = self.config[verb].ckpt_path
        if verb in ("lesion", "prune") and path is not None:
            read_checkpoint(path)
        elif path is not None and Path(path).is_file():  # not "best" or "last"
            check_whole(path)

    def _parse_ckpt_path(self) -> None:
        """Take settings from a checkpoint that names its class; those of another one would go to the default model."""
        config = self.config[self.config["subcommand"]]
        name = str(config.model.class_path)
        asked = _model_settings(config)
        ours = name in ("Classifier", "chanaxes_pl.models.Classifier", "chanaxes_pl.models.classifier.Classifier")
        if ours or config.ckpt_path is None or "_class_path" in (_settings(config.ckpt_path) or ()):
            super()._parse_ckpt_path()
        if self.config["subcommand"] == "fit" and config.ckpt_path is not None:
            _tell_ignored(asked, _model_settings(self.config["fit"]), config.ckpt_path)

    def after_instantiate_classes(self) -> None:
        """Raise ValueError if more processes were launched than the Trainer knows of."""
        environment = TorchElasticEnvironment()
        if environment.detect() and environment.world_size() > self.trainer.world_size:
            _refuse(str(self.subcommand), environment.world_size(), self.trainer.world_size)
        run = self.config[str(self.subcommand)].run
        if run is not None and self.trainer.is_global_zero:
            RunFolder(Path(run) if self.subcommand == "fit" else Path(run) / str(self.subcommand)).keep_scalars()


def _model_settings(config: Any) -> dict[str, Any]:
    return dict(config.model.as_dict().get("init_args") or {})


def _tell_ignored(asked: Mapping[str, Any], used: Mapping[str, Any], path: str) -> None:
    """Warn of settings of the model that are not those it is trained on with."""
    other = [f"{key}={asked[key]!r} (it has {used[key]!r})" for key in asked if key in used and asked[key] != used[key]]
    if other:
        rank_zero_warn(
            f"chanaxes fit goes on from {path} with the model's settings there, and not with {', '.join(other)}; for "
            "others train from the beginning, in another folder"
        )


def _settings(path: str) -> Any:
    return read_checkpoint(path).get("hyper_parameters") if Path(path).is_file() else None


def _enter(config: Any, verb: str) -> None:
    """Make a verb write into the folder that ``--run`` names, and use the network in it."""
    run = RunFolder(Path(config.run))
    folder, last = run.path, run.last_checkpoint
    if config.ckpt_path is None and last.is_file():
        config.ckpt_path = str(last)
    elif config.ckpt_path is None and verb != "fit":
        raise ValueError(f"--run {folder}: no {last}; expected the folder of a training that saved one")
    elif config.ckpt_path is None and run.trackers:
        raise ValueError(
            f"--run {folder}: a training there was interrupted before its first checkpoint and cannot continue; remove "
            "the folder to start again, or choose another one"
        )
    if verb not in ("lesion", "prune"):  # these write beside the checkpoint, without a logger
        _log_into(folder if verb == "fit" else folder / verb, config.trainer, verb)


def _log_into(folder: Path, trainer: Any, verb: str) -> None:
    """Give the Trainer and its loggers one folder; the first logger decides where checkpoints and tables go."""
    trainer.default_root_dir = str(folder)
    if trainer.logger is False:
        return
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    classes = [str(getattr(logger, "class_path", logger)).rpartition(".")[2] for logger in loggers]
    if classes[0] not in ("CSVLogger", "TensorBoardLogger"):
        raise ValueError(
            f"--run {folder}: expected a CSVLogger or TensorBoardLogger as the first of the loggers, because all files "
            f"go to its folder, or --trainer.logger false; chanaxes {verb} got {', '.join(classes)}"
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
        f"{launched} processes were launched, but the Trainer knows of {known}: each process would run "
        f"all of `chanaxes {verb}` by itself.\n"
        f"Either add --trainer.strategy ddp --trainer.devices {devices} to this command, or let the Trainer "
        f"launch the processes: chanaxes {verb} … --trainer.strategy ddp --trainer.devices {devices}"
    )
