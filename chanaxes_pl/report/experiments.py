"""The report's sections on what was done to the trained networks: lesions and pruning."""

from __future__ import annotations

from typing import Any

import pandas as pd

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.analysis.damage import score_damage_correlation
from chanaxes_pl.analysis.prediction import early_prediction
from chanaxes_pl.analysis.runs import Runs
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.lesions.interventions import OPERATIONS
from chanaxes_pl.plots import plot_early_prediction, plot_lesions, plot_pruning
from chanaxes_pl.plots.style import words
from chanaxes_pl.report.blocks import Missing, Picture, Section, Table, interval, intervals, number
from chanaxes_pl.tables import DENSE, VARIANT

_POINT = ["run", "layer", "channel"]


def lesions(runs: Runs) -> Section:
    """What lesions cost, and what that goes with."""
    about = "What it costs on test images to take channels out one by one, and the metrics that this goes with."
    found = [(run, place, table) for run in runs.each for place, table in run.lesions.items()]
    if not found:
        command = "chanaxes lesion --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt"
        return Section(
            "Lesions", about, [Missing(f"No lesions.parquet in the run folder yet; it comes from `{command}`.")]
        )
    blocks: list[Any] = []
    frames = []
    for nth, (run, place, table) in enumerate(found):
        damage = _damage(table)
        correlations = score_damage_correlation(table, [*METRICS, "peer_r2"], damage, runs.resamples)
        frames.append(correlations.assign(run=f"{run.name}/{place}"))
        means = [f"{op} {number(table[f'{op}_loss'].mean(), 4, True)}" for op in OPERATIONS if f"{op}_loss" in table]
        panels = correlations.loc[correlations["layer"] == NETWORK, "score"]
        blocks.append(
            Picture(
                f"lesions-{nth}" if len(found) > 1 else "lesions",
                plot_lesions(table, correlations, damage, title=run.name if len(runs.each) > 1 else ""),
                table,
                f"{len(table)} channels of {run.name}; mean change of cross-entropy in nats: {', '.join(means)}. "
                f"ρ: {damage} with the metric within layers, mean over layers [95 % over units].",
                [table[[*_POINT, score, damage]] for score in panels],
            )
        )
    together = pd.concat(frames, ignore_index=True)
    return Section("Lesions", about, [*blocks, *_over_runs(together, len(found), runs.resamples)])


def _damage(table: pd.DataFrame) -> str:
    return next(f"{operation}_loss" for operation in OPERATIONS if f"{operation}_loss" in table)


def _over_runs(correlations: pd.DataFrame, count: int, resamples: int) -> list[Table]:
    if count == 1:
        return []
    means = mean_over_runs(correlations[correlations["layer"] == NETWORK], "rho", resamples)
    rows = [[words(str(row["score"])), interval(row)] for _, row in means.iterrows()]
    return [
        Table("ρ with damage over runs: mean ± standard deviation [95 % bootstrap over runs].", ["metric", "ρ"], rows)
    ]


def early(runs: Runs) -> Section:
    """How early the end can be told."""
    about = "Rank correlation of each metric at each checkpoint with what becomes of the channels in the end."
    frames, blocks = [], []
    for run in runs.each:
        try:
            found = early_prediction(
                run.folder, next(iter(run.lesions.values()), None), resamples=runs.resamples, tracker=run.tracker
            )
        except ValueError as error:
            blocks.append(Missing(f"{run.name} is left out: {error}"))
            continue
        frames.append(found[(found["layer"] == NETWORK) & found["step"].isin(runs.steps)].assign(run=run.name))
    if not frames:
        return Section("Early prediction", about, blocks)
    table = pd.concat(frames, ignore_index=True)
    drawn, spread = table, "95 % over channels"
    if len(frames) > 1:
        reasons = table.drop_duplicates("target").set_index("target")["reason"]
        drawn = mean_over_runs(table, "rho", runs.resamples).rename(columns={"mean": "rho"})
        drawn, spread = drawn.assign(reason=drawn["target"].map(reasons)), "mean of runs, 95 % over runs"
    caption = (
        f"Mean over layers; bands: {spread}. Damage is that of removing a channel; the pruning order is that of input "
        "capture at the last checkpoint, low goes first."
    )
    picture = Picture("early", plot_early_prediction(drawn), table, caption)
    return Section("Early prediction", about, [*blocks, picture])


def pruning(runs: Runs) -> Section:
    """Accuracy over MACs."""
    about = "Test accuracy over the share of multiply–accumulates that is left, under each score of what goes first."
    places = list(dict.fromkeys(place for run in runs.each for place in run.pruning))
    if not places:
        command = "chanaxes prune --config CONFIG --ckpt_path RUN/checkpoints/last.ckpt"
        return Section(
            "Pruning", about, [Missing(f"No pruning.parquet in the run folder yet; it comes from `{command}`.")]
        )
    blocks: list[Any] = []
    for nth, place in enumerate(places):
        grids = [run.pruning[place] for run in runs.each if place in run.pruning]
        grid = pd.concat(grids, ignore_index=True)
        title = "" if place == "." else place
        spread = f"Mean of {len(grids)} runs; a band, where there is one, is their range. " if len(grids) > 1 else ""
        caption = f"{spread}The horizontal line is the dense network."
        name = f"pruning-{nth}" if len(places) > 1 else "pruning"
        blocks += [Picture(name, plot_pruning(grid, title), grid, caption), *_accuracies(grid, title, runs.resamples)]
    return Section("Pruning", about, blocks)


def _accuracies(grid: pd.DataFrame, title: str, resamples: int) -> list[Table]:
    """A table for each allocation and compensation: accuracy by score and budget."""
    pruned = grid[grid["score"] != DENSE]
    pruned = pruned.assign(accuracy=100 * pruned["accuracy"])
    tables = []
    for (allocation, strength), part in pruned.groupby(["allocation", "compensate"], sort=False):
        means = mean_over_runs(part[["run", *VARIANT, "accuracy"]], "accuracy", resamples)
        budgets = sorted(part["budget"].unique(), reverse=True)
        cells = intervals(means, "score", "budget", digits=1).fillna("–")
        rows = [[score, *cells.loc[score, budgets]] for score in part["score"].unique()]
        kind = f"{title + ': ' if title else ''}{allocation}, {'no compensation' if strength == 'none' else strength}"
        tables.append(
            Table(f"{kind}. Accuracy in %.", ["score", *(f"{100 * budget:g} % of MACs" for budget in budgets)], rows)
        )
    return tables
