"""``PruneModule``: lesions and pruning of a trained network under a Lightning Trainer."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from chanaxes_pl.analysis.damage import CORRELATED, join_axes, score_damage_correlation
from chanaxes_pl.analysis.scores import SCORE_COLUMN
from chanaxes_pl.axes import measure_axes
from chanaxes_pl.compensation.polish import Spread, distillation_loss
from chanaxes_pl.core.divergence import Divergence, divergence_for
from chanaxes_pl.core.errors import InputError, naming, short
from chanaxes_pl.core.files import set_aside
from chanaxes_pl.core.targets import are_classes
from chanaxes_pl.lesions.damage_table import LesionExperiment, join_shares, lesion_table
from chanaxes_pl.models import ImageClassifier
from chanaxes_pl.models.checkpoints import load_classifier
from chanaxes_pl.network.batches import Placement, logits_of, split_batch
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import isolated_rng
from chanaxes_pl.network.layers import select_layers
from chanaxes_pl.network.loaders import again, first_loader, groups_of, some_of
from chanaxes_pl.network.probe import (
    MIN_IMAGES,
    ImageBatches,
    Probe,
    ProbeSource,
    find_probe,
)
from chanaxes_pl.network.recording import Settings
from chanaxes_pl.plots import plot_lesions, plot_pruning
from chanaxes_pl.pruning.grid import PruningExperiment, pruning_grid
from chanaxes_pl.pruning.pruner import Slim
from chanaxes_pl.pruning.scores import channel_scores, default_scores
from chanaxes_pl.pruning.slim_file import CHECKPOINT_PLAN, Plan, fill
from chanaxes_pl.run_folder import RunFolder
from chanaxes_pl.tables import write_parquet
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.plain import plain

Experiment = PruningExperiment | LesionExperiment
#: A key of the registry of experiments.
ExperimentName = Literal["prune", "lesion"]
_EXPERIMENTS: dict[ExperimentName, type[Experiment]] = {"prune": PruningExperiment, "lesion": LesionExperiment}
# Rows of a grid that is not finished, a file for each process.
_UNFINISHED = "pruning-unfinished"


class PruneModule(ImageClassifier):
    """Module that lesions or prunes a network in ``trainer.test``, or fine-tunes a pruned one in ``trainer.fit``.

    ``trainer.test(PruneModule(model), datamodule=dm)`` evaluates the network on the test images, then runs the
    experiment on them. ``"prune"`` makes the grid of :func:`pruning_grid`; ``"lesion"`` makes the table of
    :func:`lesion_table`, with the axes of the same channels. The table and a figure go to ``<out>/pruning.parquet`` and
    ``<out>/pruning.png``, or ``<out>/lesions.…``. Several processes share the work and get the same table as one. An
    interrupted grid goes on in the same folder where it had got to; an earlier table becomes ``pruning-1.parquet``.
    Experiments, and fine-tuning on labels, are for networks that give one class an image.

    ``trainer.fit(PruneModule(prune(…)), datamodule=dm)`` fine-tunes with a fixed recipe (SGD, momentum, cosine). Its
    checkpoints hold the plan, so a run can be resumed with a module made from the same plan or from the dense network.
    ``load_slim(trainer.checkpoint_callback.best_model_path, MyNet())`` gives the fine-tuned network alone, and
    ``PruneModule.load_from_checkpoint(PATH, model=MyNet())`` the module. With ``teacher=`` the network learns
    the teacher's outputs instead of the labels, which the training batches then need not have.

    Args:
        model: network from images to logits, a :class:`Slim`, or the path of a :class:`Classifier`'s checkpoint.
        experiment: :class:`PruningExperiment` or :class:`LesionExperiment`; ``"prune"`` and ``"lesion"`` stand for
            their defaults. Default ``"prune"``; for a :class:`Slim` none, so that it is only evaluated.
        probe: training images under the evaluation transform; default as for ``AxisTracker``.
        out: folder for the results; default the run folder of the checkpoint, or else of the Trainer.
        lr: largest learning rate of fine-tuning.
        momentum: momentum of fine-tuning.
        weight_decay: weight decay of fine-tuning.
        num_classes: number of logits; default the outputs of the last Linear layer.
        teacher: network whose outputs fine-tuning is to bring back, such as the dense one: the loss is that of
            :func:`distillation_loss`. It works in eval mode as a copy, which is in no checkpoint.

    Attributes:
        table: result of the experiment, the same on every process.
        plan: plan of a pruned network; ``None`` for a dense one.

    Raises:
        TypeError: if ``model`` or ``teacher`` is no network.
        ValueError: if the experiment is unknown, or the checkpoint is not of a :class:`Classifier`.
    """

    def __init__(
        self,
        model: nn.Module | Slim | str | Path,
        experiment: Experiment | ExperimentName | None = None,
        *,
        probe: ProbeSource | None = None,
        out: str | Path | None = None,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        num_classes: int | None = None,
        teacher: nn.Module | Slim | None = None,
    ) -> None:
        source = Path(model) if isinstance(model, (str, Path)) else None
        network = _network(model)
        classes = num_classes or _outputs(network)
        super().__init__(network, max(classes, 2))  # a single output has no accuracy
        self.save_hyperparameters("lr", "momentum", "weight_decay")
        self.plan = model.plan if isinstance(model, Slim) else None
        self.experiment = _experiment(experiment, self.plan)
        self.table = pd.DataFrame()
        self._num_classes = classes
        # In a tuple, so that it is no submodule: its weights are not trained and in no checkpoint.
        self._teacher: tuple[nn.Module, ...] = ()
        if teacher is not None:
            self._teacher = (clone(_network(teacher, "teacher")).eval(),)
        self._wanted = Spread()  # the teacher's outputs so far
        self._divergence: Divergence | None = None
        self._probe = probe
        self._out = RunFolder.of_checkpoint(source).path if out is None and source else out

    def on_fit_start(self) -> None:
        """Put all modules in training mode: Lightning would leave a pruned network in eval mode."""
        self.train()
        own = next((parameter.dtype for parameter in self.network.parameters() if parameter.is_floating_point()), None)
        for teacher in self._teacher:
            teacher.to(self.device, own)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch ``(images, labels)``; with a teacher, of a batch of images with or without labels.

        Raises:
            ValueError: if the teacher's outputs have another shape.
        """
        if not self._teacher:
            return super().training_step(batch, batch_idx)
        loss, logits, labels = self._distil(batch)
        values: dict[str, Any] = {"train/loss": loss}
        if labels is not None and are_classes(logits, labels):
            self.train_top1.update(logits, labels)
            values["train/top1"] = self.train_top1
        self._log_epoch(values, len(logits))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of a batch, and the accuracies where the labels are classes."""
        if self._teacher:
            loss, logits, labels = self._distil(batch)
            if labels is None or not are_classes(logits, labels):
                return self._log_epoch({"val/loss": loss}, len(logits))
        return super().validation_step(batch, batch_idx)

    def _distil(self, batch: Any) -> tuple[Tensor, Tensor, Any]:
        """The loss against the teacher, the outputs, and the labels if there are any."""
        images, labels = split_batch(batch)
        logits = logits_of(self(images))
        (teacher,) = self._teacher
        with torch.no_grad():
            wanted = logits_of(teacher(images))
        self._divergence = self._divergence or divergence_for(wanted, labels)
        # Validation, and what is checked of it before the fit, has no part in what training sees.
        variance = self._wanted.add(wanted) if self.training else None
        loss = distillation_loss(logits, wanted, variance=variance, divergence=self._divergence)
        return loss, logits, labels

    def on_test_epoch_end(self) -> None:
        """Run the experiment, and write its table and figure."""
        experiment = self.experiment
        if experiment is None:
            return
        folder = self.folder  # which all processes have to ask for
        # Pruning traces the network by gradients, which do not exist in inference mode.
        with torch.inference_mode(False), torch.enable_grad(), naming("PruneModule"):
            prunes = isinstance(experiment, PruningExperiment)
            share = self._prune(experiment, folder) if prunes else self._lesion(experiment)
            self.table = join_shares(_gathered(share, self.trainer))
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            self._write(folder)
            rank_zero_info(f"PruneModule: the table of {len(self.table)} rows and its figure are in {folder}.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the plan with the weights."""
        if self.plan is not None:
            checkpoint[CHECKPOINT_PLAN] = self.plan.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give a dense network the shape of the checkpoint's pruned one.

        Raises:
            ValueError: if this network was pruned differently, or is another one.
        """
        if CHECKPOINT_PLAN not in checkpoint:
            return
        with naming("PruneModule"):
            plan = Plan.from_json(checkpoint[CHECKPOINT_PLAN])
        if self.plan is None:
            own = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("network.")}
            self.network = plain(self.network)
            fill(self.network, plan, {name[len("network.") :]: tensor for name, tensor in own.items()})
            self.plan = plan
        elif (self.plan.kept, self.plan.shapes) != (plan.kept, plan.shapes):
            raise ValueError(
                "the checkpoint is of a network that was pruned differently from this one: resume with "
                "PruneModule(the Slim that was fine-tuned), or with the dense network, which takes on its shape"
            )

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return Path(self._out if self._out is not None else self.trainer.log_dir or self.trainer.default_root_dir)

    def _prune(self, experiment: PruningExperiment, folder: Path) -> pd.DataFrame:
        """Make this process's part of the pruning grid, from where an interrupted one got to."""
        unfinished = folder / f"{_UNFINISHED}-{self.global_rank}.parquet"
        return pruning_grid(
            self.network,
            find_probe(self._probe, self.trainer),
            _evaluation(self.trainer, experiment.evaluation_size),
            experiment,
            finetune=partial(self._finetune, experiment) if experiment.finetune_epochs else None,
            progress=self._shows_progress,
            place=self._place,
            recipe=self._recipe if experiment.finetune_epochs else "",
            unfinished=None if getattr(self.trainer, "fast_dev_run", False) else unfinished,
        )

    def _lesion(self, experiment: LesionExperiment) -> pd.DataFrame:
        """Make this process's lesions, with the axes and scores of their channels."""
        probe, place, network = find_probe(self._probe, self.trainer), self._place, plain(self.network)
        size, seed = experiment.probe_size, experiment.seed
        example = next(iter(ImageBatches(probe, MIN_IMAGES, place)))
        units = find_units(network, example)
        layers = select_layers(network, experiment.layers, whole=True)  # what is lesioned
        settings = Settings(layers=layers, reliability=False, probe_size=size)
        axes = measure_axes(network, Probe(probe, size), settings, place)
        names = experiment.scores
        names = default_scores(network, units, example) if names is None else names
        scores = channel_scores(network, probe, units, names, probe_size=size, seed=seed, place=place)
        share = lesion_table(
            network,
            probe,
            _evaluation(self.trainer, experiment.evaluation_size),
            experiment,
            units=units,
            progress=self._shows_progress,
            place=place,
        )
        table = join_axes(axes, share)
        for score, values in scores.items():
            table[f"{SCORE_COLUMN}{score}"] = [
                float(values[layer][channel]) if layer in values else float("nan")
                for layer, channel in zip(table["layer"], table["channel"], strict=True)
            ]
        return table

    @property
    def _recipe(self) -> str:
        """What a fine-tuned network depends on beside the settings of the grid, as far as it can be told."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        held = {} if datamodule is None else vars(datamodule)
        held = {name: value for name, value in held.items() if isinstance(value, (int, float, str))}
        taught = [
            float(sum(weight.detach().double().sum() for weight in teacher.parameters())) for teacher in self._teacher
        ]
        return repr((dict(self.hparams), taught, self.trainer.precision, type(datamodule).__name__, held))

    @property
    def _place(self) -> Placement:
        # Without the Trainer's precision plugin: experiments run in the precision of the weights.
        return dataclasses.replace(Placement.of_trainer(self.trainer), forward_context=nullcontext)

    @property
    def _shows_progress(self) -> bool:
        return self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero

    def _finetune(self, experiment: PruningExperiment, slim: nn.Module) -> None:
        """Fine-tune one network of the grid on this process alone, with the recipe of this module."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(
                "PruneModule(finetune_epochs=…): expected trainer.test(…, datamodule=one with training images)"
            )
        recipe = {key: self.hparams[key] for key in self.hparams}
        teacher = next(iter(self._teacher), None)
        module = PruneModule(slim, num_classes=self._num_classes, teacher=teacher, **recipe)
        for metric in module.modules():
            if isinstance(metric, Metric):  # other processes train other networks, maybe fewer
                metric.distributed_available_fn = _alone
        trainer = L.Trainer(
            max_epochs=experiment.finetune_epochs,
            accelerator=self.device.type,
            devices=1 if self.device.index is None else [self.device.index],
            precision=self.trainer.precision,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # A copy, because the datamodule belongs to the surrounding Trainer. It is prepared already, and preparing it
        # again would make this process wait for the others.
        stand_in = copy.copy(datamodule)
        stand_in.prepare_data = None
        with isolated_rng():  # every network trains on the same draws, on whichever process
            torch.manual_seed(experiment.seed)
            trainer.fit(module, datamodule=stand_in)
        slim.to(self.device)

    def _replace(self, path: Path) -> None:
        """Write the table, and keep an earlier one under another name, which the report does not read."""
        if (kept := set_aside(path)) is not None:
            rank_zero_info(f"PruneModule: the earlier table of {path.parent} is {kept.name} now.")
        write_parquet(self.table, path)

    def _write(self, folder: Path) -> None:
        experiment = self.experiment
        if isinstance(experiment, PruningExperiment):
            self._replace(folder / "pruning.parquet")
            for rows in folder.glob(f"{_UNFINISHED}-*.parquet"):
                rows.unlink()
            (folder / "pruning.png").unlink(missing_ok=True)  # may be of an earlier table
            plot_pruning(self.table).savefig(folder / "pruning.png", dpi=150)
            return
        self._replace(folder / "lesions.parquet")
        (folder / "lesions.png").unlink(missing_ok=True)  # may be of an earlier table
        assert experiment is not None
        damage = f"{experiment.operations[0]}_loss"
        try:
            correlations = score_damage_correlation(self.table, CORRELATED, damage)
        except InputError as error:
            warnings.warn(
                f"PruneModule: {folder / 'lesions.parquet'} is written, without a figure of how the damage correlates "
                f"with the axes: {error.text}; lesion more channels a layer for one, LesionExperiment(channels=…)",
                stacklevel=2,
            )
            return
        plot_lesions(self.table, correlations, damage).savefig(folder / "lesions.png", dpi=150)


def _experiment(experiment: object, plan: Plan | None) -> Experiment | None:
    if experiment is None:
        return None if plan else PruningExperiment()
    if isinstance(experiment, (PruningExperiment, LesionExperiment)):
        return experiment
    if isinstance(experiment, str) and experiment in _EXPERIMENTS:
        return _EXPERIMENTS[experiment]()
    raise ValueError(
        f"PruneModule(experiment={experiment!r}): expected 'prune', 'lesion', PruningExperiment(…) or "
        "LesionExperiment(…)"
    )


def _network(model: object, name: str = "model") -> nn.Module:
    """Return the network of an argument, which may be in a Slim or, as ``model``, in a checkpoint."""
    if name == "model" and isinstance(model, (str, Path)):
        return load_classifier(model)
    model = model.model if isinstance(model, Slim) else model
    if not isinstance(model, nn.Module):
        path = ", or the path of a Classifier's checkpoint" if name == "model" else ""
        raise TypeError(f"PruneModule({name}={short(model)}): expected a network, what prune returned{path}")
    return model


def _outputs(network: nn.Module) -> int:
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"PruneModule: {type(network).__name__} has no Linear layer; expected a classifier of images, with "
            "num_classes=, the number of its classes"
        )
    return linear[-1].out_features


def _evaluation(trainer: L.Trainer, size: int | None) -> Iterable[Any]:
    """Return all test images or a fixed random choice, on every process: the processes share the variants instead."""
    loader, limit = first_loader(trainer.test_dataloaders), trainer.limit_test_batches
    if trainer.world_size == 1 and size is None:
        return loader if limit == 1.0 and isinstance(limit, float) else list(islice(loader, _count(limit, loader)))
    # A share of all batches, not of this process's, so that the result does not depend on the number of processes.
    groups = groups_of(loader)
    groups = groups[: _count(limit, groups)]
    if size is not None:
        groups = some_of(loader, groups, size)
    return again(loader, batch_sampler=groups)


def _count(limit: int | float, batches: Any) -> int:
    """Number of batches that a Trainer's limit leaves."""
    return limit if isinstance(limit, int) else int(limit * len(batches))


def _alone() -> bool:
    return False


def _gathered(share: pd.DataFrame, trainer: L.Trainer) -> list[pd.DataFrame]:
    """Gather the tables of all processes."""
    if trainer.world_size == 1:
        return [share]
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, share)
    return shares
