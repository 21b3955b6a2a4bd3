"""Table of damage: how loss, accuracy and margin change when a channel is removed, set to its mean or rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor, nn

from chanaxes_pl.analysis.damage import CLEAR
from chanaxes_pl.analysis.scores import score_family
from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, check_seed, check_several, is_whole, naming, short
from chanaxes_pl.core.progress import bar
from chanaxes_pl.core.targets import check_classes, check_finite, image_scores, lifted
from chanaxes_pl.lesions.interventions import (
    OPERATIONS,
    Intervention,
    Interventions,
    Key,
    Operation,
    Row,
    check_places,
)
from chanaxes_pl.lesions.replacements import Replacement, check_operations, measure_replacements
from chanaxes_pl.network.batches import Placement, Step, default_step, split_batch, stepped
from chanaxes_pl.network.hooks import observed, undisturbed
from chanaxes_pl.network.layers import channel_count, select_layers
from chanaxes_pl.network.loaders import same_draws
from chanaxes_pl.network.probe import Probe, ProbeSource, check_rereadable, check_sizes
from chanaxes_pl.network.recording import Settings
from chanaxes_pl.network.tracing import PartialForward
from chanaxes_pl.units.groups import Units, find_units
from chanaxes_pl.units.plain import plain


@dataclass(frozen=True, kw_only=True)
class LesionExperiment:
    """Settings of a lesion experiment: which channels, which operations, and how many images.

    Args:
        layers: layers to lesion: "auto", "conv", "conv+linear", or globs over layer names; see
            :func:`select_layers`.
        operations: operations to try: "zero" (zero ablation of the channel's unit), "mean" (mean ablation), "peer"
            and "hull" (reconstruction from all peers, or from a few).
        channels: channels to lesion: "all", a number to draw at random from each layer, or layer name → channels.
        scores: names of scores to list beside the damage, such as "taylor"; default all that apply to the network.
        probe_size: maximum number of probe images for axes, scores, means and coefficients.
        evaluation_size: number of test images for the damage, a fixed random choice; default all.
        seed: random seed of the choice of channels and of random scores.

    Raises:
        ValueError: if an operation is unknown, or a number is out of range.
    """

    layers: str | Sequence[str] = "auto"
    operations: Sequence[Operation] = OPERATIONS
    channels: int | Literal["all"] | Mapping[str, Sequence[int]] = "all"
    scores: Sequence[str] | None = None
    probe_size: int = 5000
    evaluation_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        with naming("LesionExperiment"):
            check_several("operations", self.operations)
            if not len(self.operations):
                raise ArgumentError(f"operations={self.operations!r}", "expected one at least")
            check_operations(self.operations, OPERATIONS)
            if self.scores is not None:
                check_several("scores", self.scores)
            for score in self.scores or ():
                score_family(score)
            check_sizes(self.probe_size, self.evaluation_size)
            check_seed(self.seed)
            several = isinstance(self.channels, Mapping) and len(self.channels) > 0
            if not (is_whole(self.channels, 1) or several or self.channels == "all"):
                raise ArgumentError(
                    f"channels={self.channels!r}",
                    "expected 'all', a number of channels per layer (above 0), or layer name → channels",
                )


def lesion_table(
    model: nn.Module,
    probe: ProbeSource | None,
    evaluation: Iterable[Any],
    experiment: LesionExperiment | None = None,
    *,
    units: Units | None = None,
    step: Step | None = None,
    positions: int | Literal["all"] = 16,
    fast: bool = True,
    progress: bool = True,
    place: Placement | None = None,
) -> pd.DataFrame:
    """Measure the damage that lesions do on evaluation data, one channel at a time; the model does not change.

    Each batch runs once through the intact model; a lesion then repeats only the modules downstream of it. With
    several processes, the channels are dealt out in turn; :func:`join_shares` joins the tables of all processes.

    Args:
        model: network such that ``model(images)`` gives logits ``[B, K]``. Its layers are those that it has with plain
            weights, as for :func:`find_units`.
        probe: data that means and coefficients are measured on; ``None`` if ``"zero"`` is the only operation.
        evaluation: batches of ``(images, labels)`` that are not in the probe.
        experiment: channels, operations and size of the probe; default a :class:`LesionExperiment`. Of its settings
            ``evaluation_size`` and ``scores`` are for :class:`PruneModule`.
        units: the model's units; by default found with the first evaluation image.
        step: ``(model, batch) → (logits, labels)``; with it, each lesion costs a whole forward pass.
        positions: number of local samples per probe image, or ``"all"``.
        fast: whether a lesion repeats only the modules downstream of it.
        progress: whether to show a progress bar in a terminal.
        place: device and processes; default one process, on the device of the model's first parameter.

    Returns:
        One row per channel: ``layer, channel, unit`` (its group, and its number there; empty if it cannot be removed).
        For each operation, the change of mean cross-entropy ``<op>_loss`` (nats), its standard error over images
        ``<op>_loss_se``, and the changes of accuracy ``<op>_accuracy`` (share) and of the mean logit margin
        ``<op>_margin``. ``peer_recovery`` and ``hull_recovery`` are 1 − damage / damage of ``mean``, and NaN unless
        the latter exceeds 0 by 2 standard errors. ``reason`` says why lesions are missing. ``attrs["baseline"]``
        holds ``loss``, ``accuracy`` and ``margin`` of the intact model, and the number of ``images``.

    Raises:
        ValueError: if a layer or channel is unknown, or the data does not fit.
    """
    experiment = experiment or LesionExperiment()
    if not isinstance(experiment, LesionExperiment):
        raise ArgumentTypeError(f"lesion_table(experiment={short(experiment)})", "expected a LesionExperiment(…)")
    operations = experiment.operations
    with naming("lesion_table"), undisturbed(model):
        check_rereadable(evaluation, "evaluation")
        model = plain(model)
        modules = select_layers(model, experiment.layers, whole=True)
        settings = Settings(
            layers=modules,
            positions=positions,
            reliability=False,
            step=step,
            probe_size=experiment.probe_size,
        )
        place = place or Placement.of(model)
        places = _places(modules, experiment.channels, experiment.seed)
        replacements: dict[str, Replacement] = {}
        with observed(model):
            if not set(operations) <= {"zero"}:
                if probe is None:
                    raise ArgumentError("probe=None", "expected a probe for all operations but 'zero'")
                alone = replace(place, rank=0, world=1)  # every process measures on the whole probe
                replacements = measure_replacements(model, Probe(probe, experiment.probe_size), settings, alone)
            if "zero" in operations and units is None:
                units = _units_of_first(model, evaluation, place, step)
            planned = Interventions(model, modules, replacements, units)
            rows = [planned.row(layer, channel, operations) for layer, channel in places[place.rank :: place.world]]
            damage = _Damage(model, list(planned.chosen.values()), step, fast)
            batches = sized_len(evaluation)
            total = None if batches is None else batches * len(planned.chosen)
            with bar(None, "lesions", "lesion", total=total, shown=progress) as shown:
                for batch in same_draws(evaluation):
                    damage.add(place.to_device(batch), shown.update)
        if not damage.images:
            raise ArgumentError("evaluation", "it holds no images")
        return _table(rows, damage, list(planned.chosen), operations)


def _places(
    modules: Mapping[str, nn.Module], channels: int | Literal["all"] | Mapping[str, Iterable[int]], seed: int
) -> list[tuple[str, int]]:
    """Return the layer and channel of every lesion, in the order of the table."""
    widths = {name: channel_count(module) for name, module in modules.items()}
    if isinstance(channels, Mapping):
        chosen = {layer: _numbers(layer, of_layer) for layer, of_layer in channels.items()}
        check_places(modules, chosen)
    elif channels == "all":
        chosen = {layer: list(range(width)) for layer, width in widths.items()}
    else:
        chosen = {
            layer: np.sort(np.random.default_rng([seed, number]).permutation(width)[:channels]).tolist()
            for number, (layer, width) in enumerate(widths.items())
        }
    return [(layer, channel) for layer, of_layer in chosen.items() for channel in of_layer]


def _numbers(layer: str, channels: object) -> list[int]:
    """Return channels of a layer, given as whole numbers of any kind, as int."""
    try:
        return [index(channel) for channel in channels]  # type: ignore[attr-defined]
    except TypeError:
        raise ArgumentTypeError(
            f"channels={{{layer!r}: {short(channels)}, …}}", "expected the numbers of channels, such as [0, 5]"
        ) from None


def _units_of_first(model: nn.Module, evaluation: Iterable[Any], place: Placement, step: Step | None) -> Units:
    if step is not None:
        raise ArgumentError("step=…", "with a custom step, 'zero' needs units=find_units(model, example)")
    batch = next(same_draws(evaluation), None)
    if batch is None:
        raise ArgumentError("evaluation", "it holds no images")
    moved = place.to_device(batch)
    with observed(model):
        check_classes(*default_step(model, moved))
    return find_units(model, split_batch(moved)[0][:1])


class _Damage:
    """Sums over images, in float64, of the effect of every intervention on each image."""

    def __init__(self, model: nn.Module, interventions: Sequence[Intervention], step: Step | None, fast: bool) -> None:
        self._model = model
        self._interventions = interventions
        self._step = stepped(step)
        self._forward = PartialForward(model) if fast and step is None else None
        self.images = 0
        self._sums: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._intact: Tensor | float = 0.0

    def add(self, batch: Any, advance: Callable[[], Any]) -> None:
        """Add the effects on one batch."""
        logits, labels = self._step(self._model, batch)
        check_classes(logits, labels)
        check_finite(logits, type(self._model).__name__)
        labels = lifted(labels)
        intact = image_scores(lifted(logits), labels)
        if self._forward is not None:
            self._forward.run(split_batch(batch)[0], logits)
        differences = []
        for intervention in self._interventions:
            difference = image_scores(lifted(self._logits(intervention, batch)), labels) - intact
            differences.append(torch.stack([difference.sum(0), difference.square().sum(0)]))
            advance()
        both = torch.stack(differences) if differences else intact.new_zeros(0, 2, 3)
        self._sums, self._squares = self._sums + both[:, 0], self._squares + both[:, 1]
        self._intact = self._intact + intact.sum(0)
        self.images += len(labels)

    def _logits(self, intervention: Intervention, batch: Any) -> Tensor:
        if self._forward is not None:
            return intervention.rerun(self._model, self._forward)
        with intervention.applied(self._model):
            return self._step(self._model, batch)[0]

    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean effects ``[interventions, 3]``, their standard errors, and the means of the intact model."""
        totals = (self._sums, self._squares, self._intact)
        sums, squares, intact = (torch.as_tensor(total).cpu().numpy() for total in totals)
        means = sums / self.images
        spread = np.maximum(squares - self.images * means**2, 0.0)
        errors = np.sqrt(spread / (self.images - 1) / self.images) if self.images > 1 else np.full_like(means, np.nan)
        return means, errors, intact / self.images


def _table(rows: list[Row], damage: _Damage, keys: list[Key], operations: Sequence[Operation]) -> pd.DataFrame:
    means, errors, intact = damage.means()
    number: dict[Key | None, int] = {key: place for place, key in enumerate(keys)}
    # The last row, number −1, is NaN for lesions that could not be made.
    means, errors = (np.vstack([values, np.full((1, 3), np.nan)]) for values in (means, errors))
    table = pd.DataFrame({name: [row[name] for row in rows] for name in ("layer", "channel", "unit")})
    for operation in operations:
        places = [number.get(row["keys"][operation], -1) for row in rows]
        table[f"{operation}_loss"], table[f"{operation}_loss_se"] = means[places, 0], errors[places, 0]
        table[f"{operation}_accuracy"], table[f"{operation}_margin"] = means[places, 1], means[places, 2]
    for operation in ("peer", "hull"):
        if operation in operations and "mean" in operations:
            clear = table["mean_loss"] > CLEAR * table["mean_loss_se"]
            share = table[f"{operation}_loss"] / table["mean_loss"].where(clear)
            table[f"{operation}_recovery"] = 1 - share
    table["reason"] = [row["reason"] for row in rows]
    names = ("loss", "accuracy", "margin", "images")
    table.attrs["baseline"] = dict(zip(names, (*intact.tolist(), damage.images), strict=True))
    return table


def join_shares(shares: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the tables of all processes, given in the order of their ranks, into one; they may come from disk."""
    placed = [share.set_axis(rank + len(shares) * np.arange(len(share))) for rank, share in enumerate(shares)]
    # the columns of a process that had none to make have no types
    whole = pd.concat([share for share in placed if len(share)] or placed).sort_index()
    whole.attrs = dict(shares[0].attrs)  # which concatenation keeps only where all have the same
    return whole
