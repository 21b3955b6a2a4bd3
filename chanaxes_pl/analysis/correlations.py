"""Axis correlations from the table of channels, with their reliability, null and intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, check_resampling, naming, short
from chanaxes_pl.core.metrics import LOCAL_METRICS, METRICS, TARGET_METRICS
from chanaxes_pl.core.statistics import (
    MIN_CHANNELS,
    composite,
    interval,
    rank_correlations,
    resample_counts,
    spearman,
    spearman_brown,
)
from chanaxes_pl.tables import HALVES, KEYS, SPLIT_HALF

#: Axis coordinate → the two metrics whose within-layer z-scores it averages, both with sign +.
#: It is not a pruning score: ``keep_local`` uses peer overlap with sign −, see :mod:`scores`.
AXES = {"local_axis": tuple(LOCAL_METRICS), "target_axis": tuple(TARGET_METRICS)}
#: Pairs of a local and a target metric, and of the two axis coordinates, that are correlated.
PAIRS = (
    ("input_capture", "task_information"),
    ("input_capture", "target_excess"),
    ("peer_overlap", "task_information"),
    ("peer_overlap", "target_excess"),
    ("local_axis", "target_axis"),
)
#: Pair of the headline correlation.
MAIN_PAIR = PAIRS[0]
#: Name of the mean over layers in the column ``layer``.
NETWORK = "network"


def axis_correlations(table: pd.DataFrame, resamples: int = 0, seed: int = 0) -> pd.DataFrame:
    """Compute Spearman correlations between the axes over each layer's live channels, and their means over layers.

    Args:
        table: table of channels of one checkpoint or several.
        resamples: number of bootstrap resamples over channels for ``low`` and ``high`` (95 %, percentile); 0 for none.
        seed: random seed of the resampling.

    Returns:
        One row per checkpoint, layer and metric pair: the checkpoint's keys, ``layer, local, target, rho, low,
        high, n`` (live channels), ``null`` (correlation with the null target), ``reliability_local``,
        ``reliability_target`` (split-half, Spearman–Brown), ``disattenuated`` (``rho`` divided by the geometric mean
        of the two; it may exceed 1, and is NaN if one is 0) and ``reason``, which says why ``rho`` is NaN. The layer
        ``"network"`` holds the mean over the layers that have a value.
    """
    with naming("axis_correlations"):
        _check_table(table)
        check_resampling(resamples, seed)
    rows = []
    for keys, checkpoint in checkpoints(table):
        draws: list[np.ndarray] = []
        layers = []
        for number, (layer, metrics) in enumerate(_by_layer(checkpoint)):
            values = _with_axes(metrics)
            drawn = _bootstrap(values, resamples, np.random.default_rng([seed, number]))
            draws.append(drawn)
            layers += [{"layer": layer, **row} for row in _layer_rows(values, drawn)]
        per_layer = pd.DataFrame(layers)
        network = _network_rows(per_layer, np.stack(draws))
        rows.append(pd.concat([per_layer, network], ignore_index=True).assign(**keys))
    result = pd.concat(rows, ignore_index=True)
    present = [key for key in KEYS if key in table]
    return result[[*present, *(column for column in result if column not in present)]]


def _check_table(table: object) -> None:
    if not isinstance(table, pd.DataFrame):
        hint = "axes.table" if hasattr(table, "table") else "the table of channels, such as compute_axes(…).table"
        raise ArgumentTypeError(f"table={short(table)}", f"expected {hint}")
    missing = [name for name in ("layer", "dead", *METRICS) if name not in table]
    if missing or not len(table):
        lacks = f"it lacks the columns {', '.join(missing[:6])}" if missing else "it has no rows"
        raise ArgumentError("table=…", f"{lacks}; expected the table of channels, such as compute_axes(…).table")


def main_correlation(
    correlations: pd.DataFrame, layer: str = NETWORK, pair: tuple[str, str] = MAIN_PAIR
) -> pd.DataFrame:
    """Select the rows of one layer and pair; by default the network's mean of ρ(input capture, task information)."""
    of_layer = correlations[correlations["layer"] == layer]
    pairs = zip(of_layer["local"], of_layer["target"], strict=True)
    return of_layer[[found == pair for found in pairs]].reset_index(drop=True)


