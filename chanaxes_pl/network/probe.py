"""The probe set: a fixed set of images, the same at every measurement."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
)

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, InputError, is_whole, short
from chanaxes_pl.core.targets import describe
from chanaxes_pl.network.batches import FAILURES, Placement, split_batch
from chanaxes_pl.network.hooks import isolated_rng
from chanaxes_pl.network.lightning_twins import is_a, overrides
from chanaxes_pl.network.loaders import (
    FixedDraws,
    again,
    chosen,
    deals_singly,
    first_loader,
    in_batches,
    items_of,
    members_of,
    own_groups,
    reads_items,
    same_draws,
    shuffled,
)

#: A data set, or anything that gives batches each time it is iterated (or called).
ProbeSource = Dataset | DataLoader | Iterable[Any] | Callable[[], Iterable[Any]]

MIN_IMAGES = 3
_BATCH = 128
# Iterable, but their items are no batches.
_NO_BATCHES = (str, bytes, Mapping, Tensor)


class Probe:
    """The first ``size`` images that a loader gives, or ``size`` images of a data set, the same at every measurement.

    A DataLoader is read in its own order, whatever sampler, batch sampler and collate function it has. Where it
    shuffles, and of a data set, all images are taken that may come up: a fixed random subset of them, if there are more
    than ``size``. Anything else that gives batches is read from its beginning, whole batches at a time, and has to give
    the same images every time. Random transforms draw the same numbers every time, also from generators that they or
    the data set hold. Nothing is cached, no global random number is drawn, and no sampler or generator of the loader's
    own is advanced. What else a data set changes when it is read, such as a counter, stays changed.

    Args:
        source: a map-style Dataset whose items are ``(image, label)``; a DataLoader; a list or another iterable of
            batches; a function that returns one, such as a generator function.
        size: N, images at most.
        mixed: whether the images are put in a fixed random order, so that neighbours in a data set come in different
            batches; those of an iterable or of the user's own batches stay together.

    Raises:
        TypeError: if ``source`` is none of these, or can be iterated only once.
        ValueError: if it holds fewer than 3 images.
    """

    def __init__(self, source: ProbeSource, size: int = 5000, mixed: bool = False) -> None:
        if is_a(source, "CombinedLoader"):
            source = first_loader(source)
        self._source = source
        self._size = size
        self._mixed = mixed
        self._groups: list[list[Any]] | None = None
        self._dealt_singly = False
        if isinstance(source, (DataLoader, Dataset)):
            shuffles = not isinstance(source, DataLoader)
            loader = DataLoader(source, _BATCH) if shuffles else source
            self._source = loader
            if loader.batch_sampler is not None and reads_items(loader):
                self._plan(loader, shuffles)
        elif isinstance(source, _NO_BATCHES) or not (isinstance(source, Iterable) or callable(source)):
            raise ArgumentTypeError(
                f"probe={short(source)}",
                "expected a Dataset, a DataLoader, or an iterable of batches (images, labels)",
            )
        elif _is_pair(source):
            raise ArgumentTypeError(
                f"probe={describe(source)}",
                "expected a Dataset, a DataLoader, or an iterable of batches; images and labels are one batch, "
                "[(images, labels)], or TensorDataset(images, labels)",
            )
        elif isinstance(source, Iterator):
            raise ArgumentTypeError(
                f"probe={short(source)}",
                "expected batches that can be read at every measurement, and an iterator gives them once: pass a list, "
                "or the generator function itself, without calling it",
            )

    def _plan(self, loader: DataLoader, shuffles: bool) -> None:
        """Fix which items of the data set make up the probe, and in which batches."""
        self._dealt_singly = deals_singly(loader)
        if self._dealt_singly:
            batches: Any = loader.batch_sampler
            items, random_order = items_of(loader)
            items = chosen(items, self._size) if shuffles or random_order else items[: self._size]
            size = batches.batch_size
            if batches.drop_last and len(items) >= size:  # the model may know no smaller batches
                items = items[: len(items) // size * size]
            if self._mixed:
                items = [items[place] for place in shuffled(len(items))]
            self._groups = in_batches(items, size)
        else:  # its batches may belong together, for example images of one size
            groups = own_groups(loader, self._size)
            ends = np.cumsum([len(group) for group in groups])
            self._groups = groups[: int(np.searchsorted(ends, self._size)) + 1]
        self._images = sum(map(len, self._groups))
        if self._images < MIN_IMAGES:
            raise InputError(too_small(self._images))

    @property
    def images(self) -> int | None:
        """Number of images; ``None`` for a stream, which does not tell."""
        return None if self._groups is None else self._images

    @property
    def _items(self) -> list[Any]:
        """The items of all batches, in order."""
        return [item for group in self._groups or () for item in group]

    def sample(self, size: int = 64) -> list[Any]:
        """Batches of some images from all over the probe, or the first batch of a stream; read in this process."""
        if self._groups is None:
            return [batch for _, batch in islice(self._streamed(0, 1), 1)]
        groups = self._groups[:1]
        if self._dealt_singly:
            groups = in_batches(self._items[:: -(-self._images // size)], len(self._groups[0]))
        source: Any = self._source
        here = {"num_workers": 0, "prefetch_factor": None, "multiprocessing_context": None, "timeout": 0}
        return list(same_draws(again(source, batch_sampler=groups, **here)))

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[np.ndarray, Any]]:
        """This process's share, as ``(indices [B] of the images in the probe, batch)``.

        Images are dealt out one by one, or where a loader's batch sampler is not torch's own batch by batch; none comes
        twice, so that shares may be uneven.

        Raises:
            ValueError: if the source cannot be shared between several processes.
        """
        if self._groups is None:
            if world > 1 and isinstance(self._source, DataLoader):
                raise InputError(
                    f"a probe that streams cannot be shared by {world} processes: pass a map-style Dataset, "
                    "or a DataLoader of one with batch_size"
                )
            return self._streamed(rank, world)
        shares = self._images if self._dealt_singly else len(self._groups)
        if shares < world:
            unit = "images" if self._dealt_singly else "batches"
            raise InputError(f"a probe of {shares} {unit} for {world} processes: expected one for each at least")
        return self._dealt(rank, world)

    def _dealt(self, rank: int, world: int) -> Iterator[tuple[np.ndarray, Any]]:
        assert self._groups is not None
        starts = np.cumsum([0, *map(len, self._groups)])
        if self._dealt_singly:
            items = self._items
            share = in_batches(np.arange(rank, self._images, world), len(self._groups[0]))
            groups = [[items[index] for index in part] for part in share]
        else:
            groups = self._groups[rank::world]
            share = [np.arange(a, a + len(g)) for a, g in zip(starts[rank::world], groups, strict=False)]
        source: Any = self._source
        yield from zip(share, same_draws(again(source, batch_sampler=groups)), strict=True)

    def _streamed(self, rank: int, world: int) -> Iterator[tuple[np.ndarray, Any]]:
        source: Any = self._source
        if isinstance(source, DataLoader) and reads_items(source):  # each of which is a batch
            source = again(source, batch_size=None, sampler=members_of(source.sampler, source.dataset)[0])
        elif isinstance(source, DataLoader) and type(source).__iter__ is DataLoader.__iter__:
            source = again(source, batch_size=source.batch_size, drop_last=source.drop_last)
        elif callable(source) and not isinstance(source, Iterable):
            source = source()
        seen = dealt = 0
        for batch in same_draws(source):
            if seen >= self._size:
                break
            images = _count(batch)
            if dealt % world == rank:
                yield np.arange(seen, seen + images), batch
            seen, dealt = seen + images, dealt + 1
        if dealt < world > 1:
            raise InputError(f"a probe of {dealt} batches for {world} processes: expected one for each at least")


def _is_pair(source: object) -> bool:
    """Whether this is one batch of images and labels, and not two batches of images."""
    if not isinstance(source, tuple) or len(source) != 2:
        return False
    images, labels = source
    return isinstance(images, Tensor) and isinstance(labels, Tensor) and images.ndim != labels.ndim


def check_rereadable(batches: Iterable[Any], name: str) -> None:
    """Raise TypeError for batches that can be read only once."""
    if isinstance(batches, Iterator):
        raise ArgumentTypeError(
            f"{name}={short(batches)}",
            "expected batches that can be read again, and an iterator gives them once: pass a list or a DataLoader",
        )


def find_probe(given: ProbeSource | None, trainer: Trainer) -> ProbeSource:
    """Find the images to probe a Trainer's model with.

    The first there is of: the images given, the datamodule's ``probe_dataloader()``, the first
    validation loader, and with a warning the first training loader's data set. Of the latter two a fixed random subset
    is taken where they hold more images than the probe, for the first of them may be of few classes.

    Raises:
        ValueError: if there is none of these.
    """
    if given is not None:
        return given
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "probe_dataloader"):
        with isolated_rng():  # without a tracker nobody calls it
            return datamodule.probe_dataloader()
    loaders = trainer.val_dataloaders
    if loaders is None and not trainer.testing:  # not set up yet where nothing was trained
        loaders = _validation_loaders(trainer)
    if loaders is None and trainer.testing and datamodule is not None and overrides(datamodule, "val_dataloader"):
        with isolated_rng():  # nothing was trained
            try:
                loaders = datamodule.val_dataloader()
            except FAILURES:  # many make their validation set in this setup alone
                datamodule.setup("fit")
                loaders = datamodule.val_dataloader()
    loader = first_loader(loaders)
    if loader is not None:
        return _in_random_order(loader)
    loader = first_loader(trainer.train_dataloader)
    if loader is None:
        raise InputError(
            "found no probe images: pass probe=a Dataset or DataLoader of labelled images, or give the datamodule a "
            "probe_dataloader(), or train with a validation loader (and limit_val_batches above 0)"
        )
    warnings.warn(
        "there is no validation (no loader, no validation_step, or limit_val_batches=0), so the axes are measured on "
        "training images, with their random transforms under a fixed seed. For images that were not trained on, "
        "without augmentation, pass probe=a DataLoader, or give the datamodule a probe_dataloader()",
        stacklevel=2,
    )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    data = FixedDraws(loader.dataset)
    if loader.batch_sampler is None:
        return again(loader, dataset=data, batch_size=None, sampler=loader.sampler)
    return again(loader, dataset=data, batch_sampler=loader.batch_sampler)


def _validation_loaders(trainer: Trainer) -> Any:
    """The Trainer's validation loaders before it needs them, if there are any; it makes its own when it does."""
    module: Any = trainer.lightning_module
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    hook, reloaded = module._current_fx_name, loop._last_val_dl_reload_epoch
    try:
        with suppress(*_misconfigured()), isolated_rng():  # Lightning's error where there is none; ours says more
            loop.setup_data()
        return trainer.val_dataloaders
    finally:
        loop._combined_loader, loop._last_val_dl_reload_epoch = None, reloaded
        module._current_fx_name = hook  # which that error leaves, so that whoever logs next could not


