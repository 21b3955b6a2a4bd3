"""Which images a probe takes, in which order, and that nothing of the user's is advanced."""

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from chanaxes_pl.network.probe import FixedDraws, Probe, find_probe
from tests.helpers.training import QUIET, build

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

N = 50
DATA = TensorDataset(torch.arange(N), torch.zeros(N, dtype=torch.long))
FOLD = [40, 3, 17, 8, 29, 11]


def taken(source, size: int = 5000, rank: int = 0, world: int = 1) -> list[int]:
    """The images that a probe gives, which are their own indices."""
    return [int(i) for _, batch in Probe(source, size).batches(rank, world) for i in batch[0]]


def placed(source, rank: int, world: int) -> dict[int, int]:
    """Index in the probe → image, of one process."""
    return {
        int(place): int(image)
        for places, batch in Probe(source).batches(rank, world)
        for place, image in zip(places, batch[0], strict=True)
    }


class InOrder(Sampler):
    def __iter__(self):
        return iter(FOLD)

    def __len__(self):
        return len(FOLD)


class Shuffled(InOrder):
    def __init__(self, kind: str) -> None:
        self.rounds = 0
        self.own = torch.Generator().manual_seed(4)
        self.numpy = np.random.default_rng(4)
        self.kind = kind

    def __iter__(self):
        self.rounds += 1
        draw = {
            "own": lambda: torch.randperm(len(FOLD), generator=self.own),
            "global": lambda: torch.randperm(len(FOLD)),
            "numpy": lambda: self.numpy.permutation(len(FOLD)),
            "python": lambda: random.sample(range(len(FOLD)), len(FOLD)),
        }
        return (FOLD[int(place)] for place in draw[self.kind]())


class Buckets:
    """A batch sampler of its own class, whose batches have to stay together."""

    def __iter__(self):
        return iter([[1, 2, 3], [10, 11], [20, 21, 22, 23]])

    def __len__(self):
        return 3


def test_a_sampler_of_any_class_is_read_in_its_order():
    assert taken(DataLoader(DATA, 4, sampler=InOrder())) == FOLD
    assert taken(DataLoader(DATA, 4, sampler=FOLD)) == FOLD  # type: ignore[arg-type]
    assert taken(DataLoader(DATA, 4, sampler=InOrder()), 4) == FOLD[:4]


@pytest.mark.parametrize("kind", ["own", "global", "numpy", "python"])
def test_a_sampler_that_shuffles_gives_its_members_and_is_not_advanced(kind):
    sampler = Shuffled(kind)
    states = sampler.own.get_state(), str(sampler.numpy.bit_generator.state), torch.get_rng_state(), random.getstate()
    for _ in range(2):
        assert taken(DataLoader(DATA, 4, sampler=sampler)) == sorted(FOLD)
    assert sampler.rounds == 0
    assert torch.equal(sampler.own.get_state(), states[0])
    assert str(sampler.numpy.bit_generator.state) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert random.getstate() == states[3]


def test_a_weighted_sampler_gives_only_what_it_may_draw():
    weights = [float(index in FOLD) for index in range(N)]
    drawn = taken(DataLoader(DATA, 4, sampler=WeightedRandomSampler(weights, 200)))
    assert drawn == sorted(FOLD)


def test_batches_of_a_batch_sampler_stay_together():
    for sampler in (Buckets(), [[1, 2, 3], [10, 11], [20, 21, 22, 23]]):
        batches = [batch[0].tolist() for _, batch in Probe(DataLoader(DATA, batch_sampler=sampler)).batches()]
        assert batches == [[1, 2, 3], [10, 11], [20, 21, 22, 23]]
    assert taken(DataLoader(DATA, batch_sampler=Buckets()), 4) == [1, 2, 3, 10, 11]
    shares = [taken(DataLoader(DATA, batch_sampler=Buckets()), rank=rank, world=2) for rank in range(2)]
    assert shares == [[1, 2, 3, 20, 21, 22, 23], [10, 11]]
    with pytest.raises(ValueError, match="a probe of 3 batches for 4 processes: expected one for each at least"):
        Probe(DataLoader(DATA, batch_sampler=Buckets())).batches(0, 4)


