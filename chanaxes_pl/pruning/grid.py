"""Pruning at matched MACs: every score under every allocation at every budget, evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from chanaxes_pl.analysis.scores import score_family
from chanaxes_pl.core.errors import naming
from chanaxes_pl.core.targets import image_scores
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.probe import image_batches, images_and_labels
from chanaxes_pl.pruning.allocation import ALLOCATIONS, GRID, check_budget
from chanaxes_pl.pruning.pruner import IMAGES, REFERENCE, Pruner, fit_back, strength_of
from chanaxes_pl.pruning.scores import channel_scores, default_scores
from chanaxes_pl.tables import DENSE

_TIMED = 9


#: Fine-tunes a slim network in place.
FineTune = Callable[[nn.Module], None]


def pruning_grid(
    model: nn.Module,
    probe: DataLoader | Dataset,
    evaluation: Iterable[Any],
    *,
    budgets: Sequence[float] = GRID,
    scores: Sequence[str] | None = None,
    allocations: Sequence[str] = ALLOCATIONS,
    compensate: Sequence[bool | str] = (False,),
    protect: Sequence[str] = (),
    images: int = IMAGES,
    finetune: FineTune | None = None,
    latency: bool = False,
    seed: int = 0,
    progress: bool = True,
    to_device: Callable[[Any], Any] | None = None,
    rank: int = 0,
    world: int = 1,
) -> pd.DataFrame:
    """Accuracy over remaining MACs, for every score under every allocation with every kind of compensation.

    Args:
        model: the trained network; left as it is.
        probe: training images under the evaluation transform, for scores and compensation.
        evaluation: batches of ``(images, labels)`` that nothing was chosen on; read once a variant.
        budgets: MACs that remain, as shares of the dense network's.
        scores: see :func:`score_family`; default all that the network has.
        allocations: some of :data:`ALLOCATIONS`. Scores can be set against each other under ``"uniform"`` and
            ``"shared"``; ``"own"`` mixes score and allocation.
        compensate: some of ``False``, ``"fold"`` and ``"refit"``.
        protect: globs over names of layers whose channels all stay.
        images: of the probe, at the most.
        finetune: trains a slim network in place; it is evaluated once more afterwards.
        latency: time the slim networks too.
        seed: of random scores.
        progress: show a bar.
        to_device: moves a batch to the model.
        rank: of this process, which takes every ``world``-th variant.
        world: number of processes.

    Returns:
        One row a variant, and one for the dense network: ``score, family, allocation, compensate, budget``;
        ``macs_share`` (achieved), ``macs``, ``parameters``; ``loss`` (nats), ``accuracy``, ``margin``; the same after
        fine-tuning as ``tuned_…``; ``latency_1`` and ``latency_64`` (milliseconds a batch of 1 and of 64, median).

    Raises:
        ValueError: for anything out of range, before the first network is pruned.
    """
    with naming("pruning_grid"):
        for budget in budgets:
            check_budget(budget)
        for score in scores or ():
            score_family(score)
        strengths = [strength_of(choice) for choice in compensate]
        device = next(model.parameters(), torch.empty(0)).device
        move = to_device or partial(move_data_to_device, device=device)
        batches = image_batches(probe, images, move)
        pruner = Pruner(model, batches[0], protect)
        for allocation, budget in product(allocations, budgets):
            pruner.check_reachable(allocation, budget)
        scores = default_scores(model, pruner.units, batches[0]) if scores is None else scores
        needed = [*scores, REFERENCE] if "shared" in allocations else scores
        values = channel_scores(model, probe, pruner.units, needed, probe_size=images, seed=seed, to_device=to_device)
        variants = [(DENSE, "", "", 1.0), *product(scores, allocations, strengths, budgets)]
        rows = []
        for variant in tqdm(variants[rank::world], disable=not progress, desc="pruning", unit="network"):
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
            row |= evaluate(slim, evaluation, move)
            if finetune is not None and score != DENSE:
                finetune(slim)
                row |= {f"tuned_{name}": value for name, value in evaluate(slim, evaluation, move).items()}
            if latency:
                row |= {f"latency_{size}": milliseconds(slim, batches[0], size) for size in (1, 64)}
            rows.append(row)
        return pd.DataFrame(rows)


def evaluate(model: nn.Module, batches: Iterable[Any], to_device: Callable[[Any], Any]) -> dict[str, float]:
    """Mean cross-entropy (``loss``, nats), ``accuracy`` and logit ``margin`` of a model; it is left as it was."""
    total, count = torch.zeros(3, dtype=torch.float64), 0
    with observed(model):
        for batch in batches:
            logits, labels = images_and_labels(model, to_device(batch))
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
