"""Sections of the report on experiments with the trained networks: lesions, early prediction and pruning."""

from __future__ import annotations

import pandas as pd

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.analysis.damage import CORRELATED
from chanaxes_pl.analysis.grids import score_differences
from chanaxes_pl.analysis.prediction import early_prediction
from chanaxes_pl.analysis.runs import DAMAGES, Runs, middle_epochs
from chanaxes_pl.analysis.scores import SCORE_COLUMN
from chanaxes_pl.analysis.text import LESIONED, interval, intervals, noise_of, number, variant
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots import plot_early_prediction, plot_lesions, plot_pruning
from chanaxes_pl.plots.style import words
from chanaxes_pl.report.blocks import Block, Missing, Picture, Section, Table
from chanaxes_pl.tables import DENSE, VARIANT, budget_words

_POINT = ["run", "layer", "channel"]


def lesions(runs: Runs) -> Section:
    """Make the section on the damage of lesions and its correlations."""
    about = "Damage on test images when single channels are lesioned, and what it correlates with."
    damage = runs.damage
    if damage is None:
        reason = (
            "The run folder has no lesions.parquet yet; make it with "
            "`chanaxes lesion --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt`."
        )
        if any(run.lesions for run in runs.each):
            reason = "The tables of lesions share no operation, or have no layer with 3 channels to correlate."
        return Section("Lesions", about, [Missing(reason)])
    blocks: list[Block] = []
    done = LESIONED[damage.column.removesuffix("_loss")]
    tables = list(damage.tables.groupby(["run", "place"], sort=False))
    for nth, ((run, place), table) in enumerate(tables):
        found = damage.correlations
        found = found[(found["run"] == run) & (found["place"] == place) & found["score"].isin(CORRELATED)]
        losses = [name for name in DAMAGES if name in table and table[name].notna().any()]
        means = [f"{LESIONED[name.removesuffix('_loss')]} {number(table[name].mean(), 4, True)}" for name in losses]
        panels = found.loc[found["layer"] == NETWORK, "score"]
        where = run if place == "." else f"{run} ({place})"
        blocks.append(
            Picture(
                f"lesions-{nth}" if len(tables) > 1 else "lesions",
                plot_lesions(table, found, damage.column, title=str(run) if len(runs.each) > 1 else ""),
                table.drop(columns="counts"),
                f"{len(table)} channels of {where}; mean change of cross-entropy in nats: {', '.join(means)}. "
                f"ρ: correlation of the damage if {done} with the metric, within layers, mean over layers [95 % over "
                "units]. " + "".join(f"{line}." for line in noise_of(table, damage.column)),
                [table[[*_POINT, score, damage.column]] for score in panels],
            )
        )
    rows = [
        [words(str(row["score"]).removeprefix(SCORE_COLUMN)), interval(row)] for _, row in damage.over_runs.iterrows()
    ]
    spread = "mean ± standard deviation [95 % bootstrap over runs]" if len(runs.each) > 1 else "[95 % over units]"
    caption = f"ρ with the damage if {done}: {spread}. Scores: low = remove."
    blocks.append(Table(caption, ["metric or score", "ρ"], rows))
    return Section("Lesions", about, blocks)


def early(runs: Runs) -> Section:
    """Make the section on how early damage and pruning order can be predicted."""
    about = "Rank correlation of each metric at each checkpoint with the channels' damage and pruning order at the end."
    frames: list[pd.DataFrame] = []
    blocks: list[Block] = []
    for run in runs.each:
        try:
            damage = DAMAGES[0] if runs.damage is None else runs.damage.column
            hurt = None if runs.damage is None else run.lesions.get(run.lesion_place or "")
            found = early_prediction(run, hurt, damage=damage, resamples=runs.resamples)
        except ValueError as error:
            blocks.append(Missing(f"{run.name} is left out: {error}"))
            continue
        frames.append(found[(found["layer"] == NETWORK) & found["step"].isin(runs.steps)].assign(run=run.name))
    if not frames:
        return Section("Early prediction", about, blocks)
    table = pd.concat(frames, ignore_index=True)
    table["epoch"] = middle_epochs(table)
    drawn, spread = table, "95 % over channels"
    if len(frames) > 1:
        reasons = table.drop_duplicates("target").set_index("target")["reason"]
        drawn = mean_over_runs(table, "rho", runs.resamples).rename(columns={"mean": "rho"})
        drawn, spread = drawn.assign(reason=drawn["target"].map(reasons)), "mean of runs, 95 % over runs"
    caption = (
        f"Mean over layers; bands: {spread}. Damage is the damage of removing a channel. The pruning order is that of "
        "input capture at the last checkpoint, where the lowest channels go first."
    )
    picture = Picture("early", plot_early_prediction(drawn), table, caption)
    return Section("Early prediction", about, [*blocks, picture])


