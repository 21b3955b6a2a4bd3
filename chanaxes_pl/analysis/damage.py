"""Analysis of damage: how the damage of removing a channel relates to the metrics of its axes.

Every function takes a table of channels and their damage, see :func:`join_axes`, and compares ranks within layers.
Intervals are 95 % percentile bootstraps over units instead of rows: channels that can only be removed together share
one damage and are drawn together. A resample keeps the ranks among all rows (``rerank=False`` of
:func:`rank_correlations`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.core.errors import InputError, naming
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.core.statistics import (
    MIN_CHANNELS,
    bounds,
    interval,
    rank_correlations,
    relative_ranks,
    resample_counts,
)

#: Metrics that damage is compared with, beside the scores in the tables of lesions.
CORRELATED = (*METRICS, "peer_r2")
#: Metrics that a regression starts from, and the metric of peer support that it adds.
BASE = ("input_capture", "task_information")
SUPPORT = "peer_r2"
#: Largest difference between the ranks of two matched channels, as a share of the layer.
CALIPER = 0.05
#: Standard errors over images beyond which damage is clear.
CLEAR = 2.0
_KEYS = ["layer", "channel"]


def join_axes(axes: pd.DataFrame, lesions: pd.DataFrame) -> pd.DataFrame:
    """Join the table of channels of one checkpoint and the table of their lesions, with a row per lesioned channel.

    The lesions' ``reason`` becomes ``lesion_reason``; ``attrs`` are those of the lesions.

    Raises:
        ValueError: if a channel occurs twice in one table, or the tables have no channel in common.
    """
    for name, table in (("axes", axes), ("lesions", lesions)):
        twice = table[table.duplicated(_KEYS)]
        if len(twice):
            layer, channel = twice.iloc[0][_KEYS]
            raise ValueError(f"join_axes({name}): channel {channel} of {layer!r} occurs twice; pass one checkpoint")
    joined = lesions.rename(columns={"reason": "lesion_reason"}).merge(axes, on=_KEYS)
    if joined.empty and len(lesions):  # a process may have none to make
        raise ValueError(
            f"join_axes: no channel in common; axes have the layers {', '.join(axes['layer'].unique()[:3])}, lesions "
            f"{', '.join(lesions['layer'].unique()[:3])}"
        )
    joined.attrs = dict(lesions.attrs)
    return joined


def rank_regression(
    table: pd.DataFrame,
    damage: str = "zero_loss",
    base: Sequence[str] = BASE,
    added: str = SUPPORT,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how much better one more metric explains the ranks of damage.

    The within-layer ranks of damage are regressed on those of the ``base`` metrics, then on those of ``base`` and
    ``added``, over all layers with an intercept for each. R² is adjusted for the number of predictors, so that its
    increase is 0 on average for a metric that adds nothing. ``slope`` is the coefficient of the added metric; it is
    negative if more of the metric means less damage.

    Args:
        table: table of :func:`join_axes`.
        damage: column to explain.
        base: metrics of the first regression.
        added: metric that the second regression adds.
        resamples: number of bootstrap resamples over units.
        seed: random seed of the resampling.

    Returns:
        One row: ``damage, base, added, r2_base, r2_full, increase`` with ``low`` and ``high``, ``slope`` with
        ``slope_low`` and ``slope_high``, and the numbers of ``channels`` and ``layers``.

    Raises:
        ValueError: if a column is unknown, or no layer has 3 channels for which all columns are defined.
    """
    columns = [damage, *base, added]
    with naming("rank_regression"):
        usable = _usable(table, columns)
    values, counts = usable[columns].to_numpy(float), _draws(usable, resamples, seed)
    products = np.zeros((resamples + 1, len(columns), len(columns)))
    for rows in _rows_of_layers(usable):
        products += _within(relative_ranks(values[rows]), counts[:, rows])
    freedom = len(usable) - usable["layer"].nunique()
    small, _ = _fit(products, len(base), freedom)
    full, slopes = _fit(products, len(base) + 1, freedom)
    row = {"damage": damage, "base": " + ".join(base), "added": added, "r2_base": small[0], "r2_full": full[0]}
    row |= {"increase": full[0] - small[0], **interval((full - small)[1:])}
    row |= {"slope": slopes[0], **interval(slopes[1:], "slope_")}
    return pd.DataFrame([row | {"channels": len(usable), "layers": usable["layer"].nunique()}])


