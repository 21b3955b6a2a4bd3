"""Splits, loaders and probe of all data modules, and batches augmented on the device."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from chanaxes_pl.data.augment import random_crop_flip
from chanaxes_pl.data.files import FileImages, TensorImages
from chanaxes_pl.data.splits import (
    EpochSampler,
    balanced_order,
    check_val_size,
    held_out_count,
    seeded_generator,
    stratified_split,
)

Split = Literal["train", "test"]
Transform = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

# A separate stream of random numbers for each use of a seed.
SPLIT_STREAM, PROBE_STREAM, LOADER_STREAM, AUGMENT_STREAM = range(4)


@dataclass(frozen=True, eq=False)
class _Training:
    """The training images, and the indices of those trained on and of those held out."""

    data: TensorImages | FileImages
    kept: Tensor
    held_out: Tensor


class ImageDataModule(L.LightningDataModule):
    """Splits, loaders and probe of a labelled image set; a subclass reads and transforms its images.

    ``seed`` alone fixes the held-out images and the probe. The order of training follows the global seed
    (``seed_everything``) and the epoch: runs with different global seeds differ in their order but share their
    splits, and a resumed run continues in the order of an uninterrupted one. No loader draws from the global
    random streams.

    Args:
        batch_size: images a batch, on each device.
        val_size: training images to hold out for validation, class by class: a number or a fraction below 1.
        seed: fixes the held-out images and the probe.

    Attributes:
        num_classes: the number of classes, known before anything is read.
        image_size: height and width of the network's input, in pixels.
        evaluation_transform: from uint8 images ``[…, 3, H, W]`` to normalised float32, with nothing random.
        num_workers: the number of processes that read images; 0 reads in the main process.
        collate_fn: makes a batch of what the data set returns; None stacks items.

    Raises:
        ValueError: if an argument is out of range.
    """

    num_classes: int
    image_size: int
    evaluation_transform: Transform
    num_workers: int = 0
    collate_fn: Callable[..., Batch] | None = None

    def __init__(self, *, batch_size: int = 128, val_size: int | float = 0.1, seed: int = 0) -> None:
        super().__init__()
        check_val_size(val_size)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected a non-negative number.")
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = seed
        self._training: _Training | None = None
        self._test: TensorImages | FileImages | None = None

    def read(self, split: Split) -> TensorImages | FileImages:
        """Read the official training or test images."""
        raise NotImplementedError

    def loader_transform(self, training: bool) -> Transform | None:
        """The transform of the training or evaluation loaders; None if batches are transformed on the device."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        """The names of the K classes, in the order of their labels; reads the training set if it is not read yet."""
        return self._split_training().data.class_names

    def setup(self, stage: str | None = None) -> None:
        """Read the images that ``stage`` needs: "fit", "validate", "test", or None for all."""
        if stage in ("fit", "validate", None):
            self._split_training()
        if stage in ("test", None):
            self._read_test()

    def train_dataloader(self) -> DataLoader:
        """The training images, shuffled again every epoch, without an incomplete last batch.

        Raises:
            ValueError: if there are fewer images than one batch holds.
        """
        training = self._split_training()
        dataset = self._subset(training.data, training.kept, self.loader_transform(training=True))
        if len(training.kept) < self.batch_size:
            raise ValueError(f"batch_size={self.batch_size}: there are only {len(training.kept)} training images.")
        # Worker processes fetch the first batches before Lightning calls set_epoch for a resumed run.
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        sampler = EpochSampler(training.kept, torch.initial_seed(), epoch)
        return self._loader(dataset, sampler=sampler, drop_last=True, persistent_workers=self.num_workers > 0)

    def val_dataloader(self) -> DataLoader:
        """The held-out training images, in a fixed order; empty where ``val_size`` is 0."""
        training = self._split_training()
        return self._loader(self._subset(training.data, training.held_out, self.loader_transform(training=False)))

    def test_dataloader(self) -> DataLoader:
        """The official test images, in a fixed order."""
        return self._loader(replace(self._read_test(), transform=self.loader_transform(training=False)))

    def probe_dataloader(self) -> DataLoader:
        """Training images to measure a network on: normalised float32 ``[B, 3, H, W]``, int64 labels ``[B]``.

        The images are not augmented and have the same order in every call. Class counts differ by at most one among
        the first N images, for any N, and among the even and the odd ones of these (until the smallest class is
        used up), so the first N images are a probe for any N.
        """
        training = self._split_training()
        order = balanced_order(training.data.labels[training.kept], seeded_generator(self.seed, PROBE_STREAM))
        return self._loader(self._subset(training.data, training.kept[order], self.evaluation_transform))

    def _split_training(self) -> _Training:
        if self._training is None:
            data = self.read("train")
            self._training = _Training(data, *self._split(data.labels))
        return self._training

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the held-out indices of training images with these labels ``[N]``."""
        count = held_out_count(self.val_size, len(labels))
        return stratified_split(labels, count, seeded_generator(self.seed, SPLIT_STREAM))

    def _read_test(self) -> TensorImages | FileImages:
        if self._test is None:
            self._test = self.read("test")
        return self._test

    def _subset(self, data: TensorImages | FileImages, indices: Tensor, transform: Transform | None) -> Subset:
        return Subset(replace(data, transform=transform), indices.tolist())

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            # Every iteration of a loader draws a seed for its workers: from here, not from the global stream.
            generator=seeded_generator(torch.initial_seed(), LOADER_STREAM),
            **kwargs,
        )


