"""The run folder, which holds a run's tables of channels, experiments, configuration, scalars and checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.files import set_aside

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: Folder of a tracker without a name.
DEFAULT_TRACKER = "axis"
#: File in a tracker's folder with data set, seed, epochs and versions, as JSON.
ABOUT = "about.json"
_TABLES = "step-*.parquet"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of a tracker's table of one step."""
    return folder / f"step-{step:09d}.parquet"


def table_paths(folder: str | Path) -> list[Path]:
    """List the tables of channels in a tracker's folder, in the order of their steps."""
    return sorted(Path(folder).glob(_TABLES), key=lambda path: (len(path.name), path.name))


def check_tracker_name(name: str) -> None:
    """Check that a name can be that of a folder directly in the run folder.

    Raises:
        ValueError: if it is empty, ``.``, ``..`` or an absolute path, or contains separators.
    """
    if not isinstance(name, str) or name.strip() in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise ArgumentError(f"name={name!r}", "expected the name of a folder in the run folder, without / \\ or :")


@dataclass(frozen=True)
class RunFolder:
    """Folder of one run.

        RUN/axis/step-….parquet             tables of channels, written by AxisTracker(name="axis")
        RUN/axis/about.json                 data set, seed, epochs and versions of that training
        RUN/axis-1/step-….parquet           tables of a second training in the same folder
        RUN/checkpoints/last.ckpt
        RUN/config.yaml, hparams.yaml       settings, written by `chanaxes fit` and by a Lightning logger
        RUN/metrics.csv, test/metrics.csv   scalars; metrics-1.csv, … are from before interruptions
        RUN/**/lesions.parquet, pruning.parquet

    Attributes:
        path: path of the folder.
    """

    path: Path

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> tuple[RunFolder, str]:
        """Return the folder that a Trainer's run writes to and the run's name, as ``ModelCheckpoint`` chooses them."""
        if not trainer.loggers:
            return cls(Path(trainer.default_root_dir)), Path(trainer.default_root_dir).absolute().name
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        run = Path(str(logger.name or ""), version)
        folder = Path(logger.save_dir or trainer.default_root_dir) / run
        return cls(folder), run.as_posix() if run.name else folder.absolute().name

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> RunFolder:
        """Return the folder of the run that wrote a checkpoint."""
        folder = Path(checkpoint).absolute().parent
        return cls(folder.parent if folder.name == "checkpoints" else folder)

    @classmethod
    def find(cls, folder: str | Path) -> tuple[RunFolder, Path, str]:
        """Find a run folder and a tracker's folder in it; ``folder`` may be either.

        Returns:
            The run folder, the tracker's folder, and a note for the user if the newest of several trainings was
            chosen; otherwise the note is empty.

        Raises:
            FileNotFoundError: if there is no such folder, it holds no tables of channels, or it holds those of several
                trackers, none of which is named ``axis``.
        """
        folder = Path(folder).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected one that training with AxisTracker wrote")
        if table_paths(folder):
            return cls(folder.parent), folder, ""
        run = cls(folder)
        names = run.trackers
        if len(names) > 1 and DEFAULT_TRACKER not in names:
            paths = " or ".join(str(places[-1]) for places in names.values())
            raise FileNotFoundError(f"{folder} holds the tables of several trackers: choose one, {paths}")
        if not names:
            raise FileNotFoundError(run._no_tables())
        places = names.get(DEFAULT_TRACKER) or next(iter(names.values()))
        note = ""
        if len(places) > 1:
            older = " or ".join(str(place) for place in places[:-1])
            note = (
                f"{folder} holds {len(places)} trainings, and this is the newest, {places[-1].name}; pass {older} to "
                "see an older one"
            )
        return run, places[-1], note

    @property
    def trackers(self) -> dict[str, list[Path]]:
        """Tracker name → its folders with tables of channels, from the oldest training to the newest."""
        found: dict[str, list[tuple[int, Path]]] = {}
        folders = {path.parent for path in self.path.glob(f"*/{_TABLES}")}
        for folder in sorted(folders):
            name, number = _name_and_number(folder.name)
            if not (self.path / name).is_dir():  # a tracker named "label-2"
                name, number = folder.name, 0
            found.setdefault(name, []).append((number, folder))
        return {name: [folder for _, folder in sorted(places)] for name, places in found.items()}

    def create_tracker(self, name: str) -> Path:
        """Make a new folder for a tracker's tables: ``name``, or ``name-1``, ``name-2``, … if it exists already.

        Two processes that start at once get different folders, because the file system makes a folder only once.

        Raises:
            OSError: if the run folder cannot be written.
        """
        check_tracker_name(name)
        self.path.mkdir(parents=True, exist_ok=True)
        taken = [_name_and_number(path.name)[1] for path in self.path.glob(f"{name}-*")]
        taken = [number for number in taken if (self.path / f"{name}-{number}").exists()]
        for number in count(max(taken) + 1 if taken else 0):
            folder = self.path / (f"{name}-{number}" if number else name)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
        raise AssertionError("unreachable: count() does not end")

    @property
    def last_checkpoint(self) -> Path:
        """Path of the last checkpoint of training."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def configs(self) -> list[Path]:
        """Files with the run's settings, the most complete first."""
        return [path for path in (self.path / "config.yaml", self.path / "hparams.yaml") if path.is_file()]

    @property
    def scalars(self) -> list[Path]:
        """Files of the CSV logger from training: those from before each interruption, in order, and the last one."""
        kept = sorted(self.path.glob("metrics-*.csv"), key=lambda path: (len(path.name), path.name))
        return [path for path in [*kept, self.path / "metrics.csv"] if path.is_file()]

    @property
    def test_scalars(self) -> Path:
        """File of the CSV logger from ``chanaxes test``; the last one that was set aside, if the next test failed."""
        return next(reversed(RunFolder(self.path / "test").scalars), self.path / "test" / "metrics.csv")

    def keep_scalars(self) -> None:
        """Rename the CSV logger's file to ``metrics-1.csv``, …, because the logger of a resumed run deletes it."""
        set_aside(self.path / "metrics.csv")

    def experiments(self, name: Literal["lesions", "pruning"]) -> dict[str, Path]:
        """Find the tables of one kind of experiment: folder relative to the run folder → path of the table.

        Args:
            name: ``"lesions"`` or ``"pruning"``.
        """
        return {
            path.parent.relative_to(self.path).as_posix(): path for path in sorted(self.path.rglob(f"{name}.parquet"))
        }

    def _no_tables(self) -> str:
        deep = [path for pattern in ("*/*", "*/*/*") for path in self.path.glob(f"{pattern}/{_TABLES}")]
        below = sorted({path.parent.parent for path in deep})
        holds = ", ".join(sorted(path.name for path in self.path.iterdir())[:5]) or "nothing"
        hint = f"; did you mean {' '.join(map(str, below[:3]))}" if below else ""
        return (
            f"{self.path} is no run folder: expected {DEFAULT_TRACKER}/step-….parquet in it, as AxisTracker writes; it "
            f"holds {holds}{hint}"
        )


def _name_and_number(folder: str) -> tuple[str, int]:
    """Split a folder's name into tracker and number: ``axis-2`` is the third folder of a tracker named ``axis``."""
    match = re.fullmatch(r"(.+)-([1-9]\d*)", folder)
    return (match[1], int(match[2])) if match else (folder, 0)
