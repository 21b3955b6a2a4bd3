"""Structure within a layer: graphs of its channels, triplets of channels, and propagation of metrics by weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from chanaxes_pl.analysis.upstream import Upstream, find_upstream, input_spread
from chanaxes_pl.core.errors import ArgumentError, check_seed, is_whole, naming, short
from chanaxes_pl.core.gaussian import Association, information
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.core.statistics import MIN_CHANNELS, spearman
from chanaxes_pl.core.targets import TargetSpec
from chanaxes_pl.network.batches import Placement, Step
from chanaxes_pl.network.hooks import check_network, hooked
from chanaxes_pl.network.layers import LayerSpec, select_layers
from chanaxes_pl.network.probe import Probe, ProbeSource
from chanaxes_pl.network.recording import LayerMoments, Settings, record
from chanaxes_pl.tables import associations, measure
from chanaxes_pl.units.groups import check_example
from chanaxes_pl.units.plain import plain

#: Weighted graphs over the channels of a layer.
GRAPHS = ("overlap", "excess")
#: Maximum number of triplets of a layer to average over.
TRIPLETS = 20_000
_EXCESS = ("pair_excess", "triplet_excess", "pair_excess_null", "triplet_excess_null")
_UNMEASURED = "a layer that it reads could not be measured"
_REPEATED = "it runs several times in a forward pass"


def layer_structure(
    model: nn.Module,
    probe: ProbeSource,
    *,
    layers: LayerSpec = "auto",
    positions: int | Literal["all"] = 16,
    target: TargetSpec = "auto",
    probe_size: int = 5000,
    step: Step | None = None,
    example_input: Tensor | None = None,
    widest: int = 512,
    nulls: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure structure among the channels of each layer; the model does not change.

    *Graphs.* One graph connects channels by peer overlap (−½ ln(1 − ρ²) over local samples), another by excess
    (Gaussian MMI synergy of a pair about the target, over image means). Louvain's method finds communities. Their
    modularity is compared with that of graphs whose weights are shuffled between pairs.

    *Triplets.* The excess of a pair is I(T; y_i, y_j) minus the larger information of its members; the excess of a
    triplet is I(T; y_i, y_j, y_k) minus the largest information of its pairs. Both are averaged, over all pairs and
    over all triplets or :data:`TRIPLETS` random ones. The same with a null target shows the bias of so few images.

    *Propagation.* A routed metric averages the metric of a channel's inputs, weighted by ‖W_ij‖ times the standard
    deviation of input j as the layer reads it (after norm and activation). Its Spearman correlation with the layer's
    own metric is compared with that after shuffling each channel's ‖W_ij‖ between inputs. The metrics of inputs are
    z-scored within the layer that produces them, and averaged if an input reads several layers.

    Args:
        model: network such that ``model(images)`` gives logits ``[B, K]``. Its layers are those that it has with plain
            weights, as for :func:`find_units`.
        probe: probe set: a DataLoader or Dataset of images and labels.
        layers: layers to measure, also as producers of inputs; see :func:`select_layers`.
        positions: number of local samples per image, or ``"all"``.
        target: task variable, as for :func:`compute_axes`.
        probe_size: maximum number of probe images.
        step: ``(model, batch) → (logits, labels)`` for other batches or outputs.
        example_input: ``[B, …]`` images for tracing the channels; default the first that the model is given.
        widest: largest number of live channels for which graphs are made. A graph takes about 0.2 s for 128 channels,
            2 s for 512 and 16 s for 1,280, and a layer has 2 × (1 + ``nulls``) of them.
        nulls: number of shuffled graphs, and of shuffled weights.
        seed: random seed of communities, nulls and triplets.

    Returns:
        One row per layer, in the order of the model: ``layer, channels`` (live). For each of :data:`GRAPHS`,
        ``<graph>_modularity``, ``<graph>_null``, ``<graph>_null_sd`` and ``<graph>_communities``; ``agreement``, the
        adjusted Rand index between both partitions. ``pair_excess``, ``triplet_excess``, ``pair_excess_null``,
        ``triplet_excess_null`` (nats) and the number of ``triplets``. ``producers``, the layers that produce its
        inputs, and for each metric ``routed_<metric>``, ``routed_<metric>_null`` and ``routed_<metric>_null_sd``.
        ``reason`` and ``routed_reason`` say why values are missing.

    Raises:
        ValueError: if a setting is out of range, the probe does not fit, or no layer matches.
    """
    with naming("layer_structure"):
        check_network(model)
        model = plain(model)
        tracked = select_layers(model, layers, whole=True)
        settings = Settings(
            layers=tracked, positions=positions, target=target, reliability=False, step=step, probe_size=probe_size
        )
        check_seed(seed)
        if not is_whole(nulls, 2):
            raise ArgumentError(f"nulls={short(nulls)}", "expected at least 2, to compute their mean and spread")
        if not is_whole(widest):
            raise ArgumentError(f"widest={short(widest)}", "expected a number of channels, 0 for no graphs")
        given = [] if example_input is None else [example_input]
        for example in given:
            check_example(example, "example_input")

        def note(_model: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not given:
                given.extend(value[:1].clone() for value in inputs[:1] if isinstance(value, Tensor))

        with input_spread(tracked) as spread, hooked([(model, note)], before=True):
            recorder = record(model, Probe(probe, probe_size), settings, Placement.of(model))
        if not given:
            raise ArgumentError("step=…", "does not call the model with a tensor; pass example_input=images [B, …]")
        rows, metrics, missing = [], {}, recorder.left_out()
        for number, (name, moments) in enumerate(recorder.moments()):
            row, metrics[name] = _layer_row(moments, widest, nulls, np.random.default_rng([seed, number]))
            rows.append({"layer": name} | row | ({"reason": missing[name]} if name in missing else {}))
        upstream = find_upstream(model, tracked, spread, given[0])
        for number, row in enumerate(rows):
            row |= _propagation(upstream[row["layer"]], metrics, nulls, np.random.default_rng([seed, number, 1]))
            if row["layer"] in recorder.repeated:  # and what it reads differs from run to run
                row |= {name: math.nan for name in row if name.startswith("routed_")} | {"routed_reason": _REPEATED}
        return pd.DataFrame(rows)


def joint_information(association: Association) -> Tensor:
    """Compute the joint information of each pair about the target, ``[C, C]`` nats; single channels on the diagonal."""
    single = association.single
    own = torch.arange(len(single), device=single.device)[:, None]
    peers = (own + own.mT[:, 1:]) % len(single)
    return torch.diag(single).scatter(1, peers, association.with_peers(peers))


def pair_excess(association: Association) -> Tensor:
    """Compute the information of each pair about the target beyond the better channel, ``[C, C]`` nats ≥ 0."""
    single = association.single
    return (joint_information(association) - torch.maximum(single[:, None], single)).clamp(min=0)


def triplet_excess(association: Association, triplets: Tensor) -> Tensor:
    """Compute the information of ``triplets [n, 3]`` about the target beyond their best pair, ``[n]`` nats."""
    pairs = joint_information(association)
    first, second, third = triplets.T
    best = torch.stack([pairs[first, second], pairs[first, third], pairs[second, third]]).amax(0)
    return (association.with_sets(triplets) - best).clamp(min=0)


def choose_triplets(channels: int, rng: np.random.Generator, most: int = TRIPLETS) -> Tensor:
    """List all triplets of channels, ``[n, 3]``, or draw ``most`` with replacement if there are more."""
    if math.comb(channels, 3) <= most:
        return torch.combinations(torch.arange(channels), 3)
    first, second, third = (rng.integers(channels - taken, size=most) for taken in range(3))
    second += second >= first  # an index among the remaining channels
    for taken in (np.minimum(first, second), np.maximum(first, second)):
        third += third >= taken
    return torch.from_numpy(np.stack([first, second, third], 1))


def communities(weights: np.ndarray, seed: int = 0) -> tuple[np.ndarray, float]:
    """Find the Louvain communities of a weighted graph: labels ``[C]``, and their modularity, NaN without weights.

    Args:
        weights: ``[C, C]``, symmetric, ≥ 0; the diagonal is ignored.
        seed: random seed of the order in which the algorithm visits channels.
    """
    import networkx as nx  # takes 0.4 s, and only this function needs it

    off = np.where(np.eye(len(weights), dtype=bool), 0.0, weights)
    if not off.any():
        return np.arange(len(weights)), math.nan
    graph = nx.from_numpy_array(off)
    parts = nx.community.louvain_communities(graph, seed=seed)
    labels = np.zeros(len(weights), int)
    for label, members in enumerate(parts):
        labels[list(members)] = label
    return labels, nx.community.modularity(graph, parts)


def _layer_row(
    moments: LayerMoments | None, widest: int, nulls: int, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measure the graphs and triplets of a layer, and return its metrics too."""
    names = [f"{graph}_{value}" for graph in GRAPHS for value in ("modularity", "null", "null_sd", "communities")]
    row: dict[str, Any] = {"channels": 0} | dict.fromkeys([*names, "agreement", *_EXCESS], math.nan)
    row |= {"triplets": 0, "reason": ""}
    if moments is None:
        return row, {}
    columns = measure(moments)
    live = torch.from_numpy(~columns["dead"])
    row["channels"] = count = int(live.sum())
    local, joint = Moments.merge_all(moments.local), Moments.merge_all(moments.joint)
    both = associations(joint, live.to(joint.mean.device), moments.targets)
    if count < MIN_CHANNELS or not both[0].explained.isfinite().all():
        few = f"{count} live channel{'s' * (count != 1)}, expected at least {MIN_CHANNELS}"
        row["reason"] = few if count < MIN_CHANNELS else "target does not vary, or is not finite"
        return row, columns
    triplets = choose_triplets(count, rng).to(joint.mean.device)
    means = [mean for association in both for mean in _mean_excess(association, triplets)]
    row |= dict(zip(_EXCESS, means, strict=True)) | {"triplets": len(triplets), "reason": ""}
    if count > widest:
        row["reason"] = f"{count} live channels, graphs are left out above widest={widest}"
        return row, columns
    overlap = information(local.select(live.to(local.mean.device)).correlation.square())
    labels = []
    for graph, weights in zip(GRAPHS, (overlap, pair_excess(both[0])), strict=True):
        partition, values = _graph(weights.cpu().numpy(), nulls, rng)
        labels.append(partition)
        row |= {f"{graph}_{name}": value for name, value in values.items()}
        if math.isnan(values["modularity"]):
            row["reason"] = f"the {graph} graph has no weight"
    row["agreement"] = float(adjusted_rand_score(*labels))
    return row, columns


def _mean_excess(association: Association, triplets: Tensor) -> tuple[float, float]:
    pairs = pair_excess(association)
    return float(pairs.sum() / (len(pairs) * (len(pairs) - 1))), float(triplet_excess(association, triplets).mean())


def _graph(weights: np.ndarray, nulls: int, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float]]:
    """Return community labels, and the modularity beside that of graphs with shuffled weights."""
    pairs = np.triu_indices(len(weights), 1)
    labels, found = communities(weights)
    shuffled = []
    for _ in range(nulls):
        other = np.zeros_like(weights)
        other[pairs] = rng.permutation(weights[pairs])
        shuffled.append(communities(other + other.T)[1])
    values = {"modularity": found, "null": float(np.mean(shuffled)), "null_sd": float(np.std(shuffled, ddof=1))}
    return labels, values | {"communities": int(labels.max()) + 1}


def _propagation(
    upstream: Upstream, metrics: Mapping[str, dict[str, np.ndarray]], nulls: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Correlate a layer's metrics with those routed to it by its weights, and by shuffled weights."""
    names = [f"routed_{metric}{end}" for metric in METRICS for end in ("", "_null", "_null_sd")]
    row: dict[str, Any] = {"producers": ", ".join(upstream.channels)} | dict.fromkeys(names, math.nan)
    row["routed_reason"] = upstream.reason or ("" if all(metrics[name] for name in upstream.channels) else _UNMEASURED)
    if row["routed_reason"]:
        return row
    dealt = [upstream.norms, *(rng.permuted(upstream.norms, axis=1) for _ in range(nulls))]
    for metric in METRICS:
        own, given = metrics[upstream.layer][metric], {name: metrics[name][metric] for name in upstream.channels}
        found = []
        for norms in dealt:
            routed = upstream.from_upstream(given, norms)
            both = np.isfinite(own) & np.isfinite(routed)
            found.append(spearman(routed[both], own[both]))
        values = (found[0], np.mean(found[1:]), np.std(found[1:], ddof=1))
        row |= {f"routed_{metric}{end}": float(x) for end, x in zip(("", "_null", "_null_sd"), values, strict=True)}
        if math.isnan(found[0]):
            row["routed_reason"] = "fewer than 3 channels have both metrics, or one is the same for all"
    return row
