"""Runs: everything that training, lesions and pruning wrote into the folders of one run or several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from chanaxes_pl.analysis.correlations import NETWORK, axis_correlations, highest, main_correlation
from chanaxes_pl.analysis.damage import CORRELATED, score_damage_correlation
from chanaxes_pl.analysis.scores import MINUS, REVERSE, SCORE_COLUMN
from chanaxes_pl.core.errors import check_resampling
from chanaxes_pl.core.statistics import MIN_CHANNELS, mean_over_runs
from chanaxes_pl.run_folder import ABOUT, RunFolder, table_paths
from chanaxes_pl.tables import read_channels, read_grid, read_lesions

#: Columns of damage, in the order of preference.
DAMAGES = ("zero_loss", "mean_loss", "peer_loss", "hull_loss")
_PAIR = ["layer", "local", "target"]


@dataclass(frozen=True)
class Run:
    """Contents of one run folder.

    Attributes:
        name: name that tells the run apart from the others.
        folder: the run folder.
        tracker: name of the tracker that wrote the tables of channels.
        table: table of channels of all checkpoints, see :func:`read_run`; its column ``run`` is ``name``.
        config: configuration of the run; empty if none was saved.
        scalars: values from the CSV logger, including those from before interruptions and from tests; empty if there
            was no such logger.
        lesions: folder relative to the run folder → the table of lesions in it.
        pruning: folder relative to the run folder → the pruning grid in it.
        notes: messages about what could not be read, and why.
        about: data set, seed, epochs, versions and measured weights, as the tracker wrote them; empty for runs of
            older versions.
    """

    name: str
    folder: Path
    tracker: str
    table: pd.DataFrame
    config: dict[str, Any]
    scalars: pd.DataFrame
    lesions: dict[str, pd.DataFrame]
    pruning: dict[str, pd.DataFrame]
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def steps(self) -> list[int]:
        """Optimiser steps of the checkpoints, in order."""
        return sorted(self.table["step"].unique().tolist())

    @property
    def lesion_place(self) -> str | None:
        """Folder, relative to the run folder, of the table of lesions that is taken for the run's own."""
        return "." if "." in self.lesions else next(iter(self.lesions), None)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Layer name → number of channels."""
        return {
            str(name): int(count)
            for name, count in self.table.groupby("layer", sort=False)["channel"].nunique().items()
        }


@dataclass(frozen=True)
class Damage:
    """Damage of lesions in one run or several, and its correlations.

    Attributes:
        column: column of the damage: the loss of the preferred operation, see :data:`DAMAGES`.
        tables: lesioned channels of all runs, with columns ``run``, ``place``, and ``counts``, whether this is the
            run's :attr:`~Run.lesion_place`; others may be of other weights.
        correlations: ``run, place, counts`` and the columns of :func:`score_damage_correlation`, for the metrics
            :data:`CORRELATED` and for scores that all tables have and that are none of these.
        over_runs: ``score, mean, std, low, high, runs`` of the mean over layers, where ``counts``; the
            interval is over units for one run, and over runs for several.
    """

    column: str
    tables: pd.DataFrame
    correlations: pd.DataFrame
    over_runs: pd.DataFrame


@dataclass(frozen=True)
class Runs:
    """Several runs of one network, such as several seeds, measured at the same steps.

    Attributes:
        each: the runs, in the given order.
        resamples: number of resamples of the bootstraps over channels and over runs.
    """

    each: tuple[Run, ...]
    resamples: int = 1000

    @cached_property
    def steps(self) -> list[int]:
        """Steps at which all runs have a checkpoint, in order."""
        return sorted(set.intersection(*(set(run.steps) for run in self.each)))

    @cached_property
    def table(self) -> pd.DataFrame:
        """Table of channels of all runs, with a column ``run``, at the steps that they share."""
        whole = pd.concat([run.table for run in self.each], ignore_index=True)
        shared = whole[whole["step"].isin(self.steps)].reset_index(drop=True)
        return shared.assign(epoch=middle_epochs(shared))

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """Axis correlations of all runs, see :func:`axis_correlations`; ``low`` and ``high`` are over channels."""
        return axis_correlations(self.table, self.resamples)

    @cached_property
    def landmarks(self) -> dict[str, int]:
        """Steps of the first checkpoint, of the highest headline correlation (mean of runs), and of the last."""
        mean = main_correlation(self.correlations).groupby("step")["rho"].mean()
        return {"first": self.steps[0], "highest": self.steps[highest(mean)], "last": self.steps[-1]}

    @cached_property
    def damage(self) -> Damage | None:
        """Damage of the first operation that all tables of lesions have.

        It is ``None`` without lesions, or if a table has too few channels for a rank correlation.
        """
        places = {
            (run.folder, place): (run.name, place, place == run.lesion_place, table)
            for run in self.each
            for place, table in run.lesions.items()
        }
        found = list(places.values())  # of two trackers of one run once
        columns = [name for name in DAMAGES if all(_can_be_ranked(table, name) for *_, table in found)]
        if not found or not columns:
            return None
        column, compared = columns[0], [*CORRELATED, *_other_scores([table for *_, table in found])]
        measured = [
            score_damage_correlation(table, compared, column, self.resamples).assign(
                run=name, place=place, counts=counts
            )
            for name, place, counts, table in found
        ]
        correlations = pd.concat(measured, ignore_index=True)
        network = correlations[(correlations["layer"] == NETWORK) & correlations["counts"]]
        if network["run"].nunique() == 1:
            over = network.rename(columns={"rho": "mean"}).assign(std=float("nan"), runs=1)
        else:
            by_run = network.groupby(["run", "score"], sort=False)["rho"].mean().reset_index()
            over = mean_over_runs(by_run, "rho", self.resamples)
        tables = [table.assign(place=place, counts=counts) for _, place, counts, table in found]
        tables = pd.concat(tables, ignore_index=True)
        return Damage(column, tables, correlations, over)

    @cached_property
    def grids(self) -> dict[str, pd.DataFrame]:
        """Folder relative to the run folder → the pruning grids that the runs have there, in one table."""
        places: dict[str, dict[Path, pd.DataFrame]] = {}
        for run in self.each:
            for place, grid in run.pruning.items():
                places.setdefault(place, {})[run.folder] = grid  # two trackers of one run count once
        return {place: pd.concat(grids.values(), ignore_index=True) for place, grids in places.items()}

    def mean(self, value: str = "rho") -> pd.DataFrame:
        """Average a column of the correlations over runs, see :func:`mean_over_runs`."""
        return mean_over_runs(self.correlations, value, self.resamples)

    def change(self, since: int, until: int) -> pd.DataFrame:
        """Compute the change of each axis correlation between two steps, run by run.

        Args:
            since: first step, which all runs share.
            until: second step, which all runs share.

        Returns:
            ``layer, local, target, mean, std, low, high, runs`` of ρ at ``until`` minus ρ at ``since``. The bootstrap
            draws runs, each with both of its checkpoints.
        """
        keys = ["run", *_PAIR]
        ends = [self.correlations[self.correlations["step"] == step].set_index(keys)["rho"] for step in (since, until)]
        return mean_over_runs((ends[1] - ends[0]).rename("change").reset_index(), "change", self.resamples)

    def beyond_headline(self, step: int) -> pd.DataFrame:
        """Compare the correlation of every pair with the headline correlation at one step, run by run.

        Returns:
            ``layer, local, target, mean, std, low, high, runs`` of the network's ρ minus the headline's.
        """
        rows = self.correlations[(self.correlations["step"] == step) & (self.correlations["layer"] == NETWORK)]
        main = main_correlation(rows).set_index("run")["rho"]
        gaps = rows.assign(gap=rows["rho"] - rows["run"].map(main))[["run", *_PAIR, "gap"]]
        return mean_over_runs(gaps, "gap", self.resamples)


def middle_epochs(rows: pd.DataFrame) -> pd.Series:
    """The epoch of each row's step, in the middle where epochs of some runs have other numbers of steps."""
    return rows.groupby("step")["epoch"].transform("median")


