"""Pruning grids: area under the curve, and paired differences between scores."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd

from chanaxes_pl.analysis.scores import SCORES
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.tables import DENSE, read_grid


def read_grids(tables: str) -> pd.DataFrame:
    """The pruning grids that a glob names, told apart by ``run``, the folder they are in.

    Args:
        tables: glob over files, such as ``"runs/NAME/version_*/pruning.parquet"``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if one is no pruning grid.
    """
    paths = sorted(glob(tables))
    if not paths:
        raise FileNotFoundError(f"no file matches {tables!r}; expected what `chanaxes prune` wrote, pruning.parquet")
    grids = [read_grid(Path(path)).assign(run=str(Path(path).parent)) for path in paths]
    return pd.concat(grids, ignore_index=True)


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


def score_differences(grid: pd.DataFrame, value: str = "accuracy", against: str = "l1") -> pd.DataFrame:
    """Area under the curve of each score less that of one other, and of local-axis less target-axis scores, run by run.

    Args:
        grid: of several runs, told apart by ``run``.
        value: the column under whose curve the area is.
        against: the score that is subtracted; without it in the grid the axes alone are compared.

    Returns:
        ``allocation, compensate, scores, against`` and ``mean, std, low, high, runs`` of the difference.
    """
    areas = area_under_curve(grid, value)
    if not len(areas):
        return pd.DataFrame(
            columns=["allocation", "compensate", "scores", "against", "mean", "std", "low", "high", "runs"]
        )
    present = areas["score"].unique().tolist()
    pairs = [([score], [against], score, against) for score in present if score != against and against in present]
    local, target = ([score for score in present if SCORES.get(score) == axis] for axis in ("local", "target"))
    if local and target:
        pairs.append((local, target, "local-axis scores", "target-axis scores"))
    rows = [paired_difference(areas, *pair[:2]).assign(scores=pair[2], against=pair[3]) for pair in pairs]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["allocation", "compensate"])
