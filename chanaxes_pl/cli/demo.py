"""``chanaxes demo``: train, track, lesion, prune and report, without a download."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as L
import pandas as pd
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl.analysis.correlations import highest, main_correlation
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.cli.report import report
from chanaxes_pl.data import PhotosDataModule
from chanaxes_pl.lesions.damage_table import LesionExperiment
from chanaxes_pl.models import Classifier
from chanaxes_pl.prune_module import PruneModule
from chanaxes_pl.pruning.grid import PruningExperiment
from chanaxes_pl.tables import DENSE
from chanaxes_pl.tracking.tracker import AxisTracker

_IMAGES = 500  # of the probe, for lesions and pruning


def demo(epochs: int = 4, out: str = "runs", seed: int = 0) -> None:
    """Train a quarter-width VGG-16 on crops of photographs, watch its axes come apart, then lesion and prune it.

    Args:
        epochs: number of training epochs, 70 steps each.
        out: folder below which the run gets a folder of its own.
        seed: random seed of initialisation and training.

    Raises:
        SystemExit: with status 2 if the photographs are missing.
    """
    data = PhotosDataModule(batch_size=64, val_size=0, test_crops=40)
    try:
        data.setup()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    with _quiet():
        L.seed_everything(seed, verbose=False)
        classes = data.num_classes
        model = Classifier(
            "vgg16_bn",
            num_classes=classes,
            width=0.25,
            image_size=32,
            lr=0.05,
            schedule="one_cycle",
            channels_last=True,
        )
        tracker = AxisTracker(schedule="log", probe_size=1000)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[tracker, TQDMProgressBar(refresh_rate=int(sys.stdout.isatty()))],
            logger=CSVLogger(out, "demo"),
            log_every_n_steps=10,
            limit_val_batches=0,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, data)
        folder = Path(str(trainer.log_dir))
        # No logger: the run's logs are those of its training alone. No Lightning bar: lesions and pruning draw
        # their own.
        tester = L.Trainer(
            accelerator="cpu",
            callbacks=[TQDMProgressBar(refresh_rate=0)],
            logger=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        accuracy = tester.test(model, data, verbose=False)[0]["test/top1"]
        print(
            f"A quarter-width VGG-16 learned in {trainer.global_step} steps which of {classes} photographs a crop "
            f"is from.\nIts accuracy on unseen parts of the photographs is {accuracy:.1%} (chance {1 / classes:.1%}).\n"
        )
        print(tell_axes(main_correlation(read_runs([str(tracker.folder)], resamples=1000).correlations)) + "\n")

        lesion = LesionExperiment(
            operations=("zero", "mean", "peer"),
            channels=6,
            scores=("l1",),
            probe_size=_IMAGES,
            evaluation_size=300,
            seed=seed,
        )
        lesions = PruneModule(model, lesion, out=folder)
        tester.test(lesions, data, verbose=False)
        print(tell_lesions(lesions.table) + "\n")

        grid = PruningExperiment(
            scores=("reconstruction", "input_capture", "l1", "random"),
            allocations=("uniform",),
            budgets=(0.75, 0.5, 0.25),
            compensate=(False, "refit"),
            probe_size=_IMAGES,
            seed=seed,
        )
        pruning = PruneModule(model, grid, out=folder)
        tester.test(pruning, data, verbose=False)
        print(tell_pruning(pruning.table) + "\n")
        report(str(folder))


def tell_axes(rows: pd.DataFrame) -> str:
    """Say in three sentences how the correlation of the axes went.

    Args:
        rows: result of :func:`main_correlation` for one run.
    """
    first, last = rows.iloc[0], rows.iloc[-1]
    top = rows.iloc[highest(rows["rho"])]
    lines = [
        "ρ: rank correlation between what a channel captures of its input and what it knows about the class.",
        f"Before training the two are {_coupling(first)}: {_rho(first)}.",
    ]
    if top["step"] > 0:
        lines.append(f"At their highest, after step {int(top['step'])}, they are {_coupling(top)}: {_rho(top)}.")
    apart = top["low"] > 0 and last["rho"] < top["rho"] / 2
    end = "have come apart" if apart else f"are {_coupling(last)}"
    return "\n".join([*lines, f"After training the two {end}: {_rho(last)}."])


def _coupling(row: pd.Series) -> str:
    return "coupled" if row["low"] > 0 else "not coupled"


def _rho(row: pd.Series) -> str:
    return f"ρ = {row['rho']:.2f}, 95 % interval {row['low']:.2f} to {row['high']:.2f}"


def tell_lesions(table: pd.DataFrame) -> str:
    """Say what it costs to remove a channel, to set it to its mean and to rebuild it from its peers.

    Args:
        table: lesion table with the operations zero, mean and peer.
    """
    zero, mean, peer = (table[f"{operation}_loss"].mean() for operation in ("zero", "mean", "peer"))
    return (
        f"Removing one channel changes the test loss by {zero:+.4f} nats, averaged over {len(table)} channels.\n"
        f"Setting the channel to its mean instead changes it by {mean:+.4f} nats.\n"
        f"Rebuilding the channel from the others in its layer changes it by {peer:+.4f} nats."
    )


def tell_pruning(grid: pd.DataFrame) -> str:
    """Say what it costs to remove half of the multiply–accumulates, and what compensation gives back.

    Args:
        grid: pruning table that holds input capture and random at a budget of 0.5, bare and refitted, and
            reconstruction and random at 0.25, refitted.
    """
    found = grid.set_index(["budget", "score", "compensate"])["accuracy"]
    half, quarter = found[0.5], found[0.25][:, "refit"]
    dense = grid.loc[grid["score"] == DENSE, "accuracy"].mean()
    bare, refitted = half["input_capture", "none"], half["input_capture", "refit"]
    return (
        f"Removing the channels that capture least, until half of the multiply–accumulates are left, takes the "
        f"accuracy\nfrom {dense:.1%} to {bare:.1%} (random channels: {half['random', 'none']:.1%}).\n"
        f"Refitting the layers that read them, without any training, brings it to {refitted:.1%} "
        f"(random channels: {half['random', 'refit']:.1%}).\n"
        f"At a quarter, removing what the others can best rebuild leaves {quarter['reconstruction']:.1%} after a refit "
        f"(random channels: {quarter['random']:.1%})."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about itself: devices, tips, workers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