def as_is(batch: Batch) -> Batch:
    """Return ``batch``; the ``collate_fn`` for a data set that returns whole batches."""
    return batch


class InMemoryDataModule(ImageDataModule):
    """Small images held in memory as uint8; whole batches are loaded, augmented and normalised at once.

    The train, validation and test loaders yield ``(images uint8 [B, 3, H, W], labels int64 [B])``; under a
    Trainer, ``on_after_batch_transfer`` turns them into normalised float32 on the device. In a plain loop,
    call ``training_transform`` or ``evaluation_transform`` on the images. There are no worker processes.

    A subclass sets ``num_classes``, ``image_size``, ``mean``, ``std`` and implements ``read``.

    Args:
        augment: shift training images at random by up to ``padding`` pixels and, if ``flip``, mirror half of them.
        options: arguments of :class:`ImageDataModule`.

    Attributes:
        mean: mean of each colour in the training images, from 0 to 1.
        std: standard deviation of each colour.
        padding: the largest random shift, in pixels.
        flip: whether augmentation mirrors images.

    Raises:
        ValueError: if an argument is out of range.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 4
    flip: bool = True
    collate_fn = staticmethod(as_is)

    def __init__(self, *, augment: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.augment = augment
        self._calls = itertools.count()
        self.evaluation_transform = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        )

    def training_transform(self, images: Tensor) -> Tensor:
        """Augment uint8 images ``[B, 3, H, W]``, each in its own way, and normalise them to float32.

        The global seed, the number of batches trained so far and the rank fix the draws, so a resumed run draws
        as an uninterrupted one; without a Trainer the number of calls takes the place of the number of batches.
        """
        if not self.augment:
            return self.evaluation_transform(images)
        if self.trainer is None:
            batches, rank = next(self._calls), 0
        else:
            batches, rank = self.trainer.fit_loop.total_batch_idx + 1, self.trainer.global_rank
        generator = seeded_generator(torch.initial_seed(), AUGMENT_STREAM, batches, rank)
        return self.evaluation_transform(random_crop_flip(images, self.padding, self.flip, generator))

    def loader_transform(self, training: bool) -> Transform | None:
        """None: batches are transformed on the device."""
        return None

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Transform uint8 images on their device, with augmentation in training only; leave other images alone."""
        images, labels = batch
        if images.dtype is not torch.uint8:
            return batch
        trainer = self.trainer
        if trainer is None:
            return self.evaluation_transform(images), labels
        images = self.training_transform(images) if trainer.training else self.evaluation_transform(images)
        # Lightning casts inputs, for bf16-true and the like, before the transfer, when these were still uint8.
        return trainer.precision_plugin.convert_input(images), labels

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        # Lightning's advice to add workers does not apply: they would only copy what is in memory already.
        warnings.filterwarnings("ignore", ".*does not have many workers", PossibleUserWarning)
        return super()._loader(dataset, **kwargs)
