"""Rank statistics, z-scores, composites and bootstrap intervals, with NumPy, pandas and SciPy only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import rankdata

#: Minimum number of values for a rank correlation.
MIN_CHANNELS = 3


def centred_midranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of ``[n]`` values minus the mean rank; equal values share the mean of their ranks.

    This takes a sixth of the time of SciPy's ``rankdata``.
    """
    _, group, held = np.unique(values, return_inverse=True, return_counts=True)
    return (held.cumsum() - held / 2)[group] - len(values) / 2


def relative_ranks(values: np.ndarray) -> np.ndarray:
    """Rank each column of ``[n, k]`` values, scaled to lie between −½ and ½; equal values share the mean rank."""
    return (rankdata(values, axis=0) - 0.5) / len(values) - 0.5


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the Spearman rank correlation; NaN for n < 3, a constant input, or values that are not finite.

    Example:
        >>> import numpy as np
        >>> spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 8.0]))
        0.8
    """
    if len(first) < MIN_CHANNELS or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    x, y = centred_midranks(first), centred_midranks(second)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def spearman_brown(half: float) -> float:
    """Compute the reliability of a whole from the correlation r of its halves, 2r / (1 + r); 0 if r < 0.

    Example:
        >>> round(spearman_brown(0.6), 3), spearman_brown(-0.1)
        (0.75, 0.0)
    """
    return 2 * half / (1 + half) if not half < 0 else 0.0


def z_scores(values: np.ndarray, constant: float = np.nan) -> np.ndarray:
    """Standardise values along the first dimension with the population standard deviation.

    Args:
        values: ``[n, …]``; a value that is not finite makes its whole column NaN.
        constant: z-score of a column whose values are all equal, where it is undefined. A pruning score passes 0, so
            that such a column prefers no channel.

    Returns:
        ``[n, …]``, unitless.

    Example:
        >>> import numpy as np
        >>> z_scores(np.array([1.0, 3.0])), z_scores(np.array([0.1, 0.1, 0.1])), z_scores(np.array([2.0, 2.0]), 0.0)
        (array([-1.,  1.]), array([nan, nan, nan]), array([0., 0.]))
    """
    if not len(values):
        return np.array(values, float)
    with np.errstate(invalid="ignore"):  # infinite values
        mean, spread = values.mean(0), values.std(0)
        # The rounding of the mean can leave a spread above 0.
        same = (values.max(0) == values.min(0)) & np.isfinite(spread) | (spread == 0)
        scaled = (values - mean) / np.where(same, 1.0, spread)
    return np.where(same, constant, np.where(np.isfinite(spread), scaled, np.nan))


def composite(columns: Sequence[np.ndarray], signs: Sequence[int], constant: float = np.nan) -> np.ndarray:
    """Average the signed z-scores of some columns.

    Args:
        columns: ``[n]`` each.
        signs: 1 or −1 for each column.
        constant: z-score of a constant column, see :func:`z_scores`.

    Returns:
        ``[n]``, unitless.

    Example:
        >>> import numpy as np
        >>> composite([np.array([1.0, 3.0]), np.array([5.0, 4.0])], signs=[1, -1])
        array([-1.,  1.])
    """
    return np.mean([sign * z_scores(column, constant) for column, sign in zip(columns, signs, strict=True)], 0)


def resample_counts(size: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Count how often a bootstrap with replacement draws each of ``size`` items, ``[resamples, size]``."""
    return rng.multinomial(size, np.full(size, 1 / size), resamples)


