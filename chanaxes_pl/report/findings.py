"""Findings at the top of the page: up to five sentences with the runs' own numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from scipy.stats import t as student

from chanaxes_pl.analysis.correlations import main_correlation, separation
from chanaxes_pl.analysis.runs import Runs
from chanaxes_pl.analysis.text import interval, number
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots.style import words
from chanaxes_pl.tables import DENSE, budget_words

#: Budget at which pruning is summarised; the nearest one of the grid is used.
BUDGET = 0.5
# From as many runs on, a bootstrap over them is a fair interval.
_ENOUGH = 10
# Kinds of compensation in the order in which a sentence looks for them.
_COMPENSATIONS = ("none", "refit", "fold", "distill")


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
    if len(runs.each) == 1:
        rows = main_correlation(runs.correlations).rename(columns={"rho": "mean"}).set_index("step")
    else:
        rows = main_correlation(runs.mean()).set_index("step")
    first, last = (rows[rows.index == runs.steps[place]].iloc[0] for place in (0, -1))
    if first["mean"] != first["mean"]:
        return
    epoch = number(runs.table["epoch"].min(), 1) if runs.table["epoch"].min() else ""
    start = f"At epoch {epoch}" if epoch else "At initialisation"
    text = f"{start} the two axes are {_coupled(first)}: ρ(input capture, task information) is {_cell(first)}"
    text += _chance(first)
    if len(runs.steps) > 1 and last["mean"] == last["mean"]:
        text += f"; after training they are {_coupled(last)}: ρ is {_cell(last)}{_chance(last)}"
    elif len(runs.steps) > 1:
        text += f"; at the last checkpoint ρ is undefined{_cause(runs)}"
    yield text + "."


def _cause(runs: Runs) -> str:
    """Say why most channels of the last checkpoint have no metrics."""
    reasons = runs.table.loc[runs.table["step"] == runs.steps[-1], "reason"]
    counts = reasons[reasons != ""].value_counts()
    return f" ({counts.index[0]}: {counts.iloc[0]} of {len(reasons)} channels)" if len(counts) else ""


def _coupled(row: pd.Series) -> str:
    low, high = row["low"], row["high"]
    if low != low:
        return "coupled" if row["mean"] > 0 else "not coupled"
    if 1 < row.get("runs", 1) < _ENOUGH:  # a bootstrap over three runs covers seven times in ten, not 95 in a hundred
        off = student.ppf(0.975, row["runs"] - 1) * row["std"] / math.sqrt(row["runs"])
        low, high = row["mean"] - off, row["mean"] + off
    return "coupled" if low > 0 else "inversely coupled" if high < 0 else "not coupled"


def _chance(row: pd.Series) -> str:
    """Say where a random target gives as much."""
    null = float(row.get("null", float("nan")))
    if _coupled(row) != "not coupled" and null * row["mean"] > 0 and abs(null) >= abs(row["mean"]):
        return f", no further from 0 than with a random target ({number(null)})"
    return ""


def _separation(runs: Runs) -> Iterator[str]:
    """State when ρ had fallen to half of its highest value."""
    if len(runs.steps) == 1:
        return
    found = separation(main_correlation(runs.correlations))
    coupled = found[found["highest"] > 0]
    if not len(coupled):
        if found["highest"].notna().any():
            yield "The correlation is not above 0 at any checkpoint, so the axes had no coupling to lose."
        return
    apart = coupled.dropna(subset=["step"])
    several = len(found) > 1
    highest = f"The correlation is highest at {_when(coupled, '_highest')}, where ρ is {_middle(coupled['highest'])}"
    if not len(apart):
        last = main_correlation(runs.correlations).groupby("step")["rho"].mean().iloc[-1]
        yield f"{highest}." if last != last else f"{highest}, and never falls to half of that."
    elif several:
        yield f"{highest}, and falls to half of that by {_when(apart)} in {len(apart)} of {len(found)} runs (medians)."
    else:
        yield f"{highest}, and falls to half of that by {_when(apart)}."


def _when(rows: pd.DataFrame, which: str = "") -> str:
    epoch, step = (rows[f"{name}{which}"].median() for name in ("epoch", "step"))
    return f"epoch {epoch:.2g} (step {step:.0f})" if step else "initialisation"


def _middle(values: pd.Series) -> str:
    return number(values.median())


def _damage(runs: Runs) -> Iterator[str]:
    """State the mean damage of a lesion, and the metric that it correlates with most strongly."""
    damage = runs.damage
    if damage is None:
        return
    cost = _mean(damage.tables, damage.column)
    verb = "raises"
    if cost["mean"] < 0:
        verb, cost = "lowers", pd.Series({"mean": -cost["mean"], "low": -cost["high"], "high": -cost["low"]})
    text = f"{_OPERATION[damage.column]} {verb} the test loss by {_cell(cost, 4)} nats on average"
    strongest = damage.over_runs.dropna(subset=["mean"])
    if len(strongest):
        row = strongest.iloc[int(strongest["mean"].abs().to_numpy().argmax())]
        text += f"; within layers, this damage correlates most with {words(row['score'])} (ρ = {_cell(row)})"
    yield text + "."


_OPERATION = {
    "zero_loss": "Removing one channel",
    "mean_loss": "Setting one channel to its mean",
    "peer_loss": "Rebuilding one channel from its peers",
    "hull_loss": "Rebuilding one channel from its hull",
}


def _peers(runs: Runs) -> Iterator[str]:
    """State how much of the damage remains if a channel is rebuilt from its peers."""
    damage = runs.damage
    if damage is None or damage.column == "peer_loss":
        return
    both = damage.tables.dropna(subset=[column for column in ("peer_loss",) if column in damage.tables])
    if "peer_loss" not in both or not len(both):
        return
    removed, rebuilt = (_mean(both, column) for column in (damage.column, "peer_loss"))
    text = f"Rebuilding the channel from its peers leaves {_cell(rebuilt, 4)} nats of this damage"
    if removed["mean"] > 0:
        text += f", so peers recover {100 * (1 - rebuilt['mean'] / removed['mean']):.0f} % of it"
    yield text + "."


def _pruning(runs: Runs) -> Iterator[str]:
    """State the accuracy of the best score at half the budget without compensation, and of that score with it."""
    if not runs.grids:
        return
    # Grids may have other test images, so they are not mixed; the one that compares most compensations says most.
    grid = max(runs.grids.values(), key=lambda grid: grid["compensate"].nunique())
    pruned = grid[grid["score"] != DENSE]
    if not len(pruned):
        return
    budget = min(pruned["budget"].unique(), key=lambda share: abs(share - BUDGET))
    rows = pruned[pruned["budget"] == budget]
    keys = ["score", "allocation"]
    by = [*keys, "compensate"]
    means = mean_over_runs(rows, "accuracy", runs.resamples, by=by).dropna(subset=["mean"]).set_index(by)["mean"]
    kinds = [kind for kind in _COMPENSATIONS if kind in means.index.get_level_values("compensate")]
    if not kinds:
        return
    bare = means.xs(kinds[0], level="compensate")
    score, allocation = bare.index[int(bare.to_numpy().argmax())]
    dense = 100 * grid.loc[grid["score"] == DENSE, "accuracy"].mean()
    verb = "rises" if 100 * bare.max() > dense else "falls"
    text = f"At {100 * budget:g} % of the {budget_words(pruned)}, accuracy {verb} from {number(dense, 1)} % to "
    text += f"{number(100 * bare.max(), 1)} % under the best score, {score} ({allocation} allocation"
    text += ", no compensation)" if kinds[0] == "none" else f", {kinds[0]})"
    others = [kind for kind in kinds[1:] if (score, allocation, kind) in means.index]
    if kinds[0] == "none" and others:
        mended = means[score, allocation, others[0]]
        points = 100 * (mended - bare.max())
        verb = "recovers" if points >= 0 else "costs a further"
        text += f"; {others[0]} {verb} {number(abs(points), 1)} points, to {number(100 * mended, 1)} %"
    yield text + "."


def _mean(table: pd.DataFrame, column: str) -> pd.Series:
    """Average over channels, then over runs."""
    by_run = table.groupby("run", sort=False)[column].mean().reset_index().assign(all="")
    return mean_over_runs(by_run, column, by=["all"]).iloc[0]


def _cell(row: pd.Series, digits: int = 2) -> str:
    return interval(row, digits, spread=False)
