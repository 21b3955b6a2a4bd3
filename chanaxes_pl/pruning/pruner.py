"""Pruning of one network: score, allocation, budget and compensation give a slim network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from chanaxes_pl.compensation.layerwise import RIDGE, Compensation, compensate, reestimate_norms
from chanaxes_pl.compensation.polish import polish
from chanaxes_pl.core.divergence import Divergence, divergence_for, mean_divergence
from chanaxes_pl.core.errors import ArgumentError, InputError, check_seed, naming, short
from chanaxes_pl.core.memory import GIGABYTE, MEMORY, check_memory
from chanaxes_pl.core.moments import true_float32
from chanaxes_pl.core.targets import check_finite
from chanaxes_pl.network.batches import FAILURES, Placement, Step, logits_of, stepped
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import observed, undisturbed
from chanaxes_pl.network.probe import ImageBatches, Probe, ProbeSource, check_sizes
from chanaxes_pl.pruning.allocation import (
    Allocation,
    check_allocation,
    check_budget,
    check_reachable,
    check_round_to,
    fit_budget,
    keep_best,
    threshold_order,
    uniform_order,
)
from chanaxes_pl.pruning.costs import Cost, Parameters
from chanaxes_pl.pruning.latency import Latency
from chanaxes_pl.pruning.scores import channel_scores, unit_ranks, unit_values
from chanaxes_pl.pruning.sensitivity import (
    LEVELS,
    measure_sensitivity,
    sensitivity_order,
    some,
)
from chanaxes_pl.pruning.slim_file import Plan, save_slim
from chanaxes_pl.units.groups import check_example, find_units
from chanaxes_pl.units.macs import Macs, count_macs
from chanaxes_pl.units.plain import plain, unwrapped
from chanaxes_pl.units.removal import Group, disagreement, remove

#: Reference score of the allocation ``"shared"``.
REFERENCE = "taylor"
#: Default number of probe images for scores and compensation.
IMAGES = 2000
#: Polish learns from up to this many times as many: it fits all weights at once.
MORE = 10
# Before compensation, a slim network's logits equal those of the dense network with the removed channels masked, up to
# this share of the largest logit, or to this multiple of the logits' precision.
_AGREE, _ROUNDINGS = 1e-3, 16
# Images that tell what a step gained, few of them at once.
_TOLD, _AT_ONCE = 128, 16


#: What follows a cut: a layer-wise compensation, or ``"distill"``, a refit with polish after it.
Kind = Compensation | Literal["distill"]
#: Choice of a compensation: ``True`` means ``"refit"``, ``False`` and ``"none"`` mean none.
Compensate = bool | Kind | Literal["none"]
#: A key of :data:`COSTS`.
BudgetOf = Literal["macs", "parameters", "latency"]
#: What a budget can be a share of → the class that tells it for any removal.
COSTS: dict[BudgetOf, type[Macs] | type[Parameters] | type[Latency]] = {
    "macs": Macs,
    "parameters": Parameters,
    "latency": Latency,
}
#: Score → layer → ``[C]``, as :func:`channel_scores` returns them.
Scores = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Slim:
    """A pruned network with a record of how it was pruned.

    Attributes:
        model: slim network in eval mode, a module like the dense one with fewer channels.
        plan: which units it kept, and how they were chosen.
        report: errors of each layer before and after compensation, see :func:`compensate`; ``None`` without.
        steps: what each step gained: ``step`` (``"cut"``, then those of the compensation), ``divergence`` of the
            outputs from the dense network's, as in :func:`sensitivity` but on the first 128 of the probe's images,
            which compensation has seen too, and ``seconds``.
        sensitivity: what the allocation went by, see :func:`sensitivity`; ``None`` for allocations without it.
    """

    model: nn.Module
    plan: Plan
    report: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    sensitivity: pd.DataFrame | None = None

    @property
    def macs(self) -> int:
        """Multiply–accumulates (MACs) of one image."""
        return self.plan.macs

    @property
    def dense_macs(self) -> int:
        """MACs of one image before pruning."""
        return self.plan.dense_macs

    def __repr__(self) -> str:
        """What was pruned, how, and what each step left: not the thousands of indices in the plan."""
        notes = self.plan.notes
        chosen = [str(notes[name]) for name in ("score", "allocation", "compensate") if name in notes]
        moved = "" if self.steps is None else " → ".join(f"{value:.3g}" for value in self.steps["divergence"])
        return (
            f"Slim({type(self.model).__name__}: {self.macs / 1e6:,.4g} of {self.dense_macs / 1e6:,.4g} M MACs "
            f"({100 * self.macs / self.dense_macs:.1f} %){', ' if chosen else ''}{'/'.join(chosen)}"
            f"{f', divergence {moved}' if moved else ''})"
        )

    def save(self, path: str | Path) -> None:
        """Save the network as ``<path>.safetensors``, which :func:`load_slim` reads."""
        save_slim(path, self.model, self.plan)


class Pruner:
    """A dense network that can be pruned in many ways, with the images that tell how.

    Args:
        model: dense network; it does not change.
        probe: images, and labels where a score needs them.
        place: device of the network; every process does all of the work.
        step: as for :func:`prune`.
        example: ``[B, …]`` images as the model takes them, also the batch whose latency counts; default the first ones
            of the probe, and the latency of one of them.
        protect: glob, or several, over the names of layers that keep all their channels.
        budget_of: what a budget is a share of, a key of :data:`COSTS`.
        round_to: number of channels of which every layer keeps a multiple, see :func:`fit_budget`.
        probe_size: maximum number of images.
        memory: gigabytes for whatever looks at images.
        progress: whether what takes long shows a progress bar in a terminal.

    Attributes:
        model: the dense network with plain weights, see :func:`plain`.
        batches: unlabelled images of the probe, in memory if they take at most a quarter of ``memory``.
        units: units that can be removed.
        macs: MACs as a function of the removed units.
        cost: what a budget is a share of, as a function of the removed units.

    Raises:
        ValueError: if the model does not run on the example, gives logits that are not finite or has nothing to
            remove, or if a pattern matches no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: ProbeSource,
        place: Placement | None = None,
        step: Step | None = None,
        *,
        example: Tensor | None = None,
        protect: str | Sequence[str] = (),
        budget_of: BudgetOf = "macs",
        round_to: int = 1,
        probe_size: int = IMAGES,
        memory: float = MEMORY,
        progress: bool = True,
    ) -> None:
        check_budget_of(budget_of)
        check_round_to(round_to)
        check_memory(memory)
        check_sizes(probe_size)
        self._place = place = replace(place or Placement.of(model), rank=0, world=1)
        self._probe, self._step, self._size, self._memory = probe, step, probe_size, memory
        self._progress = progress
        self._images_of = _images_of(model, step)
        self.batches = ImageBatches(probe, probe_size, place, self._images_of).within(memory / 4 * GIGABYTE)
        if example is not None:
            check_example(example, "example_input")
        given = None if example is None else place.to_device(example)
        images: Tensor = next(iter(self.batches)) if given is None else given
        self.model = model = plain(unwrapped(model))
        if step is not None:
            _check_step(model, step, _first_batch(probe, place))
        _check_single(model, images[:2])
        self.units = find_units(model, images[:1]).protect(protect)
        if not self.units.groups:
            raise ArgumentError(f"protect={protect!r}", "protects every layer; expected some left to prune")
        self.groups = tuple(self.units.groups.values())
        self.macs = Macs(model, self.groups, images[:1])
        timed = images[:1] if given is None else given
        self.cost: Cost = self.macs if budget_of == "macs" else COSTS[budget_of](model, self.groups, timed)
        self._round_to = round_to
        self._images, self._exact = images, _exactness(model, images)

    @property
    def _count(self) -> int:
        """Number of images in the batches, all of which have been read."""
        return self.batches.images if isinstance(self.batches, ImageBatches) else sum(map(len, self.batches))

    @cached_property
    def divergence(self) -> Divergence:
        """What outputs are compared by, see :func:`divergence_of`."""
        return divergence_of(self.model, self._probe, self._step, self._place)

    @cached_property
    def more(self) -> Iterable[Tensor]:
        """The probe's images up to :data:`MORE` times as many, for polish; held as :attr:`batches` are."""
        if self._count < self._size:  # there are no more
            return self.batches
        images = ImageBatches(self._probe, MORE * self._size, self._place, self._images_of, mixed=True)
        return images.within(self._memory / 4 * GIGABYTE)

    def scores(self, names: Sequence[str], seed: int = 0) -> Scores:
        """Score all channels, see :func:`channel_scores`."""
        return channel_scores(
            self.model,
            self._probe,
            self.units,
            names,
            step=self._step,
            probe_size=self._size,
            memory=self._memory,
            seed=seed,
            place=self._place,
            progress=self._progress,
        )

    def choose(
        self,
        scores: Scores,
        score: str,
        allocation: Allocation,
        budget: float,
        sensitivity: pd.DataFrame | None = None,
    ) -> dict[str, Tensor]:
        """Choose the units that stay.

        Args:
            scores: values of ``score``, and for ``"shared"`` of :data:`REFERENCE`.
            score: name of the score that ranks the units.
            allocation: one of :data:`ALLOCATIONS`, which decides how much each layer loses.
            budget: share of the dense network's cost that remains.
            sensitivity: what :meth:`sensitivity` measured, for the allocation of that name.

        Raises:
            ValueError: if the allocation is unknown, or the budget cannot be reached.
        """
        self.check_reachable(allocation, budget)
        if allocation == "sensitivity":
            assert sensitivity is not None
            order = sensitivity_order(self.macs, sensitivity)
        else:
            order = self._order(scores, score, allocation)
        values = unit_values if allocation == "own" else unit_ranks
        removed = fit_budget(self.cost, order, budget, self._round_to)
        return keep_best(self.groups, removed, {group.name: values(group, scores[score]) for group in self.groups})

    def sensitivity(self, scores: Scores, score: str, levels: int = LEVELS) -> pd.DataFrame:
        """Measure how far the outputs move as each group alone loses units in a score's order.

        Args:
            scores: values of ``score``.
            score: name of the score that ranks the units.
            levels: number of levels of removal.

        Returns:
            The table of :func:`measure_sensitivity`.
        """
        return measure_sensitivity(
            self.model,
            self.groups,
            {group.name: unit_ranks(group, scores[score]) for group in self.groups},
            self.batches,
            self._count,
            divergence=self.divergence,
            levels=levels,
            memory=self._memory,
            progress=self._progress,
        )

    def compensate(
        self,
        slim: nn.Module,
        kept: Mapping[str, Tensor],
        compensation: Kind | None,
        seed: int = 0,
        done: Callable[[str, nn.Module], None] = lambda _step, _slim: None,
    ) -> pd.DataFrame | None:
        """Compensate what :meth:`cut` gave, in place, unless ``compensation`` is ``None``.

        Args:
            slim: slim network.
            kept: group name → the units that stayed.
            compensation: its kind.
            seed: random seed of polish.
            done: called with the name of each step after it.

        Returns:
            The errors of each layer, see :func:`compensate`.
        """
        report = None
        if compensation:
            layerwise = "refit" if compensation == "distill" else compensation
            known = {"images": self._count, "memory": self._memory, "progress": self._progress}
            report = compensate(slim, self.model, self.groups, kept, self.batches, layerwise, **known)
            done(layerwise, slim)
        if compensation == "distill":
            known = {"memory": self._memory, "seed": seed, "progress": self._progress}
            polish(slim, self.model, self.groups, kept, self.more, divergence=self.divergence, **known)
            done("polish", slim)
        return report

    def check_reachable(self, allocation: Allocation, budget: float) -> None:
        """Raise ValueError if the allocation is unknown or the budget cannot be reached."""
        check_allocation(allocation)
        check_reachable(self.cost, budget, self._round_to)

    def count(self, kept: Mapping[str, Tensor]) -> int:
        """Return the MACs of one image with the units that stay."""
        removed = np.array([group.size - len(kept.get(group.name, range(group.size))) for group in self.groups])
        return round(self.macs.of(removed))

    def cut(self, kept: Mapping[str, Tensor]) -> nn.Module:
        """Return a slim copy of the model in eval mode, checked on the example images.

        Raises:
            ValueError: if its logits differ from those of the model with the removed channels masked. Then the forward
                pass depends on the data, or on sizes that pruning changes.
        """
        slim = clone(self.model).eval()
        remove(slim, self.groups, kept)
        with true_float32(self._images.device):
            reason = disagreement(self.model, slim, self.groups, kept, self._images, self._exact)
        if reason:
            raise InputError(
                f"{type(self.model).__name__} gives different logits after removal than with those "
                "channels set to zero: its forward pass depends on the data or hard-codes channel counts; protect= the "
                f"layers concerned ({reason})"
            )
        return slim

    def plan(self, slim: nn.Module, kept: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Plan:
        """Record how ``slim`` was pruned, so that it can be rebuilt; for a budget of latency also what was measured."""
        if isinstance(self.cost, Latency):
            measured = self.cost.conditions | {"slim_ms": round(self.cost.measure(slim), 3)}
            notes = {**notes, "latency": measured}
        return Plan.of(
            self.model,
            slim,
            self.groups,
            kept,
            input_shape=self._images.shape[1:],
            macs=count_macs(slim, self._images[:1]),
            dense_macs=self.macs.dense,
            notes=notes,
        )

    def _order(self, scores: Scores, score: str, allocation: Allocation) -> np.ndarray:
        if allocation == "uniform":
            return uniform_order(self.groups)
        by = scores[score if allocation == "own" else REFERENCE]
        return threshold_order(self.groups, {group.name: unit_values(group, by) for group in self.groups})


def _exactness(model: nn.Module, images: Tensor) -> float:
    """Return the share of the largest logit by which a slim network may differ from the masked one.

    Raises:
        ValueError: if a logit is not finite.
    """
    with observed(model):
        logits = logits_of(model(images))
    check_finite(logits, type(model).__name__)
    return max(_AGREE, _ROUNDINGS * torch.finfo(logits.dtype).eps)


def prune(
    model: nn.Module,
    probe: ProbeSource,
    budget: float,
    *,
    budget_of: BudgetOf = "macs",
    round_to: int = 1,
    score: str = "reconstruction",
    allocation: Allocation = "sensitivity",
    sensitivity: pd.DataFrame | None = None,
    compensate: Compensate = True,
    example_input: Tensor | None = None,
    protect: str | Sequence[str] = (),
    probe_size: int = IMAGES,
    memory: float = MEMORY,
    reestimate: bool = False,
    seed: int = 0,
    progress: bool = True,
    step: Step | None = None,
) -> Slim:
    """Prune a trained network to a share of its multiply–accumulates (MACs), parameters or latency, without retraining.

    Args:
        model: trained network from images to logits; it does not change.
        probe: training images under the evaluation transform, ``(images, labels)``, as for :func:`compute_axes`;
            only scores that need the task use the labels.
        budget: MACs that remain, as a share of the dense network's, in (0, 1]; or what ``budget_of`` names.
        budget_of: what the budget is a share of. ``"macs"``: the MACs of one image. ``"parameters"``: the number of
            parameters, without the biases that compensation may add. ``"latency"``: the time of a forward pass over
            ``example_input``, by default one image, uncompiled, on the model's device with PyTorch's present number of
            threads; some twenty slim networks are timed beside the dense one, and ``plan.notes["latency"]`` tells the
            conditions and the milliseconds.
        round_to: number of channels of which every pruned layer keeps a multiple; hardware is often faster at multiples
            of 8 or 16. A budget of MACs or parameters is then a bound, met as closely as such steps allow. Layers with
            fewer channels stay whole, and no other keeps fewer than ``round_to``. 1 allows every width.
        score: score that ranks the channels, one of README's list; the lowest go first. ``"reconstruction"``: one after
            the other the one whose loss those that remain can best make up for where they are read, see
            :func:`reconstruction_costs`; full-width ResNet-18 takes the time of about four forward passes over the
            probe. ``"l1"`` takes no time.
        allocation: way to choose how much each layer loses: ``"sensitivity"``, what moves the outputs least, measured
            by cutting one group of layers at a time, in the time of some 500 to 1,300 forward passes of an image
            for each (ResNet-50 has 37 groups); ``"uniform"``, the same share of each, which takes no time;
            ``"shared"``, as Taylor scores would choose; or ``"own"``, as the score itself would.
        sensitivity: table of :func:`sensitivity` for the same network and score, so that it is measured once for many
            budgets; only for the allocation of that name.
        compensate: kind of compensation, which fits the remaining weights to the dense network's activations:
            ``"refit"`` (or ``True``), ``"fold"``, or ``False`` for none; ``"distill"`` is a refit, after which all
            layers together learn to give the dense network's outputs in 600 steps of 128 images, see :func:`polish`.
            Those are drawn from up to ten times as many of the probe's images as ``probe_size``. It takes about as long
            as 77,000 forward passes of the dense network and three times as many of the slim one.
        example_input: images ``[B, …]`` as the model takes them; default the first ones of the probe.
        protect: glob, or several, over the names of layers that keep all their channels.
        probe_size: maximum number of probe images for scores and layer-wise compensation.
        memory: gigabytes (10⁹ bytes) that sensitivity, compensation and the score ``reconstruction`` take, whatever the
            number of images; less takes longer, and fits wide layers as if no ReLU followed them.
        reestimate: whether to re-estimate BatchNorm statistics at the end.
        seed: random seed of random scores and of polish.
        progress: whether to show progress bars in a terminal.
        step: ``(model, batch) → (logits, labels)`` for other batches than images, ``(images, labels)`` and the like;
            what it passes to the model are the images.

    Returns:
        The pruned network in ``.model``, a module like ``model``, in eval mode: call ``slim.model.train()`` before
        training it with your own loss. ``.macs`` and ``.dense_macs``; ``.steps``, what each step gained; ``.save``.

    Raises:
        ValueError: if the budget is out of range or below what protected layers take, ``round_to`` is no whole number
            from 1 to the widest layer, a name is unknown, the model does not run on the images or gives logits that are
            not finite, its logits after removal differ from those with the removed channels masked, or ``memory`` has
            no room for the activations of one image.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
        ...                       nn.Flatten(), nn.Linear(8, 4))
        >>> data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
        >>> slim = prune(model, data, budget=0.5)
        >>> round(slim.macs / slim.dense_macs, 2), slim.steps["step"].tolist()
        (0.5, ['cut', 'refit'])
    """
    with naming("prune"), undisturbed(model):
        check_seed(seed)
        check_budget_of(budget_of)
        check_budget(budget, COSTS[budget_of].unit)
        budget, compensation = float(budget), compensation_of(compensate)
        pruner = Pruner(
            model,
            probe,
            step=step,
            example=example_input,
            protect=protect,
            budget_of=budget_of,
            round_to=round_to,
            probe_size=probe_size,
            memory=memory,
            progress=progress,
        )
        table = check_sensitivity(sensitivity, allocation, pruner.groups)
        pruner.check_reachable(allocation, budget)
        scores = pruner.scores([score, REFERENCE] if allocation == "shared" else [score], seed)
        if allocation == "sensitivity" and table is None:
            table = pruner.sensitivity(scores, score)
        kept = pruner.choose(scores, score, allocation, budget, table)
        steps = _Steps(pruner)
        slim = pruner.cut(kept)
        steps.note("cut", slim)
        report = pruner.compensate(slim, kept, compensation, seed, steps.note)
        if reestimate:
            reestimate_norms(slim, pruner.batches)
            steps.note("reestimate", slim)
        notes = {"budget": budget, "budget_of": budget_of, "round_to": round_to}
        notes |= {"score": score, "allocation": allocation, "compensate": compensation or "none"}
        return Slim(slim, pruner.plan(slim, kept, notes), report, steps.table, table)


class _Steps:
    """What each step of a pruning gains.

    Args:
        pruner: has the dense network and images, of which some are enough.

    Attributes:
        table: the steps, see :class:`Slim`.
    """

    def __init__(self, pruner: Pruner) -> None:
        self._divergence: Divergence = pruner.divergence
        self._images = [part for images in some(pruner.batches, 0, _TOLD) for part in images.split(_AT_ONCE)]
        with observed(pruner.model):
            self._outputs = [logits_of(pruner.model(images)) for images in self._images]
        self._begin = perf_counter()
        self._rows: list[dict[str, Any]] = []

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows)

    def note(self, step: str, slim: nn.Module) -> None:
        """Note that a step is done."""
        spent = perf_counter() - self._begin
        with observed(slim):
            found = [logits_of(slim(images)) for images in self._images]
        moved = mean_divergence(self._divergence, self._outputs, found)
        self._rows.append({"step": step, "divergence": moved, "seconds": spent})
        self._begin = perf_counter()


