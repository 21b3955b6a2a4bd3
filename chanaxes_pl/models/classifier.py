"""The LightningModule that trains a backbone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.targets import check_classes, describe
from chanaxes_pl.models.backbones import Backbone, build_backbone
from chanaxes_pl.network.batches import logits_of, split_batch
from chanaxes_pl.network.layers import crashes_channels_last


def cosine_factor(step: int, total: int, warmup: int = 0) -> float:
    """The learning rate at optimiser step ``step``, as a fraction of its peak.

    Rises as (step + 1) / warmup, then falls as ½(1 + cos(π·(step − warmup)/(total − warmup))) to 0 at
    ``total`` (Loshchilov and Hutter, 2017, without restarts).

    >>> [cosine_factor(step, total=6, warmup=2) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


#: The CIFAR recipe, which fills in for hyperparameters that a subclass of :class:`ImageClassifier` does not have.
RECIPE = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
}


class ImageClassifier(L.LightningModule):
    """Any network, trained with cross-entropy on batches ``(images, labels)``.

    Logs ``train/loss``, ``train/top1`` and, for both ``val`` and ``test``, ``loss``, ``top1`` and (with more
    than 5 classes) ``top5``, all as means over an epoch. A subclass sets its recipe by saving hyperparameters with
    names from :data:`RECIPE`.

    Args:
        network: a network from images ``[batch, 3, height, width]`` to logits ``[batch, num_classes]``.
        num_classes: number of labels.
        channels_last: whether to keep maps in NHWC order.
    """

    def __init__(self, network: nn.Module, num_classes: int, channels_last: bool = False) -> None:
        super().__init__()
        self.network = network
        self._num_classes = num_classes
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            network.to(memory_format=self.memory_format)
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = _accuracies(num_classes, "val/")
        self.test_accuracy = _accuracies(num_classes, "test/")
        self._further: dict[int, MetricCollection] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]`` of images ``[batch, 3, height, width]``."""
        return self.network(images.contiguous(memory_format=self.memory_format))

    def on_train_start(self) -> None:
        """Refuse to prolong a run whose learning rate has come to the end of its one cycle."""
        schedule = self.lr_schedulers()
        steps = self.trainer.estimated_stepping_batches
        if isinstance(schedule, OneCycleLR) and schedule.total_steps < steps:  # its state is that of the checkpoint
            raise InputError(
                f"the run was begun for {schedule.total_steps} steps of one cycle and is now to take {int(steps)}: "
                "expected the same max_epochs, batch size and data; begin another run, or train with schedule='cosine'"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch ``(images, labels)``."""
        logits, labels = self._run(batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=self._setting("label_smoothing"))
        self.train_top1.update(logits, labels)
        self._log_epoch({"train/loss": loss, "train/top1": self.train_top1}, len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracies of one batch ``(images, labels)``."""
        self._evaluate(batch, "val/loss", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss and the accuracies of one batch ``(images, labels)``."""
        accuracy = self.test_accuracy
        if dataloader_idx:  # of several loaders each has its own
            if dataloader_idx not in self._further:
                self._further[dataloader_idx] = accuracy.clone()
                self._further[dataloader_idx].reset()
            accuracy = self._further[dataloader_idx]
        self._evaluate(batch, "test/loss", accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, and a learning rate schedule that advances at every step of it."""
        shared = {"lr": self._setting("lr"), "weight_decay": self._setting("weight_decay")}
        if self._setting("optimizer") == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), **shared)
        else:
            momentum = {"momentum": self._setting("momentum"), "nesterov": self._setting("nesterov")}
            optimizer = torch.optim.SGD(self.parameters(), **shared, **momentum)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"},
        }

    def _setting(self, name: str) -> Any:
        return self.hparams.get(name, RECIPE[name])

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < math.inf:  # an iterable data set of unknown length gives -1
            raise ValueError(
                f"schedule={self._setting('schedule')!r} needs the length of the run: "
                "give the Trainer max_epochs or max_steps"
            )
        total = int(total)
        if self._setting("schedule") == "one_cycle":
            return OneCycleLR(optimizer, self._setting("lr"), total_steps=total, cycle_momentum=False)
        warmup = self._setting("warmup_epochs")
        if warmup:  # only a warm-up needs to know the length of an epoch
            batches = self.trainer.num_training_batches
            warmup = round(warmup * math.ceil(batches / self.trainer.accumulate_grad_batches))
        return LambdaLR(optimizer, partial(cosine_factor, total=total, warmup=warmup))

    def _evaluate(self, batch: tuple[Tensor, Tensor], loss_name: str, accuracy: MetricCollection) -> None:
        logits, labels = self._run(batch)
        check_classes(logits, labels)
        if logits.shape[1] != self._num_classes:
            raise InputError(
                f"{type(self.network).__name__} gives {logits.shape[1]} logits, and the accuracies are of "
                f"{self._num_classes}: pass num_classes={logits.shape[1]}"
            )
        accuracy.update(logits, labels)
        self._log_epoch({loss_name: F.cross_entropy(logits, labels), **dict(accuracy.items())}, len(labels))

    def _run(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The logits ``[batch, num_classes]`` and the labels of a batch.

        Raises:
            ValueError: if the batch is not understood, or its labels are no class indices.
        """
        images, labels = split_batch(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            told = f"{describe(labels)} of {labels.dtype}" if isinstance(labels, Tensor) else describe(labels)
            raise InputError(
                f"the labels of a batch are {told}: expected the index of each image's class, integers [B]"
            )
        return logits_of(self(images)), labels.long()

    def _log_epoch(self, values: dict[str, Any], batch_size: int) -> None:
        # sync_dist averages the losses over processes; the metrics sync themselves
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "prog_bar": True}
        for name, value in values.items():
            # named, because Lightning does not find a metric that was made after it first looked for them
            attribute = name if isinstance(value, Metric) else None
            self.log(name, value, metric_attribute=attribute, batch_size=batch_size, **options)


class Classifier(ImageClassifier):
    """A backbone trained with cross-entropy, by default with the CIFAR recipe.

    Args:
        backbone: name of the network.
        num_classes: number of labels.
        width: multiplier of every channel count.
        image_size: side of the images in pixels, which chooses the stem.
        optimizer: ``"sgd"``, or ``"adamw"``, which ignores ``momentum`` and ``nesterov``.
        lr: largest learning rate of the run.
        momentum: momentum of SGD.
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: weight decay of all parameters.
        schedule: learning rate over optimiser steps. ``"cosine"`` falls to 0 over the whole run; ``"one_cycle"``
            rises over the first 30 % of the run and falls over the rest; a run with it cannot be prolonged.
        warmup_epochs: epochs, or a fraction of one, of linear warm-up before the cosine.
        label_smoothing: label smoothing of the training loss, in [0, 1].
        channels_last: whether to keep maps in NHWC order, with which ResNet-18 trains about 1.3 times as fast on a CPU.

    Raises:
        ValueError: as :func:`build_backbone`; for an unknown optimiser or schedule; for a negative warm-up, or any
            with ``"one_cycle"``, which has its own; and for ``channels_last`` on a network so narrow that it would
            crash.

    >>> classifier = Classifier("resnet18", num_classes=10, width=0.25)
    >>> classifier(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        width: float = 1.0,
        image_size: int = 32,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 5e-4,
        schedule: Literal["cosine", "one_cycle"] = "cosine",
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"unknown optimizer {optimizer!r}; expected 'sgd' or 'adamw'")
        if schedule not in ("cosine", "one_cycle"):
            raise ValueError(f"unknown schedule {schedule!r}; expected 'cosine' or 'one_cycle'")
        if warmup_epochs < 0 or (warmup_epochs and schedule == "one_cycle"):
            raise ValueError(
                f"warmup_epochs={warmup_epochs} with schedule={schedule!r}: expected 0 or more epochs before "
                "'cosine', and 0 for 'one_cycle', which warms up over 30 % of the run"
            )
        network = build_backbone(backbone, num_classes, width, image_size)
        if channels_last:
            _check_channels_last(network)
        super().__init__(network, num_classes, channels_last)
        self.save_hyperparameters()
        self.backbone_arguments = dict(self.hparams)  # what a pruned copy is built from again


def _check_channels_last(network: nn.Module) -> None:
    if name := crashes_channels_last(network):
        inputs = network.get_submodule(name).in_channels
        raise ValueError(
            f"channels_last=True: {name} has {inputs} input channels, and strided 1×1 convolutions "
            "need at least 8 there; choose a larger width or channels_last=False"
        )


def _accuracies(num_classes: int, prefix: str) -> MetricCollection:
    top = {"top1": 1, "top5": 5} if num_classes > 5 else {"top1": 1}
    return MetricCollection(
        {name: MulticlassAccuracy(num_classes, top_k=k, average="micro") for name, k in top.items()},
        prefix=prefix,
        compute_groups=False,  # a first batch without errors would merge top-1 and top-5 for good
    )