def highest(rho: pd.Series) -> int:
    """Return the place of the highest correlation; undefined ones count as the lowest."""
    return int(rho.fillna(-2.0).to_numpy().argmax())


def separation(rows: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """Find when each run's correlation has fallen to a share of its highest value.

    Args:
        rows: rows of :func:`main_correlation`, of one run or several, with a column ``run``.
        share: share of the highest correlation.

    Returns:
        One row per run: ``run, first, highest, last`` (ρ at the first checkpoint, at its highest and at the last),
        ``step_highest, epoch_highest``, and ``step, epoch`` of the first later checkpoint with ρ at or below the share;
        NaN if there is none, or the highest ρ is not above 0.

    Example:
        >>> rows = pd.DataFrame({"run": "a", "epoch": [0, 0.1, 0.2, 1], "step": [0, 1, 2, 9]})
        >>> rows = rows.assign(rho=[0.5, 0.6, 0.4, 0.3])
        >>> separation(rows)[["first", "highest", "last", "step"]].values.tolist()
        [[0.5, 0.6, 0.3, 9.0]]
    """
    found = []
    for run, each in rows.groupby("run", sort=False):
        each = each.sort_values("step").reset_index(drop=True)
        peak = highest(each["rho"])
        top = float(each["rho"].iloc[peak])
        after = each.iloc[peak + 1 :]
        below = after[after["rho"] <= share * top] if top > 0 else after.iloc[:0]
        step, epoch = (float(below[name].iloc[0]) if len(below) else float("nan") for name in ("step", "epoch"))
        row = {"run": run, "first": each["rho"].iloc[0], "highest": top, "last": each["rho"].iloc[-1]}
        row |= {"step_highest": each["step"].iloc[peak], "epoch_highest": each["epoch"].iloc[peak]}
        found.append(row | {"step": step, "epoch": epoch})
    return pd.DataFrame(found)


def reliabilities(table: pd.DataFrame, metrics: Sequence[str] = (*SPLIT_HALF, *AXES)) -> pd.DataFrame:
    """Compute the split-half reliability of metrics and axis coordinates.

    Args:
        table: table of channels of one checkpoint or several.
        metrics: names of the metrics and axis coordinates.

    Returns:
        The checkpoint's keys, ``layer, metric, reliability``; the layer ``"network"`` holds the mean over layers.
    """
    rows = []
    for keys, checkpoint in checkpoints(table):
        layers = pd.DataFrame(
            {"layer": layer, "metric": metric, "reliability": _reliability(values, metric)}
            for layer, measured in _by_layer(checkpoint)
            for values in [_with_axes(measured) if set(metrics) & set(AXES) else measured]
            for metric in metrics
        )
        mean = layers.groupby("metric", sort=False)["reliability"].mean().reset_index().assign(layer=NETWORK)
        rows.append(pd.concat([layers, mean], ignore_index=True).assign(**keys))
    return pd.concat(rows, ignore_index=True)


def task_masses(table: pd.DataFrame) -> pd.DataFrame:
    """Sum the task information of each layer that peers duplicate, Σ I_T·R², and the rest, Σ I_T·(1 − R²), in nats."""
    duplicate = table["task_information"] * table["peer_r2"]
    masses = table.assign(duplicate=duplicate, nonreplaceable=table["task_information"] - duplicate)
    keys = [*(key for key in KEYS if key in table), "layer"]
    return masses.groupby(keys, sort=False)[["duplicate", "nonreplaceable"]].sum(min_count=1).reset_index()


def checkpoints(table: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Iterate over the checkpoints of a table, with their keys; a table without keys is one checkpoint."""
    present = [key for key in KEYS if key in table]
    if not present:
        yield {}, table
        return
    for values, frame in table.groupby(present, sort=False):
        yield dict(zip(present, values, strict=True)), frame


def layer_columns(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the metrics and axis coordinates of one layer's live channels by name, with the halves and the null."""
    return _with_axes(next(_by_layer(frame))[1])


def _by_layer(checkpoint: pd.DataFrame) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Iterate over the layers: the name, and the metrics of the live channels by name."""
    names = [str(column) for column in checkpoint.select_dtypes(["number", "bool"]) if column not in _NOT_METRICS]
    numbers = checkpoint[names].to_numpy(float)  # all at once, because pandas is slow by column
    codes, layers = pd.factorize(checkpoint["layer"])
    codes[checkpoint["dead"].to_numpy(bool)] = -1
    for code, layer in enumerate(layers):
        yield layer, dict(zip(names, numbers[codes == code].T, strict=True))


def _with_axes(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = dict(metrics)
    for axis, parts in AXES.items():
        for half in ("", *(f"_{half}" for half in HALVES)):
            values[axis + half] = _mean_z_score([metrics[metric + half] for metric in parts])
    values["target_axis_null"] = _mean_z_score([metrics[f"{metric}_null"] for metric in TARGET_METRICS])
    return values


def _mean_z_score(columns: Sequence[np.ndarray]) -> np.ndarray:
    return composite(columns, [1] * len(columns))


_NOT_METRICS = (*KEYS, "layer", "channel", "dead", "at_ceiling", "reason", "target")


def _layer_rows(values: dict[str, np.ndarray], draws: np.ndarray) -> list[dict]:
    rows = []
    reliable = {
        metric: _reliability(values, metric) for metric in dict.fromkeys(name for pair in PAIRS for name in pair)
    }
    for (local, target), drawn in zip(PAIRS, draws, strict=True):
        rho = spearman(values[local], values[target])
        rows.append(
            {
                "local": local,
                "target": target,
                "rho": rho,
                **interval(drawn),
                "n": len(values[local]),
                "null": spearman(values[local], values[f"{target}_null"]),
                **_disattenuated(rho, reliable[local], reliable[target]),
                "reason": "" if np.isfinite(rho) else _why_undefined(values[local], values[target]),
            }
        )
    return rows


def _why_undefined(local: np.ndarray, target: np.ndarray) -> str:
    if len(local) < MIN_CHANNELS:
        return f"{len(local)} live channel{'' if len(local) == 1 else 's'}, expected at least {MIN_CHANNELS}"
    for side, values in (("local", local), ("target", target)):
        if not np.isfinite(values).all():
            return f"the {side} metric is not defined"
    return "a metric is the same for all channels"


def _network_rows(layers: pd.DataFrame, draws: np.ndarray) -> pd.DataFrame:
    """Average over layers; ``draws [layers, pairs, resamples]`` give the intervals of the means."""
    measured = ["rho", "null", "reliability_local", "reliability_target", "disattenuated"]
    network = layers.groupby(["local", "target"], sort=False).agg({**dict.fromkeys(measured, "mean"), "n": "sum"})
    has_rho = layers.groupby(["local", "target"], sort=False)["rho"].count() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean is NaN if no layer has a value
        bounds = pd.DataFrame([interval(drawn) for drawn in np.nanmean(draws, 0)], index=network.index)
    return network.assign(
        layer=NETWORK,
        low=bounds["low"],
        high=bounds["high"],
        reason=np.where(has_rho, "", "no layer has one"),
    ).reset_index()[list(layers)]


def _reliability(values: dict[str, np.ndarray], metric: str) -> float:
    return spearman_brown(spearman(*(values[f"{metric}_{half}"] for half in HALVES)))


def _disattenuated(rho: float, local: float, target: float) -> dict[str, float]:
    reliable = local * target
    return {
        "reliability_local": local,
        "reliability_target": target,
        "disattenuated": rho / math.sqrt(reliable) if reliable > 0 else float("nan"),
    }


def _bootstrap(values: dict[str, np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Compute Spearman correlations over resampled channels, ``[pairs, resamples]``; NaN where ρ is NaN."""
    channels = len(values["input_capture"])
    drawn = np.full((len(PAIRS), resamples), np.nan)
    if resamples == 0 or channels < MIN_CHANNELS:
        return drawn
    counts = resample_counts(channels, resamples, rng).astype(float)
    defined = {name for name in values if np.isfinite(values[name]).all()}
    for target in dict.fromkeys(target for _, target in PAIRS if target in defined):
        pairs = [number for number, pair in enumerate(PAIRS) if pair[1] == target and pair[0] in defined]
        if pairs:
            local = np.stack([values[PAIRS[number][0]] for number in pairs], 1)
            drawn[pairs] = rank_correlations(local, values[target], counts, rerank=True).T
    return drawn