def sensitivity(
    model: nn.Module,
    probe: ProbeSource,
    *,
    score: str = "reconstruction",
    levels: int = LEVELS,
    example_input: Tensor | None = None,
    protect: str | Sequence[str] = (),
    probe_size: int = IMAGES,
    memory: float = MEMORY,
    seed: int = 0,
    progress: bool = True,
    step: Step | None = None,
) -> pd.DataFrame:
    """Measure how far a network's outputs move when one group of layers at a time loses channels.

    After each cut, what reads the group is refitted. The table is what ``prune(…, allocation="sensitivity")`` goes by,
    and serves for every budget: ``prune(…, sensitivity=table)``.

    Args:
        model: trained network; it does not change.
        probe: training images under the evaluation transform, as for :func:`prune`; of labels only the kind counts,
            which tells how outputs are compared. The last quarter of the images, at most 128, is held out for that.
        score: score that ranks the channels; the lowest go first.
        levels: number of levels of removal, evenly spaced; the last leaves one unit.
        example_input: images ``[B, …]`` as the model takes them; default the first ones of the probe.
        protect: glob, or several, over the names of layers that keep all their channels.
        probe_size: maximum number of probe images.
        memory: gigabytes (10⁹ bytes) to take beside the network; less takes longer.
        seed: random seed of random scores.
        progress: whether to show progress bars in a terminal.
        step: as for :func:`prune`.

    Returns:
        One row per group and level: ``group``, its name; ``units`` that it has; ``removed`` of them, from 0 on; and
        ``divergence``. For classes this is the mean Kullback–Leibler divergence from the dense network's
        probabilities, in nats; for logits of labels that exclude none, the sum of each one's; for real numbers the
        squared error as a share of their variance.

    Raises:
        ValueError: as :func:`prune` does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
        ...                       nn.Flatten(), nn.Linear(8, 4))
        >>> table = sensitivity(model, TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4), levels=4)
        >>> table[["group", "removed"]].values.tolist()
        [['0', 0], ['0', 4], ['0', 8], ['0', 12], ['0', 15], ['2', 0], ['2', 2], ['2', 4], ['2', 6], ['2', 7]]
    """
    with naming("sensitivity"), undisturbed(model):
        check_seed(seed)
        pruner = Pruner(
            model,
            probe,
            step=step,
            example=example_input,
            protect=protect,
            probe_size=probe_size,
            memory=memory,
            progress=progress,
        )
        return pruner.sensitivity(pruner.scores([score], seed), score, levels)


