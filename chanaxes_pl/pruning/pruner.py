"""A smaller network that computes nearly the same: from a score, an allocation and a budget to a slim model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from chanaxes_pl.core.errors import ArgumentError, InputError, naming
from chanaxes_pl.core.moments import true_float32
from chanaxes_pl.network.groups import find_units
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.macs import Cost, count_macs
from chanaxes_pl.network.probe import Placement, image_batches
from chanaxes_pl.network.removal import clone, disagreement, remove
from chanaxes_pl.pruning.allocation import (
    check_allocation,
    check_budget,
    fit_budget,
    keep_best,
    threshold_order,
    uniform_order,
)
from chanaxes_pl.pruning.compensation import RIDGE, compensate, reestimate_norms
from chanaxes_pl.pruning.scores import channel_scores, unit_ranks, unit_values
from chanaxes_pl.pruning.slim_file import Plan, save_slim

#: The score whose allocation ``"shared"`` imposes on every other.
REFERENCE = "taylor"
#: Images that compensation fits to, unless told otherwise.
IMAGES = 2000
# Before compensation a slim network's logits are those of the dense one with the removed channels at 0, but for
# rounding: to this share of the largest logit, or to this many times the precision of 16-bit logits.
_AGREE, _ROUNDINGS = 1e-3, 16


#: Score → layer → ``[C]``, as :func:`channel_scores` gives them.
Scores = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Slim:
    """A pruned network, and what was done to it.

    Attributes:
        model: the slim network, in eval mode; a module like the dense one, with fewer channels.
        plan: which units it kept, and how they were chosen.
        report: what compensation did to each layer, see :func:`compensate`; ``None`` without.
    """

    model: nn.Module
    plan: Plan
    report: Any = None

    @property
    def macs(self) -> int:
        """Multiply–accumulates of one image."""
        return self.plan.macs

    @property
    def dense_macs(self) -> int:
        """The same before pruning."""
        return self.plan.dense_macs

    def save(self, path: str | Path) -> None:
        """Write ``<path>.safetensors``, which :func:`load_slim` reads."""
        save_slim(path, self.model, self.plan)


class Pruner:
    """A dense network, ready to be pruned in many ways.

    Args:
        model: left as it is.
        example: ``[B, …]``, images as the model takes them, on its device.
        protect: globs over names of layers whose channels all stay.

    Attributes:
        units: what can be removed.
        cost: its MACs.

    Raises:
        ValueError: if the model does not run on the example or gives logits that are not finite, has nothing to
            remove, or a pattern matches nothing.
    """

    def __init__(self, model: nn.Module, example: Tensor, protect: Sequence[str] = ()) -> None:
        self.model = model
        self.units = find_units(model, example[:1]).protect(protect)
        if not self.units.groups:
            raise ArgumentError(f"protect={list(protect)!r}", "protects every layer; expected some left to prune")
        self.groups = tuple(self.units.groups.values())
        self.cost = Cost(model, self.groups, example[:1])
        self._example = example[:1]
        self._images = example
        self._exact = _exactness(model, example)

    def choose(self, scores: Scores, score: str, allocation: str, budget: float) -> dict[str, Tensor]:
        """The units that stay.

        Args:
            scores: has ``score``, and :data:`REFERENCE` for ``"shared"``.
            score: which units go first.
            allocation: one of :data:`ALLOCATIONS`, how much each layer loses.
            budget: MACs that remain, as a share of the dense network's.

        Raises:
            ValueError: for an unknown allocation, or a budget that cannot be reached.
        """
        self.check_reachable(allocation, budget)
        by = unit_values if allocation == "own" else unit_ranks
        values = {group.name: by(group, scores[score]) for group in self.groups}
        removed = fit_budget(self.cost, self._order(scores, score, allocation), budget)
        return keep_best(self.groups, removed, values)

    def check_reachable(self, allocation: str, budget: float) -> None:
        """Check that the allocation exists and the budget is reachable.

        Raises:
            ValueError: in either case.
        """
        check_allocation(allocation)
        fit_budget(self.cost, uniform_order(self.groups), budget)

    def macs(self, kept: Mapping[str, Tensor]) -> int:
        """Multiply–accumulates of one image with these units."""
        removed = np.array([group.size - len(kept.get(group.name, range(group.size))) for group in self.groups])
        return round(self.cost.macs(removed))

    def cut(self, kept: Mapping[str, Tensor]) -> nn.Module:
        """A slim copy of the model, in eval mode, checked on the example images.

        Raises:
            ValueError: if its logits are not those of the model with the removed channels at 0: the forward pass
                depends on the data, or on sizes that pruning changes.
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
        """What was done, for the record and to do it again."""
        return Plan.of(
            self.model,
            slim,
            self.groups,
            kept,
            input_shape=self._example.shape[1:],
            macs=count_macs(slim, self._example),
            dense_macs=self.cost.dense,
            notes=notes,
        )

    def _order(self, scores: Scores, score: str, allocation: str) -> np.ndarray:
        if allocation == "uniform":
            return uniform_order(self.groups)
        by = scores[score if allocation == "own" else REFERENCE]
        return threshold_order(self.groups, {group.name: unit_values(group, by) for group in self.groups})


