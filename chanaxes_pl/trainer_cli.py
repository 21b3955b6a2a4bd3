"""The verbs that run a Trainer: LightningCLI with this package's defaults and one more check.

Apart from ``cli.py`` because importing LightningCLI takes seconds.
"""

import os
import sys
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import chanaxes_pl.data
import chanaxes_pl.tracker  # noqa: F401  so that --data DigitsDataModule and the like need no module names

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


class TrainerCLI(LightningCLI):
    """``chanaxes fit | validate | test``, parsed from ``sys.argv`` and run.

    The model is a :class:`Classifier` unless ``--model`` names another LightningModule; ``--data`` names a
    DataModule. Under ``fabric run`` that command's flags are the Trainer's defaults.

    Raises:
        SystemExit: with status 2 for arguments that do not parse, and for a launch of several processes that
            the Trainer does not know of: each would train its own model, side by side.
    """

    def __init__(self) -> None:
        launched = os.environ.get("LT_CLI_USED") == "1"
        super().__init__(
            LightningModule,
            subclass_mode_model=True,
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
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make ``--model.backbone`` and the like mean :class:`Classifier` where no class is named."""
        parser.set_defaults({"model": {"class_path": "chanaxes_pl.models.Classifier"}})

    def after_instantiate_classes(self) -> None:
        """Refuse, before anything trains or is written, to run as one of several strangers."""
        environment = TorchElasticEnvironment()
        if environment.detect() and environment.world_size() > self.trainer.world_size:
            _refuse(str(self.subcommand), environment.world_size(), self.trainer.world_size)


def _refuse(verb: str, launched: int, known: int) -> NoReturn:
    nodes = int(os.environ.get("LT_NUM_NODES", "1"))
    devices = launched // nodes
    print(
        f"error: {launched} processes were launched, but the Trainer knows of {known}: each would run the "
        f"whole of `chanaxes {verb}` by itself.\n"
        f"Either add --trainer.strategy ddp --trainer.devices {devices} to this command, or let the Trainer "
        f"launch the processes: chanaxes {verb} … --trainer.strategy ddp --trainer.devices {devices}",
        file=sys.stderr,
    )
    raise SystemExit(2)
