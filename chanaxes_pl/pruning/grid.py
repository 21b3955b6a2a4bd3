"""Pruning grid: the accuracy of every score under every allocation at every budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from chanaxes_pl.analysis.scores import score_family
from chanaxes_pl.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    InputError,
    check_seed,
    check_several,
    is_whole,
    naming,
    short,
)
from chanaxes_pl.core.memory import MEMORY, check_memory
from chanaxes_pl.core.progress import bar
from chanaxes_pl.core.targets import check_classes, image_scores
from chanaxes_pl.network.batches import Placement, Step, stepped
from chanaxes_pl.network.hooks import observed, undisturbed
from chanaxes_pl.network.loaders import same_draws
from chanaxes_pl.network.probe import ProbeSource, check_rereadable, check_sizes
from chanaxes_pl.pruning.allocation import (
    GRID,
    Allocation,
    check_allocation,
    check_budget,
    check_round_to,
)
from chanaxes_pl.pruning.costs import count_parameters
from chanaxes_pl.pruning.latency import milliseconds
from chanaxes_pl.pruning.pruner import (
    COSTS,
    IMAGES,
    REFERENCE,
    BudgetOf,
    Compensate,
    Pruner,
    Scores,
    check_budget_of,
    compensation_of,
)
from chanaxes_pl.pruning.scores import default_scores
from chanaxes_pl.tables import DENSE, TUNED, VARIANT, read_parquet, write_parquet

#: Function that fine-tunes a slim network in place.
FineTune = Callable[[nn.Module], None]
#: Score, allocation, compensation and budget of one network of a grid.
Variant = tuple[str, Any, Any, float]
#: What stands for the network before pruning.
DENSE_VARIANT: Variant = (DENSE, "", None, 1.0)
#: Settings of a grid of which each row has one choice.
CHOICES = ("budgets", "scores", "allocations", "compensate")
# Column of a file of rows: what else they depend on, as text.
_SETTINGS = "settings"


@dataclass(frozen=True, kw_only=True)
class PruningExperiment:
    """Settings of a pruning grid, which holds every combination of score, allocation, compensation and budget.

    Args:
        budgets: MACs that remain, as shares of the dense network's; or what budget_of names.
        budget_of: what the budgets are shares of: "macs", "parameters", or "latency" (of one image, measured).
        round_to: number of channels of which every pruned layer keeps a multiple, such as 8; 1 allows every width.
        scores: names of scores that rank the channels, such as "taylor"; default all that apply to the network.
        allocations: ways to choose how much each layer loses: "uniform", "shared", "own" and "sensitivity". Compare
            scores under "uniform" and "shared"; "own" mixes score and allocation. "sensitivity", which prune takes by
            default, is left out by default, because it is measured for each score.
        compensate: kinds of compensation: false, "fold", "refit", and "distill" (a refit and 600 steps after it).
        protect: glob, or several, over the names of layers that keep all their channels.
        finetune_epochs: epochs of fine-tuning, after which each network is evaluated again; 0 for none.
        latency: whether to time the slim networks.
        probe_size: maximum number of probe images for scores and compensation.
        memory: gigabytes (10⁹ bytes) that sensitivity, compensation and the score "reconstruction" take, whatever the
            number of images; less takes longer.
        evaluation_size: number of test images for the accuracies, a fixed random choice; default all.
        seed: random seed of random scores and of fine-tuning.

    Raises:
        ValueError: if a name is unknown, or a number is out of range.
    """

    budgets: Sequence[float] = GRID
    budget_of: BudgetOf = "macs"
    round_to: int = 1
    scores: Sequence[str] | None = None
    allocations: Sequence[Allocation] = ("uniform", "shared", "own")
    compensate: Sequence[Compensate] = (False, "refit")
    protect: str | Sequence[str] = ()
    finetune_epochs: int = 0
    latency: bool = False
    probe_size: int = IMAGES
    memory: float = MEMORY
    evaluation_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        with naming("PruningExperiment"):
            for name in CHOICES:
                if (choices := getattr(self, name)) is None:
                    continue
                check_several(name, choices)
                if not len(choices):
                    raise ArgumentError(f"{name}={choices!r}", "expected one at least")
            check_budget_of(self.budget_of)
            check_round_to(self.round_to)
            for budget in self.budgets:
                check_budget(budget, COSTS[self.budget_of].unit)
            for score in self.scores or ():
                score_family(score)
            for allocation in self.allocations:
                check_allocation(allocation)
            for choice in self.compensate:
                compensation_of(choice)
            check_sizes(self.probe_size, self.evaluation_size)
            check_memory(self.memory)
            check_seed(self.seed)
            if not is_whole(self.finetune_epochs):
                raise ArgumentError(f"finetune_epochs={self.finetune_epochs!r}", "expected a whole number from 0 on")


def pruning_grid(
    model: nn.Module,
    probe: ProbeSource,
    evaluation: Iterable[Any],
    experiment: PruningExperiment | None = None,
    *,
    finetune: FineTune | None = None,
    progress: bool = True,
    place: Placement | None = None,
    step: Step | None = None,
    unfinished: str | Path | None = None,
    recipe: str = "",
) -> pd.DataFrame:
    """Prune a network in every way that the experiment names, and measure the accuracies.

    Args:
        model: trained network; it does not change.
        probe: training images under the evaluation transform, for scores and compensation.
        evaluation: batches of ``(images, labels)`` that no choice was based on; each variant reads them once.
        experiment: scores, allocations, compensations and budgets; default a :class:`PruningExperiment`. Of its
            settings ``evaluation_size`` is for :class:`PruneModule`.
        finetune: function that trains a slim network in place; the network is evaluated again afterwards.
        progress: whether to show a progress bar in a terminal.
        place: device and processes; default one process, on the device of the model's first parameter. Several
            processes take the variants in turn.
        step: ``(model, batch) → (logits, labels)`` for other batches, as for :func:`prune`.
        unfinished: file that keeps every row as soon as it is made, one for each process. If the grid is interrupted,
            another call with the same network, images and settings (but for more or fewer variants) goes on after the
            rows that the file holds, and says how many these are.
        recipe: what ``finetune`` does and ``step`` reads, in words of your own: rows of another recipe are made anew.

    Returns:
        One row per variant, and one for the dense network: ``score, family, allocation, compensate, budget``;
        ``budget_of``; ``macs_share`` (achieved), ``macs``, ``parameters``; ``loss`` (nats), ``accuracy``, ``margin``,
        and the same after fine-tuning as ``tuned_…``; ``latency_1`` and ``latency_64``, the median milliseconds for a
        batch of 1 and of 64.

    Raises:
        ValueError: if a budget cannot be reached, the data does not fit, or ``unfinished`` is another file; raised
            before the first network is pruned.
    """
    experiment = experiment or PruningExperiment()
    if not isinstance(experiment, PruningExperiment):
        raise ArgumentTypeError(f"pruning_grid(experiment={short(experiment)})", "expected a PruningExperiment(…)")
    with naming("pruning_grid"), undisturbed(model):
        check_rereadable(evaluation, "evaluation")
        place = place or Placement.of(model)
        pruner = Pruner(
            model,
            probe,
            place,
            step,
            protect=experiment.protect,
            budget_of=experiment.budget_of,
            round_to=experiment.round_to,
            probe_size=experiment.probe_size,
            memory=experiment.memory,
            progress=progress,
        )
        example = next(iter(pruner.batches))
        for allocation, budget in product(experiment.allocations, experiment.budgets):
            pruner.check_reachable(allocation, budget)
        scores = experiment.scores
        scores = default_scores(pruner.model, pruner.units, example) if scores is None else scores
        kinds = [compensation_of(choice) for choice in experiment.compensate]
        variants = [DENSE_VARIANT, *product(scores, experiment.allocations, kinds, experiment.budgets)]
        share = variants[place.rank :: place.world]
        dense = evaluate(model, evaluation, place, step)
        if not math.isfinite(dense["loss"]):
            raise InputError(
                f"{type(model).__name__} has a loss of {dense['loss']} on the evaluation images: expected a finite "
                "one; leave out images that hold NaN or infinity, or look for such values in the weights"
            )
        rank_zero_info(f"{len(variants) - 1} networks to prune and evaluate.")
        made = _Made(None, "")
        if unfinished is not None:
            seen = {"probe": _fingerprint(pruner.batches), "dense": dense}
            made = _Made.of(Path(unfinished), experiment, seen | {"recipe": recipe})
            if known := sum(variant in made.rows for variant in share):
                rank_zero_info(
                    f"{unfinished} holds {known} of {len(share)} networks of this grid, which goes on there."
                )
        left = [variant for variant in share if variant not in made.rows and variant != DENSE_VARIANT]
        values = _scores_of(pruner, left, experiment.seed)
        measured = dict.fromkeys(score for score, allocation, *_ in left if allocation == "sensitivity")
        tables = {score: pruner.sensitivity(values, score) for score in measured}
        for variant in bar(share, "pruning", "network", shown=progress):
            if variant in made.rows:
                continue
            score, allocation, compensation, budget = variant
            row = {"score": score, "family": DENSE, "allocation": allocation, "compensate": "", "budget": budget}
            slim, macs = model, pruner.macs.dense
            if variant != DENSE_VARIANT:
                kept = pruner.choose(values, score, allocation, budget, tables.get(score))
                slim, macs = pruner.cut(kept), pruner.count(kept)
                pruner.compensate(slim, kept, compensation, experiment.seed)
                row |= {"family": score_family(score), "compensate": compensation or "none"}
            row |= {"budget_of": experiment.budget_of, "macs_share": macs / pruner.macs.dense, "macs": macs}
            row |= {"parameters": count_parameters(slim)}
            row |= dense if variant == DENSE_VARIANT else evaluate(slim, evaluation, place, step)
            if finetune is not None and variant != DENSE_VARIANT:
                finetune(slim)
                row |= {f"{TUNED}{name}": value for name, value in evaluate(slim, evaluation, place, step).items()}
            if experiment.latency:
                row |= {f"latency_{count}": milliseconds(slim, example, count) for count in (1, 64)}
            made.add(variant, row)
        return pd.DataFrame([made.rows[variant] for variant in share])


def _scores_of(pruner: Pruner, variants: Sequence[Variant], seed: int) -> Scores:
    """Return the scores that some variants are chosen by."""
    if not variants:
        return {}
    needed = dict.fromkeys(score for score, *_ in variants)
    if any(allocation == "shared" for _, allocation, *_ in variants):
        needed[REFERENCE] = None
    return pruner.scores(list(needed), seed)


def _fingerprint(batches: Iterable[Tensor]) -> list[float]:
    """Return two numbers by which images are known again: a sum over all, and one that tells their order."""
    sums = torch.cat([images.flatten(1).double().sum(1).cpu() for images in batches])
    return [float(sums.sum()), float(sums @ torch.arange(len(sums), dtype=sums.dtype))]


class _Made:
    """Rows of a grid that are there already, by variant; each is also kept in a file as soon as it is made.

    Attributes:
        rows: variant → its row.
    """

    def __init__(self, path: Path | None, settings: str) -> None:
        self._path, self._settings = path, settings
        self.rows: dict[Variant, dict[str, Any]] = {}

    @classmethod
    def of(cls, path: Path, experiment: PruningExperiment, seen: Mapping[str, object]) -> _Made:
        """Return the rows of an interrupted grid of the same settings, on the same network and the same images.

        Args:
            path: file of the rows.
            experiment: settings of the grid.
            seen: by what network and images are known again, as JSON can hold it.

        Raises:
            ValueError: if the file is there, and is none of such rows.
        """
        settings = {field.name: getattr(experiment, field.name) for field in fields(experiment)}
        settings = {name: value for name, value in settings.items() if name not in CHOICES}
        made = cls(path, json.dumps({**settings, **seen}, default=list))
        if path.exists():
            table = read_parquet(path, (*VARIANT, _SETTINGS))
            for row in table[table[_SETTINGS] == made._settings].drop(columns=_SETTINGS).to_dict("records"):
                row = {str(name): value for name, value in row.items()}
                compensation = None if row["compensate"] in ("", "none") else row["compensate"]
                made.rows[row["score"], row["allocation"], compensation, row["budget"]] = row
        return made

    def add(self, variant: Variant, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows[variant] = row
        if self._path is not None:
            write_parquet(pd.DataFrame(self.rows.values()).assign(**{_SETTINGS: self._settings}), self._path)


def evaluate(model: nn.Module, batches: Iterable[Any], place: Placement, step: Step | None = None) -> dict[str, float]:
    """Return the mean cross-entropy (``loss``, nats), ``accuracy`` and logit ``margin``; the model does not change."""
    total, count = torch.zeros(3, dtype=torch.float64), 0
    with observed(model):
        for batch in same_draws(batches):
            logits, labels = stepped(step)(model, place.to_device(batch))
            check_classes(logits, labels)
            total += image_scores(logits.cpu().double(), labels.cpu().long()).sum(0)
            count += len(labels)
    if not count:
        raise ArgumentError("evaluation", "it holds no images")
    return dict(zip(("loss", "accuracy", "margin"), (total / count).tolist(), strict=True))