def resampled(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draw from ``[n]`` values with replacement, ``[resamples, n]``."""
    return values[np.random.default_rng(seed).integers(0, max(1, len(values)), (resamples, len(values)))]


def bounds(draws: np.ndarray, method: Literal["linear", "nearest"] = "linear") -> np.ndarray:
    """Return the ends of 95 % percentile intervals, ``[2, …]``, over the draws that are not NaN.

    Args:
        draws: ``[resamples, …]``, a statistic of every resample.
        method: interpolation method of ``numpy.quantile``.
    """
    if not len(draws):
        return np.full((2, *draws.shape[1:]), np.nan)
    if np.isfinite(draws).all():
        return np.quantile(draws, [0.025, 0.975], axis=0, method=method)  # many times faster than nanquantile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all draws are NaN
        return np.nanquantile(draws, [0.025, 0.975], axis=0, method=method)


def interval(draws: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Return :func:`bounds` of ``[resamples]`` draws as the columns ``<prefix>low`` and ``<prefix>high``."""
    low, high = bounds(draws)
    return {f"{prefix}low": float(low), f"{prefix}high": float(high)}


def rank_correlations(values: np.ndarray, target: np.ndarray, counts: np.ndarray, *, rerank: bool) -> np.ndarray:
    """Compute the Spearman correlations of some columns with one target in every bootstrap resample.

    A resample is a count per row, so that nothing is sorted twice. A column's correlation leaves out the rows in which
    the column is not finite.

    Args:
        values: ``[n, k]``.
        target: ``[n]``, finite.
        counts: ``[resamples, n]``, how often each row is drawn.
        rerank: whether to rank each resample anew. If true, the result is Spearman's correlation of the resampled
            rows, in which a row that is drawn twice is a tie. If false, the ranks among all rows are kept and weighted
            by the counts, with one matrix product for all columns.

    Returns:
        ``[resamples, k]``; NaN for fewer than 3 rows, and if a resample holds only one value.
    """
    found = np.full((len(counts), values.shape[1]), np.nan)
    masks, group = np.unique(np.isfinite(values), axis=1, return_inverse=True)
    correlate = _reranked if rerank else _fixed_ranks
    for number, mask in enumerate(masks.T):
        if mask.sum() >= MIN_CHANNELS:
            columns = np.flatnonzero(group.ravel() == number)
            found[:, columns] = correlate(values[np.ix_(mask, columns)], target[mask], counts[:, mask])
    return found


def _reranked(values: np.ndarray, target: np.ndarray, counts: np.ndarray) -> np.ndarray:
    y = _resampled_midranks(target, counts)
    columns = []
    for column in values.T:
        x = _resampled_midranks(column, counts)
        xy, xx, yy = ((counts * a * b).sum(1) for a, b in ((x, y), (x, x), (y, y)))
        scale = np.sqrt(xx * yy)
        columns.append(np.divide(xy, scale, out=np.full_like(xy, np.nan), where=scale > 0))
    return np.stack(columns, 1)


def _resampled_midranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the centred midranks of ``values [n]`` within each resample, ``[resamples, n]``."""
    order = np.argsort(values, kind="stable")
    distinct, group = np.unique(values, return_inverse=True)
    starts = np.searchsorted(values[order], distinct)
    held = np.add.reduceat(counts[:, order], starts, axis=1)
    middle = held.cumsum(1) - held / 2  # rank − ½ of the middle of a group of ties
    return middle[:, group] - counts.sum(1, keepdims=True) / 2


def _fixed_ranks(values: np.ndarray, target: np.ndarray, counts: np.ndarray) -> np.ndarray:
    x, y = relative_ranks(values), relative_ranks(target[:, None])
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    sum_x, sum_y = counts @ x, counts @ y
    xx, xy = counts @ x**2 - sum_x**2 / total, counts @ (x * y) - sum_x * sum_y / total
    scale = np.sqrt(np.maximum(xx * (counts @ y**2 - sum_y**2 / total), 0.0))
    # If a resample holds only one value, the sums hold only rounding error.
    return np.divide(xy, scale, out=np.full_like(xy, np.nan), where=scale > 1e-12)


_GROUPED = ("epoch", "step", "layer", "local", "target", "metric", "score", "allocation", "compensate", "budget")


def mean_over_runs(
    frame: pd.DataFrame,
    value: str | Sequence[str] = "rho",
    resamples: int = 1000,
    seed: int = 0,
    by: Sequence[str] = _GROUPED,
) -> pd.DataFrame:
    """Average a column of a result table over runs (seeds), with a 95 % percentile bootstrap over runs.

    Args:
        frame: rows of several runs, with a column ``run``.
        value: name of the column, or several names.
        resamples: number of bootstrap resamples over runs.
        seed: random seed of the resampling.
        by: columns to group by, if ``frame`` has them: those of the checkpoint, layer and metrics, and those that tell
            the networks of a pruning grid apart.

    Returns:
        The grouping columns and ``mean, std, low, high, runs``; for several columns also ``value``, the column's name.
    """
    if not isinstance(value, str):
        each = [mean_over_runs(frame, column, resamples, seed, by).assign(value=column) for column in value]
        return pd.concat(each, ignore_index=True)
    present = [column for column in by if column in frame]

    def summary(values: pd.Series) -> pd.Series:
        data = values.dropna().to_numpy()
        low, high = bounds(resampled(data, resamples, seed).mean(1)) if len(data) > 1 else (np.nan, np.nan)
        std = data.std(ddof=1) if len(data) > 1 else np.nan
        mean = data.mean() if len(data) else np.nan
        return pd.Series({"mean": mean, "std": std, "low": low, "high": high, "runs": len(data)})

    return frame.groupby(present, sort=False)[value].apply(summary).unstack().reset_index()