def check_sensitivity(table: pd.DataFrame | None, allocation: str, groups: Sequence[Group]) -> pd.DataFrame | None:
    """Return a table that a user gave, checked against the groups of the network that is pruned.

    Raises:
        ValueError: if it is for another allocation or for other groups.
    """
    if table is None:
        return None
    if allocation != "sensitivity":
        raise ArgumentError("sensitivity=…", f"serves allocation='sensitivity' alone, not {allocation!r}")
    columns = {"group", "units", "removed", "divergence"}
    if not isinstance(table, pd.DataFrame) or not columns <= set(table.columns):
        raise ArgumentError(
            f"sensitivity={short(table)}", "expected the table that chanaxes_pl.sensitivity(model, probe) returns"
        )
    sizes = {str(name): int(units) for name, units in zip(table["group"], table["units"], strict=True)}
    for group in groups:
        if sizes.get(group.name) != group.size:
            has = f"{sizes[group.name]} units there" if group.name in sizes else "no row there"
            raise ArgumentError(
                "sensitivity=…",
                f"is of another network: the group {group.name!r} of {group.size} units has {has}; expected the table "
                "of this network with the same protect=",
            )
    parts = []
    for name, rows in table.assign(group=table["group"].astype(str)).groupby("group", sort=False):
        rows = rows.sort_values("removed")
        removed, divergence = (rows[column].to_numpy(float) for column in ("removed", "divergence"))
        if removed[0] != 0 or not (np.diff(removed) > 0).all() or not np.isfinite(divergence).all():
            raise ArgumentError(
                "sensitivity=…",
                f"has the rows {short(rows[['removed', 'divergence']].values.tolist())} for the group {name!r}; "
                "expected one for 0 removed units and one for each other number of them, with finite divergences",
            )
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def divergence_of(model: nn.Module, probe: ProbeSource, step: Step | None, place: Placement) -> Divergence:
    """Return what outputs are compared by, from the first outputs and the kind of their labels, if there are any."""
    with observed(model):
        return divergence_for(*stepped(step)(model, _first_batch(probe, place)))


