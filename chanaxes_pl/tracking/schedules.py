"""When to measure, and what time it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError

# Batches that an epoch of unknown length is taken to have left.
_LEFT = 1000

ScheduleSpec = str | int | Sequence[int]


@dataclass(frozen=True)
class Schedule:
    """Which optimiser steps and epoch ends are measured; step 0, random initialisation, always is.

    Attributes:
        every_epochs: measure at the end of every so many epochs; 0 for never.
        every_steps: measure after every so many optimiser steps; 0 for never.
        doubling: measure after steps 1, 2, 4, 8, …, until the first epoch has ended.
        steps: measure after just these steps.
    """

    every_epochs: int = 0
    every_steps: int = 0
    doubling: bool = False
    steps: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, spec: ScheduleSpec) -> Schedule:
        """From ``"epoch"``, ``"log"``, ``n`` or ``"n epochs"``, ``"n steps"``, or a list of steps.

        Raises:
            ValueError: for anything else.

        Example:
            >>> Schedule.parse("log").due(step=4, epoch=0, epoch_ends=False)
            True
            >>> Schedule.parse("100 steps").due(step=150, epoch=0, epoch_ends=False)
            False
        """
        if isinstance(spec, (np.ndarray, Tensor)):
            spec = spec.tolist()
        if isinstance(spec, str) and spec in ("epoch", "log"):
            return cls(every_epochs=1, doubling=spec == "log")
        if isinstance(spec, str):
            match = re.fullmatch(r"(\d+)(?: (epoch|step)s?)?", spec)  # a bare number is text on a command line
            if match and int(match[1]) > 0:
                count = int(match[1])
                return cls(every_steps=count) if match[2] == "step" else cls(every_epochs=count)
        elif isinstance(spec, (int, np.integer)) and not isinstance(spec, bool):
            if spec > 0:
                return cls(every_epochs=int(spec))
        elif isinstance(spec, Sequence) and all(isinstance(step, (int, np.integer)) and step >= 0 for step in spec):
            return cls(steps=frozenset(map(int, spec)))
        raise ArgumentError(
            f"schedule={spec!r}",
            "expected 'epoch', 'log' (steps 0, 1, 2, 4, … then epochs), a number of "
            "epochs, 'n epochs', 'n steps', or a list of steps",
        )

    @property
    def only_start(self) -> bool:
        """Whether nothing is asked for but random initialisation."""
        return not (self.every_epochs or self.every_steps or self.doubling or self.steps - {0})

    def due(self, step: int, epoch: int, epoch_ends: bool, before: int | None = None) -> bool:
        """Whether to measure after ``step`` optimiser steps, in epoch number ``epoch`` (from 0).

        Args:
            step: number of steps so far.
            epoch: number of whole epochs before this one.
            epoch_ends: whether this one is at its end.
            before: number of steps when it was last asked, default one less; where a batch makes several, as those of
                several optimisers do, what comes due at any of them is due.
        """
        before = step - 1 if before is None else before
        if step == 0 or any(before < chosen <= step for chosen in self.steps):
            return True
        if epoch_ends and self.every_epochs and (epoch + 1) % self.every_epochs == 0:
            return True
        if self.doubling and epoch == 0 and before < 1 << (step.bit_length() - 1):
            return True
        return bool(self.every_steps) and step // self.every_steps > before // self.every_steps


@dataclass
class Clock:
    """Where training stands.

    Where the loader does not tell how many batches an epoch has, it counts as long as the one before it. The first
    counts as ``max_steps`` steps long, more than which it cannot be; without ``max_steps`` it counts as having 1,000
    batches left, whenever one asks. Fractions so found grow, and stay below the whole number of the epoch's end.

    Attributes:
        epoch: passes over the training data so far.
        step: optimiser steps so far.
        batches: of the last whole epoch; 0 before it ends.
    """

    epoch: float = 0.0
    step: int = 0
    batches: int = 0

    def tick(self, trainer: Trainer, batch_idx: int) -> None:
        """A batch has been trained on."""
        begun, seen = trainer.current_epoch, batch_idx + 1
        if trainer.is_last_batch:
            self.epoch, self.batches = begun + 1.0, seen
        elif trainer.num_training_batches != float("inf"):
            self.epoch = begun + seen / trainer.num_training_batches
        else:
            self.epoch = begun + self._guess(seen, trainer.max_steps * trainer.accumulate_grad_batches, begun)
        self.step = trainer.global_step

    def _guess(self, seen: int, most: int, begun: int) -> float:
        length = self.batches or max(most, 0)
        before = max(self.epoch - begun, 0.0)
        part = seen / max(length, seen + 1) if length else 0.0
        return part if part > before else before + (1 - before) / (_LEFT + 1)
