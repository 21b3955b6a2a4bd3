"""``chanaxes demo``: the whole thing in two minutes, on images that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger

from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.summary import summary
from chanaxes_pl.tracker import AxisTracker


def demo(epochs: int = 8, out: str = "runs", seed: int = 0) -> None:
    """Train a quarter-width ResNet-18 on handwritten digits and watch its axes come apart.

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
    summary(str(tracker.folder))
    print(f"scalars: {Path(str(trainer.log_dir)) / 'metrics.csv'}")
