"""DataLoaders read again: which items they give, and in which batches, without advancing anything of theirs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from types import ModuleType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from chanaxes_pl.core.errors import InputError, short
from chanaxes_pl.network.hooks import isolated_rng
from chanaxes_pl.network.lightning_twins import is_a

#: Seed of every fixed choice of images.
SEED = 0
_END = object()
_FEW = 100


def groups_of(loader: DataLoader) -> list[list[Any]]:
    """The items of a map-style data set in the batches that a loader makes of them, each item once.

    In its order, or sorted if it is random; those of all processes that share it.

    Raises:
        ValueError: if it reads a stream, or its items are batches.
    """
    if not reads_items(loader) or loader.batch_sampler is None:
        raise InputError(
            f"images are chosen, and shared by processes, by their index, which {short(loader)} does not go by: "
            "expected torch's own DataLoader of a map-style data set of images, or one process and evaluation_size=None"
        )
    if deals_singly(loader):
        return in_batches(items_of(loader)[0], loader.batch_sampler.batch_size)  # type: ignore[attr-defined]
    return own_groups(loader, len(loader.dataset))  # type: ignore[arg-type]


def some_of(loader: DataLoader, groups: list[list[Any]], size: int) -> list[list[Any]]:
    """A fixed random choice of ``size`` items of a loader's batches, in their order; all if there are fewer."""
    items = [item for group in groups for item in group]
    if size >= len(items):
        return groups
    return in_batches(chosen(items, size), loader.batch_sampler.batch_size if deals_singly(loader) else 1)  # type: ignore[union-attr]


def deals_singly(loader: DataLoader) -> bool:
    """Whether any images may go together in a batch; a batch sampler of the user's own may join those of one size."""
    return type(loader.batch_sampler) is BatchSampler


def in_batches(items: Any, at_once: int) -> list[Any]:
    """Cut items into batches, of which the last may be smaller."""
    return [items[start : start + at_once] for start in range(0, len(items), at_once)]


def chosen(items: list[Any], size: int) -> list[Any]:
    """A fixed random choice of ``size`` items, in their order; all if there are fewer."""
    return [items[place] for place in np.sort(shuffled(len(items))[:size])]


def shuffled(count: int) -> np.ndarray:
    """The numbers below ``count``, in a fixed random order."""
    return np.random.default_rng(SEED).permutation(count)


def own_groups(loader: DataLoader, most: int) -> list[list[Any]]:
    """The first batches of a user's own batch sampler, at most ``most``, each item once."""
    groups, _ = _drawn(_on_members(loader.batch_sampler, loader.dataset), loader.dataset, most)
    seen: set[Any] = set()
    groups = [[item for item in dict.fromkeys(group) if not (item in seen or seen.add(item))] for group in groups]
    return [group for group in groups if group]


def first_loader(loaders: Any) -> Any:
    """Return the first loader in lists and mappings of loaders, or ``None``."""
    if is_a(loaders, "CombinedLoader"):
        loaders = loaders.flattened
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return first_loader(loaders[0]) if loaders else None
    return loaders


class FixedDraws(Dataset):
    """A data set whose random transforms draw the same numbers for an item each time it is read.

    Args:
        data: a map-style data set; its transforms draw from the global generators of torch, NumPy and ``random``, or
            from their own.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self._generators = _generators_of(data)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        with _seeded(index if isinstance(index, int) else crc32(repr(index).encode()), self._generators):
            return self.data[index]


def again(loader: DataLoader, **changed: Any) -> DataLoader:
    """A loader like another one, over other items or in another order; no generator or worker is shared."""
    options: dict[str, Any] = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "timeout": loader.timeout,
        "prefetch_factor": loader.prefetch_factor,
        "generator": torch.Generator(),  # a loader without one draws its workers' seeds from the global stream
    }
    return DataLoader(**options | changed)


def reads_items(loader: DataLoader) -> bool:
    """Whether a loader reads items of a map-style data set in torch's own way."""
    return not isinstance(loader.dataset, IterableDataset) and type(loader).__iter__ is DataLoader.__iter__


@contextmanager
def _seeded(seed: int, generators: Iterable[Any] = ()) -> Iterator[None]:
    """Draw the same random numbers every time, and leave the global generators, and those given, as they were."""
    with isolated_rng(), ExitStack() as stack:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # transforms draw from the global generator
        random.seed(seed)
        for generator in generators:
            stack.callback(_seed(generator, seed))
        yield