def _exactness(model: nn.Module, images: Tensor) -> float:
    """The share of the largest logit by which a slim network may differ from the masked one.

    Raises:
        ValueError: if logits are not finite.
    """
    with observed(model):
        logits = model(images)
    bad = len(logits) - int(logits.flatten(1).isfinite().all(1).sum())
    if bad:
        raise InputError(
            f"{type(model).__name__} gives logits with NaN or infinity for {bad} of {len(logits)} images: "
            "expected finite ones; look for such values in those images and in the weights"
        )
    return max(_AGREE, _ROUNDINGS * torch.finfo(logits.dtype).eps)


def prune(
    model: nn.Module,
    probe: DataLoader | Dataset,
    *,
    budget: float,
    score: str = "l1",
    allocation: str = "uniform",
    compensate: bool | str = True,
    example_input: Tensor | None = None,
    protect: Sequence[str] = (),
    probe_size: int = IMAGES,
    reestimate: bool = False,
    seed: int = 0,
) -> Slim:
    """A smaller network with a share of the multiply–accumulates of a trained one, without retraining.

    Args:
        model: the trained network, from images to logits; left as it is.
        probe: training images under the evaluation transform, ``(images, labels)``, as for :func:`compute_axes`;
            labels are used by scores that need the task only.
        budget: MACs that remain, as a share of the dense network's, in (0, 1].
        score: which channels go first, see :data:`SCORES`.
        allocation: how much each layer loses: ``"uniform"``, ``"shared"`` (as Taylor would choose) or ``"own"``.
        compensate: fit what is left to the dense network's signals: ``"refit"`` (or ``True``), ``"fold"``, or not.
        example_input: images ``[B, …]`` as the model takes them; default the probe's first.
        protect: globs over names of layers whose channels all stay.
        probe_size: images of the probe that scores and compensation use, at most.
        reestimate: estimate BatchNorm statistics anew at the end.
        seed: of random scores.

    Raises:
        ValueError: for a budget out of range or below what protected layers cost, unknown names, a model that does not
            run on the images or gives logits that are not finite, or whose logits after removal are not those with the
            removed channels at 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
        ...                       nn.Flatten(), nn.Linear(8, 4))
        >>> data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
        >>> slim = prune(model, data, budget=0.5)
        >>> slim.model[0], round(slim.macs / slim.dense_macs, 2)
        (Conv2d(3, 10, kernel_size=(3, 3), stride=(1, 1)), 0.5)
    """
    with naming("prune"):
        check_budget(budget)
        strength = strength_of(compensate)
        place = Placement.of(model)
        batches = image_batches(probe, probe_size, place)
        example = batches[0] if example_input is None else place.to_device(example_input)
        pruner = Pruner(model, example, protect)
        needed = [score, REFERENCE] if allocation == "shared" else [score]
        scores = channel_scores(model, probe, pruner.units, needed, probe_size=probe_size, seed=seed, place=place)
        kept = pruner.choose(scores, score, allocation, budget)
        slim = pruner.cut(kept)
        report = fit_back(slim, pruner, kept, batches, strength, reestimate)
        notes = {"budget": budget, "score": score, "allocation": allocation, "compensate": strength or "none"}
        return Slim(slim, pruner.plan(slim, kept, notes), report)


def fit_back(
    slim: nn.Module,
    pruner: Pruner,
    kept: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    strength: str,
    reestimate: bool = False,
) -> Any:
    """Compensate a slim network in place, if ``strength`` says so; the report of :func:`compensate`."""
    report = compensate(slim, pruner.model, pruner.groups, kept, batches, strength) if strength else None
    if reestimate:
        reestimate_norms(slim, batches)
    return report


def strength_of(choice: bool | str) -> str:
    """``""``, ``"fold"`` or ``"refit"`` from what a user may say.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(choice, str) and choice in RIDGE:
        return choice
    if choice in (True, False, "none"):
        return "refit" if choice is True else ""
    raise ArgumentError(f"compensate={choice!r}", "expected True (the same as 'refit'), 'fold', or False")
