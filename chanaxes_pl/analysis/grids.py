"""Pruning grids: area under the curve, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.tables import DENSE


def area_under_curve(grid: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Mean of a column over MACs, for every score, allocation and compensation of every run.

    The curve is linear between the achieved MACs of the grid's networks, from the smallest to the dense one, and the
    area under it is divided by that range.

    Args:
        grid: from :func:`pruning_grid`; several, told apart by a column ``run``.
        value: the column.

    Returns:
        ``run`` (where there), ``score, family, allocation, compensate`` and ``area``.
    """
    runs = ["run"] if "run" in grid else []
    rows = []
    for keys, curve in grid[grid["score"] != DENSE].groupby(
        [*runs, "score", "family", "allocation", "compensate"], sort=False
    ):
        dense = grid[(grid["score"] == DENSE) & ((grid["run"] == keys[0]) if runs else True)]
        points = pd.concat([curve, dense]).sort_values("macs_share")
        x, y = points["macs_share"].to_numpy(), points[value].to_numpy()
        row = dict(zip([*runs, "score", "family", "allocation", "compensate"], keys, strict=True))
        rows.append(row | {"area": float(np.trapezoid(y, x) / (x[-1] - x[0]))})
    return pd.DataFrame(rows)


def paired_difference(
    areas: pd.DataFrame, first: Sequence[str], second: Sequence[str], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How much better some scores do than others on the same checkpoints, under each allocation and compensation.

    Args:
        areas: from :func:`area_under_curve`, of several runs.
        first: scores, averaged within a run.
        second: the scores that are subtracted.
        resamples: bootstrap resamples over runs.
        seed: of the resamples.

    Returns:
        ``allocation, compensate, mean, std, low, high, runs`` of the difference, see
        :func:`mean_over_runs`.
    """
    areas = areas if "run" in areas else areas.assign(run="")
    keys = ["run", "allocation", "compensate"]
    means = [areas[areas["score"].isin(scores)].groupby(keys, sort=False)["area"].mean() for scores in (first, second)]
    gaps = (means[0] - means[1]).rename("gap").reset_index()
    return mean_over_runs(gaps, "gap", resamples, seed, by=keys[1:])
