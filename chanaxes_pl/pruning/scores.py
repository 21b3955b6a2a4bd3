"""Scores of all channels that could be removed, and of units of coupled channels; low = remove.

See ``analysis/scores`` for the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from scipy.stats import rankdata
from torch import Tensor, nn

from chanaxes_pl.analysis.scores import OWN_SCORES, REVERSE, SCORES, base_score, from_maximum, own_scores, score_family
from chanaxes_pl.core.errors import ArgumentError, InputError
from chanaxes_pl.core.memory import MEMORY
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.network.batches import Placement, Step, split_batch, stepped, without_labels
from chanaxes_pl.network.layers import channel_count
from chanaxes_pl.network.probe import Probe, ProbeSource
from chanaxes_pl.network.recording import LayerMoments, Settings, record, unmeasured
from chanaxes_pl.pruning.baselines import WEIGHT_SCORES, norms_behind, weight_scores
from chanaxes_pl.pruning.feature_maps import MAP_IMAGES, MAP_SCORES, MapScore, map_scores
from chanaxes_pl.pruning.reconstruction import reconstruction_costs
from chanaxes_pl.tables import measure
from chanaxes_pl.units.groups import Units
from chanaxes_pl.units.removal import Group

#: Scores that need recorded activations on the probe.
_RECORDED = {*OWN_SCORES, "activation_rms"}


def default_scores(model: nn.Module, units: Units, images: Tensor) -> list[str]:
    """List the scores that apply to a network; say which are left out because a layer cannot be measured.

    ``bn_scale`` needs a BatchNorm behind every removable layer, ``hrank`` and ``chip`` a layer that reads each. Our own
    scores and ``activation_rms`` need every layer's output by image, which attention in windows does not have.

    Args:
        model: model to score; it does not change.
        units: the model's units.
        images: ``[B, …]`` images on the model's device.
    """
    producers = dict.fromkeys(name for group in units.groups.values() for name in group.producers)
    behind = norms_behind(model, units, lambda: model(images[:1]))
    unfit = {"bn_scale"} if behind.keys() != producers.keys() else set()
    if not all(group.consumers for group in units.groups.values()):
        unfit |= set(MAP_SCORES)
    if missing := unmeasured(model, {name: model.get_submodule(name) for name in producers}, images):
        layer, why = next(iter(missing.items()))
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        rank_zero_info(
            "The scores of both axes and 'activation_rms' are left out, because a layer to be pruned could not be "
            f"measured: {layer!r}{others}, {why}."
        )
        unfit |= _RECORDED
    return [score for score in SCORES if score not in unfit]


def channel_scores(
    model: nn.Module,
    probe: ProbeSource,
    units: Units,
    scores: Sequence[str],
    *,
    step: Step | None = None,
    probe_size: int = 5000,
    positions: int | Literal["all"] = 16,
    memory: float = MEMORY,
    seed: int = 0,
    place: Placement | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """Compute some scores of every channel that could be removed; the model does not change.

    A score ``minus_<metric>`` is the layer's maximum minus the metric; a reversed score is the maximum minus the score.
    Composites are means of signed within-layer z-scores, shifted to a layer minimum of 0. Dead channels come first in
    all of these, reversed or not. ``reconstruction``, ``hrank`` and ``chip`` give all channels of a unit one value.
    Units that no layer reads, such as queries and keys of an attention, have their L1 norms for ``reconstruction``.

    Args:
        model: model that the units were found in.
        probe: probe set, see :class:`Probe`; read only if a score needs images, with labels only if it needs them.
        units: removable units.
        scores: names of scores, see :func:`score_family`.
        step: ``(model, batch) → (logits, labels)`` for batches or outputs other than ``(images, labels)`` and logits.
        probe_size: maximum number of probe images.
        positions: number of local samples per image, or ``"all"``.
        memory: gigabytes (10⁹ bytes) that ``reconstruction`` takes; less takes more passes over the probe.
        seed: random seed of random scores.
        place: device and processes; default one process, on the device of the model's first parameter. Several
            processes share the pass for our own metrics; each computes the other scores by itself.
        progress: whether ``reconstruction`` shows a progress bar in a terminal.

    Returns:
        Score → layer → ``[C]`` float64 on the host; low = remove; −inf if not finite.

    Raises:
        ValueError: if a score is unknown, the probe does not fit, the target does not vary, ``bn_scale`` is asked
            for and a removable layer has no BatchNorm behind it, or ``memory`` has no room for ``reconstruction``.
    """
    for score in scores:
        score_family(score)
    place = place or Placement.of(model)
    run = stepped(step)
    layers = {name: model.get_submodule(name) for group in units.groups.values() for name in group.producers}
    asked = {base_score(score) for score in scores}

    def batches() -> Iterator[Any]:
        return (place.to_device(batch) for _, batch in Probe(probe, probe_size).batches())

    tasks = sorted(name for name in asked if name == "taylor" or SCORES[name] in ("target", "both"))
    if tasks and step is None and split_batch(first := next(batches(), (None, None)))[1] is None:
        alone = (
            "the batches of the probe hold images alone: expected (images, labels), or a score of weights or of "
            "activations, such as 'l1' or 'keep_local'"
        )
        raise ArgumentError(f"score={tasks[0]!r}", f"needs labels, and {without_labels(first) or alone}")
    # These come first because they may raise an error, and the other passes are long.
    found: dict[str, dict[str, Tensor]] = {}
    found |= {score: weight_scores(score, model, units, batches, run) for score in WEIGHT_SCORES if score in asked}
    for score in scores:
        if base_score(score) == "random":
            found[score] = _random(model, layers, seed, draw=int(score.removeprefix("random").strip("_") or 0))
    if asked & _RECORDED:
        names = {layer: name for name, layer in layers.items()}  # a recorder names compiled layers differently
        settings = Settings(
            layers={name: layer for layer, name in names.items()},
            positions=positions,
            reliability=False,
            step=step,
            target="auto" if tasks else _sum_of_logits,
            probe_size=probe_size,
        )
        recorder = record(model, Probe(probe, probe_size), settings, place)
        measured = ((names[recorder.layers[name]], moments) for name, moments in recorder.moments())
        found |= _recorded(measured, asked, recorder.left_out())
    if asked & set(MAP_SCORES):
        images: dict[MapScore, int] = {score: MAP_IMAGES[score] for score in MAP_SCORES if score in asked}
        of_units = map_scores(model, units.groups.values(), batches, lambda batch: run(model, batch), images)
        found |= {score: _of_channels(values, units, layers) for score, values in of_units.items()}
    if "reconstruction" in asked:
        read = [group for group in units.groups.values() if group.consumers]
        norms = weight_scores("l1", model, units, batches, run)
        costs = {group.name: unit_values(group, norms) for group in units.groups.values() if not group.consumers}
        costs |= reconstruction_costs(
            model,
            read,
            batches,
            lambda batch: run(model, batch),
            positions=positions,
            images=Probe(probe, probe_size).images,
            memory=memory,
            progress=progress,
        )
        found["reconstruction"] = _of_channels(costs, units, layers)
    return {score: {name: _directed(score, found, name) for name in layers} for score in scores}


def _sum_of_logits(logits: Tensor, _labels: Any) -> Tensor:
    """Return a target that needs no labels, for scores that do not depend on the target."""
    return logits.flatten(1).double().sum(1)


def _directed(score: str, found: Mapping[str, Mapping[str, Tensor]], layer: str) -> Tensor:
    values = found[score if score in found else base_score(score)][layer].detach().double().cpu()
    finite = values.isfinite()
    if score.startswith(REVERSE):
        values = from_maximum(values, finite)
    return torch.where(finite, values, -torch.inf)


def _recorded(
    layers: Iterable[tuple[str, LayerMoments | None]], asked: set[str], missing: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """Return our own scores and the root mean square of the activations, by score and layer."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in _RECORDED}
    needs_target = sorted(name for name in asked if SCORES[name] in ("target", "both"))
    for layer, moments in layers:
        if moments is None:
            raise InputError(f"layer {layer!r} could not be measured, {missing[layer]}; leave it out with protect=")
        columns = measure(moments)
        reasons = set(columns["reason"][~columns["dead"]]) - {""}
        if reasons and needs_target:
            raise ArgumentError(
                f"score={needs_target[0]!r}",
                f"undefined on this probe, {reasons.pop()} (at layer {layer!r}); "
                "expected a probe on which the margin of the logits varies",
            )
        for name, values in own_scores(columns).items():
            found[name][layer] = values
        local = Moments.merge_all(moments.local)
        found["activation_rms"][layer] = (local.variance + local.mean.square()).sqrt()
    return found


