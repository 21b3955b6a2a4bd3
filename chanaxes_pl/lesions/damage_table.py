"""Damage table: the change of loss, accuracy and margin when a channel is removed, set to its mean, or rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from chanaxes_pl.core.errors import ArgumentError, naming
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.core.targets import image_scores, task_variable
from chanaxes_pl.lesions.interventions import OPERATIONS, Intervention, Interventions, Key, check_places
from chanaxes_pl.lesions.replacements import Replacement, check_operations, measure_replacements
from chanaxes_pl.network.groups import Units, find_units
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import channel_count, select_layers
from chanaxes_pl.network.probe import Placement, Probe, Step, check_sizes, images_and_labels
from chanaxes_pl.network.recording import Settings
from chanaxes_pl.network.tracing import PartialForward

#: A recovery is given where the damage that it is a share of exceeds 0 by this many standard errors.
CLEAR = 2.0


@dataclass(frozen=True, kw_only=True)
class LesionExperiment:
    """Which channels are lesioned, how, and on how many images.

    Args:
        layers: layers to lesion: "auto", "conv", "conv+linear", or globs over names; see :func:`select_layers`.
        operations: some of "zero" (removed, zero ablation), "mean" (mean ablation), "peer" and "hull" (rebuilt from
            peers).
        channels: "all", a number of channels to draw at random from each layer, or layer name → channels.
        scores: names of scores to set beside the damage, see :func:`score_family`; default all that the network has.
        probe_size: images for axes, scores, means and coefficients, at most.
        evaluation_size: test images for the damage, a fixed random choice; default all.
        seed: seed of the channels drawn and of random scores.

    Raises:
        ValueError: for an unknown operation, or a number out of range.
    """

    layers: str | Sequence[str] = "auto"
    operations: Sequence[str] = OPERATIONS
    channels: int | str | Mapping[str, Sequence[int]] = "all"
    scores: Sequence[str] | None = None
    probe_size: int = 5000
    evaluation_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        with naming("LesionExperiment"):
            check_operations(self.operations, OPERATIONS)
            check_sizes(self.probe_size, self.evaluation_size)
            number = isinstance(self.channels, int) and self.channels > 0
            if not (number or self.channels == "all" or isinstance(self.channels, Mapping)):
                raise ArgumentError(
                    f"channels={self.channels!r}",
                    "expected 'all', how many a layer (a whole number above 0), or layer name → channels",
                )


def lesion_table(
    model: nn.Module,
    probe: DataLoader | Dataset | None,
    evaluation: Iterable[Any],
    experiment: LesionExperiment | None = None,
    *,
    units: Units | None = None,
    step: Step | None = None,
    positions: int | str = 16,
    fast: bool = True,
    progress: bool = True,
    place: Placement | None = None,
) -> pd.DataFrame:
    """Measure the damage that lesions do on evaluation data, one channel at a time; the model is left as it was.

    A batch is run once as a whole, and each lesion repeats what lies downstream of it. With several processes each
    takes every so many-th channel; :func:`join_shares` makes their tables one.

    Args:
        model: ``model(images)`` gives logits ``[B, K]``.
        probe: what means and coefficients are measured on; ``None`` where ``"zero"`` is all that is asked.
        evaluation: batches of ``(images, labels)``, others than the probe's.
        experiment: which channels, and how.
        units: of the model; found with the first evaluation image by default.
        step: ``(model, batch) → (logits, labels)``; then each lesion costs a whole forward pass.
        positions: local samples of each probe image, or ``"all"``.
        fast: ``False`` makes a whole forward pass for each lesion.
        progress: show a bar where output goes to a terminal.
        place: where the model runs; default one process, on the device of its first parameter.

    Returns:
        One row a channel: ``layer, channel, unit`` (its group and number there; empty where it cannot be removed);
        for each operation the changes that it makes to mean cross-entropy ``<op>_loss`` (nats; its standard error
        over images is ``<op>_loss_se``), to ``<op>_accuracy`` (share) and to the mean logit margin ``<op>_margin``;
        ``peer_recovery`` and ``hull_recovery``, 1 − damage / damage of ``mean``, NaN unless the latter exceeds 0 by 2
        standard errors; and ``reason``, which says why lesions are missing. ``attrs["baseline"]`` holds ``loss``,
        ``accuracy`` and ``margin`` of the intact model, and the number of ``images``.

    Raises:
        ValueError: for unknown layers or channels, or data that does not fit.
    """
    experiment = experiment or LesionExperiment()
    operations = experiment.operations
    with naming("lesion_table"):
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
            with tqdm(total=total, disable=None if progress else True, desc="lesions", unit="lesion") as bar:
                for batch in evaluation:
                    damage.add(place.to_device(batch), bar.update)
        if not damage.images:
            raise ArgumentError("evaluation", "it holds no images")
        return _table(rows, damage, list(planned.chosen), operations)


def _places(
    modules: Mapping[str, nn.Module], channels: str | int | Mapping[str, Iterable[int]], seed: int
) -> list[tuple[str, int]]:
    """Layer and channel of every lesion, in the order of the table."""
    widths = {name: channel_count(module) for name, module in modules.items()}
    if isinstance(channels, Mapping):
        chosen = {layer: list(of_layer) for layer, of_layer in channels.items()}
        check_places(modules, chosen)
    elif channels == "all":
        chosen = {layer: list(range(width)) for layer, width in widths.items()}
    else:
        assert isinstance(channels, int)
        chosen = {
            layer: np.sort(np.random.default_rng([seed, number]).permutation(width)[:channels]).tolist()
            for number, (layer, width) in enumerate(widths.items())
        }
    return [(layer, channel) for layer, of_layer in chosen.items() for channel in of_layer]


def _units_of_first(model: nn.Module, evaluation: Iterable[Any], place: Placement, step: Step | None) -> Units:
    if step is not None:
        raise ArgumentError("step=…", "with a step of your own, 'zero' needs units=find_units(model, example)")
    batch = next(iter(evaluation), None)
    if batch is None:
        raise ArgumentError("evaluation", "it holds no images")
    moved = place.to_device(batch)
    images_and_labels(model, moved)  # what a batch has to be is said there
    return find_units(model, moved[0][:1])


class _Damage:
    """Sums over images of what every change does to each image, in float64."""

    def __init__(self, model: nn.Module, interventions: Sequence[Intervention], step: Step | None, fast: bool) -> None:
        self._model = model
        self._interventions = interventions
        self._step = step or images_and_labels
        self._forward = PartialForward(model) if fast and step is None else None
        self.images = 0
        self._sums: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._intact: Tensor | float = 0.0

    def add(self, batch: Any, advance: Callable[[], Any]) -> None:
        """Take in a batch."""
        logits, labels = self._step(self._model, batch)
        intact = task_variable(image_scores, logits, labels)
        if self._forward is not None:
            self._forward.run(batch[0], logits)
        home = accumulation_device(logits.device)
        differences = []
        for intervention in self._interventions:
            hurt = self._logits(intervention, batch).to(home).double()
            difference = image_scores(hurt, labels.to(home).long()) - intact
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
        """Mean changes ``[changes, 3]`` and their standard errors over images, and the intact means ``[3]``."""
        totals = (self._sums, self._squares, self._intact)
        sums, squares, intact = (torch.as_tensor(total).cpu().numpy() for total in totals)
        means = sums / self.images
        spread = np.maximum(squares - self.images * means**2, 0.0)
        errors = np.sqrt(spread / (self.images - 1) / self.images) if self.images > 1 else np.full_like(means, np.nan)
        return means, errors, intact / self.images


def _table(rows: list[dict[str, Any]], damage: _Damage, keys: list[Key], operations: Sequence[str]) -> pd.DataFrame:
    means, errors, intact = damage.means()
    number = {key: place for place, key in enumerate(keys)}
    # One more row of NaN, for lesions that could not be made: number −1.
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
    """The whole table from those of all processes, in order of their ranks; they may have been on disk meanwhile."""
    placed = [share.set_axis(rank + len(shares) * np.arange(len(share))) for rank, share in enumerate(shares)]
    return pd.concat(placed).sort_index()