def _other_scores(lesions: Sequence[pd.DataFrame]) -> list[str]:
    """Return the columns of scores that all tables of lesions have and that are no metric by another name."""
    same = {SCORE_COLUMN + kind + metric for kind in ("", MINUS, REVERSE, REVERSE + MINUS) for metric in CORRELATED}
    shared = set.intersection(*({str(name) for name in table} for table in lesions))
    return [name for name in map(str, lesions[0]) if name.startswith(SCORE_COLUMN) and name in shared - same]


def _can_be_ranked(lesions: pd.DataFrame, damage: str) -> bool:
    """Return whether a layer has enough channels whose damage is defined."""
    if damage not in lesions:
        return False
    defined = lesions[np.isfinite(lesions[damage].to_numpy(float))]
    return len(defined) > 0 and bool(defined["layer"].value_counts().max() >= MIN_CHANNELS)


def read_runs(folders: str | Path | Sequence[str | Path], resamples: int = 1000) -> Runs:
    """Read several run folders.

    Args:
        folders: folder of a run, or of several of one network, with the same layers and widths.
        resamples: number of resamples of the bootstraps over channels and over runs.

    Raises:
        FileNotFoundError: if a folder is not a run folder.
        ValueError: if no folder is given, one is given twice, the networks differ, the runs share no step, or
            ``resamples`` is below 1.
    """
    check_resampling(resamples, least=1)
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    if not folders:
        raise ValueError("no run folder given: expected one that training with AxisTracker wrote, RUNS/NAME/version_0")
    found = [RunFolder.find(folder) for folder in folders]
    trackers = [tracker for _, tracker, _ in found]
    for place, tracker in enumerate(trackers):
        if tracker in trackers[:place]:
            raise ValueError(f"{tracker.parent} is given twice")
    roots = [run.path for run, _, _ in found]
    names = _names(roots if len(set(roots)) == len(roots) else trackers)
    each = [_read(*place, name) for place, name in zip(found, names, strict=True)]
    runs = Runs(tuple(replace(run, notes=(*run.notes, *_other_task(each[0], run))) for run in each), resamples)
    for run in runs.each[1:]:
        if run.widths != runs.each[0].widths:
            raise ValueError(_other_network(runs.each[0], run))
    if not runs.steps:
        lists = "; ".join(f"{run.name}: {', '.join(map(str, run.steps[:4]))} …" for run in runs.each)
        raise ValueError(f"the runs have no step in common at which all were measured: {lists}")
    return runs


