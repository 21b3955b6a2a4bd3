"""Latency: the time of a forward pass on the machine at hand, of one network or without some of its units."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from chanaxes_pl.network.hooks import observed
from chanaxes_pl.units.removal import Group, without

_TIMED = 9
# Rounds of a comparison: at most this many, and at least _FEWEST, until _SECONDS have passed.
_ROUNDS, _FEWEST, _SECONDS = 15, 3, 1.0


def milliseconds(model: nn.Module, images: Tensor, size: int) -> float:
    """Return the median time of a forward pass over a batch of ``size`` images, repeated from ``images``."""
    batch = images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]
    with observed(model):
        times = [_once(model, batch) for _ in range(_TIMED + 2)]
    return statistics.median(times[2:])  # the first two warm up


def _once(model: nn.Module, batch: Tensor) -> float:
    # On one thread of a CPU the process's own time, which other processes on the machine hardly change.
    clock = time.process_time if batch.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    begin = clock()
    model(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return 1e3 * (clock() - begin)


class Latency:
    """Milliseconds of a forward pass as a function of how many units each group has lost.

    A network without the units is run itself, in turns with the dense one, so that a machine that is slower for a while
    does not change their ratio. A sum over a table of layers would miss what runs between the layers, which is a third
    to two thirds of ResNet-18 and MobileNetV2 on a CPU.

    Args:
        model: dense network; it does not change. A compiled one runs uncompiled.
        groups: its removable groups.
        example: ``[B, …]``, the batch that is timed, on the model's device.

    Attributes:
        groups: groups in the order that ``removed`` uses.
        dense: milliseconds with all units.
        unit: what is measured, for messages.
        exact: that it is not: the same network differs by a few percent from one measurement to the next.
        conditions: device, images in the batch, threads, and milliseconds of the dense network.
    """

    unit, exact = "latency", False

    def __init__(self, model: nn.Module, groups: Iterable[Group], example: Tensor) -> None:
        self.groups = tuple(groups)
        self._model, self._example = model, example
        self._known: dict[tuple[int, ...], float] = {}
        with observed(model):
            self.dense = min(_once(model, example) for _ in range(_FEWEST + 1))
        self.conditions = {
            "device": _device_name(example.device),
            "batch": len(example),
            "threads": torch.get_num_threads(),
            "dense_ms": round(self.dense, 3),
        }

    def of(self, removed: np.ndarray) -> float:
        """Return the milliseconds after each group has lost ``removed`` ``[G]`` units; each is measured once."""
        key = tuple(map(int, removed))
        if not any(key):
            return self.dense
        if key not in self._known:
            self._known[key] = self.measure(without(self._model, self.groups, removed))
        return self._known[key]

    def measure(self, slim: nn.Module) -> float:
        """Return the milliseconds of a slim network: ``dense`` times the ratio of the fastest of several rounds."""
        rounds: list[tuple[float, float]] = []
        with observed(self._model), observed(slim):
            _once(slim, self._example)  # warms up
            begin = time.perf_counter()
            while len(rounds) < _FEWEST or (len(rounds) < _ROUNDS and time.perf_counter() - begin < _SECONDS):
                rounds.append((_once(slim, self._example), _once(self._model, self._example)))
        fastest, dense = map(min, zip(*rounds, strict=True))
        return self.dense * fastest / dense


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
