"""Run folders: everything that training, lesions and pruning left in them, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml

from chanaxes_pl.analysis.correlations import NETWORK, axis_correlations, main_correlation
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.tables import VARIANT, read_parquet

#: Folder of a tracker that was given no name.
DEFAULT = "axis"
_PAIR = ["layer", "local", "target"]


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        name: tells it apart from the runs beside it.
        folder: the run folder.
        tracker: name of the tracker whose tables these are.
        table: the channels of all checkpoints, see :func:`read_run`; its column ``run`` is ``name``.
        config: the configuration that it was started with, empty where none was saved.
        scalars: what the CSV logger wrote, also before the run was interrupted and when it was tested; empty where
            none did.
        lesions: tables of lesions, by the folder they are in, relative to the run's.
        pruning: pruning grids, by the same.
        notes: what could not be read, and why.
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

    @cached_property
    def steps(self) -> list[int]:
        """Optimiser steps of its checkpoints, in order."""
        return sorted(self.table["step"].unique().tolist())

    @cached_property
    def widths(self) -> dict[str, int]:
        """Channels by layer."""
        return {
            str(name): int(count)
            for name, count in self.table.groupby("layer", sort=False)["channel"].nunique().items()
        }


@dataclass(frozen=True)
class Runs:
    """Some runs of one network, such as several seeds, measured at the same steps.

    Attributes:
        each: the runs, in the order they were given.
        resamples: of the bootstraps over channels and over runs.
    """

    each: tuple[Run, ...]
    resamples: int = 1000

    @cached_property
    def steps(self) -> list[int]:
        """The steps at which all of them have a checkpoint, in order."""
        return sorted(set.intersection(*(set(run.steps) for run in self.each)))

    @cached_property
    def table(self) -> pd.DataFrame:
        """Channels of all runs, told apart by ``run``, at the steps that they share."""
        whole = pd.concat([run.table for run in self.each], ignore_index=True)
        return whole[whole["step"].isin(self.steps)].reset_index(drop=True)

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """Axis correlations of all runs, see :func:`axis_correlations`; ``low`` and ``high`` are over channels."""
        return axis_correlations(self.table, self.resamples)

    @cached_property
    def landmarks(self) -> dict[str, int]:
        """Steps of the first checkpoint, of that with the highest headline correlation (mean of runs), of the last."""
        mean = main_correlation(self.correlations).groupby("step")["rho"].mean().fillna(-2.0)
        highest = self.steps[int(mean.to_numpy().argmax())]
        return {"first": self.steps[0], "highest": highest, "last": self.steps[-1]}

    def mean(self, value: str = "rho") -> pd.DataFrame:
        """Mean over runs of a column of the correlations, with its spread: see :func:`mean_over_runs`."""
        return mean_over_runs(self.correlations, value, self.resamples)

    def change(self, since: int, until: int) -> pd.DataFrame:
        """How much each axis correlation changed between two steps, run by run.

        Args:
            since: a step that all runs share.
            until: another.

        Returns:
            ``layer, local, target, mean, std, low, high, runs`` of ρ at ``until`` less ρ at ``since``: the bootstrap
            draws runs, each with both of its checkpoints.
        """
        keys = ["run", *_PAIR]
        ends = [self.correlations[self.correlations["step"] == step].set_index(keys)["rho"] for step in (since, until)]
        return mean_over_runs((ends[1] - ends[0]).rename("change").reset_index(), "change", self.resamples)

    def beyond_headline(self, step: int) -> pd.DataFrame:
        """How much higher the other metric pairs correlate than the headline's, on the same checkpoints.

        Returns:
            ``layer, local, target, mean, std, low, high, runs`` of the network's ρ less the headline's, run by run.
        """
        rows = self.correlations[(self.correlations["step"] == step) & (self.correlations["layer"] == NETWORK)]
        main = main_correlation(rows).set_index("run")["rho"]
        gaps = rows.assign(gap=rows["rho"] - rows["run"].map(main))[["run", *_PAIR, "gap"]]
        return mean_over_runs(gaps, "gap", self.resamples)


def read_runs(folders: Sequence[str | Path], resamples: int = 1000) -> Runs:
    """Several run folders side by side.

    Args:
        folders: of runs of one network: same layers, same widths.
        resamples: of the bootstraps over channels and over runs.

    Raises:
        FileNotFoundError: if one is no run folder.
        ValueError: if none is given, one is given twice, they are of different networks, or no step is common to all.
    """
    if not folders:
        raise ValueError("no run folder given: expected what training with AxisTracker wrote, RUNS/NAME/version_0")
    roots = [_root(Path(folder)) for folder in folders]
    for place, (root, _) in enumerate(roots):
        if root in [other for other, _ in roots[:place]]:
            raise ValueError(f"{root} is given twice")
    names = _names([root for root, _ in roots])
    runs = Runs(tuple(_read(*place, name) for place, name in zip(roots, names, strict=True)), resamples)
    for run in runs.each[1:]:
        if run.widths != runs.each[0].widths:
            raise ValueError(_other_network(runs.each[0], run))
    if not runs.steps:
        lists = "; ".join(f"{run.name}: {', '.join(map(str, run.steps[:4]))} …" for run in runs.each)
        raise ValueError(f"the runs have no step in common at which all were measured: {lists}")
    return runs


def _root(folder: Path) -> tuple[Path, Path]:
    """The run folder and the tracker's folder in it, whichever of the two was given."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected what training with AxisTracker wrote")
    if any(folder.glob("step-*.parquet")):
        return folder.parent, folder
    trackers = sorted({path.parent for path in folder.glob("*/step-*.parquet")})
    if len(trackers) == 1 or folder / DEFAULT in trackers:
        return folder, folder / DEFAULT if folder / DEFAULT in trackers else trackers[0]
    if trackers:
        raise FileNotFoundError(
            f"{folder} holds the tables of several trackers: name one, {' or '.join(map(str, trackers))}"
        )
    below = sorted({path.parent.parent for deep in ("*/*", "*/*/*") for path in folder.glob(f"{deep}/step-*.parquet")})
    holds = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    hint = f"; did you mean {' '.join(map(str, below[:3]))}" if below else ""
    raise FileNotFoundError(
        f"{folder} is no run folder: expected {DEFAULT}/step-….parquet in it, as AxisTracker writes; it holds "
        f"{holds}{hint}"
    )


