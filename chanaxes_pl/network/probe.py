"""The probe set: a fixed set of images, the same at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset, SubsetRandomSampler

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, InputError

#: ``(module, batch) → (logits [B, K], labels [B])``.
Step = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]

MIN_IMAGES = 3
_BATCH = 128
_SEED = 0


def images_and_labels(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The default step: ``module(images)`` of a batch ``(images, labels)``.

    Raises:
        ValueError: if the batch is anything else, or the module gives no tensor.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
    if not pair:
        raise ValueError(
            f"the probe gave a batch that is {_describe(batch)}: expected (images, labels); "
            "for anything else pass step=(module, batch) → (logits, labels)"
        )
    images, labels = batch
    logits = module(images)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(module).__name__}.forward(images) gave {_describe(logits)}: expected logits [B, K]; "
            "for anything else pass step=(module, batch) → (logits, labels)"
        )
    return logits, labels


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(_describe(v) for v in value[:4])}"
    return f"of type {type(value).__name__}"


@dataclass(frozen=True)
class Placement:
    """Where a model runs, and which share of the work is this process's.

    Attributes:
        to_device: moves a batch to the model.
        forward_context: what a forward pass runs in, such as a precision plugin's.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: unless 0 ≤ rank < world.
    """

    to_device: Callable[[Any], Any]
    forward_context: Callable[[], AbstractContextManager] = nullcontext
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ArgumentError(f"rank={self.rank}, world={self.world}", "expected rank from 0 to world − 1")

    @classmethod
    def of(cls, model: nn.Module) -> Placement:
        """One process, on the device of the model's first parameter."""
        parameter = next(model.parameters(), torch.empty(0))
        return cls(partial(move_data_to_device, device=parameter.device))

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Placement:
        """That of a Trainer's modules."""
        return cls(
            trainer.strategy.batch_to_device,
            trainer.precision_plugin.forward_context,
            trainer.global_rank,
            trainer.world_size,
        )


class Probe:
    """The first ``size`` images of a loader, or ``size`` images of a data set, the same at every checkpoint.

    A DataLoader that does not shuffle is read in its own order; of a data set, or of a shuffling loader's,
    a fixed random subset is taken where it has more than ``size`` images. An iterable data set is read from its
    beginning, whole batches at a time, and has to yield the same images every time. Nothing is cached, and
    no global random number is drawn.

    Args:
        source: a map-style Dataset whose items are ``(image, label)``, or a DataLoader.
        size: N, images at most.

    Raises:
        TypeError: if ``source`` is neither.
        ValueError: if it holds fewer than 3 images.
    """

    def __init__(self, source: Dataset | DataLoader, size: int = 5000) -> None:
        if not isinstance(source, (DataLoader, Dataset)):
            raise ArgumentTypeError(f"probe={source!r}", "expected a Dataset or a DataLoader of (images, labels)")
        loader = source if isinstance(source, DataLoader) else DataLoader(source, batch_size=_BATCH)
        self._loader = loader
        self._size = size
        self._batch: int = getattr(loader.batch_sampler, "batch_size", 0)
        # A stream, or batches of no stated size, cannot be indexed: taken as they come.
        self._indexed = not isinstance(loader.dataset, IterableDataset) and self._batch > 0
        if self._indexed:
            sampler = getattr(loader.batch_sampler, "sampler", None)
            keep_order = isinstance(source, DataLoader) and isinstance(sampler, SequentialSampler)
            self._order = _fixed_order(_members(loader), size, keep_order)
            if len(self._order) < MIN_IMAGES:
                raise InputError(too_small(len(self._order)))

    @property
    def images(self) -> int | None:
        """How many; ``None`` for a stream, which does not tell."""
        return len(self._order) if self._indexed else None

    def sample(self, count: int = 64) -> Any:
        """A batch of images from all over the probe, or the first batch of a stream; read in this process."""
        if not self._indexed:
            return next(iter(self._loader), None)
        chosen = self._order[:: -(-len(self._order) // count)].tolist()
        few, generator = Subset(self._loader.dataset, chosen), torch.Generator()
        return next(iter(DataLoader(few, count, collate_fn=self._loader.collate_fn, generator=generator)))

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[np.ndarray, Any]]:
        """This process's share, as ``(indices [B] of the images in the probe, batch)``.

        Images are dealt out one by one, none twice, so that shares may be uneven and never repeat an image.

        Raises:
            ValueError: if the source cannot be shared between several processes.
        """
        if not self._indexed:
            if world > 1:
                raise ValueError(
                    f"a probe that streams cannot be shared by {world} processes: pass a map-style Dataset, "
                    "or a DataLoader of one with batch_size"
                )
            return self._streamed()
        if len(self._order) < world:
            raise ValueError(
                f"a probe of {len(self._order)} images for {world} processes: expected one image each at least"
            )
        return self._dealt(rank, world)

    def _dealt(self, rank: int, world: int) -> Iterator[tuple[np.ndarray, Any]]:
        indices = np.arange(rank, len(self._order), world)
        loader = self._loader
        size = self._batch
        share = DataLoader(
            Subset(loader.dataset, self._order[indices].tolist()),
            batch_size=size,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # a loader without one draws its workers' seeds from the global stream
        )
        for number, batch in enumerate(share):
            yield indices[number * size : (number + 1) * size], batch

    def _streamed(self) -> Iterator[tuple[np.ndarray, Any]]:
        seen = 0
        for batch in self._loader:
            if seen >= self._size:
                return
            images = extract_batch_size(batch)
            yield np.arange(seen, seen + images), batch
            seen += images


def find_probe(given: Dataset | DataLoader | None, trainer: Trainer) -> Dataset | DataLoader:
    """The images to probe a Trainer's model with.

    In this order: those given, the datamodule's ``probe_dataloader()``, the validation loader.

    Raises:
        ValueError: if there is none of these.
    """
    if given is not None:
        return given
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "probe_dataloader"):
        return datamodule.probe_dataloader()
    loaders = trainer.val_dataloaders
    if loaders is None and not trainer.testing:  # not set up yet where nothing was trained
        with suppress(MisconfigurationException):  # Lightning's error where there is no validation; ours says more
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
    if isinstance(loader, DataLoader):
        return loader
    raise InputError(
        "found no probe images: pass probe=a Dataset or DataLoader of labelled images, or give the datamodule a "
        "probe_dataloader(), or train with a validation loader (and limit_val_batches above 0)"
    )


