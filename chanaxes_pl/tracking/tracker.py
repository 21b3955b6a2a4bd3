"""``AxisTracker``: both information axes of every channel, measured while a Trainer trains."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from chanaxes_pl.analysis.correlations import axis_correlations
from chanaxes_pl.axes import measure_axes
from chanaxes_pl.core.errors import ArgumentError, naming
from chanaxes_pl.core.targets import TargetSpec
from chanaxes_pl.network.layers import LayerSpec, channel_count, select_layers
from chanaxes_pl.network.probe import Placement, Probe, Step, find_probe
from chanaxes_pl.network.recording import Settings
from chanaxes_pl.run_folder import RunFolder, check_tracker_name
from chanaxes_pl.tracking.history import History
from chanaxes_pl.tracking.logging import Measurement, checkpoint_scalars, log
from chanaxes_pl.tracking.schedules import Schedule, ScheduleSpec

# A fast development run only shows that nothing breaks.
_FAST_IMAGES = 32


class AxisTracker(L.Callback):
    """Records the local and the target axis of every channel, from random initialisation on.

    Training goes on bit for bit as without it. At every checkpoint of its schedule it runs the model over a fixed
    probe set, logs axis correlations and what they rest on to every logger of the Trainer (``epoch`` counts
    completed epochs; in W&B it is the x-axis, and histograms and a table come with it), and writes the table of
    channels to ``<run folder>/<name>/step-….parquet`` (see :func:`read_run`). The logged values also stand in
    ``trainer.callback_metrics``, for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor.

    Args:
        probe: labelled, un-augmented images: a Dataset of ``(image, label)`` or a DataLoader. Default: the
            datamodule's ``probe_dataloader()``, else the validation loader's data set.
        probe_size: images at most.
        layers: ``"conv"``, ``"conv+linear"``, globs over layer names, or ``(name, module) → bool``.
        schedule: ``"epoch"``; ``"log"`` (steps 0, 1, 2, 4, … in the first epoch, then epochs); every ``n`` epochs
            (a number, or ``"n epochs"``); ``"n steps"``; or a list of optimiser steps. Step 0 is always measured.
        target: the task variable: ``"logit_margin"``, ``"log_probability"``, ``"label"``, or
            ``(logits, labels) → [B]`` or ``[B, D]``.
        positions: local samples an image, or ``"all"``.
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
        probe: Dataset | DataLoader | None = None,
        probe_size: int = 5000,
        layers: LayerSpec = "conv",
        schedule: ScheduleSpec = "epoch",
        target: TargetSpec = "logit_margin",
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
        self._given = probe
        self._save = save
        self._history = History()
        self._widths: dict[str, int] = {}
        self._probe: Probe | None = None
        self._scalars: dict[str, float] = {}
        self._started = self._spent = 0.0

    @property
    def correlations(self) -> pd.DataFrame:
        """Axis correlations of all checkpoints so far."""
        return self._history.correlations

    @property
    def folder(self) -> Path | None:
        """Where the tables are written; ``None`` before training, where none are, and on other ranks than 0."""
        return self._history.folder

    @property
    def state_key(self) -> str:
        """Tells trackers of different names apart in a checkpoint."""
        return f"{type(self).__qualname__}({self.name})"

    def state_dict(self) -> dict[str, Any]:
        """The history so far, the values last logged and the widths of the tracked layers."""
        return {"layers": dict(self._widths), "scalars": dict(self._scalars), "history": self._history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history."""
        self._widths = state_dict["layers"]
        self._scalars = state_dict.get("scalars", {})
        self._history.load_state_dict(state_dict["history"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew where training does; a checkpoint's history is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._history, self._widths, self._scalars = History(), {}, {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure random initialisation, or take up a resumed run."""
        self._begin(trainer, pl_module)
        if trainer.global_step == 0 or not self._history.checkpoints:
            self._measure(trainer, pl_module, float(trainer.current_epoch))
        _monitor(trainer, self._scalars)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where the schedule says so: before validation, so that checkpoints of this epoch hold it."""
        ends = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.schedule.due(trainer.global_step, trainer.current_epoch, ends):
            part = 1.0 if ends else (batch_idx + 1) / trainer.num_training_batches
            self._measure(trainer, pl_module, trainer.current_epoch + part)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure initialisation even where not a single batch was trained on."""
        if not self._history.checkpoints:
            self._begin(trainer, pl_module)
            self._measure(trainer, pl_module, 0.0)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fast = bool(getattr(trainer, "fast_dev_run", False))  # the Trainer sets it without declaring it
        size = min(self.settings.probe_size, _FAST_IMAGES) if fast else self.settings.probe_size
        with naming(type(self).__name__):
            layers = select_layers(pl_module, self.settings.layers)
            self._probe = Probe(find_probe(self._given, trainer), size)
        widths = {name: channel_count(layer) for name, layer in layers.items()}
        if self._widths and self._widths != widths:
            raise ValueError(_other_layers(self._widths, widths))
        self._widths = widths
        if self._save and trainer.is_global_zero and not fast:
            root, run = RunFolder.of_trainer(trainer)
            self._history.open(root, self.name, run, _about(trainer))
        self._started, self._spent = time.perf_counter(), 0.0

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: float) -> None:
        if trainer.global_step == self._history.last_step:  # gradients still accumulate, or two schedules meet
            return
        begin = time.perf_counter()
        assert self._probe is not None
        with _as_validation(trainer), naming(type(self).__name__):
            table = measure_axes(
                pl_module,
                self._probe,
                self.settings,
                Placement.of_trainer(trainer),
            )
        correlations = axis_correlations(table)
        self.table = self._history.add(epoch, trainer.global_step, table, correlations)
        first, now = self._spent == 0.0, time.perf_counter()
        self._spent += now - begin
        cost = {"seconds": now - begin, "time_share": self._spent / max(now - self._started, 1e-9)}
        scalars = checkpoint_scalars(table, correlations, self.name)
        scalars |= {f"{self.name}/{key}": value for key, value in cost.items()}
        self._scalars = scalars
        shown = Measurement(
            self.name, epoch, trainer.global_step, self.table, self.correlations, scalars, self.folder, first
        )
        for logger in trainer.loggers:
            log(logger, shown, media=trainer.is_global_zero)
        self._spent += time.perf_counter() - now
        _monitor(trainer, scalars)


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


def _about(trainer: L.Trainer) -> dict[str, Any]:
    """What a reader of the tables wants to know of their training."""
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "data": type(datamodule or getattr(trainer.train_dataloader, "dataset", None)).__name__,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "epochs": trainer.max_epochs,
        "precision": str(trainer.precision),
        "versions": {name: version(name) for name in ("chanaxes_pl", "torch", "lightning")},
    }


def _other_layers(before: dict[str, int], now: dict[str, int]) -> str:
    changed = [f"{n}: {before[n]} channels, now {now[n]}" for n in before if n in now and before[n] != now[n]]
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    parts = [*changed, *(f"{n}: gone" for n in gone), *(f"{n}: new" for n in new)]
    return (
        f"the checkpoint's AxisTracker followed other layers than this one ({len(before)} before, {len(now)} now): "
        f"{'; '.join(parts[:5])}{' …' if len(parts) > 5 else ''}. Resume with the same model and layers=, or track "
        "under another name= to begin a new table"
    )