def _seed(generator: Any, seed: int) -> Callable[[], Any]:
    """Seed a generator of torch, NumPy or ``random``; return what brings its state back."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        generator.manual_seed(seed)
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        known = generator.getstate()
        generator.seed(seed)
        return lambda: generator.setstate(known)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        generator.seed(seed % 2**32)
        return lambda: generator.set_state(legacy)
    bits = generator.bit_generator
    before = bits.state
    bits.state = type(bits)(seed).state
    return lambda: setattr(bits, "state", before)


def _generators_of(source: Any) -> list[Any]:
    """The generators of their own that a loader, its data set or their transforms hold.

    Lists and mappings of more than :data:`_FEW` items are taken for lists of images and not looked through.
    """
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    waiting = [source]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (str, bytes, Tensor, np.ndarray, type, ModuleType)):
            continue
        seen[id(value)] = value
        if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            found[id(value)] = value
        elif isinstance(value, Mapping):
            waiting += value.values() if len(value) <= _FEW else ()
        elif isinstance(value, (list, tuple, set)):
            waiting += value if len(value) <= _FEW else ()
        else:
            waiting += getattr(value, "__dict__", {}).values()
    return list(found.values())


def same_draws(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches whose making draws the same random numbers every time, also from generators that they hold."""
    generators = _generators_of(batches)
    with _seeded(SEED, generators):
        stream = iter(batches)
    for number in count(SEED):
        with _seeded(number, generators):
            batch = next(stream, _END)
        if batch is _END:
            return
        yield batch


def members_of(sampler: Any, data: Any) -> tuple[list[Any], bool]:
    """What a sampler gives, in its order, and whether that order is random: then all that may come up, sorted."""
    data = data.data if isinstance(data, FixedDraws) else data
    if type(sampler) is SequentialSampler or isinstance(sampler, RandomSampler):
        return list(range(len(sampler.data_source))), isinstance(sampler, RandomSampler)
    if isinstance(sampler, WeightedRandomSampler):
        return torch.as_tensor(sampler.weights).nonzero().flatten().tolist(), True
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(int(index) for index in sampler.indices), True
    if type(sampler) is DistributedSampler and sampler.dataset is data:
        return list(range(len(data))), sampler.shuffle
    return _drawn(sampler, data, len(data) if hasattr(data, "__len__") else 2**31)


def items_of(loader: Any) -> tuple[list[Any], bool]:
    """:func:`members_of` of a loader with torch's own batch sampler, whose sampler the loader need not have."""
    batches = loader.batch_sampler
    members, random_order = members_of(batches.sampler, loader.dataset)
    if batches.drop_last and not random_order:  # else any of them may be among those dropped
        members = members[: len(members) // batches.batch_size * batches.batch_size]
    return members, random_order


def _on_members(batches: Any, data: Any) -> Any:
    """A batch sampler over a fixed order of the items that its sampler gives, whatever number of processes share it."""
    if not isinstance(getattr(batches, "sampler", None), Sampler):
        return batches
    copied = _own_copy(batches, data)
    copied.sampler = members_of(batches.sampler, data)[0]
    return copied


def _drawn(sampler: Any, data: Any, limit: int) -> tuple[list[Any], bool]:
    """Draw from a sampler or a batch sampler of any class; its own generators and counters stay where they are.

    Args:
        sampler: the share of a distributed sampler is put together with those of the other processes.
        data: the data set that it draws from.
        limit: draws at most.
    """
    first, second = _draws(sampler, data, limit)
    if first == second:
        return first, False
    if any(isinstance(item, list) for item in first):  # random batches: those of a fixed seed
        return first, True
    members = {*first, *second}
    return (sorted(members) if all(isinstance(item, int) for item in members) else first), True


def _draws(sampler: Any, data: Any, limit: int) -> tuple[list[Any], list[Any]]:
    """Two draws of a sampler, with different random numbers."""
    if not isinstance(sampler, DistributedSampler):
        copied = _own_copy(sampler, data)
        return _once(copied, SEED, limit), _once(copied, SEED + 1, limit)
    shares = []
    for rank in range(sampler.num_replicas):
        copied = _own_copy(sampler, data)
        copied.rank = rank
        shares.append([_once(copied, seed, limit) for seed in (SEED, SEED + 1)])
    total = len(sampler.dataset)  # type: ignore[arg-type]  # beyond it, images repeat to make shares equal
    turns = [zip(*drawn, strict=True) for drawn in zip(*shares, strict=True)]
    first, second = ([item for turn in each for item in turn][:total] for each in turns)
    return first, second


def _once(sampler: Any, seed: int, limit: int) -> list[Any]:
    with _seeded(seed):
        return [_plain(item) for item in islice(sampler, limit)]


def _plain(item: Any) -> Any:
    if isinstance(item, (Tensor, np.ndarray, np.integer)):
        return item.tolist()
    return list(item) if isinstance(item, tuple) else item


def _own_copy(sampler: Any, data: Any) -> Any:
    """A sampler that may be iterated without a trace in the one it copies."""
    if isinstance(sampler, (list, tuple, range)):
        return sampler
    copied = copy.copy(sampler)
    for name, value in list(getattr(sampler, "__dict__", {}).items()):
        if isinstance(value, torch.Generator):
            setattr(copied, name, value.clone_state())
        elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
            setattr(copied, name, copy.deepcopy(value))
        elif isinstance(value, Sampler) or (isinstance(value, Dataset) and value is not data):
            setattr(copied, name, _own_copy(value, data))
    return copied