def check_sizes(probe_size: int, evaluation_size: int | None = None) -> None:
    """Check how many images an experiment asks for.

    Raises:
        ValueError: if either is too few.
    """
    if probe_size < MIN_IMAGES:
        raise ArgumentError(f"probe_size={probe_size}", f"expected at least {MIN_IMAGES} images")
    if evaluation_size is not None and evaluation_size < 1:
        raise ArgumentError(f"evaluation_size={evaluation_size}", "expected at least 1 image, or None for all")


def too_small(images: int) -> str:
    """The error for a probe of too few images."""
    return (
        f"the probe holds {images} image{'' if images == 1 else 's'}, expected at least {MIN_IMAGES} "
        "(and some hundred for figures that mean something); pass a larger probe="
    )


def _members(loader: DataLoader) -> np.ndarray:
    """Indices into the data set that the loader draws from."""
    if isinstance(loader.sampler, SubsetRandomSampler):
        return np.sort(np.asarray(loader.sampler.indices))
    return np.arange(len(loader.dataset))  # type: ignore[arg-type]


def _fixed_order(members: np.ndarray, size: int, keep_order: bool) -> np.ndarray:
    if len(members) <= size or keep_order:
        return members[:size]
    return np.sort(np.random.default_rng(_SEED).permutation(members)[:size])


def image_batches(source: DataLoader | Dataset, count: int, place: Placement) -> list[Tensor]:
    """The images of a :class:`Probe` of at most ``count``, in its batches.

    Raises:
        ValueError: if a batch holds no images first, or an image is not finite.
    """
    batches, seen = [], 0
    for _, batch in Probe(source, count).batches():
        moved = place.to_device(batch)
        images = moved[0] if isinstance(moved, (tuple, list)) and moved else moved
        if not isinstance(images, Tensor) or images.ndim < 2:
            raise InputError(f"a batch of type {type(batch).__name__}: expected (images, labels), or images")
        bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise InputError(f"image {seen + int(bad[0])} of the probe holds NaN or infinity; leave it out")
        batches.append(images[: count - seen])
        seen += len(images)
    return batches
