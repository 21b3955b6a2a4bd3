"""From the table of channels to axis correlations, with their reliability, null and intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from chanaxes_pl.core.metrics import LOCAL_METRICS, TARGET_METRICS
from chanaxes_pl.tables import HALVED, HALVES, KEYS

#: Axis coordinates: the mean of the within-layer z-scores of an axis's two metrics.
AXES = {"local_axis": tuple(LOCAL_METRICS), "target_axis": tuple(TARGET_METRICS)}
PAIRS = (
    ("input_capture", "task_information"),
    ("input_capture", "target_excess"),
    ("peer_overlap", "task_information"),
    ("peer_overlap", "target_excess"),
    ("local_axis", "target_axis"),
)
HEADLINE = PAIRS[0]
#: The name under which the mean over layers stands in the column ``layer``.
NETWORK = "network"
#: Fewer live channels than this have no axis correlation.
MIN_CHANNELS = 3


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman rank correlation of ``[n]`` and ``[n]``; NaN for n < 3, a constant, or anything not finite.

    Example:
        >>> import numpy as np
        >>> spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 8.0]))
        0.8
    """
    if len(first) < MIN_CHANNELS or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    x, y = _centred_midranks(first), _centred_midranks(second)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def _centred_midranks(values: np.ndarray) -> np.ndarray:
    """``[n]`` ranks, ties sharing their mean, less the mean rank; a sixth of the time that SciPy's call takes."""
    _, group, held = np.unique(values, return_inverse=True, return_counts=True)
    return (held.cumsum() - held / 2)[group] - len(values) / 2


def spearman_brown(half: float) -> float:
    """Reliability of a whole from the correlation r of its halves, 2r / (1 + r); 0 where they do not agree (r < 0).

    Example:
        >>> round(spearman_brown(0.6), 3), spearman_brown(-0.1)
        (0.75, 0.0)
    """
    return 2 * half / (1 + half) if not half < 0 else 0.0


def axis_correlations(table: pd.DataFrame, resamples: int = 0, seed: int = 0) -> pd.DataFrame:
    """Spearman correlation between the axes over each layer's live channels, and their mean over layers.

    Args:
        table: one checkpoint's table of channels, or several.
        resamples: bootstrap resamples over channels for ``low`` and ``high`` (95 %, percentile); 0 for none.
        seed: of the resamples.

    Returns:
        One row per checkpoint, layer and metric pair: the checkpoint's keys, ``layer, local, target, rho, low,
        high, n`` (live channels), ``null`` (the same against the null target), ``reliability_local``,
        ``reliability_target`` (split-half, stepped up), ``disattenuated`` (``rho`` divided by the geometric
        mean of the two; may exceed 1, NaN where one is 0) and ``reason``, which says why ``rho`` is NaN. The
        mean over the layers that have one is the layer ``"network"``.
    """
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


def headline(correlations: pd.DataFrame, layer: str = NETWORK, pair: tuple[str, str] = HEADLINE) -> pd.DataFrame:
    """The rows of one layer and pair of metrics; by default ρ(input capture, task information), the network's mean."""
    of_layer = correlations[correlations["layer"] == layer]
    pairs = zip(of_layer["local"], of_layer["target"], strict=True)
    return of_layer[[found == pair for found in pairs]].reset_index(drop=True)


def reliabilities(table: pd.DataFrame, metrics: Sequence[str] = (*HALVED, *AXES)) -> pd.DataFrame:
    """Split-half reliability of every metric and axis coordinate: keys, ``layer, metric, reliability``.

    The mean over layers is the layer ``"network"``.

    Args:
        table: one checkpoint's table of channels, or several.
        metrics: which of them.
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
    """Task information that peers duplicate, Σ I_T·R², and that they do not, Σ I_T·(1 − R²), in nats a layer."""
    duplicate = table["task_information"] * table["peer_r2"]
    masses = table.assign(duplicate=duplicate, nonreplaceable=table["task_information"] - duplicate)
    keys = [*(key for key in KEYS if key in table), "layer"]
    return masses.groupby(keys, sort=False)[["duplicate", "nonreplaceable"]].sum(min_count=1).reset_index()


_GROUPED = ("epoch", "step", "layer", "local", "target", "metric", "score", "allocation", "compensate", "budget")


def over_runs(
    frame: pd.DataFrame,
    value: str | Sequence[str] = "rho",
    resamples: int = 1000,
    seed: int = 0,
    by: Sequence[str] = _GROUPED,
) -> pd.DataFrame:
    """Mean over runs (seeds) of a column of a result table, with a 95 % percentile bootstrap over runs.

    Args:
        frame: rows of several runs, told apart by ``run``.
        value: the column, or several.
        resamples: bootstrap resamples over runs.
        seed: of the resamples.
        by: the columns that say what belongs together, as far as ``frame`` has them: checkpoint, layer, metrics, and
            what tells the networks of a pruning grid apart.

    Returns:
        The keys, ``mean, std, low, high, runs``; of several columns also ``value``, which of them.
    """
    if not isinstance(value, str):
        each = [over_runs(frame, column, resamples, seed, by).assign(value=column) for column in value]
        return pd.concat(each, ignore_index=True)
    present = [column for column in by if column in frame]

    def summary(values: pd.Series) -> pd.Series:
        data = values.dropna().to_numpy()
        picks = np.random.default_rng(seed).integers(0, max(1, len(data)), (resamples, len(data)))
        low, high = np.quantile(data[picks].mean(1), [0.025, 0.975]) if len(data) > 1 else (np.nan, np.nan)
        std = data.std(ddof=1) if len(data) > 1 else np.nan
        mean = data.mean() if len(data) else np.nan
        return pd.Series({"mean": mean, "std": std, "low": low, "high": high, "runs": len(data)})

    return frame.groupby(present, sort=False)[value].apply(summary).unstack().reset_index()


def checkpoints(table: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Every checkpoint of a table, with its keys; the whole table where it has none."""
    present = [key for key in KEYS if key in table]
    if not present:
        yield {}, table
        return
    for values, frame in table.groupby(present, sort=False):
        yield dict(zip(present, values, strict=True)), frame


