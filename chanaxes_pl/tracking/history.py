"""What a tracker has measured in a run so far: in memory, in the run folder, in the training checkpoint."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from chanaxes_pl.core.files import replacing
from chanaxes_pl.run_folder import ABOUT, RunFolder, checkpoint_path, table_paths
from chanaxes_pl.tables import read_parquet, write_parquet


class History:
    """The checkpoints of one run: their keys, their axis correlations, and the folder with their tables.

    Attributes:
        run: the run's name, kept when training is resumed.
        checkpoints: ``(epoch, step)`` of each measurement, in order.
        correlations: those of all checkpoints, in one frame.
        folder: where the tables are written; ``None`` where none are.
    """

    def __init__(self) -> None:
        self.run = ""
        self.checkpoints: list[tuple[float, int]] = []
        self.correlations = pd.DataFrame()
        self.folder: Path | None = None
        self._resumed = False
        self._came_from: Path | None = None

    @property
    def last_step(self) -> int:
        """Step of the last measurement; −1 before the first."""
        return self.checkpoints[-1][1] if self.checkpoints else -1

    def add(self, epoch: float, step: int, table: pd.DataFrame, correlations: pd.DataFrame) -> pd.DataFrame:
        """Take in one measurement: returns its table with the keys in front, and writes it where there is a folder.

        A folder that can no longer be written costs this table, with a warning, and not the training.
        """
        keyed = _keyed(table, self.run, epoch, step)
        self.checkpoints.append((epoch, step))
        frames = [self.correlations, _keyed(correlations, self.run, epoch, step)]
        self.correlations = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
        if self.folder is not None:
            path = checkpoint_path(self.folder, step)
            try:
                write_parquet(keyed, path)
            except OSError as error:
                warnings.warn(f"the table of step {step} is lost, training goes on: {path}: {error}", stacklevel=2)
        return keyed

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
                draft.write_text(json.dumps(about or {}))
        except OSError as error:
            raise OSError(
                f"AxisTracker cannot write its tables to {folder} ({error.strerror or error}): "
                "give the Trainer another default_root_dir or logger, or the tracker save=False"
            ) from error
        self.folder = folder
        if self._resumed:
            self._bring_tables(folder)

    def _bring_tables(self, folder: Path) -> None:
        """Make ``folder`` hold the tables of exactly the checkpoints that the resumed run had behind it."""
        kept = {checkpoint_path(folder, step).name for _, step in self.checkpoints}
        for path in table_paths(folder):
            if path.name not in kept:  # measured after the state that training goes on from
                (folder / "set-aside").mkdir(exist_ok=True)
                path.replace(folder / "set-aside" / path.name)
        paths = [checkpoint_path(folder, step) for _, step in self.checkpoints]
        for path in paths:
            if not path.exists() and self._came_from and (self._came_from / path.name).exists():
                shutil.copyfile(self._came_from / path.name, path)
            if path.exists():
                self._check(path)
        missing = [path.name for path in paths if not path.exists() and not (folder / "set-aside" / path.name).exists()]
        if missing:
            warnings.warn(
                f"{folder} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}, and "
                f"{self._came_from or 'the resumed run, which wrote no tables,'} cannot give them: the table of "
                f"channels has a gap of {len(missing)} checkpoints; the correlations are complete",
                stacklevel=2,
            )

    def _check(self, path: Path) -> None:
        try:
            read_parquet(path)
        except ValueError as error:
            (path.parent / "set-aside").mkdir(exist_ok=True)
            path.replace(path.parent / "set-aside" / path.name)
            warnings.warn(f"{error}; moved to {path.parent / 'set-aside'}, training goes on", stacklevel=2)

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
        """Go on from :meth:`state_dict`."""
        self._resumed = True
        self.folder = None
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


def _keyed(frame: pd.DataFrame, run: str, epoch: float, step: int) -> pd.DataFrame:
    keys = pd.DataFrame({"run": run, "epoch": epoch, "step": step}, index=frame.index)
    return pd.concat([keys, frame], axis=1)
