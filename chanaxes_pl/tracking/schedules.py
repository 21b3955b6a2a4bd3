"""Measurement schedules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chanaxes_pl.core.errors import ArgumentError

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
        if spec == "epoch":
            return cls(every_epochs=1)
        if spec == "log":
            return cls(every_epochs=1, doubling=True)
        if isinstance(spec, str):
            match = re.fullmatch(r"(\d+)(?: (epoch|step)s?)?", spec)  # a bare number is text on a command line
            if match and int(match[1]) > 0:
                count = int(match[1])
                return cls(every_steps=count) if match[2] == "step" else cls(every_epochs=count)
        elif isinstance(spec, int) and not isinstance(spec, bool):
            if spec > 0:
                return cls(every_epochs=spec)
        elif isinstance(spec, Sequence) and all(isinstance(step, int) and step >= 0 for step in spec):
            return cls(steps=frozenset(spec))
        raise ArgumentError(
            f"schedule={spec!r}",
            "expected 'epoch', 'log' (steps 0, 1, 2, 4, … then epochs), a number of "
            "epochs, 'n epochs', 'n steps', or a list of steps",
        )

    def due(self, step: int, epoch: int, epoch_ends: bool) -> bool:
        """Whether to measure after ``step`` optimiser steps, in epoch number ``epoch`` (from 0)."""
        if step == 0 or step in self.steps:
            return True
        if epoch_ends and self.every_epochs and (epoch + 1) % self.every_epochs == 0:
            return True
        if self.doubling and epoch == 0 and step & (step - 1) == 0:
            return True
        return bool(self.every_steps) and step % self.every_steps == 0
