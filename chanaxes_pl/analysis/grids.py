"""Analysis of pruning grids: area under the curve, and paired differences between scores."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd

from chanaxes_pl.analysis.scores import SCORES
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.tables import DENSE, TUNED, read_grid


def read_grids(tables: str) -> pd.DataFrame:
    """Read the pruning grids that match a glob; the column ``run`` holds the folder of each.

    Args:
        tables: glob over files, such as ``"runs/NAME/version_*/pruning.parquet"``.

    Raises:
        FileNotFoundError: if no file matches.
        ValueError: if a file is not a pruning grid.
    """
    paths = sorted(glob(tables))
    if not paths:
        raise FileNotFoundError(f"no file matches {tables!r}; expected pruning.parquet, which `chanaxes prune` writes")
    grids = [read_grid(Path(path)).assign(run=str(Path(path).parent)) for path in paths]
    return pd.concat(grids, ignore_index=True)


def area_under_curve(grid: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Average a column over MACs, for every score, allocation and compensation of every run.

    The curve is linear between the achieved MACs of the grid's networks, from the smallest to the dense one. The area
    under it is divided by that range.

    Args:
        grid: table of :func:`pruning_grid`, or several with a column ``run``.
        value: column to average.

    Returns:
        ``run`` (if the grid has it), ``score, family, allocation, compensate`` and ``area``.
    """
    runs = ["run"] if "run" in grid else []
    rows = []
    for keys, curve in grid[grid["score"] != DENSE].groupby(
        [*runs, "score", "family", "allocation", "compensate"], sort=False
    ):
        dense = grid[(grid["score"] == DENSE) & ((grid["run"] == keys[0]) if runs else True)]
        if value.startswith(TUNED):  # the dense network is trained already
            dense = dense.assign(**{value: dense[value.removeprefix(TUNED)]})
        points = pd.concat([curve, dense]).sort_values("macs_share")
        x, y = points["macs_share"].to_numpy(), points[value].to_numpy()
        row = dict(zip([*runs, "score", "family", "allocation", "compensate"], keys, strict=True))
        rows.append(row | {"area": float(np.trapezoid(y, x) / (x[-1] - x[0]))})
    return pd.DataFrame(rows)


def paired_difference(
    areas: pd.DataFrame, first: Sequence[str], second: Sequence[str], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Compare two sets of scores on the same checkpoints, under each allocation and compensation.

    Args:
        areas: table of :func:`area_under_curve`, of several runs.
        first: scores to average within a run.
        second: scores whose average is subtracted.
        resamples: number of bootstrap resamples over runs.
        seed: random seed of the resampling.

    Returns:
        ``allocation, compensate, mean, std, low, high, runs`` of the difference, see
        :func:`mean_over_runs`.
    """
    areas = areas if "run" in areas else areas.assign(run="")
    keys = ["run", "allocation", "compensate"]
    means = [areas[areas["score"].isin(scores)].groupby(keys, sort=False)["area"].mean() for scores in (first, second)]
    gaps = (means[0] - means[1]).rename("gap").reset_index()
    return mean_over_runs(gaps, "gap", resamples, seed, by=keys[1:])


_DIFFERENCE = ["allocation", "compensate", "mean", "std", "low", "high", "runs", "scores", "against"]


def score_differences(grid: pd.DataFrame, value: str = "accuracy", against: str = "l1") -> pd.DataFrame:
    """Compare the area under the curve of each score with a reference, and local-axis with target-axis scores.

    Args:
        grid: pruning grids of several runs, with a column ``run``.
        value: column of the curve.
        against: reference score, which is subtracted; if the grid lacks it, only the axes are compared.

    Returns:
        ``allocation, compensate, scores, against`` and ``mean, std, low, high, runs`` of the difference.
    """
    areas = area_under_curve(grid, value)
    present = areas["score"].unique().tolist() if len(areas) else []
    pairs = [([score], [against], score, against) for score in present if score != against and against in present]
    local, target = ([score for score in present if SCORES.get(score) == axis] for axis in ("local", "target"))
    if local and target:
        pairs.append((local, target, "local-axis scores", "target-axis scores"))
    rows = [paired_difference(areas, *pair[:2]).assign(scores=pair[2], against=pair[3]) for pair in pairs]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=_DIFFERENCE)