def _misconfigured() -> list[type[Exception]]:
    """Lightning's error, and its twin in the package named pytorch_lightning where that is in use."""
    twin = sys.modules.get("lightning_fabric.utilities.exceptions")
    return [MisconfigurationException, *([twin.MisconfigurationException] if twin else [])]


def _in_random_order(loader: Any) -> Any:
    """A loader whose order is that of its data set, as one that shuffles; any other as it is."""
    if not isinstance(loader, DataLoader) or not reads_items(loader) or not deals_singly(loader):
        return loader
    batches: Any = loader.batch_sampler
    sampler, size = batches.sampler, batches.batch_size
    distributed = type(sampler) is DistributedSampler and sampler.dataset is loader.dataset and not sampler.shuffle
    if not distributed and type(sampler) is not SequentialSampler:
        return loader
    return again(loader, batch_size=size, sampler=SubsetRandomSampler(items_of(loader)[0]))


def check_sizes(probe_size: int, evaluation_size: int | None = None) -> None:
    """Check how many images an experiment asks for.

    Raises:
        ValueError: if either is too few.
    """
    if not is_whole(probe_size, MIN_IMAGES):
        raise ArgumentError(f"probe_size={short(probe_size)}", f"expected at least {MIN_IMAGES} images")
    if evaluation_size is not None and not is_whole(evaluation_size, 1):
        raise ArgumentError(f"evaluation_size={short(evaluation_size)}", "expected at least 1 image, or None for all")


