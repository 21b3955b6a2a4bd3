"""Groupings: whether the two axes sort a layer's channels into the same groups."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from chanaxes_pl.analysis.correlations import AXES, checkpoints, layer_columns
from chanaxes_pl.core.statistics import z_scores
from chanaxes_pl.tables import HALVES

#: Number of groups per layer, k of k-means.
GROUPS = 4


def groupings(table: pd.DataFrame, seed: int = 0, starts: int = 10) -> pd.DataFrame:
    """Measure how well the groupings of a layer's channels by the two axes agree.

    Args:
        table: table of channels of one checkpoint or several.
        seed: random seed of k-means.
        starts: number of starts of k-means.

    Returns:
        The checkpoint's keys, ``layer, ari, ceiling_local, ceiling_target, n``. ``ari`` is the adjusted Rand index
        between the k-means partitions (k = 4) by the z-scored local metrics and by the z-scored target metrics. A
        ceiling is the index between the partitions of one axis on the two halves of the probe. The values are NaN if
        fewer than 4 channels are live, or the halves were not kept apart.
    """
    rows = []
    for keys, checkpoint in checkpoints(table):
        for layer, frame in checkpoint.groupby("layer", sort=False):
            values = layer_columns(frame)
            labels = {
                (axis, half): _clusters(np.stack([values[m + half] for m in metrics], 1), seed, starts)
                for axis, metrics in AXES.items()
                for half in ("", *(f"_{half}" for half in HALVES))
            }
            rows.append(
                {
                    **keys,
                    "layer": layer,
                    "ari": _rand_index(labels["local_axis", ""], labels["target_axis", ""]),
                    "ceiling_local": _rand_index(labels["local_axis", "_even"], labels["local_axis", "_odd"]),
                    "ceiling_target": _rand_index(labels["target_axis", "_even"], labels["target_axis", "_odd"]),
                    "n": len(values["input_capture"]),
                }
            )
    return pd.DataFrame(rows)


def _clusters(values: np.ndarray, seed: int, starts: int) -> np.ndarray | None:
    """Return the k-means labels ``[n]`` of z-scored points ``[n, 2]``, or ``None`` if they cannot be grouped."""
    if len(values) < GROUPS or not np.isfinite(values).all():
        return None
    points = z_scores(values, constant=0.0)
    # On so few points, threads only wait for each other, on a busy machine twenty times as long.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than groups: some stay empty
        model = KMeans(GROUPS, n_init=starts, random_state=seed)  # pyright: ignore[reportArgumentType]
        return model.fit(points).labels_


def _rand_index(first: np.ndarray | None, second: np.ndarray | None) -> float:
    return float("nan") if first is None or second is None else float(adjusted_rand_score(first, second))