def _other_task(first: Run, run: Run) -> Iterator[str]:
    """Say in what a run's task differs from the first one's, as far as both tell."""
    for what, of in (("data set", lambda run: run.about.get("data")), ("target", _target)):
        ours, theirs = of(first), of(run)
        if ours and theirs and ours != theirs:
            yield f"{run.name} is pooled with {first.name}, whose {what} is another one: {ours}, and not {theirs}"


def _target(run: Run) -> str:
    return str(run.table["target"].iloc[0]) if "target" in run.table else ""


def _names(roots: Sequence[Path]) -> list[str]:
    """Name the runs by the shortest ends of their paths that tell them apart, with at least two parts."""
    length = 2
    while len({root.parts[-length:] for root in roots}) < len(roots):
        length += 1
    return ["/".join(root.parts[-length:]) for root in roots]


def _read(run: RunFolder, tracker: Path, newest: str, name: str) -> Run:
    notes = [newest] if newest else []
    table = _tables(tracker, notes).assign(run=name)
    config, scalars = _config(run, notes), _scalars(run, notes)
    lesions, pruning = (
        {
            place: found.assign(run=name)
            for place, path in paths.items()
            if (found := _noted(read, path, notes)) is not None
        }
        for paths, read in ((run.experiments("lesions"), read_lesions), (run.experiments("pruning"), read_grid))
    )
    about = ((tracker / ABOUT).is_file() and _noted(_read_json, tracker / ABOUT, notes)) or {}
    return Run(name, run.path, tracker.name, table, config, scalars, lesions, pruning, tuple(notes), about)