def _of_channels(values: Mapping[str, Tensor], units: Units, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Give every channel the value of its unit."""
    found: dict[str, Tensor] = {}
    for name, group in units.groups.items():
        for layer, indices in group.producers.items():
            channels = found.setdefault(layer, torch.zeros(channel_count(layers[layer]), dtype=torch.float64))
            channels[indices] = values[name][:, None].expand(indices.shape)
    return found


def _random(model: nn.Module, layers: Mapping[str, nn.Module], seed: int, draw: int) -> dict[str, Tensor]:
    # The seed uses the layer's number in the whole model, so protecting other layers does not change its scores.
    numbers = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return {
        name: torch.from_numpy(np.random.default_rng([seed, draw, numbers[name]]).random(channel_count(layer)))
        for name, layer in layers.items()
    }


def unit_ranks(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """Score every unit by the ranks of its channels within their layers, so that wide and narrow layers count equally.

    Args:
        group: group of units.
        values: layer → ``[C]``, one score of its channels.

    Returns:
        ``[U]`` float64 in [0, 1]: the mean over a unit's channels of rank / (C − 1), ties sharing their mean rank.
    """
    ranks = []
    for layer, indices in group.producers.items():
        order = (rankdata(values[layer].numpy()) - 1) / max(1, len(values[layer]) - 1)
        ranks.append(torch.from_numpy(order)[indices])
    return torch.cat(ranks, 1).mean(1)


def unit_values(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """Score every unit on a scale that layers share, so that one threshold can serve all of them.

    Args:
        group: group of units.
        values: layer → ``[C]``, one score of its channels; −inf for dead ones.

    Returns:
        ``[U]`` float64: the mean over a unit's channels of the value divided by the mean of its layer's finite values
        (1 in a layer that is 0 throughout). A dead channel counts as 0; a unit of only dead channels gets −inf.
    """
    shares = []
    for layer, indices in group.producers.items():
        channels = values[layer].double()
        mean = channels[channels.isfinite()].mean()
        shares.append(torch.where(channels.isfinite() & (mean == 0), 1.0, channels / mean)[indices])
    members = torch.cat(shares, 1)
    dead = ~members.isfinite()
    return torch.where(dead.all(1), -torch.inf, torch.where(dead, 0.0, members).mean(1))
