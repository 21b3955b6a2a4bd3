"""What all data modules share: the splits, the loaders, the probe, and batches augmented on the device."""

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

# One stream of random numbers for each use of a seed.
SPLIT_STREAM, PROBE_STREAM, LOADER_STREAM, AUGMENT_STREAM = range(4)


@dataclass(frozen=True, eq=False)
class _Training:
    """The training images with the indices that are trained on and those that are held out."""

    data: TensorImages | FileImages
    kept: Tensor
    held_out: Tensor


class ImageDataModule(L.LightningDataModule):
    """Splits, loaders and probe of a labelled image set; a subclass says how it is read and transformed.

    ``seed`` fixes which images are held out and the probe, and nothing else does. The order of training
    follows the global seed (``seed_everything``) and the epoch: runs that differ in the global seed differ in
    their order but share their splits, and a resumed run goes on in the order it would have had. No loader
    draws from the global random streams.

    Args:
        batch_size: images a batch, on each device.
        val_size: training images to hold out for validation, class by class: a number or a fraction below 1.
        seed: fixes the held-out images and the probe.

    Attributes:
        num_classes: the number of classes, known before anything is read.
        image_size: height and width of the network's input, in pixels.
        evaluation_transform: from uint8 images ``[…, 3, H, W]`` to normalised float32, with nothing random.

    Raises:
        ValueError: if an argument is out of range.
    """

    num_classes: int
    image_size: int
    evaluation_transform: Transform
    num_workers: int = 0
    collate_fn: Callable[[Any], Any] | None = None

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
        """What the training or evaluation loaders apply to their images; None leaves it to the device."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        """The K classes' names, in the order of their labels. Reads the training set if need be."""
        return self._split_training().data.class_names

    def setup(self, stage: str | None = None) -> None:
        """Read the images that ``stage`` needs: "fit", "validate", "test", or None for all."""
        if stage in ("fit", "validate", None):
            self._split_training()
        if stage in ("test", None):
            self._read_test()

    def train_dataloader(self) -> DataLoader:
        """Shuffled training images, in another order every epoch, without an incomplete last batch.

        Raises:
            ValueError: if the batch size leaves no whole batch.
        """
        training = self._split_training()
        dataset = self._subset(training.data, training.kept, self.loader_transform(training=True))
        if len(training.kept) < self.batch_size:
            raise ValueError(f"batch_size={self.batch_size}: there are only {len(training.kept)} training images.")
        # Loops with workers ask for the first batches before Lightning has announced a resumed run's epoch.
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
        """Training images to observe a network on: normalised float32 ``[B, 3, H, W]``, int64 labels ``[B]``.

        Not augmented, not shuffled, the same on every call, ready for a network without a Trainer. In every
        prefix, and in its even and its odd images, the classes' counts differ by one at most (until the
        smallest class is used up), so the first N images are a probe for any N.
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


def as_is(batch: Any) -> Any:
    """Return ``batch``: the ``collate_fn`` for a data set that slices whole batches."""
    return batch


class InMemoryDataModule(ImageDataModule):
    """A set of small images held in memory as uint8 and loaded, augmented and normalised a batch at a time.

    The train, validation and test loaders yield ``(images uint8 [B, 3, H, W], labels int64 [B])``; under a
    Trainer, ``on_after_batch_transfer`` turns them into normalised float32 on the device. In a plain loop,
    call ``training_transform`` or ``evaluation_transform`` on the images. There are no worker processes.

    A subclass sets ``num_classes``, ``image_size``, ``mean``, ``std`` and implements ``read``.

    Args:
        augment: shift training images at random by up to ``padding`` pixels and, if ``flip``, mirror half of them.
        options: those of :class:`ImageDataModule`.

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

        The draws are a function of the global seed, the number of batches trained so far and the rank, so
        that a resumed run makes those it would have made; without a Trainer, of the number of calls so far.
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

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Transform uint8 images on their device, augmenting in training only; leave other images alone."""
        images, labels = batch
        if images.dtype is not torch.uint8:
            return batch
        trainer = self.trainer
        if trainer is None:
            return self.evaluation_transform(images), labels
        images = self.training_transform(images) if trainer.training else self.evaluation_transform(images)
        # Lightning casts inputs for bf16-true and the like before the transfer, when these were still uint8.
        return trainer.precision_plugin.convert_input(images), labels

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        # Lightning's advice to add workers does not apply: they would only copy what is in memory already.
        warnings.filterwarnings("ignore", ".*does not have many workers", PossibleUserWarning)
        return super()._loader(dataset, **kwargs)