def too_small(images: int) -> str:
    """The error for a probe of too few images."""
    return (
        f"the probe holds {images} image{'' if images == 1 else 's'}, expected at least {MIN_IMAGES} "
        "(and some hundred for figures that mean something); pass a larger probe="
    )


def _count(batch: Any) -> int:
    """Images in a batch."""
    try:
        images, labels = split_batch(batch)
    except InputError:  # a step of the user's reads it
        images = labels = None
    for part in (images, labels):
        if isinstance(part, Tensor) and part.ndim:
            return len(part)
    for part in (labels, images):  # a list of images may also be one of views, each of all images
        if isinstance(part, (list, tuple)):
            return len(part)
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:  # Lightning's error speaks of logging
        raise InputError(f"a batch is {describe(batch)}: expected (images, labels), as tensors") from None


class ImageBatches:
    """The images of a :class:`Probe`, in its batches ``[B, …]``, read anew whenever they are iterated.

    Args:
        source: as for :class:`Probe`.
        count: images at most.
        place: device of the model.
        images_of: function from a batch to its images; default the first result of :func:`split_batch`.
        mixed: as for :class:`Probe`.

    Attributes:
        images: number of images, once all have been read.

    Raises:
        ValueError: while they are read, if a batch's images are not found or no tensor, an image is not finite, or
            there is none.
    """

    def __init__(
        self,
        source: ProbeSource,
        count: int,
        place: Placement,
        images_of: Callable[[Any], Any] | None = None,
        mixed: bool = False,
    ) -> None:
        self._probe, self._count, self._place, self._images_of = Probe(source, count, mixed), count, place, images_of
        self.images = 0

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        for _, batch in self._probe.batches():
            moved = self._place.to_device(batch)
            images = split_batch(moved)[0] if self._images_of is None else self._images_of(moved)
            if not isinstance(images, Tensor) or images.ndim < 2:
                raise InputError(f"the images of a batch are {describe(images)}: expected a tensor [B, C, …]")
            bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten()
            if len(bad):
                raise InputError(f"image {seen + int(bad[0])} of the probe holds NaN or infinity; leave it out")
            yield images[: self._count - seen]
            seen = min(seen + len(images), self._count)
            if seen == self._count:  # a step may make several images of an item
                break
        if not seen:
            raise InputError("the probe holds no images; pass a larger probe=")
        self.images = seen

    def within(self, size: float) -> list[Tensor] | ImageBatches:
        """A list of the batches if their images take at most ``size`` bytes, else the batches read anew each time.

        All are read, and checked.
        """
        held: list[Tensor] | None = []
        total = 0
        for images in self:
            total += images.nbytes
            if held is not None:
                held = [*held, images] if total <= size else None
        return self if held is None else held