def pruning(runs: Runs, against: str = "l1") -> Section:
    """Make the section on accuracy over MACs.

    Args:
        runs: runs of one network.
        against: score that the others are compared with if there are several runs.
    """
    about = "Test accuracy over the share of multiply–accumulates (MACs) that remains, for each score."
    if not runs.grids:
        command = "chanaxes prune --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt"
        return Section(
            "Pruning", about, [Missing(f"The run folder has no pruning.parquet yet; make it with `{command}`.")]
        )
    blocks: list[Block] = []
    for nth, (place, grid) in enumerate(runs.grids.items()):
        count = grid["run"].nunique()
        title = "" if place == "." else place
        spread = f"Mean of {count} runs; a band is their range. " if count > 1 else ""
        caption = f"{spread}The horizontal line is the dense network. Each row of panels has its own scale."
        if "tuned_accuracy" in grid:
            caption += " Accuracies are those before fine-tuning."
        if (grid["score"] == DENSE).all():
            blocks.append(Missing(f"The table in {place} holds no pruned network."))
            continue
        name = f"pruning-{nth}" if len(runs.grids) > 1 else "pruning"
        blocks += [Picture(name, plot_pruning(grid, title), grid, caption), *_accuracies(grid, title, runs.resamples)]
        if count > 1:
            blocks += _paired(grid, title, against)
    return Section("Pruning", about, blocks)


def _accuracies(grid: pd.DataFrame, title: str, resamples: int) -> list[Table]:
    """Make a table of accuracy by score and budget for each allocation and compensation."""
    pruned = grid[grid["score"] != DENSE]
    pruned = pruned.assign(accuracy=100 * pruned["accuracy"])
    tables = []
    for keys, part in pruned.groupby(["allocation", "compensate"], sort=False):
        allocation, compensate = map(str, keys)
        means = mean_over_runs(part[["run", *VARIANT, "accuracy"]], "accuracy", resamples)
        budgets = sorted(part["budget"].unique(), reverse=True)
        cells = intervals(means, "score", "budget", digits=1).fillna("–")
        rows = [[score, *cells.loc[score, budgets]] for score in part["score"].unique()]
        kind = f"{title + ': ' if title else ''}{variant(allocation, compensate)}"
        tables.append(
            Table(
                f"{kind}. Accuracy in % by the share of {budget_words(grid)} that remains.",
                ["score", *(f"{100 * budget:g} %" for budget in budgets)],
                rows,
            )
        )
    return tables


def _paired(grid: pd.DataFrame, title: str, against: str) -> list[Table]:
    """Make a table of the differences between scores in the area under the curve, run by run."""
    differences = score_differences(grid, against=against)
    rows = [
        [f"{row['scores']} minus {row['against']}", variant(row["allocation"], row["compensate"]), cell]
        for _, row in differences.iterrows()
        for cell in [interval(row, 1, sign=True, scale=100)]
    ]
    caption = (
        f"{title + ': ' if title else ''}paired differences of two scores on the same runs, in points of accuracy "
        "averaged over the curve; mean ± standard deviation over runs [95 % bootstrap over runs]."
    )
    return [Table(caption, ["scores", "under", "difference"], rows)] if rows else []