@pytest.mark.parametrize("sampler", [SubsetRandomSampler(FOLD), InOrder(), Shuffled("global"), Shuffled("own"), None])
def test_what_lightning_hands_to_two_processes_gives_what_one_process_gives(sampler):
    one = placed(DataLoader(DATA, 4, sampler=sampler), 0, 1)
    both = {}
    for rank in range(2):
        if sampler is None:
            shared = DistributedSampler(DATA, 2, rank, shuffle=False)
        else:
            shared = DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank, shuffle=False)
        both |= placed(DataLoader(DATA, 4, sampler=shared), rank, 2)
    assert both == one


def test_any_iterable_of_batches_is_a_probe():
    batches = [[torch.arange(3), torch.zeros(3)], [torch.arange(3, 8), torch.zeros(5)]]
    combined = CombinedLoader([DataLoader(DATA, 4), DataLoader(DATA, 8)], "sequential")
    assert taken(batches) == taken(lambda: iter(batches)) == list(range(8))
    assert taken(batches, 2) == [0, 1, 2]
    assert taken(combined) == list(range(N))
    assert [taken(batches, rank=rank, world=2) for rank in range(2)] == [[0, 1, 2], [3, 4, 5, 6, 7]]
    with pytest.raises(ValueError, match="a probe of 2 batches for 3 processes"):
        taken(batches, rank=0, world=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, r"probe=3: expected a Dataset, a DataLoader, or an iterable of batches \(images, labels\)"),
        ({"a": 1}, r"probe=\{'a': 1\}: expected a Dataset"),
        (iter([1]), "an iterator gives them once: pass a list, or the generator function itself, without calling it"),
    ],
)
def test_what_gives_no_batches_or_only_once_is_refused(source, message):
    with pytest.raises(TypeError, match=message):
        Probe(source)


class Noisy(Dataset):
    """Every reading of an image draws from three global generators."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()), np.random.rand(), random.random(), index]), 0  # noqa: NPY002


class Stream(IterableDataset):
    def __iter__(self):
        return (Noisy()[index] for index in range(N))


@pytest.mark.parametrize("source", [Noisy(), DataLoader(Noisy(), 7), DataLoader(Stream(), 7), FixedDraws(Noisy())])
def test_random_transforms_draw_the_same_numbers_every_time_and_none_of_the_trainings(source):
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    first, second = (torch.cat([batch[0] for _, batch in Probe(source).batches()]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first[:, 0].unique()) == N
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_an_image_of_fixed_draws_is_the_same_in_any_order_and_process():
    data = FixedDraws(Noisy())
    alone = data[7][0]
    assert torch.equal(torch.cat([data[3][0], data[7][0]])[4:], alone)
    shares = [batch[0] for rank in range(2) for _, batch in Probe(DataLoader(data, 5)).batches(rank, 2)]
    assert (torch.cat(shares) == alone).all(1).sum() == 1


def trainer() -> L.Trainer:
    return L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")


def test_a_trainer_is_searched_for_images_in_a_fixed_order():
    fitter, loader, other = trainer(), DataLoader(DATA, 4), DataLoader(DATA, 8)
    fitter.strategy.connect(build())
    assert find_probe(DATA, fitter) is DATA
    fitter.fit_loop.epoch_loop.val_loop._combined_loader = CombinedLoader({"a": [loader, other]}, "sequential")
    assert find_probe(None, fitter) is loader
    fitter.datamodule = type("Data", (), {"probe_dataloader": lambda self: other})()  # type: ignore[attr-defined]
    assert find_probe(None, fitter) is other