def _tables(tracker: Path, notes: list[str]) -> pd.DataFrame:
    """Read all intact checkpoints of the network that most of them belong to."""
    found = {path: _noted(read_channels, path, notes) for path in table_paths(tracker)}
    whole = {path: frame for path, frame in found.items() if frame is not None}
    if not whole:
        raise ValueError(f"{tracker}: no checkpoint can be read; the first: {notes[-len(found)]}")
    networks = {path: tuple(zip(frame["layer"], frame["channel"], strict=True)) for path, frame in whole.items()}
    network, _ = Counter(networks.values()).most_common(1)[0]
    steps: dict[int, Path] = {}
    for path, frame in list(whole.items()):
        own = frame["step"].unique().tolist()
        again = next((steps[step] for step in own if step in steps), None)
        if networks[path] != network and len(own) == 1:
            notes.append(f"{path}: holds other layers or channels than the run's other tables, or in another order")
        elif again is not None:
            notes.append(f"{path}: holds step {own[0]}, as {again.name} does")
        else:
            steps |= dict.fromkeys(own, path)
            continue
        del whole[path]
    return pd.concat(whole.values(), ignore_index=True)


def _config(run: RunFolder, notes: list[str]) -> dict[str, Any]:
    for path in run.configs:
        read = _noted(_read_yaml, path, notes)
        if read:
            return read
    return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read settings as plain values.

    Raises:
        ValueError: if the file holds no settings. PyYAML raises many kinds of errors, all of which become this one.
    """
    try:
        read = yaml.safe_load(path.read_text())
        yaml.safe_dump(read)  # so that the page can show it
    except (yaml.YAMLError, TypeError, AttributeError, LookupError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(read, dict | None):
        raise ValueError(f"expected settings by name, but it holds a {type(read).__name__}")
    return read or {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(read, dict):
        raise ValueError(f"expected facts by name, but it holds a {type(read).__name__}")
    return read


def _scalars(run: RunFolder, notes: list[str]) -> pd.DataFrame:
    """Join the logs from before each interruption, up to where the run continued, the last one, and the test's."""
    whole = pd.DataFrame()
    for path in run.scalars:
        part = _noted(_read_csv, path, notes)
        if part is not None and len(part):
            before = whole[whole["step"] < part["step"].min()] if len(whole) else whole
            whole = pd.concat([before, part], ignore_index=True) if len(before) else part
    test = _noted(_read_csv, run.test_scalars, notes) if run.test_scalars.is_file() else None
    return whole if test is None else pd.concat([whole, test], ignore_index=True)


def _read_csv(path: Path) -> pd.DataFrame:
    """Read scalars by step.

    Raises:
        ValueError: if the file is not CSV, lacks ``epoch`` or ``step``, or holds text.
    """
    scalars = pd.read_csv(path)
    missing = [name for name in ("epoch", "step") if name not in scalars]
    if missing:
        raise ValueError(f"it lacks the columns {', '.join(missing)}, which a CSVLogger writes")
    text = [name for name in scalars if len(scalars) and not pd.api.types.is_numeric_dtype(scalars[name])]
    if text:
        raise ValueError(f"the column {text[0]} holds text, expected numbers")
    return scalars


def _noted(read: Callable[[Path], Any], path: Path, notes: list[str]) -> Any:
    """Read a file with ``read``; if it is damaged, add a note and return ``None``."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        notes.append(told if told.startswith(str(path)) else f"{path} cannot be read: {told}")
        return None


def _other_network(first: Run, other: Run) -> str:
    return (
        f"runs of different networks: {_unlike(first, other)}; {_unlike(other, first)}. Make a report of each network"
    )


def _unlike(run: Run, other: Run) -> str:
    layers = [f"{name} ({width} channels)" for name, width in run.widths.items() if other.widths.get(name) != width]
    return f"{run.name} has {', '.join(layers[:2]) or 'nothing else'}{' …' if len(layers) > 2 else ''}"