def matched_comparison(
    table: pd.DataFrame,
    damage: str = "zero_loss",
    support: str = SUPPORT,
    matched: str = "task_information",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the damage of channels with much and with little peer support that match in another metric.

    In each layer, the channels above the median of ``support`` are paired one to one with those below it, so that the
    partners' ranks of ``matched`` are as close as possible. Pairs further apart than :data:`CALIPER` are left out; in
    a small layer, pairs of neighbours always stay.

    Args:
        table: table of :func:`join_axes`.
        damage: column to compare.
        support: metric that splits the channels.
        matched: metric in which partners match.
        resamples: number of bootstrap resamples over the units of the channels with much support.
        seed: random seed of the resampling.

    Returns:
        Two rows, with ``scale`` ``"value"`` (in the unit of ``damage``) and ``"rank"`` (rank of damage in the layer,
        from 0 to 1): ``damage, support, matched, scale``, the means for ``much`` and ``little`` support, their
        ``difference`` with ``low`` and ``high``, ``imbalance`` (mean difference of the partners' ranks of
        ``matched``), and the numbers of ``pairs`` and ``layers``.

    Raises:
        ValueError: if a column is unknown, or no layer has 3 channels for which all columns are defined.
    """
    columns = [damage, support, matched]
    with naming("matched_comparison"):
        usable = _usable(table, columns)
    values = usable[columns].to_numpy(float)
    ranks, pairs = np.zeros_like(values), []
    for rows in _rows_of_layers(usable):
        ranks[rows] = relative_ranks(values[rows])
        pairs += [rows[pair] for pair in _pairs(ranks[rows, 1], ranks[rows, 2])]
    much, little = np.reshape(pairs, (-1, 2)).astype(int).T
    weights = _draws(usable, resamples, seed)[:, much]
    result = []
    for scale, hurt in (("value", values[:, 0]), ("rank", ranks[:, 0] + 0.5)):
        with np.errstate(invalid="ignore"):  # there may be no pair
            drawn = weights @ (hurt[much] - hurt[little]) / weights.sum(1)
        row = {"damage": damage, "support": support, "matched": matched, "scale": scale}
        row |= {"much": _mean(hurt[much]), "little": _mean(hurt[little]), "difference": drawn[0]}
        row |= interval(drawn[1:]) | {"imbalance": _mean(ranks[much, 2] - ranks[little, 2])}
        result.append(row | {"pairs": len(much), "layers": usable["layer"].iloc[much].nunique()})
    return pd.DataFrame(result)


def score_damage_correlation(
    table: pd.DataFrame, scores: Sequence[str], damage: str = "zero_loss", resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Compute the Spearman correlation of some scores with damage within each layer, and its mean over layers.

    Args:
        table: table of :func:`join_axes`, with any further scores as columns.
        scores: columns to compare with damage; they share the resamples, so that they can be compared.
        damage: column of the damage.
        resamples: number of bootstrap resamples over units.
        seed: random seed of the resampling.

    Returns:
        One row per score and layer, and one for the layer ``"network"`` with the mean over layers: ``score, damage,
        layer, rho, low, high`` and ``n``, the number of channels for which both are finite. The correlation is NaN if
        there are fewer than 3 of them, or all have the same score or damage.

    Raises:
        ValueError: if a column is unknown, or no layer has 3 channels whose damage is defined.
    """
    with naming("score_damage_correlation"):
        usable = _usable(table, [damage], others=scores)
    values, target = usable[list(scores)].to_numpy(float), usable[damage].to_numpy(float)
    counts = _draws(usable, resamples, seed)
    layers = _rows_of_layers(usable)
    draws = np.stack(
        [rank_correlations(values[rows], target[rows], counts[:, rows], rerank=False) for rows in layers], 1
    )
    sizes = np.stack([np.isfinite(values[rows]).sum(0) for rows in layers])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean is NaN if no layer has a value
        draws = np.concatenate([draws, np.nanmean(draws, 1, keepdims=True)], 1)
    low, high = bounds(draws[1:])
    names = [*(usable["layer"].iloc[rows[0]] for rows in layers), NETWORK]
    columns = {"rho": draws[0], "low": low, "high": high, "n": np.vstack([sizes, sizes.sum(0)])}
    result = {"score": np.repeat(np.array(scores, object), len(names)), "damage": damage, "layer": names * len(scores)}
    return pd.DataFrame(result | {name: column.T.ravel() for name, column in columns.items()})


def damage_reliability(table: pd.DataFrame, damage: str = "zero_loss") -> float:
    """Compute the share of the damage's variance within layers that is not noise of the test images.

    The noise is the mean square of the standard errors over images; the share is 0 at least, and a mean over layers.
    Its root bounds the correlation that any score can have with the damage, roughly where ranks are correlated.

    Args:
        table: table of :func:`lesion_table`.
        damage: column of the damage, which has its standard errors in the column ``<damage>_se``.

    Returns:
        The share; NaN if no layer has two channels with both, or all do the same damage.

    Raises:
        ValueError: if a column is missing.

    Example:
        >>> table = pd.DataFrame({"layer": "conv", "zero_loss": [0.0, 0.2, 0.4], "zero_loss_se": [0.1, 0.1, 0.1]})
        >>> round(damage_reliability(table), 2)
        0.75
    """
    error = f"{damage}_se"
    with naming("damage_reliability"):
        _check_columns(table, [damage, error])
    layers = table.dropna(subset=[damage, error]).groupby("layer", sort=False)
    variance = layers[damage].var().to_numpy()
    noise = layers[error].agg(lambda errors: (errors**2).mean()).to_numpy(float)
    shares = np.maximum(1 - noise[variance > 0] / variance[variance > 0], 0.0)
    return _mean(shares)


def _check_columns(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"no column {', '.join(map(repr, missing))}; there are {', '.join(table.columns)}")


def _usable(table: pd.DataFrame, columns: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
    """Return the rows with all columns defined, of layers with at least 3 of them; ``others`` only need to exist."""
    _check_columns(table, [*columns, *others])
    defined: np.ndarray = np.isfinite(table[list(columns)].to_numpy(float)).all(axis=1)  # type: ignore[assignment]
    rows = table.loc[defined]
    rows = rows.loc[rows.groupby("layer")["layer"].transform("size") >= MIN_CHANNELS]
    if rows.empty:
        raise InputError(f"no layer has {MIN_CHANNELS} channels for which {', '.join(columns)} are defined")
    return rows.reset_index(drop=True)


def _rows_of_layers(rows: pd.DataFrame) -> list[np.ndarray]:
    return [np.asarray(places) for places in rows.groupby("layer", sort=False).indices.values()]


def _draws(rows: pd.DataFrame, resamples: int, seed: int) -> np.ndarray:
    """Count how often each row is drawn, ``[1 + resamples, n]``: whole units, resampled within their group.

    The first entry takes every row once, which gives the measured value.
    """
    own = rows["layer"].astype(str) + "[" + rows["channel"].astype(str) + "]"
    unit = own if "unit" not in rows else rows["unit"].where(rows["unit"].notna() & (rows["unit"] != ""), own)
    group = unit.str.rpartition("[")[0]
    rng = np.random.default_rng(seed)
    counts = np.ones((1 + resamples, len(rows)))
    for members in group.groupby(group, sort=False).indices.values():
        number, names = pd.factorize(unit.iloc[members])
        drawn = resample_counts(len(names), resamples, rng)
        counts[1:, members] = drawn[:, number]
    return counts


def _within(ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the centred sums of products of ``[n, k]`` ranks, weighted by the counts, ``[resamples, k, k]``."""
    width = ranks.shape[1]
    sums = counts @ ranks
    products = counts @ (ranks[:, :, None] * ranks[:, None, :]).reshape(len(ranks), -1)
    total = np.maximum(counts.sum(1), 1)[:, None, None]
    return products.reshape(-1, width, width) - sums[:, :, None] * sums[:, None, :] / total


def _fit(products: np.ndarray, predictors: int, freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the adjusted R² of variable 0 on the next ones, and the slope of the last one, in each resample."""
    among, toward = products[:, 1 : predictors + 1, 1 : predictors + 1], products[:, 1 : predictors + 1, 0]
    slopes = (np.linalg.pinv(among, rcond=1e-10, hermitian=True) @ toward[:, :, None])[:, :, 0]
    total = products[:, 0, 0]
    plain = np.divide((slopes * toward).sum(1), total, out=np.full_like(total, np.nan), where=total > 0)
    left = freedom - predictors
    return (1 - (1 - plain) * freedom / left if left > 0 else np.full_like(plain, np.nan)), slopes[:, -1]


def _pairs(support: np.ndarray, matched: np.ndarray) -> list[np.ndarray]:
    """Return the places ``[2]`` of a channel with much support and one with little, for each pair of a layer."""
    much, little = np.flatnonzero(support > np.median(support)), np.flatnonzero(support < np.median(support))
    apart = np.abs(matched[much][:, None] - matched[little])
    limit = max(CALIPER, 1.5 / len(support))
    near = apart <= limit
    # Capped distances, so that no pair gets worse for the sake of one that is left out.
    first, second = linear_sum_assignment(np.minimum(apart, limit))
    return [np.array([much[i], little[j]]) for i, j in zip(first, second, strict=True) if near[i, j]]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
