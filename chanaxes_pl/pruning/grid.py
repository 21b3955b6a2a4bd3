"""Pruning at matched MACs: every score under every allocation at every budget, evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from chanaxes_pl.analysis.scores import score_family
from chanaxes_pl.core.errors import ArgumentError, naming
from chanaxes_pl.core.targets import image_scores
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.probe import Placement, check_sizes, image_batches, images_and_labels
from chanaxes_pl.pruning.allocation import ALLOCATIONS, GRID, check_allocation, check_budget
from chanaxes_pl.pruning.pruner import IMAGES, REFERENCE, Pruner, fit_back, strength_of
from chanaxes_pl.pruning.scores import channel_scores, default_scores
from chanaxes_pl.tables import DENSE

_TIMED = 9


#: Fine-tunes a slim network in place.
FineTune = Callable[[nn.Module], None]


@dataclass(frozen=True, kw_only=True)
class PruningExperiment:
    """Which networks a pruning grid holds: every score × allocation × compensation × budget.

    Args:
        budgets: MACs that remain, as shares of the dense network's.
        scores: which channels go first, see :func:`score_family`; default all that the network has.
        allocations: how much each layer loses: some of "uniform", "shared" and "own". Scores can be compared under
            "uniform" and "shared"; "own" mixes score and allocation.
        compensate: some of false, "fold" and "refit".
        protect: globs over names of layers whose channels all stay.
        finetune_epochs: epochs that each network is fine-tuned for, and then evaluated again; 0 for none.
        latency: time the slim networks.
        probe_size: images for scores and compensation, at most.
        evaluation_size: test images for the accuracies, a fixed random choice; default all.
        seed: seed of random scores and of fine-tuning.

    Raises:
        ValueError: for an unknown name, or a number out of range.
    """

    budgets: Sequence[float] = GRID
    scores: Sequence[str] | None = None
    allocations: Sequence[str] = ALLOCATIONS
    compensate: Sequence[bool | str] = (False, "refit")
    protect: Sequence[str] = ()
    finetune_epochs: int = 0
    latency: bool = False
    probe_size: int = IMAGES
    evaluation_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        with naming("PruningExperiment"):
            for budget in self.budgets:
                check_budget(budget)
            for score in self.scores or ():
                score_family(score)
            for allocation in self.allocations:
                check_allocation(allocation)
            for choice in self.compensate:
                strength_of(choice)
            check_sizes(self.probe_size, self.evaluation_size)
            if self.finetune_epochs < 0:
                raise ArgumentError(f"finetune_epochs={self.finetune_epochs}", "expected 0 or more")


def pruning_grid(
    model: nn.Module,
    probe: DataLoader | Dataset,
    evaluation: Iterable[Any],
    experiment: PruningExperiment | None = None,
    *,
    finetune: FineTune | None = None,
    progress: bool = True,
    place: Placement | None = None,
) -> pd.DataFrame:
    """Measure accuracy over remaining MACs, for every score under every allocation with every kind of compensation.

    Args:
        model: the trained network; left as it is.
        probe: training images under the evaluation transform, for scores and compensation.
        evaluation: batches of ``(images, labels)`` that nothing was chosen on; read once a variant.
        experiment: which variants.
        finetune: trains a slim network in place; it is evaluated once more afterwards.
        progress: show a bar where output goes to a terminal.
        place: where the model runs; default one process, on the device of its first parameter. Of several processes
            each takes every so many-th variant.

    Returns:
        One row a variant, and one for the dense network: ``score, family, allocation, compensate, budget``;
        ``macs_share`` (achieved), ``macs``, ``parameters``; ``loss`` (nats), ``accuracy``, ``margin``; the same after
        fine-tuning as ``tuned_…``; ``latency_1`` and ``latency_64`` (milliseconds a batch of 1 and of 64, median).

    Raises:
        ValueError: for a budget that cannot be reached, or data that does not fit, before the first network is pruned.
    """
    experiment = experiment or PruningExperiment()
    size, seed = experiment.probe_size, experiment.seed
    with naming("pruning_grid"):
        place = place or Placement.of(model)
        batches = image_batches(probe, size, place)
        pruner = Pruner(model, batches[0], experiment.protect)
        for allocation, budget in product(experiment.allocations, experiment.budgets):
            pruner.check_reachable(allocation, budget)
        scores = experiment.scores
        scores = default_scores(model, pruner.units, batches[0]) if scores is None else scores
        needed = [*scores, REFERENCE] if "shared" in experiment.allocations else scores
        alone = replace(place, rank=0, world=1)  # every process scores all channels
        values = channel_scores(model, probe, pruner.units, needed, probe_size=size, seed=seed, place=alone)
        strengths = [strength_of(choice) for choice in experiment.compensate]
        variants = [(DENSE, "", "", 1.0), *product(scores, experiment.allocations, strengths, experiment.budgets)]
        share, quiet = variants[place.rank :: place.world], None if progress else True
        rows = []
        for variant in tqdm(share, disable=quiet, desc="pruning", unit="network"):
            score, allocation, strength, budget = variant
            if score == DENSE:
                slim, macs = model, pruner.cost.dense
            else:
                kept = pruner.choose(values, score, allocation, budget)
                slim, macs = pruner.cut(kept), pruner.macs(kept)
                fit_back(slim, pruner, kept, batches, strength)
            row = {"score": score, "family": DENSE if score == DENSE else score_family(score), "allocation": allocation}
            row |= {"compensate": strength or ("" if score == DENSE else "none"), "budget": budget}
            row |= {"macs_share": macs / pruner.cost.dense, "macs": macs}
            row |= {"parameters": sum(parameter.numel() for parameter in slim.parameters())}
            row |= evaluate(slim, evaluation, place)
            if finetune is not None and score != DENSE:
                finetune(slim)
                row |= {f"tuned_{name}": value for name, value in evaluate(slim, evaluation, place).items()}
            if experiment.latency:
                row |= {f"latency_{count}": milliseconds(slim, batches[0], count) for count in (1, 64)}
            rows.append(row)
        return pd.DataFrame(rows)


def evaluate(model: nn.Module, batches: Iterable[Any], place: Placement) -> dict[str, float]:
    """Mean cross-entropy (``loss``, nats), ``accuracy`` and logit ``margin`` of a model; it is left as it was."""
    total, count = torch.zeros(3, dtype=torch.float64), 0
    with observed(model):
        for batch in batches:
            logits, labels = images_and_labels(model, place.to_device(batch))
            total += image_scores(logits.cpu().double(), labels.cpu().long()).sum(0)
            count += len(labels)
    return dict(zip(("loss", "accuracy", "margin"), (total / max(count, 1)).tolist(), strict=True))


def milliseconds(model: nn.Module, images: Tensor, size: int) -> float:
    """Median time of a forward pass over a batch of ``size`` images ``[size, …]``, made of those given."""
    batch = images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]
    times = []
    with observed(model):
        for _ in range(_TIMED + 2):  # the first two warm up
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            begin = time.perf_counter()
            model(batch)
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])