def _names(roots: Sequence[Path]) -> list[str]:
    """The shortest ends of their paths that tell the runs apart, of two parts at the least."""
    length = 2
    while len({root.parts[-length:] for root in roots}) < len(roots):
        length += 1
    return ["/".join(root.parts[-length:]) for root in roots]


def _read(root: Path, tracker: Path, name: str) -> Run:
    notes: list[str] = []
    table = _tables(tracker, notes).assign(run=name)
    return Run(
        name,
        root,
        tracker.name,
        table,
        config=_config(root, notes),
        scalars=_scalars(root, notes),
        lesions=_found(root, "lesions.parquet", {"layer", "channel", "input_capture"}, name, notes),
        pruning=_found(root, "pruning.parquet", {*VARIANT, "macs_share"}, name, notes),
        notes=tuple(notes),
    )


def _tables(tracker: Path, notes: list[str]) -> pd.DataFrame:
    """All checkpoints that can be read."""
    frames = [_noted(read_parquet, path, notes) for path in sorted(tracker.glob("step-*.parquet"))]
    whole = [frame for frame in frames if frame is not None]
    if not whole:
        raise ValueError(f"{tracker}: no checkpoint can be read; the first: {notes[0]}")
    return pd.concat(whole, ignore_index=True)


def _config(root: Path, notes: list[str]) -> dict[str, Any]:
    for path in (root / "config.yaml", root / "hparams.yaml"):
        if path.is_file():
            read = _noted(lambda file: yaml.safe_load(file.read_text()), path, notes)
            if isinstance(read, dict) and read:
                return read
    return {}


def keep_scalars(root: Path) -> None:
    """Put the CSV logger's file by, as ``metrics-1.csv`` and so on: the logger of a run that goes on deletes it."""
    path, number = root / "metrics.csv", 1
    while (kept := root / f"metrics-{number}.csv").exists():
        number += 1
    if path.is_file():
        path.replace(kept)


def _scalars(root: Path, notes: list[str]) -> pd.DataFrame:
    """What was logged before each interruption, up to where the run went on, then the rest, and then the test."""
    kept = sorted(root.glob("metrics-*.csv"), key=lambda path: (len(path.name), path.name))
    whole = pd.DataFrame()
    for path in [*kept, root / "metrics.csv"]:
        part = _noted(pd.read_csv, path, notes) if path.is_file() else None
        if part is not None and len(part):
            before = whole[whole["step"] < part["step"].min()] if len(whole) else whole
            whole = pd.concat([before, part], ignore_index=True) if len(before) else part
    path = root / "test" / "metrics.csv"
    test = _noted(pd.read_csv, path, notes) if path.is_file() else None
    return whole if test is None else pd.concat([whole, test], ignore_index=True)


def _found(root: Path, name: str, columns: set[str], run: str, notes: list[str]) -> dict[str, pd.DataFrame]:
    """Tables of one name anywhere in the run folder, by the folder they are in."""
    found = {}
    for path in sorted(root.rglob(name)):
        table = _noted(pd.read_parquet, path, notes)
        if table is not None and columns <= {*table}:
            found[path.parent.relative_to(root).as_posix()] = table.assign(run=run)
        elif table is not None:
            notes.append(f"{path} lacks the columns {', '.join(sorted(columns - {*table}))}")
    return found


def _noted(read: Callable[[Path], Any], path: Path, notes: list[str]) -> Any:
    """What ``read`` makes of a file; ``None``, and a note, where the file is damaged."""
    try:
        return read(path)
    except (OSError, ValueError, pa.ArrowInvalid, yaml.YAMLError) as error:
        told = str(error).splitlines()[0]
        notes.append(told if told.startswith(str(path)) else f"{path} cannot be read: {told}")
        return None


def _other_network(first: Run, other: Run) -> str:
    return (
        f"runs of different networks: {_unlike(first, other)}; {_unlike(other, first)}. Make a report of each network "
        "by itself; `chanaxes compare` sets pruning grids of different ones side by side"
    )


def _unlike(run: Run, other: Run) -> str:
    layers = [f"{name} ({width} channels)" for name, width in run.widths.items() if other.widths.get(name) != width]
    return f"{run.name} has {', '.join(layers[:2]) or 'nothing else'}{' …' if len(layers) > 2 else ''}"