def _first_batch(probe: ProbeSource, place: Placement) -> Any:
    _, batch = next(iter(Probe(probe, IMAGES).batches()))
    return place.to_device(batch)


def _check_single(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError if a model that takes two images loses the dimension of the batch where there is one."""
    if len(images) < 2:
        return
    with observed(model):
        try:
            two, one = (logits_of(model(images[:count])) for count in (2, 1))
        except FAILURES:  # told with its shapes when the channels are followed
            return
    if isinstance(one, Tensor) and isinstance(two, Tensor) and 0 < one.ndim < two.ndim:
        raise InputError(
            f"{type(model).__name__} gives {tuple(two.shape)} for two images and {tuple(one.shape)} for one: expected "
            "[1, …]; a squeeze() without a dimension takes that of the batch too, flatten(1) does not"
        )


def _images_of(model: nn.Module, step: Step | None) -> Callable[[Any], Any] | None:
    """Return the function from a batch to the images that a step passes to the model; ``None`` without a step."""
    if step is None:
        return None

    def images(batch: Any) -> Any:
        caught: list[Any] = []

        def catch(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.extend((*args, *kwargs.values()))
            raise _Called

        handle = model.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with observed(model), suppress(_Called):
                step(model, batch)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ArgumentError(
                "step=…", f"passes {len(caught)} values to {type(model).__name__}, expected its images alone"
            )
        return caught[0]

    return images


def _check_step(model: nn.Module, step: Step, batch: Any) -> None:
    """Raise ValueError if a step reads another output of the model than the logits that pruning goes by."""
    gave: list[Any] = []
    handle = model.register_forward_hook(lambda _model, _args, output: gave.append(output))
    try:
        with observed(model):
            outputs, _ = stepped(step)(model, batch)
    finally:
        handle.remove()
    others = [value for value in tree_leaves(gave) if isinstance(value, Tensor)]
    if not isinstance(outputs, Tensor) or any(_same_values(outputs, logits_of(output)) for output in gave):
        return
    if any(_same_values(outputs, other) for other in others):
        raise ArgumentError(
            "step=…",
            f"reads an output of {type(model).__name__} other than its logits, by which channels are chosen; expected "
            "a network that gives the logits first: wrap it in one that does",
        )


def _same_values(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and one.numel() == other.numel() and one.flatten().equal(other.flatten())


class _Called(Exception):
    """Raised by a hook when the model is called, which then does not run."""


def compensation_of(choice: Compensate) -> Kind | None:
    """Return the kind of compensation that a user chose, or ``None`` for none.

    Raises:
        ValueError: if there is no such choice.
    """
    if choice in (True, False, "none"):
        return "refit" if choice is True else None
    if choice == "distill" or (isinstance(choice, str) and choice in RIDGE):
        return choice
    raise ArgumentError(f"compensate={choice!r}", "expected True (the same as 'refit'), 'fold', 'distill', or False")


def check_budget_of(budget_of: str) -> None:
    """Raise ValueError unless ``budget_of`` is a key of :data:`COSTS`."""
    if budget_of not in COSTS:
        raise ArgumentError(f"budget_of={budget_of!r}", f"expected one of {', '.join(map(repr, COSTS))}")
