"""What has been measured in a run so far: in memory, in the run folder, in the training checkpoint."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from chanaxes_pl.axes import Axes
from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, InputError, is_whole, naming, short
from chanaxes_pl.core.files import replacing
from chanaxes_pl.run_folder import ABOUT, DEFAULT_TRACKER, RunFolder, check_tracker_name, checkpoint_path, table_paths
from chanaxes_pl.tables import read_parquet, write_parquet


class History:
    """The checkpoints of one run, in memory and in a run folder; what :class:`AxisTracker` keeps, for any loop.

    Fed by hand in a training loop of one's own, it leaves the run folder that :func:`read_runs` and
    ``chanaxes report`` read. Of several processes only one may feed it. To resume, keep :meth:`state_dict` with the
    weights and give it to :meth:`load_state_dict` before the next :meth:`add`: tables of later steps are set aside.

    Args:
        folder: the run folder, made with the first checkpoint. A second history of the same folder does not write
            among the first one's tables: it takes ``name-1``. ``None`` keeps all in memory.
        name: of the folder in it.
        about: what else to keep of this training, such as ``{"data": "CIFAR10", "seed": 0}``, as JSON.

    Attributes:
        run: the run's name, kept when training is resumed.
        checkpoints: ``(epoch, step)`` of each measurement, in order.
        table: the last checkpoint's table of channels, with ``run, epoch, step`` in front.
        correlations: those of all checkpoints, in one frame.
        folder: where the tables are written; ``None`` where none are, or before the first.

    Raises:
        ValueError: for a name that is not that of a folder.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from chanaxes_pl import compute_axes, read_run
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> probe = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
        >>> history = History(f"{tempfile.mkdtemp()}/mine")
        >>> for epoch in range(2):
        ...     history.add(10 * epoch, epoch, compute_axes(model, probe))  # and train the model in between
        >>> read_run(history.folder)[["run", "epoch", "step"]].drop_duplicates().values.tolist()
        [['mine', 0.0, 0], ['mine', 1.0, 10]]
    """

    def __init__(
        self, folder: str | Path | None = None, name: str = DEFAULT_TRACKER, about: Mapping[str, Any] | None = None
    ) -> None:
        with naming(type(self).__name__):
            check_tracker_name(name)
            try:
                json.dumps(dict(about or {}))
            except (TypeError, ValueError) as error:
                raise ArgumentTypeError(f"about={short(about)}", f"expected what JSON can hold ({error})") from None
        self.run = ""
        self.checkpoints: list[tuple[float, int]] = []
        self.table = pd.DataFrame()
        self.correlations = pd.DataFrame()
        self.folder: Path | None = None
        self._root, self._name, self._about = None if folder is None else Path(folder).absolute(), name, about
        self._resumed = False
        self._came_from: Path | None = None

    @property
    def last_step(self) -> int:
        """Step of the last measurement; −1 before the first."""
        return self.checkpoints[-1][1] if self.checkpoints else -1

    def add(self, step: int, epoch: float, axes: Axes, replace: bool = False, same: bool = True) -> None:
        """Take in one measurement, and write its table where there is a folder.

        A folder that can no longer be written costs this table, with a warning, and not the training.

        Args:
            step: optimiser steps before it, more than before the last one.
            epoch: passes over the training data before it; may be a fraction.
            axes: of the network, from :func:`compute_axes`.
            replace: take the place of the last measurement if that is of the same step.
            same: refuse axes of other channels than before.

        Raises:
            ValueError: for a step that is not above the last one's, an epoch that is no number from 0 on, or axes of
                other channels than before.
            TypeError: if ``axes`` are none.
            OSError: if the folder cannot be made.
        """
        with naming(f"{type(self).__name__}.add"):
            self._check_next(step, epoch, axes, replace, same)
        if self.folder is None and self._root is not None:
            root = RunFolder(self._root)
            self.open(root, self._name, root.path.absolute().name, self._about)
        if step == self.last_step:
            self.checkpoints.pop()
            self.correlations = self.correlations[self.correlations["step"] != step]
        keys = (self.run, float(epoch), int(step))
        self.table = _keyed(axes.table, *keys)
        self.checkpoints.append(keys[1:])
        frames = [self.correlations, _keyed(axes.correlations, *keys)]
        self.correlations = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
        if self.folder is not None:
            path = checkpoint_path(self.folder, step)
            try:
                write_parquet(self.table, path)
            except OSError as error:
                warnings.warn(f"the table of step {step} is lost, training goes on: {path}: {error}", stacklevel=2)

    def _check_next(self, step: int, epoch: float, axes: Axes, replace: bool, same: bool) -> None:
        if not isinstance(axes, Axes):
            raise ArgumentTypeError(
                f"axes: a {type(axes).__name__}", "expected what compute_axes(model, probe) returns"
            )
        first = self.last_step + (0 if replace and self.checkpoints else 1)
        if not is_whole(step, first):
            text = f"expected the number of optimiser steps so far, a whole number from {first} on"
            raise ArgumentError(f"step={step!r}", f"{text}; begin a History for each training")
        if not isinstance(epoch, Real) or not 0 <= epoch < float("inf"):
            raise ArgumentError(f"epoch={epoch!r}", "expected the passes over the training data so far, such as 0.5")
        before, now = _channels(self.table), _channels(axes.table)
        if same and before and before != now:
            other = sorted({layer for layer, _ in {*before} ^ {*now}})
            raise InputError(
                f"other channels than in step {self.last_step}, in {', '.join(other[:3]) or 'another order'}: expected "
                "the same layers= of the same network at every step; begin another History for another network"
            )

    def open(self, root: RunFolder, name: str, run: str, about: Mapping[str, Any] | None = None) -> None:
        """Choose the folder ``root/name``, see that it can be written, and bring a resumed run's tables into it.

        A run never writes among another one's tables: it takes ``name-1``, ``name-2``, … instead.

        Args:
            root: the run folder.
            name: of the tracker.
            run: the run's name.
            about: what else to keep of this training, as JSON.

        Raises:
            OSError: if the folder cannot be written.
        """
        self.run = self.run or run
        before = self.folder or self._came_from
        folder = root.path / name
        try:
            if before and (before.parent.resolve() == root.path.resolve() or not before.exists()):
                folder = root.path / before.name  # its own tables, here or moved here
                folder.mkdir(parents=True, exist_ok=True)
            else:
                folder = root.create_tracker(name)
            with replacing(folder / ABOUT) as draft:
                draft.write_text(json.dumps({"versions": versions(), **(about or {})}))
        except OSError as error:
            who, cure = "AxisTracker", "give the Trainer another default_root_dir or logger, or the tracker save=False"
            if self._root is not None:
                who, cure = type(self).__name__, "give it another folder"
            raise OSError(f"{who} cannot write its tables to {folder} ({error.strerror or error}): {cure}") from error
        self.folder = folder
        if self._resumed:
            self._bring_tables(folder)

    def _bring_tables(self, folder: Path) -> None:
        """Make ``folder`` hold the tables of exactly the checkpoints that the resumed run had behind it."""
        kept = {checkpoint_path(folder, step).name for _, step in self.checkpoints}
        for path in table_paths(folder):
            if path.name not in kept:  # measured after the state that training goes on from
                _set_aside(path)
        paths, damaged = [checkpoint_path(folder, step) for _, step in self.checkpoints], set()
        for path in paths:
            if not path.exists() and self._came_from and (self._came_from / path.name).exists():
                shutil.copyfile(self._came_from / path.name, path)
            if path.exists() and _is_damaged(path):
                damaged.add(path)
        missing = [path.name for path in paths if not path.exists() and path not in damaged]
        if missing:
            warnings.warn(
                f"{folder} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}, and "
                f"{self._came_from or 'the resumed run, which wrote no tables,'} cannot give them: the table of "
                f"channels has a gap of {len(missing)} checkpoints; the correlations are complete",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins only, so that a checkpoint loads with ``weights_only=True``."""
        columns: dict[str, Any] = {}
        for name, column in self.correlations.items():
            number = pd.api.types.is_numeric_dtype(column)
            columns[str(name)] = torch.tensor(column.to_numpy(float)) if number else column.tolist()
        return {
            "run": self.run,
            "checkpoints": [list(checkpoint) for checkpoint in self.checkpoints],
            "correlations": columns,
            "folder": str(self.folder.absolute()) if self.folder else "",
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; tables of later steps are set aside, or if it has none yet, stay aside."""
        self._resumed = True
        before = self.last_step
        if self.folder is not None and state["folder"] != str(self.folder.absolute()):
            self.folder = None  # else training goes back within one process, as after a search for a learning rate
        self.run = state["run"]
        self.checkpoints = [(float(epoch), int(step)) for epoch, step in state["checkpoints"]]
        columns = {
            name: column.numpy() if isinstance(column, torch.Tensor) else column
            for name, column in state["correlations"].items()
        }
        frame = pd.DataFrame(columns)
        whole = {name: "int64" for name in ("step", "n") if name in frame}
        self.correlations = frame.astype(whole)
        self._came_from = Path(state["folder"]) if state["folder"] else None
        if self.last_step != before:
            self.table = pd.DataFrame()
        if self.folder is not None:
            self._bring_tables(self.folder)


def _set_aside(path: Path) -> Path:
    """Move a table out of the way, beside those that were before; return where it is."""
    folder, number = path.parent / "set-aside", 0
    folder.mkdir(exist_ok=True)
    while (aside := folder / f"{path.stem}{f'-{number}' if number else ''}{path.suffix}").exists():
        number += 1
    return path.replace(aside)


def _is_damaged(path: Path) -> bool:
    """Whether a table cannot be read; it is then set aside, with a warning."""
    try:
        read_parquet(path)
    except ValueError as error:
        warnings.warn(f"{error}; moved to {_set_aside(path)}, training goes on", stacklevel=2)
        return True
    return False


def _channels(table: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(table["layer"], table["channel"], strict=True)) if len(table) else []


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("chanaxes_pl", "torch", "lightning")}


def _keyed(frame: pd.DataFrame, run: str, epoch: float, step: int) -> pd.DataFrame:
    keys = pd.DataFrame({"run": run, "epoch": epoch, "step": step}, index=frame.index)
    return pd.concat([keys, frame], axis=1)
