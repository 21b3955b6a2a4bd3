"""``chanaxes demo``: the whole thing in two minutes, on images that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl.analysis.text import describe_lesions, describe_pruning
from chanaxes_pl.cli.report import report
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.lesions.damage_table import LesionExperiment
from chanaxes_pl.models import Classifier
from chanaxes_pl.prune_module import PruneModule
from chanaxes_pl.pruning.grid import PruningExperiment
from chanaxes_pl.tracking.tracker import AxisTracker


def demo(epochs: int = 8, out: str = "runs", seed: int = 0) -> None:
    """Train a quarter-width ResNet-18 on handwritten digits, watch its axes come apart, then lesion and prune it.

    Args:
        epochs: to train for.
        out: folder for the run, in a folder of its own below it.
        seed: of initialisation and training.
    """
    L.seed_everything(seed, verbose=False)
    data = DigitsDataModule(image_size=16, batch_size=64)
    model = Classifier("resnet18", num_classes=10, width=0.25, image_size=16, schedule="one_cycle", channels_last=True)
    tracker = AxisTracker(schedule="log")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[tracker],
        logger=CSVLogger(out, "demo"),
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    accuracy = trainer.test(model, data, verbose=False)[0]["test/top1"]
    print(f"\nResNet-18 at quarter width on 8×8 digits, {epochs} epochs, test accuracy {accuracy:.1%}\n")
    report(str(tracker.folder), text=True)
    folder = Path(str(trainer.log_dir))
    # without the logger: the run's own logs are of its training alone
    tester = L.Trainer(accelerator="cpu", logger=False, enable_model_summary=False, enable_checkpointing=False)
    print(f"scalars: {folder / 'metrics.csv'}\n")
    experiment = LesionExperiment(operations=("zero", "mean", "peer"), channels=6, scores=("l1",), seed=seed)
    lesions = PruneModule(model, experiment, out=folder)
    tester.test(lesions, data, verbose=False)
    print(describe_lesions(lesions.table))
    print(f"figure: {folder / 'lesions.png'}\ntable:  {folder / 'lesions.parquet'}\n")
    grid = PruningExperiment(
        scores=("input_capture", "l1", "random"), allocations=("uniform",), budgets=(0.8, 0.5, 0.2), seed=seed
    )
    pruning = PruneModule(model, grid, out=folder)
    tester.test(pruning, data, verbose=False)
    print(describe_pruning(pruning.table))
    print(f"figure: {folder / 'pruning.png'}\ntable:  {folder / 'pruning.parquet'}\n")
    print(f"all of it on one page: chanaxes report {folder}")
