"""The held-out split, the order of the probe and the order of an epoch, each a function of a seed."""

from collections.abc import Iterator, Sized

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler


def seeded_generator(*words: int) -> torch.Generator:
    """A CPU generator seeded by non-negative ``words``; the global random streams stay as they are.

    The words are mixed first, so that neighbouring seeds, epochs or ranks give unrelated streams.
    """
    (mixed,) = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed))


def check_val_size(val_size: int | float) -> None:
    """Raise unless ``val_size`` is a count of images (int ≥ 0) or a fraction (float in [0, 1))."""
    if val_size < 0 or (isinstance(val_size, float) and not val_size < 1):
        raise ValueError(f"val_size={val_size!r}: expected an int ≥ 0 (images) or a float in [0, 1) (a fraction).")


def held_out_count(val_size: int | float, total: int) -> int:
    """The number of images out of ``total`` that ``val_size`` holds out.

    Raises:
        ValueError: if ``val_size`` is out of range or leaves nothing to train on.

    Example:
        >>> held_out_count(5000, 50_000), held_out_count(0.25, 60)
        (5000, 15)
    """
    check_val_size(val_size)
    count = round(val_size * total) if isinstance(val_size, float) else val_size
    if count >= total:
        raise ValueError(f"val_size={val_size!r} holds out {count} of {total} images: none is left to train on.")
    return count


def stratified_split(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hold ``count`` images out, every class in proportion to its size.

    Args:
        labels: ``[N]`` int64, the class of each image.
        count: the exact number of images to hold out; the classes with the largest remainders round up.
        generator: chooses which images of a class are held out.

    Returns:
        The kept and the held-out indices, ``[N - count]`` and ``[count]``, ascending.
    """
    exact = torch.bincount(labels).double() * count / max(len(labels), 1)
    quota = exact.floor().long()
    largest = torch.argsort(exact - quota, descending=True, stable=True)
    quota[largest[: count - int(quota.sum())]] += 1
    held_out = _ranks_within_class(labels, generator) < quota[labels]
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Order all images so that every prefix, and its even and odd positions, hold all classes equally often.

    The order goes through the classes in rounds, with one image from each. With an odd number of classes, a class
    alternates between even and odd positions; with an even number, neighbouring classes swap positions in every
    other round to the same effect. Counts then differ by at most one, until the smallest class is used up.

    Args:
        labels: ``[N]`` int64, the class of each image.
        generator: chooses the order of the images within their class.

    Returns:
        ``[N]`` int64, a permutation of the images' indices.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> labels[balanced_order(labels, seeded_generator(0))].tolist()
        [0, 1, 1, 0, 0, 1, 1, 0]
    """
    classes = int(labels.max()) + 1
    rounds = _ranks_within_class(labels, generator)
    place = labels ^ (rounds & 1) if classes % 2 == 0 else labels
    return torch.argsort(rounds * classes + place)


def _ranks_within_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """``[N]`` int64: the position of each image in a random order of its class, from 0."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    sizes = torch.bincount(labels)
    first = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return ranks


class EpochSampler(RandomSampler):
    """A shuffle fixed by seed and epoch, so that a resumed run continues in the order of an uninterrupted one.

    It is a ``RandomSampler`` because this tells Lightning to shuffle when it puts its distributed sampler in place.
    Lightning calls ``set_epoch``; in a plain loop, each iteration is the next epoch.

    Args:
        data_source: the data set; only its length is used.
        seed: any non-negative number.
        epoch: the epoch of the first iteration.
    """

    def __init__(self, data_source: Sized, seed: int, epoch: int = 0) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = seeded_generator(self.seed, self.epoch)
        self.epoch += 1
        return iter(torch.randperm(len(self.data_source), generator=generator).tolist())
