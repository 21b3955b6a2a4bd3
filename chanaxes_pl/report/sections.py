"""Sections of the report; each function makes one from the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import yaml

from chanaxes_pl.analysis.correlations import MAIN_PAIR, PAIRS, main_correlation, reliabilities, task_masses
from chanaxes_pl.analysis.groupings import groupings
from chanaxes_pl.analysis.runs import Run, Runs
from chanaxes_pl.analysis.text import epoch_number, interval, intervals, number
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots import (
    channel_panels,
    distributions,
    plot_accuracy,
    plot_alignment,
    plot_channels,
    plot_correlations,
    plot_cost,
    plot_distributions,
    plot_groupings,
    plot_pairs,
    plot_peer_support,
)
from chanaxes_pl.plots.style import words
from chanaxes_pl.report.blocks import Block, Folded, Missing, Picture, Section, Table
from chanaxes_pl.report.experiments import early, lesions, pruning
from chanaxes_pl.tables import DENSE

#: Fact that a reader looks for first → its key in the configuration.
_SHOWN = {
    "network": "model.init_args.backbone",
    "width": "model.init_args.width",
    "data": "data.class_path",
    "batch": "data.init_args.batch_size",
    "learning rate": "model.init_args.lr",
    "epochs": "trainer.max_epochs",
    "precision": "trainer.precision",
    "seed": "seed_everything",
}


def configuration(runs: Runs) -> Section:
    """Make the section on what was run, with notes about what could not be read."""
    shown = {name: [_fact(run, name, key) for run in runs.each] for name, key in _SHOWN.items()}
    versions = [run.about.get("versions") for run in runs.each]
    texts = [", ".join(f"{k} {v}" for k, v in each.items()) if isinstance(each, dict) else "" for each in versions]
    shown["versions"] = texts
    shown["target"] = ["" if (named := run.table.get("target")) is None else str(named.iloc[0]) for run in runs.each]
    shown["weights"] = [str(run.about.get("weights", "")) for run in runs.each]
    shown = {name: cells for name, cells in shown.items() if any(cells)}
    shown["checkpoints"] = [f"{len(run.steps)}, to step {run.steps[-1]}" for run in runs.each]
    same = {name: cells[0] for name, cells in shown.items() if len(set(cells)) == 1}
    first, *more = runs.each
    every = "all runs" if more else first.name
    blocks: list[Block] = [Table("", ["", every], list(same.items()))] if same else []
    other = {name: cells for name, cells in shown.items() if name not in same}
    if other:
        rows = [[run.name, *(cells[n] or "–" for cells in other.values())] for n, run in enumerate(runs.each)]
        blocks.append(Table("", ["run", *other], rows))
    if len(runs.each) > 1:
        left = sum(len(run.steps) for run in runs.each) - len(runs.each) * len(runs.steps)
        if left:
            blocks.append(Missing(f"Left out: {left} checkpoint{'s' * (left != 1)}, at steps that not all runs have."))
    blocks += [Missing(note) for run in runs.each for note in run.notes]
    saved = [run for run in runs.each if run.config]
    blocks += [Folded(f"whole configuration of {run.name}", yaml.safe_dump(run.config)) for run in saved]
    if len(saved) < len(runs.each):
        blocks.append(Missing("No saved configuration: only runs of `chanaxes fit` write config.yaml."))
    return Section("Configuration", "Networks that were trained, and the number of checkpoints.", blocks)


def accuracy(runs: Runs) -> Section:
    """Make the section on accuracy."""
    rows = [row for run in runs.each for row in _accuracies(run)]
    about = "Top-1 accuracy during training."
    if not rows:
        reason = "No accuracy: metrics.csv in the run folder has no top1. Train a Classifier with a CSVLogger."
        return Section("Accuracy", about, [Missing(reason)])
    table = pd.DataFrame(rows)
    ends = table.groupby(["run", "split"], sort=False).last()["accuracy"].unstack()
    splits = [split for split in ("train", "val", "test") if split in ends]
    cells = [[str(run), *(number(100 * row[split], 1) for split in splits)] for run, row in ends.iterrows()]
    if len(cells) > 1:
        cells.append(["mean ± sd", *(_mean_and_spread(100 * ends[split]) for split in splits)])
    caption = "Train: mean over the epoch, during training. Validation and test: images that were not trained on."
    picture = Picture("accuracy", plot_accuracy(table), table, caption)
    return Section("Accuracy", about, [picture, Table("Top-1 accuracy at the end, in %.", ["run", *splits], cells)])


def _mean_and_spread(values: pd.Series) -> str:
    spread = f" ± {number(values.std(), 1)}" if values.count() > 1 else ""
    return number(values.mean(), 1) + spread


def correlation(runs: Runs) -> Section:
    """Make the section on the correlation of the two axes."""
    several = len(runs.each) > 1
    means, change = runs.mean(), runs.change(runs.steps[0], runs.steps[-1])
    drawn = Picture(
        "correlations",
        plot_correlations(runs.correlations),
        runs.correlations,
        "Left: ρ(input capture, task information), mean over layers. The ceiling is the highest ρ that the metrics' "
        "split-half reliability allows; the null is ρ for a random target. Right: every layer"
        + (", mean over runs." if several else "."),
    )
    reliable = reliabilities(runs.table)
    pairs = Picture(
        "pairs",
        plot_pairs(runs.correlations, reliable),
        reliable,
        "Left: all pairs of a local and a target metric, and the two axes. Right: how far each metric, measured on one "
        "half of the probe, agrees with the other half (Spearman–Brown).",
    )
    rows = []
    for pair in PAIRS:
        by_step = main_correlation(means, pair=pair).set_index("step")
        cells = [interval(by_step.loc[[step]].iloc[0]) for step in runs.landmarks.values()]
        whole = interval(main_correlation(change, pair=pair).iloc[0], sign=True)
        rows.append([" and ".join(map(words, pair)), *cells, whole])
    spread = " ± standard deviation over runs [95 % bootstrap over runs]" if several else ""
    caption = f"Mean over layers{spread}. Change: last minus first checkpoint of the same run."
    table = Table(caption, ["pair", *_when(runs).values(), "change"], rows)
    blocks: list[Block] = [drawn, table, pairs, *_against_headline(runs)]
    if len(runs.steps) == 1:
        blocks.insert(0, Missing('A single checkpoint shows no change over epochs. `schedule="log"` records more.'))
    about = "Spearman's ρ between a channel's local and its target metrics, within layers, over training."
    return Section("Axis correlation", about, blocks)


def _against_headline(runs: Runs) -> list[Table]:
    if len(runs.each) == 1:
        return []
    first, last = (runs.beyond_headline(step) for step in (runs.steps[0], runs.steps[-1]))
    rows = [
        [
            " and ".join(map(words, pair)),
            *(interval(main_correlation(frame, pair=pair).iloc[0], sign=True) for frame in (first, last)),
        ]
        for pair in PAIRS
        if pair != MAIN_PAIR
    ]
    caption = "ρ minus that of input capture and task information, at the same checkpoint of the same run."
    return [Table(caption, ["pair", "first checkpoint", _last(runs)], rows)]


def metrics(runs: Runs) -> Section:
    """Make the section on the four metrics over time."""
    quantiles = distributions(runs.table)
    dead = runs.table.groupby("step")["dead"].sum()
    picture = Picture(
        "distributions",
        plot_distributions(quantiles),
        quantiles,
        "Over all live channels: median, middle half and middle 90 %. "
        f"Dead channels: {dead.iloc[0]:g} at the first checkpoint, {dead.iloc[-1]:g} at the last.",
    )
    return Section("Metrics", "How the four metrics are distributed over channels.", [picture])


def channels(runs: Runs) -> Section:
    """Make the section that shows every channel."""
    when = _when(runs)
    steps = {when[key]: runs.landmarks[key] for key in ("first", "last")}
    panels = channel_panels(runs.table, steps)
    kept = ["run", "layer", "channel"]
    points = [panel[[*kept, panel["local"].iloc[0], panel["target"].iloc[0]]] for panel in panels if len(panel)]
    numbers = pd.concat(panels)[["run", "epoch", "step", "layer", "channel", "when", "local", "target", "x", "y"]]
    about = "Each point is a channel; rest the pointer on a point to see which one."
    if len(points) < len(panels):
        return Section("Channels", about, [Missing("No channel is live, or has its metrics defined.")])
    picture = Picture(
        "channels",
        plot_channels(panels, list(runs.each[0].widths)),
        numbers,
        "Ranks within the layer. If the axes were coupled, the points would lie along the diagonal.",
        points,
    )
    return Section("Channels", about, [picture])


def groups(runs: Runs) -> Section:
    """Make the section on whether the axes group channels alike."""
    about = (
        "k-means groups (k = 4) of a layer's channels by their local metrics, and by their target metrics. The "
        "adjusted Rand index is 1 if both groupings are the same, and 0 on average if they are unrelated."
    )
    frames = [groupings(runs.table[runs.table["step"] == step]).assign(when=when) for when, step in _distinct(runs)]
    table = pd.concat(frames, ignore_index=True)
    if table["ari"].isna().all():
        return Section("Groupings", about, [Missing("No layer has 4 live channels, so none can be grouped.")])
    caption = (
        "Agreement of the two axes, and the ceiling of each axis: its agreement with itself on the probe's other half."
    )
    return Section("Groupings", about, [Picture("groupings", plot_groupings(table), table, caption)])


def peers(runs: Runs) -> Section:
    """Make the section on how well peers reconstruct channels."""
    last = runs.table[runs.table["step"] == runs.steps[-1]]
    about = f"Share of a channel's variance that a ridge regression on its peers explains, at the {_last(runs)}."
    quartiles = last.groupby(["run", "layer"], sort=False)["peer_r2"].quantile(np.array([0.25, 0.5, 0.75])).unstack()
    support = quartiles.set_axis(["peer_r2_low", "peer_r2", "peer_r2_high"], axis=1).reset_index()
    table = support.merge(task_masses(last), on=["run", "layer"])
    caption = "Duplicated task information is weighted by the share of the channel that its peers explain, Σ I·R²."
    return Section("Peer support", about, [Picture("peers", plot_peer_support(table), table, caption)])


def gradients(runs: Runs) -> Section:
    """Make the section on the angle between the gradients of the two kinds of information."""
    about = (
        "Cosine between the gradients of input capture and of task information with respect to a channel's weights: "
        "0 if a gradient step on one does not change the other."
    )
    if "alignment" not in runs.table:
        return Section("Gradient alignment", about, [Missing("Not measured: train with AxisTracker(alignment=True).")])
    ends = runs.table[runs.table["step"].isin([runs.steps[0], runs.steps[-1]])]
    ends = ends.assign(angle=ends["alignment"].abs())
    table = ends.groupby(["run", "epoch", "step", "layer"], sort=False)["angle"].mean().reset_index()
    cells = intervals(mean_over_runs(table, "angle", runs.resamples), "layer", "step").sort_index(axis=1)
    rows = [[layer, *cells.loc[layer]] for layer in runs.each[0].widths]
    known = {_setting(run.config, key) for run in runs.each for key in (_SHOWN["network"], _SHOWN["data"])}
    figure = plot_alignment(ends, published=known == {"resnet18", "CIFAR100DataModule"})
    caption = "Absolute values over channels: quartiles, 5 to 95 % range, and the mean as a diamond."
    when = [f"epoch {epoch_number(epoch)}" for epoch in sorted(ends["epoch"].unique())]
    blocks = [Picture("alignment", figure, table, caption), Table("Mean |cos| of a layer.", ["layer", *when], rows)]
    return Section("Gradient alignment", about, blocks)


def cost(runs: Runs) -> Section:
    """Make the section on the cost of measuring."""
    about = "Time that the tracker added to training, including the passes over the probe."
    frames = []
    for run in runs.each:
        timed = [c.removesuffix("/time_share") for c in map(str, run.scalars) if c.endswith("/time_share")]
        tracker = next((name for name in timed if f"{name}/seconds" in run.scalars), None)
        if tracker is not None:
            rows = run.scalars.dropna(subset=[f"{tracker}/seconds"])
            taken = {name: rows[f"{tracker}/{name}"] for name in ("seconds", "time_share")}
            frames.append(pd.DataFrame({"run": run.name, "epoch": rows["epoch"], "step": rows["step"], **taken}))
    if not frames:
        return Section("Cost", about, [Missing("metrics.csv has no …/seconds. Train with a CSVLogger.")])
    table = pd.concat(frames, ignore_index=True)
    return Section("Cost", about, [Picture("cost", plot_cost(table), table, "Wall-clock time, one line per run.")])


def _fact(run: Run, name: str, key: str) -> str:
    """Look up a fact about a run, in its configuration or else in its tracker's notes."""
    noted = run.about.get(name)
    return _setting(run.config, key) or ("" if noted is None else str(noted))


