"""Sensitivity: what the outputs lose when one group alone is cut, more and more of it, and what reads it is refitted.

The refit is that of ``compensate``, solved from the dense network's moments alone: with nothing else cut, the readers
of a group see what they do in the dense network. The outputs are measured on images that no refit has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from heapq import heapify, heappop, heappush

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from chanaxes_pl.compensation.layerwise import POSITIONS, RIDGE
from chanaxes_pl.core.divergence import Divergence, by_position, mean_divergence
from chanaxes_pl.core.errors import ArgumentError, InputError, is_whole
from chanaxes_pl.core.memory import GIGABYTE, MEMORY
from chanaxes_pl.core.progress import bar
from chanaxes_pl.network.hooks import activation_bytes, observed
from chanaxes_pl.network.tracing import PartialForward, edited
from chanaxes_pl.pruning.readers import Sampling, measured
from chanaxes_pl.units.macs import Macs
from chanaxes_pl.units.removal import Group, masked

#: Levels of removal of a group, evenly spaced, after which one unit is left.
LEVELS = 8
#: Images on which outputs are compared at most.
COMPARED = 128
# Fewer images are not worth parting.
_FEW = 8
# As other groups shrink, what a step frees changes: no step takes more than this part of what a group has left.
_PIECES = 8
_LEAST = 1e-9


def measure_sensitivity(
    model: nn.Module,
    groups: Iterable[Group],
    ranks: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    images: int,
    *,
    divergence: Divergence = "kl",
    levels: int = LEVELS,
    ridge: float = RIDGE["refit"],
    memory: float = MEMORY,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure how far the outputs move when each group alone loses its lowest units and its readers are refitted.

    Args:
        model: dense network with plain weights; it does not change.
        groups: its groups.
        ranks: group name → ``[U]``, scores of its units; the lowest go first.
        batches: unlabelled images ``[B, …]`` on the model's device, iterated for every pass that ``memory`` takes. The
            last quarter of them, at most 128, are held out: the outputs are compared there, the rest is for refits.
            Fewer than 8 serve for both.
        images: number of images in all batches.
        divergence: what outputs are compared by.
        levels: number of levels of removal; the last leaves one unit.
        ridge: λ of the refit, as for :func:`compensate`.
        memory: gigabytes (10⁹ bytes) to take beside the network: half of it for moments, an eighth for refitted
            weights, the rest for activations. Less takes more passes; a kernel too large for it is refitted as if its
            places were one.
        progress: whether to show a progress bar in a terminal.

    Returns:
        One row per group and level, the first with nothing removed: ``group``, ``units`` of the group, ``removed`` of
        them, and ``divergence``, the mean over held-out images, in nats but for ``"square"``.

    Raises:
        ValueError: if a reader's inputs or the outputs are not finite, or ``memory`` has no room for the moments of one
            group.
    """
    if not is_whole(levels, 1):
        raise ArgumentError(f"levels={levels!r}", "expected a whole number from 1 on, such as 8")
    groups = list(groups)
    held = min(images // 4, COMPARED) if images >= _FEW else 0
    fitted, compared = images - held, images - held if held else 0
    limit, rows = memory * GIGABYTE / 2, []
    with observed(model):
        outputs = _Outputs(model, divergence, some(batches, compared, images), 0.75 * limit)

        def run() -> None:
            for seen in some(batches, 0, fitted):
                for part in seen.split(outputs.at_once):
                    model(part)

        read = measured(model, groups, Sampling(POSITIONS, fitted), memory, 0.5, run)
        for group, found in bar(read, "sensitivity", "group", total=len(groups), shown=progress):
            even = np.linspace(0, group.size, levels + 1).round()
            counts = sorted({min(int(count), group.size - 1) for count in even} - {0})
            order = ranks[group.name].argsort(stable=True)
            # No layer reads the queries and keys of an attention: such a group has nothing to refit.
            refits = [reader.refits(group, order, counts, ridge) for reader in found]
            moved, weights = [0.0], sum(reader.weight_bytes for reader in found)
            at_once = int(max(1, limit // 4 // max(weights, 1)))
            for start in range(0, len(counts), at_once):
                cuts = [
                    _Cut(group, order[count:].sort().values, dict(zip(group.consumers, map(next, refits), strict=True)))
                    for count in counts[start : start + at_once]
                ]
                moved += outputs.moved(cuts)
            if not np.isfinite(moved).all():
                raise InputError(f"the outputs hold NaN or infinity where {group.name!r} loses units; use float32")
            for count, distance in zip([0, *counts], moved, strict=True):
                rows.append({"group": group.name, "units": group.size, "removed": count, "divergence": distance})
    return pd.DataFrame(rows)


def sensitivity_order(macs: Macs, table: pd.DataFrame) -> np.ndarray:
    """Return the removal order that gives up the least divergence for the most MACs: ``[Σ(U − 1)]`` group numbers.

    Divergences rise with what is removed: where a measured one falls, the largest before it counts, and between levels
    they are interpolated monotonically (Fritsch and Butland, 1984). Groups then lose units one after the other. At each
    turn the group goes on whose next units cost the least divergence for the MACs that they free, as things stand; how
    many units count as next is what makes that ratio least. So a group whose first units cost most is still cut where
    that pays in the end.

    Args:
        macs: MACs as a function of the removed units.
        table: from :func:`measure_sensitivity`, for the same groups.
    """
    curves = divergences(macs.groups, table)
    removed, order = np.zeros(len(macs.groups), dtype=int), []

    def next_of(number: int) -> tuple[float, int, int, int]:
        """The divergence that it costs to free one MAC by a group's next units; the group; how many; when it was so."""
        ahead = curves[number][removed[number] :]
        # MACs are linear in the units of one group.
        freed = max(macs.freed(removed, number), _LEAST) * np.arange(1, len(ahead))
        rates = (ahead[1:] - ahead[0]) / freed
        return float(rates.min()), number, int(rates.argmin()) + 1, len(order)

    # As other groups shrink, a unit frees less, so what was found before is never too high: only the lowest has to be
    # known as it is now.
    waiting = [next_of(number) for number, curve in enumerate(curves) if len(curve) > 1]
    heapify(waiting)
    while waiting:
        _, group, step, known = heappop(waiting)
        if known == len(order):
            step = min(step, max(1, (len(curves[group]) - removed[group]) // _PIECES))
            order += [group] * step
            removed[group] += step
        if removed[group] < len(curves[group]) - 1:
            heappush(waiting, next_of(group))
    return np.array(order, dtype=int)


def divergences(groups: Sequence[Group], table: pd.DataFrame) -> list[np.ndarray]:
    """Return for each group ``[U]``, the divergence after 0, 1, … U − 1 units have gone; it never falls."""
    curves = []
    for group in groups:
        rows = table[table["group"] == group.name]
        known, found = rows["removed"].to_numpy(), np.maximum.accumulate(rows["divergence"].to_numpy())
        counts = np.arange(group.size)
        curves.append(PchipInterpolator(known, found)(counts) if len(known) > 1 else np.zeros(group.size))
    return curves


class _Cut:
    """A group that lost some units, with its readers refitted.

    Args:
        group: group.
        kept: the units that stay.
        fitted: layer → its weight, and what is added to its outputs ``[C]``.
    """

    def __init__(self, group: Group, kept: Tensor, fitted: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._group, self._kept, self._fitted = group, kept, fitted
        #: Modules that compute something else.
        self.changed = group.masks

    @contextmanager
    def made(self, model: nn.Module) -> Iterator[None]:
        """Let the model compute what it would after the cut, inside the block."""
        with ExitStack() as stack:
            stack.enter_context(masked(model, [self._group], {self._group.name: self._kept}))
            shifts = {}
            for name, (weight, shift) in self._fitted.items():
                layer = model.get_submodule(name)
                layer.weight.copy_(weight)  # type: ignore[operator,union-attr] # a stand-in that masked() has put there
                shifts[name] = partial(_shifted, shift, 1 if weight.ndim > 2 else -1)
            stack.enter_context(edited(model, shifts))
            yield


def _shifted(shift: Tensor, dimension: int, output: Tensor) -> Tensor:
    return output + (shift if dimension == -1 else shift.view(-1, *[1] * (output.ndim - 2)))


class _Outputs:
    """Outputs of the dense network on held-out images, and how far they are from those of cut ones.

    Args:
        model: dense network, observed.
        divergence: what outputs are compared by.
        images: held-out images.
        memory: bytes for their activations.
    """

    def __init__(self, model: nn.Module, divergence: Divergence, images: Iterator[Tensor], memory: float) -> None:
        first = next(images)
        #: Number of images for whose activations there is room.
        self.at_once = size = int(max(1, memory // activation_bytes(model, first[:1])))
        self._model = model
        self._divergence: Divergence = divergence
        self._parts = [part.clone() for batch in (first, *images) for part in batch.split(size)]
        self._forwards = [PartialForward(model)]
        if sum(map(len, self._parts)) <= size:
            self._forwards = [PartialForward(model) for _ in self._parts]
        self._logits = [forward.run(part) for forward, part in zip(self._cycled(), self._parts, strict=True)]
        if not all(bool(logits.isfinite().all()) for logits in self._logits):
            raise InputError("the outputs hold NaN or infinity on this probe; leave out the images that give them")
        rows = torch.cat([by_position(logits) for logits in self._logits])
        if divergence == "square" and bool((rows == rows[0]).all()):
            count = sum(map(len, self._parts))
            raise InputError(
                f"the outputs are the same for all of the last {count} images of the probe, where they are compared: "
                "expected some that differ; pass a larger or shuffled probe, or allocation='uniform'"
            )

    def moved(self, cuts: Sequence[_Cut]) -> list[float]:
        """Return the mean divergence that each cut makes."""
        found: list[list[Tensor]] = [[] for _ in cuts]
        for forward, part in zip(self._cycled(), self._parts, strict=True):
            if len(self._forwards) < len(self._parts):
                forward.run(part)
            for cut, outputs in zip(cuts, found, strict=True):
                with cut.made(self._model):
                    outputs.append(forward.rerun(cut.changed))
        return [mean_divergence(self._divergence, self._logits, outputs) for outputs in found]

    def _cycled(self) -> list[PartialForward]:
        return self._forwards if len(self._forwards) == len(self._parts) else self._forwards * len(self._parts)


def some(batches: Iterable[Tensor], first: int, last: int) -> Iterator[Tensor]:
    """Give the images of some batches from one number on to before another."""
    seen = 0
    for images in batches:
        part = images[max(0, first - seen) : max(0, last - seen)]
        if len(part):
            yield part
        seen += len(images)
        if seen >= last:
            return
