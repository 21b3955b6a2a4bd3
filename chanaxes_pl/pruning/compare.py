"""``chanaxes compare``: the pruning grids of several runs as one table and figure."""

from __future__ import annotations

from glob import glob
from pathlib import Path

import pandas as pd

from chanaxes_pl.analysis.grids import area_under_curve, paired_difference
from chanaxes_pl.analysis.scores import SCORES
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots import plot_pruning
from chanaxes_pl.tables import DENSE, VARIANT


def compare(tables: str, value: str = "accuracy", against: str = "l1", figure: str | None = None) -> None:
    """Print mean and interval over runs of what ``chanaxes prune`` found, scores set against each other in pairs.

    Args:
        tables: glob over the runs' tables, in quotes: "runs/NAME/version_*/pruning.parquet".
        value: the column to compare: accuracy, loss, margin, or one after fine-tuning, tuned_accuracy and so on.
        against: the score that every other is set against on the same runs.
        figure: where to draw the mean curves, with the range over runs; default nowhere.
    """
    grid = read_grids(tables)
    if value not in grid:
        raise SystemExit(f"error: no column {value!r} in {tables}; there are {', '.join(map(str, grid.columns))}")
    areas = area_under_curve(grid, value)
    print(describe_runs(grid, areas, value, against))
    if figure:
        plot_pruning(grid).savefig(figure, dpi=150)
        print(f"\nfigure: {figure}")


def read_grids(tables: str) -> pd.DataFrame:
    """The pruning grids that a glob names, told apart by ``run``, the part of the path in which they differ.

    Raises:
        SystemExit: if there is none, or one is no pruning grid.
    """
    paths = sorted(glob(tables))
    if not paths:
        raise SystemExit(f"error: no file matches {tables!r}; expected what `chanaxes prune` wrote, pruning.parquet")
    grids = []
    for path in paths:
        grid = pd.read_parquet(path)
        if not {*VARIANT, "macs_share"} <= {*grid}:
            raise SystemExit(f"error: {path} is no pruning grid: expected columns {', '.join(VARIANT)}, macs_share")
        grids.append(grid.assign(run=str(Path(path).parent)))
    return pd.concat(grids, ignore_index=True)


def describe_runs(grid: pd.DataFrame, areas: pd.DataFrame, value: str, against: str) -> str:
    """Mean over runs by budget and as area under the curve, and paired differences, in percent or nats."""
    scale, unit = (100, "%") if value.endswith("accuracy") else (1, "nats")
    runs = grid["run"].nunique()
    dense = grid[grid["score"] == DENSE][value.removeprefix("tuned_")] * scale
    lines = [f"{value} in {unit}, {runs} run{'s' * (runs != 1)}, dense {_spread(dense)}; mean [95 % over runs]"]
    for (allocation, strength), part in grid[grid["score"] != DENSE].groupby(["allocation", "compensate"], sort=False):
        means = mean_over_runs(part[["run", *VARIANT, value]], value)
        budgets = sorted(means["budget"].unique(), reverse=True)
        head = "".join(f"{f'{100 * budget:g} %':>19}" for budget in budgets)
        title = f"{allocation}, {'no compensation' if strength == 'none' else strength}"
        lines += ["", title, f"{'':26}{head}"]
        for score, rows in means.groupby("score", sort=False):
            cells = [_interval(rows[rows["budget"] == budget], scale) for budget in budgets]
            lines.append(f"{score:26}" + "".join(f"{cell:>19}" for cell in cells))
        area = areas[(areas["allocation"] == allocation) & (areas["compensate"] == strength)]
        lines += _paired(area, against, scale)
    return "\n".join(lines)


def _paired(areas: pd.DataFrame, against: str, scale: float) -> list[str]:
    """Differences of areas on the same runs: every score and one other, and the two axes."""
    present = areas["score"].unique().tolist()
    lines = []
    if against in present:
        lines.append(f"area under the curve less that of {against}, on the same runs:")
        for score in present:
            if score != against:
                row = paired_difference(areas, [score], [against])
                lines.append(f"  {score:20}{_interval(row, scale):>19}")
    local, target = ([score for score in present if SCORES.get(score) == family] for family in ("local", "target"))
    if local and target:
        cell = _interval(paired_difference(areas, local, target), scale)
        lines.append(f"local-axis scores less target-axis scores: {cell} ({', '.join(local)} / {', '.join(target)})")
    return lines


def _interval(rows: pd.DataFrame, scale: float) -> str:
    if not len(rows):
        return "–"
    middle, low, high = (scale * float(rows[name].iloc[0]) for name in ("mean", "low", "high"))
    return f"{middle:.1f}" if low != low else f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _spread(values: pd.Series) -> str:
    return f"{values.mean():.1f}" if len(values) < 2 else f"{values.mean():.1f} ± {values.std():.1f}"