def coordinates(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Metrics and axis coordinates of one layer's live channels, also of the halves and the null, by name."""
    return _with_axes(next(_by_layer(frame))[1])


def _by_layer(checkpoint: pd.DataFrame) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Each layer's name, and the metrics of its live channels by name."""
    names = [str(column) for column in checkpoint if column not in _NOT_METRICS]
    numbers = checkpoint[names].to_numpy(float)  # at once: pandas is slow one by one
    codes, layers = pd.factorize(checkpoint["layer"])
    codes[checkpoint["dead"].to_numpy(bool)] = -1
    for code, layer in enumerate(layers):
        yield layer, dict(zip(names, numbers[codes == code].T, strict=True))


def _with_axes(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = dict(metrics)
    for axis, parts in AXES.items():
        for half in ("", *(f"_{half}" for half in HALVES)):
            values[axis + half] = np.mean([_z_scores(metrics[metric + half]) for metric in parts], 0)
    values["target_axis_null"] = np.mean([_z_scores(metrics[f"{metric}_null"]) for metric in TARGET_METRICS], 0)
    return values


_NOT_METRICS = (*KEYS, "layer", "channel", "dead", "at_ceiling", "reason")


def _z_scores(values: np.ndarray) -> np.ndarray:
    spread = values.std() if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.full_like(values, np.nan)


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
                **_interval(drawn),
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
    """Means over layers; ``draws [layers, pairs, resamples]`` give the interval of the mean."""
    measured = ["rho", "null", "reliability_local", "reliability_target", "disattenuated"]
    network = layers.groupby(["local", "target"], sort=False).agg({**dict.fromkeys(measured, "mean"), "n": "sum"})
    has_rho = layers.groupby(["local", "target"], sort=False)["rho"].count() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean over layers none of which has a value is NaN
        bounds = pd.DataFrame([_interval(drawn) for drawn in np.nanmean(draws, 0)], index=network.index)
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


def _interval(draws: np.ndarray) -> dict[str, float]:
    kept = draws[np.isfinite(draws)]
    low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (np.nan, np.nan)
    return {"low": float(low), "high": float(high)}


def _bootstrap(values: dict[str, np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """``[pairs, resamples]`` Spearman correlations over channels drawn with replacement.

    A resample is a count per channel. Midranks follow from counts summed in the order of the values, and the
    correlation is Pearson's with the counts as weights, so nothing is sorted again.
    """
    channels = len(values["input_capture"])
    if resamples == 0 or channels < MIN_CHANNELS:
        return np.full((len(PAIRS), resamples), np.nan)
    counts = rng.multinomial(channels, np.full(channels, 1 / channels), resamples).astype(float)
    names = dict.fromkeys(name for pair in PAIRS for name in pair)
    ranks = {name: _resampled_ranks(values[name], counts) for name in names}
    return np.stack([_weighted_correlation(ranks[local], ranks[target], counts) for local, target in PAIRS])


def _resampled_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[resamples, n]`` centred midranks of ``values [n]`` within each resample; NaN if one is not finite."""
    if not np.isfinite(values).all():
        return np.full_like(counts, np.nan)
    order = np.argsort(values, kind="stable")
    distinct, group = np.unique(values, return_inverse=True)
    starts = np.searchsorted(values[order], distinct)
    held = np.add.reduceat(counts[:, order], starts, axis=1)
    middle = held.cumsum(1) - held / 2  # rank − ½ of a tied group's middle
    return middle[:, group] - len(values) / 2


def _weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[resamples]``: correlation of centred ranks; NaN where a resample holds one value only."""
    xy, xx, yy = ((weights * a * b).sum(1) for a, b in ((x, y), (x, x), (y, y)))
    scale = np.sqrt(xx * yy)
    return np.divide(xy, scale, out=np.full_like(xy, np.nan), where=scale > 0)
