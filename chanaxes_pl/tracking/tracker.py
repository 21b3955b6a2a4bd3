"""``AxisTracker``: both information axes of every channel, measured while a Trainer trains."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from chanaxes_pl.axes import Axes, measure_axes
from chanaxes_pl.core.errors import ArgumentError, InputError, naming
from chanaxes_pl.core.targets import TargetSpec
from chanaxes_pl.network.batches import Placement, Step
from chanaxes_pl.network.hooks import check_made
from chanaxes_pl.network.layers import LayerSpec, channel_count, select_layers
from chanaxes_pl.network.loaders import first_loader
from chanaxes_pl.network.probe import Probe, ProbeSource, find_probe
from chanaxes_pl.network.recording import Settings
from chanaxes_pl.run_folder import RunFolder, check_tracker_name
from chanaxes_pl.tracking.history import History, versions
from chanaxes_pl.tracking.logging import Measurement, checkpoint_scalars, log
from chanaxes_pl.tracking.resume import check_same, check_same_layers, fingerprint
from chanaxes_pl.tracking.schedules import Clock, Schedule, ScheduleSpec
from chanaxes_pl.tracking.weights import (
    as_validated,
    averaging,
    measured_weights,
    move_behind_averaging,
    weight_sums,
)

# A fast development run only shows that nothing breaks.
_FAST_IMAGES = 32
_LOGS = ("log", "log_dict")


class AxisTracker(L.Callback):
    """Records the local and the target axis of every channel, from random initialisation on.

    Training goes on bit for bit as without it. At every checkpoint of its schedule it runs the model over a fixed
    probe set, and writes the table of channels to ``<run folder>/<name>/step-….parquet`` (see :func:`read_run`).

    Every logger of the Trainer gets the axis correlations and what they rest on; ``epoch`` counts passes over the
    training data, see :class:`Clock` for streams. W&B, whose x-axis that is, also gets histograms and a table,
    TensorBoard histograms and the figure of the correlations, MLflow the tables as artefacts. The values also stand
    in ``trainer.callback_metrics``, for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor.

    Logged, each behind ``<name>/``; ρ is Spearman's correlation within layers, mean over layers, from −1 to 1:

    ============================ =======================================================================================
    ``rho``                      ρ of input capture and task information; ``rho_null`` with a random target;
                                 ``rho_disattenuated`` divided by what the reliabilities allow, so above 1 at times
    ``rho_pairs/<a>-<b>``        ρ of the other pairs; ``local_axis`` and ``target_axis`` are means of z-scores
    ``layer/<layer>/rho``        ρ of one layer, ``rho_axes`` that of both coordinates, ``dead`` its channels without
                                 variance; of the first 100 layers
    ``reliability/<metric>``     agreement of both halves of the probe, up to 1 (Spearman–Brown)
    ``task_mass/duplicate``      Σ task information × peer R² over all channels, nats; ``task_mass/nonreplaceable`` the
                                 rest
    ``dead``, ``at_ceiling``     number of channels that do not vary, and of those whose correlation is clipped
    ``alignment``                mean absolute cosine of both gradients, with ``alignment=True``
    ``seconds``, ``time_share``  of this measurement; of all measurements in the time since training began, 0 to 1
    ============================ =======================================================================================

    Where a ``WeightAveraging`` holds averages, the weights are measured that validation sees; averages that another
    callback leaves when training ends are measured then. ``about.json`` beside the tables says which. ``validate``
    and ``test`` leave one table of the network that they were given in ``<run folder>/validate/<name>`` and
    ``test/<name>``. Where training is resumed, settings and probe must be the same.

    Args:
        probe: labelled, un-augmented images: a Dataset of ``(image, label)`` or a DataLoader. Default: the
            datamodule's ``probe_dataloader()``, else the validation loader's data set. Where a network is tested
            and there is none of these: the images that it was trained with as a probe, else those of the test.
        probe_size: images at most.
        layers: ``"auto"`` (convolutions, and Linear layers where those hold less than half of the weights, without
            the head), ``"conv"``, ``"conv+linear"``, globs over layer names, or ``(name, module) → bool``; see
            :func:`select_layers`.
        schedule: ``"epoch"``; ``"log"`` (steps 0, 1, 2, 4, … in the first epoch, then epochs); every ``n`` epochs
            (a number, or ``"n epochs"``); ``"n steps"``; or a list of optimiser steps. Step 0 is always measured, and
            the end of a training in which the schedule never came due.
        target: task variable T: ``"auto"`` (from outputs and labels, see :func:`infer_target`), ``"logit_margin"``,
            ``"log_probability"``, ``"signed_logit"``, ``"log_likelihood"``, ``"label"``, or
            ``(outputs, labels) → [B]`` or ``[B, D]``.
        positions: local samples an image, ``"all"``, or ``"mean"``: the local axis then measures image means, as the
            target axis does, and not single positions.
        noise: σ₀² of input capture: ``"median"``, ``"mean"``, a quantile such as ``"q0.25"``, a number.
        reliability: keep the probe's two halves apart, for reliabilities.
        alignment: add the cosine between the gradients of input capture and
            task information, column ``alignment`` (see
            :func:`alignment`); costs more than all the rest.
        save: write the tables.
        name: first part of the logged keys and name of the folder; two trackers in one Trainer need two names.
        step: ``(module, batch) → (logits, labels)`` where a batch is not ``(images, labels)`` or
            ``module(images)`` gives no logits.

    Attributes:
        table: the last checkpoint's table of channels.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AxisTracker()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        probe: ProbeSource | None = None,
        probe_size: int = 5000,
        layers: LayerSpec = "auto",
        schedule: ScheduleSpec = "epoch",
        target: TargetSpec = "auto",
        positions: int | str = 16,
        noise: str | float = "median",
        reliability: bool = True,
        alignment: bool = False,
        save: bool = True,
        name: str = "axis",
        step: Step | None = None,
    ) -> None:
        super().__init__()
        with naming(type(self).__name__):
            check_tracker_name(name)
            if probe is not None:
                Probe(probe, probe_size)  # tells what cannot be one
            if name == "epoch":
                raise ArgumentError("name='epoch'", "expected another name: loggers hold a value epoch already")
            self.settings = Settings(
                layers=layers,
                positions=positions,
                target=target,
                noise=noise,
                reliability=reliability,
                step=step,
                probe_size=probe_size,
                alignment=alignment,
            )
            self.schedule = Schedule.parse(schedule)
        self.name = name
        self.table = pd.DataFrame()
        self._given, self._asked = probe, schedule
        self._save = save
        self._history, self._clock = History(), Clock()
        self._evaluated: History | None = None
        self._stage = ""
        self._widths: dict[str, int] = {}
        self._fingerprint: dict[str, Any] = {}
        self._probe: Probe | None = None
        self._trained_with: ProbeSource | None = None
        self._scalars: dict[str, float] = {}
        self._weights: list[float] = []
        self._started = self._spent = 0.0

    @property
    def correlations(self) -> pd.DataFrame:
        """Axis correlations of all checkpoints of the training so far; before one, of the network last evaluated."""
        return self._shown.correlations

    @property
    def folder(self) -> Path | None:
        """Where those tables are written; ``None`` before any, where none are, and on other ranks than 0."""
        return self._shown.folder

    @property
    def _shown(self) -> History:
        return self._history if self._history.checkpoints or self._evaluated is None else self._evaluated

    @property
    def state_key(self) -> str:
        """Tells trackers of different names apart in a checkpoint."""
        return f"{type(self).__qualname__}({self.name})"

    def state_dict(self) -> dict[str, Any]:
        """The history so far, the values last logged, and what must be the same where training is resumed."""
        return {
            "layers": dict(self._widths),
            "fingerprint": dict(self._fingerprint),
            "scalars": dict(self._scalars),
            "clock": asdict(self._clock),
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history; where its network is only evaluated, take its place in time."""
        if "clock" in state_dict:
            self._clock = Clock(**state_dict["clock"])
        if self._stage == "fit":
            self._widths = state_dict["layers"]
            self._fingerprint = state_dict.get("fingerprint", {})
            self._scalars = state_dict.get("scalars", {})
            self._history.load_state_dict(state_dict["history"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint's place in time; the state that is loaded after this is more exact, where there is one."""
        self._clock = Clock(float(checkpoint.get("epoch", 0)), checkpoint.get("global_step", 0))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew where training does; a checkpoint's history is loaded after this."""
        self._stage = stage
        if self._clock.step != trainer.global_step:
            self._clock = Clock(float(trainer.current_epoch), trainer.global_step)
        if stage == "fit":
            move_behind_averaging(trainer, self)
            if trainer.global_step == 0:
                self._history, self._clock = History(), Clock()
                self._widths, self._fingerprint, self._scalars = {}, {}, {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure random initialisation, or take up a resumed run."""
        self._begin(trainer, pl_module)
        if trainer.global_step == 0 or not self._history.checkpoints:
            self._measure(trainer, pl_module, _epoch(trainer))
        _monitor(trainer, self._scalars)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where the schedule says so: before validation, so that checkpoints of this epoch hold it."""
        before = self._clock.step
        self._clock.tick(trainer, batch_idx)
        due = self.schedule.due(trainer.global_step, trainer.current_epoch, trainer.is_last_batch, before)
        if due and trainer.global_step != self._history.last_step:  # else gradients still accumulate
            self._measure(trainer, pl_module, self._clock.epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the trained network where averages have become its weights, or the schedule never came due."""
        never = self._history.last_step == 0 < trainer.global_step and not self.schedule.only_start
        if never or (averaging(trainer) and weight_sums(pl_module) != self._weights):
            self._measure(trainer, pl_module, self._clock.epoch)
        if never and not _fast(trainer):
            warnings.warn(_never_due(self._asked, trainer.global_step), stacklevel=2)
        if trainer.global_step == 0 < self._clock.epoch and not _fast(trainer):
            warnings.warn(
                "AxisTracker: the Trainer counted no optimiser step, so only random initialisation was measured: let "
                "training_step use the optimisers of self.optimizers(), which Lightning counts",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure initialisation even where not a single batch was trained on."""
        if not self._history.checkpoints:
            self._begin(trainer, pl_module)
            self._measure(trainer, pl_module, self._clock.epoch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the network that ``trainer.validate`` was given; not in a training's own validation."""
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module, "validate")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the network that ``trainer.test`` was given."""
        self._evaluate(trainer, pl_module, "test")

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._history.last_step > trainer.global_step:  # of another training by the same Trainer
            self._history, self._widths, self._fingerprint = History(), {}, {}
        with naming(type(self).__name__):
            check_made(pl_module)
        probe, layers = self._prepare(trainer, pl_module)
        widths = _widths(layers)
        with naming(type(self).__name__):
            now = {} if _fast(trainer) else fingerprint(self.settings, probe)
        check_same_layers(self._widths, widths)
        check_same(self._fingerprint, now)
        self._probe, self._widths, self._fingerprint = probe, widths, now
        if self._writes(trainer):
            root, run = RunFolder.of_trainer(trainer)
            self._history.open(root, self.name, run, _about(trainer) | {"weights": measured_weights(trainer)})
        self._started, self._spent = time.perf_counter(), 0.0

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Probe, dict[str, nn.Module]]:
        """The probe, and the tracked layers."""
        size = min(self.settings.probe_size, _FAST_IMAGES) if _fast(trainer) else self.settings.probe_size
        with naming(type(self).__name__):
            layers = select_layers(pl_module, self.settings.layers)
            probe = Probe(self._images(trainer), size)
        return probe, layers

    def _images(self, trainer: L.Trainer) -> ProbeSource:
        """As :func:`find_probe`; for a mere test also those that training was probed with, else the test's own."""
        try:
            images = find_probe(self._given, trainer)
        except (InputError, OSError):  # training images may be elsewhere
            if not trainer.testing:
                raise
            images = first_loader(trainer.test_dataloaders) if self._trained_with is None else self._trained_with
        if self._stage == "fit":
            self._trained_with = images
        return images

    def _writes(self, trainer: L.Trainer) -> bool:
        return self._save and trainer.is_global_zero and not _fast(trainer)

    def _layers(self, pl_module: L.LightningModule) -> dict[str, nn.Module]:
        """The layers that training began with, or where the network has other ones now those chosen anew."""
        with naming(type(self).__name__):
            there = select_layers(pl_module, lambda _name, _layer: True)
            layers = {name: layer for name, layer in there.items() if name in self._widths}
            if _widths(layers) == self._widths:
                return layers
            layers = select_layers(pl_module, self.settings.layers)
        before, self._widths = self._widths, _widths(layers)
        changed = [name for name in before | self._widths if before.get(name) != self._widths.get(name)]
        warnings.warn(
            f"AxisTracker: the network has other channels than at the last measurement, in {', '.join(changed[:3])}"
            f"{', …' if len(changed) > 3 else ''}: correlations from here on are of those it has now",
            stacklevel=2,
        )
        return layers

    def _axes(
        self, trainer: L.Trainer, pl_module: L.LightningModule, probe: Probe, layers: dict[str, nn.Module]
    ) -> Axes:
        with _as_validation(trainer), _unlogged(pl_module), naming(type(self).__name__):
            settings = replace(self.settings, layers=layers)
            return Axes(measure_axes(pl_module, probe, settings, Placement.of_trainer(trainer)), 0)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: float) -> None:
        begin = time.perf_counter()
        assert self._probe is not None
        with as_validated(trainer, pl_module):
            axes = self._axes(trainer, pl_module, self._probe, self._layers(pl_module))
            self._weights = weight_sums(pl_module) if averaging(trainer) else []
        self._history.add(trainer.global_step, epoch, axes, replace=True, same=False)
        self.table = self._history.table
        first, now = self._spent == 0.0, time.perf_counter()
        self._spent += now - begin
        cost = {"seconds": now - begin, "time_share": self._spent / max(now - self._started, 1e-9)}
        scalars = checkpoint_scalars(axes.table, axes.correlations, self.name)
        scalars |= {f"{self.name}/{key}": value for key, value in cost.items()}
        self._scalars = scalars
        shown = Measurement(
            self.name, epoch, trainer.global_step, self.table, self.correlations, scalars, self.folder, first
        )
        for logger in trainer.loggers:
            log(logger, shown, media=trainer.is_global_zero)
        self._spent += time.perf_counter() - now
        _monitor(trainer, scalars)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, verb: str) -> None:
        """One table, apart from those of a training: ``<run folder>/validate/<name>`` or ``test/<name>``."""
        try:
            probe, layers = self._prepare(trainer, pl_module)
            axes = self._axes(trainer, pl_module, probe, layers)
        except InputError as error:
            if verb != "test" or self._given is not None:
                raise
            warnings.warn(f"AxisTracker: the tested network is not measured: {error.text}", stacklevel=2)
            return
        self._evaluated = History()
        if self._writes(trainer):
            root, run = RunFolder.of_trainer(trainer)
            root = root if root.path.name == verb else RunFolder(root.path / verb)
            self._evaluated.open(root, self.name, run, _about(trainer) | {"weights": "those evaluated"})
        self._evaluated.add(self._clock.step, self._clock.epoch, axes)
        self.table = self._evaluated.table
        _monitor(trainer, checkpoint_scalars(axes.table, axes.correlations, self.name))


def _epoch(trainer: L.Trainer) -> float:
    """Passes over the training data when training starts, which may be in the middle of one."""
    # Those trained on: a checkpoint that was written at a batch's end does not count that one as completed.
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    batches = trainer.num_training_batches
    return trainer.current_epoch + (done / batches if done < batches < float("inf") else 0.0)


def _widths(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: channel_count(layer) for name, layer in layers.items()}


def _fast(trainer: L.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # the Trainer sets it without declaring it


def _never_due(schedule: ScheduleSpec, steps: int) -> str:
    return (
        f"AxisTracker(schedule={schedule!r}) came due at no step of {steps} after initialisation, so the trained "
        f"network was measured as well. For more in between pass a schedule in steps, such as "
        f"schedule='{max(steps // 10, 1)} steps'"
    )


def _monitor(trainer: L.Trainer, scalars: dict[str, float]) -> None:
    """Put values where ``ModelCheckpoint`` and ``EarlyStopping`` look.

    Not by ``log``: at the first epoch's end it would show what was logged when training started.
    """
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in scalars.items()})


@contextmanager
def _as_validation(trainer: L.Trainer) -> Iterator[None]:
    """Batch hooks of a user's module or datamodule see validation meanwhile, and do not augment."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def _unlogged(module: L.LightningModule) -> Iterator[None]:
    """What a module logs in its forward pass, or in a ``step=``, goes nowhere meanwhile."""
    parts = [part for part in module.modules() if callable(getattr(part, "log_dict", None))]
    before = [(part, {name: vars(part)[name] for name in _LOGS if name in vars(part)}) for part in parts]
    for part in parts:
        vars(part).update(dict.fromkeys(_LOGS, _nothing))
    try:
        yield
    finally:
        for part, own in before:
            for name in _LOGS:
                del vars(part)[name]
            vars(part).update(own)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _about(trainer: L.Trainer) -> dict[str, Any]:
    """What a reader of the tables wants to know of their training."""
    loaders = (trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders)
    data = getattr(trainer, "datamodule", None) or next(
        (loader.dataset for loader in loaders if isinstance(loader, DataLoader)), None
    )
    return {
        "data": type(data).__name__,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "epochs": trainer.max_epochs,
        "precision": str(trainer.precision),
        "versions": versions(),
    }