def _setting(config: dict[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:  # the hparams.yaml of a CSVLogger has no such levels
        value = config.get(key.split(".")[-1])
    return "" if value is None else str(value).split(".")[-1] if "class_path" in key else str(value)


def _accuracies(run: Run) -> Iterator[dict[str, Any]]:
    end = run.table["epoch"].max()
    for split in ("train", "val", "test"):
        if f"{split}/top1" not in run.scalars:
            continue
        rows = run.scalars.dropna(subset=[f"{split}/top1"])
        for row in (rows.tail(1) if split == "test" else rows).to_dict("records"):
            # A Trainer that only tests a checkpoint logs epoch 0, whatever the checkpoint's.
            epoch = row["epoch"] + 1 if split != "test" else row["epoch"] or end
            yield {"run": run.name, "split": split, "epoch": epoch, "accuracy": row[f"{split}/top1"]}
    if "test/top1" not in run.scalars:  # the pruning grid evaluates the dense network too
        for grid in run.pruning.values():
            dense = grid.loc[grid["score"] == DENSE, "accuracy"]
            if len(dense):
                yield {"run": run.name, "split": "test", "epoch": end, "accuracy": dense.iloc[0]}
                return


def _when(runs: Runs) -> dict[str, str]:
    """Name the landmarks."""
    epochs = runs.table.drop_duplicates("step").set_index("step")["epoch"]
    names = {"first": "first checkpoint", "highest": "where ρ is highest", "last": _last(runs)}
    return {key: f"{names[key]} (epoch {epoch_number(epochs[step])})" for key, step in runs.landmarks.items()}


def _last(runs: Runs) -> str:
    """Name the last step at which all runs were measured."""
    return "last checkpoint" if all(run.steps[-1] == runs.steps[-1] for run in runs.each) else "last shared checkpoint"


def _distinct(runs: Runs) -> list[tuple[str, int]]:
    """List the landmarks, each step once."""
    when = _when(runs)
    return [(when[key], step) for step, key in {step: key for key, step in runs.landmarks.items()}.items()]


#: Sections of the page, from top to bottom.
SECTIONS: tuple[Callable[[Runs], Section], ...] = (
    configuration,
    accuracy,
    correlation,
    metrics,
    channels,
    groups,
    peers,
    gradients,
    lesions,
    early,
    pruning,
    cost,
)


def make_sections(runs: Runs, against: str = "l1") -> Iterator[Section]:
    """Make the sections one by one.

    Args:
        runs: runs of one network.
        against: pruning score that the others are compared with.
    """
    for make in SECTIONS:
        yield pruning(runs, against) if make is pruning else make(runs)
