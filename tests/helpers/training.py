"""A network, images and a Trainer small enough that a whole training takes a tenth of a second."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4
#: Optimiser steps in an epoch of :func:`loaders`.
STEPS = 4
WIDTHS = {"net.0": 6, "net.4": 8}

#: Flags of ``chanaxes fit`` that make a config's run small and quiet.
FLAGS = {
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "trainer.accelerator": "cpu",
    "data.batch_size": 8,
}

#: What every fit of such a size says, whatever the callbacks.
QUIET = [
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Found 1 module.s. in eval mode at the start of training",
]


class Small(L.LightningModule):
    """Two convolutions with a frozen BatchNorm, a live one and dropout; keeps its losses and what it trained on."""

    def __init__(self, dropout: float = 0.3, backend: str | None = None, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(6, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, CLASSES),
        )
        self.frozen = self.net[1]
        if backend:
            self.net = torch.compile(self.net, backend=backend)
        self.losses: list[float] = []
        self.seen: list[list[int]] = []
        self.train()

    def train(self, mode: bool = True) -> "Small":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.losses.append(loss.item())
        self.seen.append((images[:, 0, 0, 0] * 1e6).long().tolist())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def images(count: int = 40, seed: int = 0) -> TensorDataset:
    """``count`` labelled images of 3 × 8 × 8 whose mean tells the class, a little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator) + labels[:, None, None, None] / 4, labels)


def loaders(shuffle: bool = False, count: int = 8 * STEPS) -> dict[str, DataLoader]:
    """Training and validation loaders, as keyword arguments of ``Trainer.fit``."""
    return {
        "train_dataloaders": DataLoader(images(count, 1), batch_size=8, shuffle=shuffle),
        "val_dataloaders": DataLoader(images(), batch_size=16),
    }


def build(**settings: Any) -> Small:
    """The network from seed 0."""
    torch.manual_seed(0)
    return Small(**settings)


def trainer(root: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A Trainer on the CPU that prints nothing, for 2 epochs unless told otherwise."""
    defaults = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, L.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


class RecordingLogger(Logger):
    """Keeps every row that it is given."""

    def __init__(self, save_dir: Path | None = None) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self._save_dir = save_dir

    @property
    def name(self) -> str:
        return "recorded"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str | None:
        return None if self._save_dir is None else str(self._save_dir)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Not kept."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, prefix: str = "axis/") -> list[tuple[int | None, dict[str, float]]]:
        """The rows of one tracker."""
        return [(step, row) for step, row in self.rows if any(key.startswith(prefix) for key in row)]
