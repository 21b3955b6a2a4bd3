"""Findings at the top of the page: up to five sentences with the runs' own numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.stats import t as student

from chanaxes_pl.analysis.correlations import main_correlation, separation
from chanaxes_pl.analysis.damage import CORRELATED
from chanaxes_pl.analysis.runs import Runs
from chanaxes_pl.analysis.scores import SCORE_COLUMN
from chanaxes_pl.analysis.text import LESIONED, epoch_number, interval, number
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots.style import words
from chanaxes_pl.tables import DENSE, budget_words

#: Budget at which pruning is summarised; the nearest one of the grid is used.
BUDGET = 0.5
# From as many runs on, a bootstrap over them is a fair interval.
_ENOUGH = 10


@dataclass(frozen=True)
class Finding:
    """A sentence, and the title of the section that supports it."""

    text: str
    section: str


def findings(runs: Runs) -> list[Finding]:
    """Write the sentences for the experiments that were made, in the order of the page."""
    makers = {
        "Axis correlation": (_coupling, _separation),
        "Lesions": (_damage, _peers),
        "Pruning": (_pruning,),
    }
    return [Finding(text, title) for title, each in makers.items() for make in each for text in make(runs)]


def _coupling(runs: Runs) -> Iterator[str]:
    """State ρ at the first and the last checkpoint, with intervals over channels for one run, otherwise over runs."""
    count = len(runs.each)
    means = runs.mean() if count > 1 else runs.correlations.rename(columns={"rho": "mean"})
    rows = main_correlation(means).set_index("step")
    first, last = (_judged(rows[rows.index == runs.steps[place]].iloc[0]) for place in (0, -1))
    if first["mean"] != first["mean"]:
        return
    epoch = number(runs.table["epoch"].min(), 1) if runs.table["epoch"].min() else ""
    start = f"At epoch {epoch}" if epoch else "At initialisation"
    text = f"{start} {_state(first, 'the two axes are', 'ρ(input capture, task information)', count)}"
    if len(runs.steps) > 1 and last["mean"] == last["mean"]:
        less = _coupled(first) == _coupled(last) == "coupled" and last["mean"] <= first["mean"] / 2
        text += f"; {_at_the_end(runs)} {_state(last, 'they are less' if less else 'they are', 'ρ', count)}"
    elif len(runs.steps) > 1:
        text += f"; at the last checkpoint ρ is undefined{_cause(runs)}"
    if "std" in first and 1 < first["runs"] < _ENOUGH:
        text += f" (95 % intervals by Student's t over {first['runs']:.0f} runs)"
    yield f"{text}."


def _judged(row: pd.Series) -> pd.Series:
    """Return a mean over few runs with an interval by Student's t.

    A bootstrap over three runs covers seven times in ten, not 95 in a hundred.
    """
    if not 1 < row.get("runs", 1) < _ENOUGH:
        return row
    off = student.ppf(0.975, row["runs"] - 1) * row["std"] / math.sqrt(row["runs"])
    ends = {"low": row["mean"] - off, "high": row["mean"] + off}
    return pd.Series({**row, **ends})


def _state(row: pd.Series, are: str, rho: str, count: int) -> str:
    """Say whether the axes are coupled, if an interval tells, and ρ."""
    coupled = _coupled(row)
    text = f"{are} {coupled}: {rho} is {_cell(row)}" if coupled else f"{rho} is {_cell(row)}"
    if row.get("runs", count) < count:
        text += f" in {row['runs']:.0f} of {count} runs, and undefined in the others"
    return text + _chance(row)


def _at_the_end(runs: Runs) -> str:
    if all(run.steps[-1] == runs.steps[-1] for run in runs.each):
        return "after training"
    return f"at step {runs.steps[-1]}, the last that all runs share,"


def _cause(runs: Runs) -> str:
    """Say why most channels of the last checkpoint have no metrics."""
    reasons = runs.table.loc[runs.table["step"] == runs.steps[-1], "reason"]
    counts = reasons[reasons != ""].value_counts()
    return f" ({counts.index[0]}: {counts.iloc[0]} of {len(reasons)} channels)" if len(counts) else ""


def _coupled(row: pd.Series) -> str:
    """Say what the interval tells; empty if there is none."""
    low, high = row["low"], row["high"]
    if low != low:
        return ""
    return "coupled" if low > 0 else "inversely coupled" if high < 0 else "not coupled"


def _chance(row: pd.Series) -> str:
    """Say where a random target gives as much."""
    null = float(row.get("null", float("nan")))
    if _coupled(row) == "not coupled" or null * row["mean"] <= 0 or not abs(null) >= abs(row["mean"]):
        return ""
    return f", no further from 0 than with a random target ({number(null)})"


def _separation(runs: Runs) -> Iterator[str]:
    """State when ρ, its mean over several runs, had fallen to half of its highest value."""
    rows, which = main_correlation(runs.correlations), "The correlation"
    if len(runs.each) > 1:
        means = main_correlation(runs.mean())
        rows = means[means["runs"] == len(runs.each)].rename(columns={"mean": "rho"}).assign(run="")
        which = "The mean correlation"
    if len(rows) < 2 or rows["rho"].isna().all():
        return
    (found,) = separation(rows).to_dict("records")
    if not found["highest"] > 0:
        yield f"{which} is not above 0 at any checkpoint, so the axes had no coupling to lose."
        return
    text = f"{which} is highest at {_when(found['epoch_highest'], found['step_highest'])}, where ρ is "
    text += number(found["highest"])
    if found["step"] == found["step"]:
        text += f", and falls to half of that by {_when(found['epoch'], found['step'])}"
    elif found["last"] == found["last"]:
        text += ", and never falls to half of that"
    yield f"{text}."


def _when(epoch: float, step: float) -> str:
    return f"epoch {epoch_number(epoch)} (step {step:.0f})" if step else "initialisation"


def _damage(runs: Runs) -> Iterator[str]:
    """State the mean damage of a lesion, and the metric that it correlates with most strongly."""
    damage = runs.damage
    if damage is None:
        return
    tables = damage.tables[damage.tables["counts"]]
    cost = _mean(tables, damage.column)
    verb = "rises"
    if cost["mean"] < 0:
        verb, cost = "falls", pd.Series({"mean": -cost["mean"], "low": -cost["high"], "high": -cost["low"]})
    done = LESIONED[damage.column.removesuffix("_loss")]
    text = f"With one channel {done}, the test loss {verb} by {_cell(cost, 4)} nats on average"
    measured = damage.over_runs.dropna(subset=["mean"])
    axes = measured["score"].isin(CORRELATED)
    if len(measured[axes]):
        which, beyond = _strongest(measured[axes])
        text += "; within layers, this damage correlates "
        text += f"most with {which}" if beyond else f"with no metric beyond chance, most with {which}"
        if len(measured[~axes]):
            which, beyond = _strongest(measured[~axes])
            text += f", and of the other scores {'most' if beyond else 'with none beyond chance, most'} with {which}"
    if others := ", ".join(sorted(set(damage.tables["place"]) - set(tables["place"]))):
        text += f"; tables of lesions in {others} are not counted"
    yield text + "."


def _strongest(correlations: pd.DataFrame) -> tuple[str, bool]:
    """Name what correlates most strongly, and say whether its interval excludes 0."""
    row = correlations.iloc[int(correlations["mean"].abs().to_numpy().argmax())]
    return f"{words(row['score'].removeprefix(SCORE_COLUMN))} (ρ = {_cell(row)})", not row["low"] <= 0 <= row["high"]


def _peers(runs: Runs) -> Iterator[str]:
    """State how much of the damage remains if a channel is rebuilt from its peers."""
    damage = runs.damage
    if damage is None or damage.column == "peer_loss":
        return
    tables = damage.tables[damage.tables["counts"]]
    both = tables.dropna(subset=[column for column in ("peer_loss",) if column in tables])
    if "peer_loss" not in both or not len(both):
        return
    removed, rebuilt = (_mean(both, column) for column in (damage.column, "peer_loss"))
    text = f"Rebuilding the channel from its peers leaves {_cell(rebuilt, 4)} nats of this damage"
    if removed["mean"] > 0:
        text += f", so peers recover {100 * (1 - rebuilt['mean'] / removed['mean']):.0f} % of it"
    yield text + "."


def _pruning(runs: Runs) -> Iterator[str]:
    """State the accuracy of the best way to prune to half the budget, and of the best one without compensation.

    Grids may have other test images, so a way is judged by what it loses against the dense network on its own ones.
    """
    found = pd.concat([pd.DataFrame(), *(_ways(grid) for grid in runs.grids.values())])
    if not len(found):
        return
    # Of as many runs as there are, so that the means compare; then of one kind of budget, nearest to the one asked for.
    found = found[found["runs"] == found["runs"].max()]
    found = found[found["of"] == (_USUAL if _USUAL in set(found["of"]) else found["of"].iloc[0])]
    budget = min(found["budget"].unique(), key=lambda share: abs(share - BUDGET))
    found = found[found["budget"] == budget]
    best, bare = _best(found), _best(found[found["compensate"] == "none"])
    dense, kept = 100 * best["dense"], 100 * best["mean"]
    text = f"At {100 * budget:g} % of the {best['of']}, accuracy {'rises' if kept > dense else 'falls'} from "
    ways = len(found.drop_duplicates(_WAY))
    choice = f"at best of {ways} ways" if ways > 1 else "there"
    text += (
        f"{number(dense, 1)} % to {number(kept, 1)} % {choice}, by {best['score']} ({best['allocation']} allocation, "
    )
    text += "no compensation)" if best["compensate"] == "none" else f"{best['compensate']})"
    if bare and best["compensate"] != "none":
        text += f"; without compensation {number(100 * bare['mean'], 1)} % are left at best, by {bare['score']}"
        text += f" ({bare['allocation']} allocation)"
    if best["runs"] < len(runs.each):
        text += f" ({best['runs']} of {len(runs.each)} runs)"
    yield text + "."


_WAY = ["score", "allocation", "compensate"]
_USUAL = "multiply–accumulates"


def _ways(grid: pd.DataFrame) -> pd.DataFrame:
    """Return for each way to prune ``mean``, the accuracy of ``runs``, and ``dense``, that of their dense networks."""
    dense = grid[grid["score"] == DENSE].groupby("run")["accuracy"].mean()
    rows = grid[grid["score"] != DENSE].dropna(subset=["accuracy"])
    if not len(rows):
        return rows
    ways = rows.assign(dense=rows["run"].map(dense)).groupby([*_WAY, "budget"], sort=False)
    found = ways.agg(mean=("accuracy", "mean"), dense=("dense", "mean"), runs=("run", "nunique"))
    return found.reset_index().assign(of=budget_words(grid))


def _best(ways: pd.DataFrame) -> dict[str, Any]:
    """Return the row that loses least against the dense network; nothing if there are no rows."""
    rows = ways.iloc[(ways["dense"] - ways["mean"]).argsort(kind="stable")].to_dict("records")
    return {str(name): value for name, value in rows[0].items()} if rows else {}


def _mean(table: pd.DataFrame, column: str) -> pd.Series:
    """Average over channels, then over runs."""
    by_run = table.groupby("run", sort=False)[column].mean().reset_index().assign(all="")
    return mean_over_runs(by_run, column, by=["all"]).iloc[0]


def _cell(row: pd.Series, digits: int = 2) -> str:
    return interval(row, digits, spread=False)
