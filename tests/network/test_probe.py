"""Which images a probe holds, in which order; that reading it leaves no trace; where a Trainer's probe comes from."""

import itertools
import random
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from chanaxes_pl.network.batches import Placement
from chanaxes_pl.network.loaders import FixedDraws
from chanaxes_pl.network.probe import ImageBatches, Probe, find_probe, too_small
from tests.helpers.training import QUIET, build, images, loaders, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
COUNT = 24
EVEN = list(range(0, COUNT, 2))


class Numbers(Dataset):
    """Item i is an image of i, and its label."""

    def __init__(self, count: int = COUNT, noisy: bool = False) -> None:
        self.count, self.noisy = count, noisy

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        drawn = torch.rand(1) + np.random.rand() + random.random() if self.noisy else torch.zeros(1)  # noqa: NPY002
        return torch.full((1,), float(index)) + drawn.float() / 4, index % 3


class Keyed(Numbers):
    """Its items have names."""

    def __getitem__(self, name):
        return super().__getitem__(int(name.removeprefix("item ")))


class Stream(IterableDataset):
    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __iter__(self):
        return iter(Numbers(self.count)[index] for index in range(self.count))


class Batches:
    """A loader of one's own."""

    def __iter__(self):
        return iter(of_batches())


class Ordered(Sampler):
    """Gives these items, and counts how often it is asked."""

    def __init__(self, order):
        self.order, self.asked = order, 0

    def __iter__(self):
        self.asked += 1
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class Shuffled(Ordered):
    """In an order drawn from a source of its own, or from a global one."""

    def __init__(self, order, source):
        super().__init__(order)
        self.source = source

    def __iter__(self):
        if self.source == "torch":
            return iter([self.order[place] for place in torch.randperm(len(self.order)).tolist()])
        if self.source == "random":
            return iter(random.sample(self.order, len(self.order)))
        if isinstance(self.source, torch.Generator):
            return iter([self.order[i] for i in torch.randperm(len(self.order), generator=self.source).tolist()])
        if isinstance(self.source, random.Random):
            return iter(self.source.sample(self.order, len(self.order)))
        return iter(self.source.permutation(self.order).tolist())


class Wrapping(Sampler):
    """Gives what another sampler gives, backwards."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return reversed(list(self.inner))


class Counting(Sampler):
    """Another half of the items in every epoch: has a state of plain numbers."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(range(self.epoch % 2, COUNT, 2))


class Buckets(BatchSampler):
    """Batches of its own making."""

    def __init__(self, groups):
        self.groups = groups

    def __iter__(self):
        return iter(self.groups)

    def __len__(self):
        return len(self.groups)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def by(sampler, batch_size=5, **options):
    return lambda: DataLoader(Numbers(), batch_size=batch_size, sampler=sampler(), **options)


def by_batches(sampler):
    return lambda: DataLoader(Numbers(), batch_sampler=sampler())


REVERSED = list(range(COUNT - 1, -1, -1))
GROUPS = [[0, 9, 3], [20], [4, 6, 8, 10], [7, 1]]
TORN = [item for group in GROUPS for item in group]

# Sampler → which images, in which order.
SAMPLERS = {
    "in order": (by(lambda: None), list(range(COUNT))),
    "in order, the last dropped": (by(lambda: None, drop_last=True), list(range(20))),
    "shuffled, the last dropped": (by(lambda: None, drop_last=True, shuffle=True), list(range(20))),
    "SequentialSampler": (by(lambda: SequentialSampler(range(COUNT))), list(range(COUNT))),
    "shuffled": (by(lambda: None, shuffle=True), list(range(COUNT))),
    "shuffled by a generator": (by(lambda: RandomSampler(range(COUNT), generator=generator())), list(range(COUNT))),
    "some of them at random": (by(lambda: RandomSampler(range(COUNT), num_samples=6)), list(range(COUNT))),
    "SubsetRandomSampler": (by(lambda: SubsetRandomSampler(EVEN, generator())), EVEN),
    "SubsetRandomSampler of a tensor": (by(lambda: SubsetRandomSampler(torch.tensor([7, 5, 2]))), [2, 5, 7]),
    "WeightedRandomSampler": (by(lambda: WeightedRandomSampler([0, 0, 1, 1, 1] + 19 * [0], 99)), [2, 3, 4]),
    "DistributedSampler": (by(lambda: DistributedSampler(Numbers(), 2, 1, shuffle=False)), list(range(COUNT))),
    "a list": (by(lambda: [9, 4, 17, 0]), [9, 4, 17, 0]),
    "a tuple": (by(lambda: (9, 4, 17, 0)), [9, 4, 17, 0]),
    "a range": (by(lambda: range(3, 9)), [3, 4, 5, 6, 7, 8]),
    "own, in order": (by(lambda: Ordered(REVERSED)), REVERSED),
    "own, of tensors": (by(lambda: Ordered([torch.tensor(6), torch.tensor(3), torch.tensor(8)])), [6, 3, 8]),
    "own, of NumPy's": (by(lambda: Ordered(list(np.array([6, 3, 8])))), [6, 3, 8]),
    "own, torch": (by(lambda: Shuffled(EVEN, "torch")), EVEN),
    "own, random": (by(lambda: Shuffled(EVEN, "random")), EVEN),
    "own, a generator": (by(lambda: Shuffled(EVEN, generator())), EVEN),
    "own, random's generator": (by(lambda: Shuffled(EVEN, random.Random(3))), EVEN),
    "own, NumPy's generator": (by(lambda: Shuffled(EVEN, np.random.default_rng(3))), EVEN),
    "own around another": (by(lambda: Wrapping(Ordered(EVEN))), EVEN[::-1]),
    "own around a random one": (by(lambda: Wrapping(SubsetRandomSampler(EVEN, generator()))), EVEN),
    "own that counts": (by(Counting), list(range(COUNT))),
    "batches of a list": (by_batches(lambda: GROUPS), TORN),
    "batches of a class": (by_batches(lambda: Buckets(GROUPS)), TORN),
    "batches of tuples": (by_batches(lambda: [tuple(group) for group in GROUPS]), TORN),
    "torch's batches of a sampler": (by_batches(lambda: BatchSampler(Ordered(REVERSED), 7, False)), REVERSED),
    "torch's batches of a random one": (by_batches(lambda: BatchSampler(SubsetRandomSampler(EVEN), 7, False)), EVEN),
    "a Subset": (lambda: DataLoader(Subset(Numbers(), [5, 3, 1]), 2), [5, 3, 1]),
    "a ConcatDataset": (lambda: DataLoader(ConcatDataset([Numbers(3), Numbers(2)]), 2), [0, 1, 2, 0, 1]),
    "items one by one": (lambda: DataLoader(Numbers(), 1), list(range(COUNT))),
    "whole batches as items": (lambda: DataLoader(of_batches(), batch_size=None), list(range(COUNT))),
    "whole batches, shuffled": (lambda: DataLoader(of_batches(), batch_size=None, shuffle=True), list(range(COUNT))),
    "a stream": (lambda: DataLoader(Stream(), 5), list(range(COUNT))),
    "a stream, the last dropped": (lambda: DataLoader(Stream(), 5, drop_last=True), list(range(20))),
    "a list of batches": (lambda: of_batches(), list(range(COUNT))),
    "a function": (lambda: lambda: iter(of_batches()), list(range(COUNT))),
    "a data set": (Numbers, list(range(COUNT))),
    "workers": (by(lambda: Shuffled(EVEN, "torch"), num_workers=1), EVEN),
}


def of_batches() -> list:
    return [default_collate([Numbers()[index] for index in range(a, a + 4)]) for a in range(0, COUNT, 4)]


def read(probe: Probe, rank: int = 0, world: int = 1) -> tuple[list[int], list[int]]:
    """Indices in the probe, and items."""
    parts = [(indices.tolist(), batch[0][:, 0].tolist()) for indices, batch in probe.batches(rank, world)]
    assert all(len(indices) == len(items) for indices, items in parts)
    indices, items = (list(itertools.chain(*each)) for each in zip(*parts, strict=True))
    return indices, [int(item) for item in items]


def streams() -> tuple:
    kind, keys, *place = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *place), random.getstate()


def state(thing) -> dict:
    """What a sampler holds, down to the state of its generators."""
    if isinstance(thing, torch.Generator):
        return {"state": thing.get_state().tolist()}
    if isinstance(thing, np.random.Generator):
        return thing.bit_generator.state
    if isinstance(thing, random.Random):
        return {"state": thing.getstate()}
    if isinstance(thing, Sampler):
        return {name: state(value) for name, value in vars(thing).items()}
    return {"": thing if isinstance(thing, (int, str, list, type(None))) else type(thing)}


@pytest.mark.parametrize("case", SAMPLERS)
def test_a_probe_holds_the_images_that_may_come_up_the_same_every_time_and_leaves_no_trace(case):
    make, wanted = SAMPLERS[case]
    source = make()
    samplers = [getattr(source, name, None) for name in ("sampler", "batch_sampler")]
    before = streams(), [state(sampler) for sampler in samplers]
    probe = Probe(source)
    first = read(probe)
    assert first == (list(range(len(wanted))), wanted)
    assert read(probe) == first
    assert read(Probe(make())) == first
    assert len(probe.sample(4)[0]) > 0
    assert (streams(), [state(sampler) for sampler in samplers]) == before


@pytest.mark.parametrize("case", SAMPLERS)
def test_an_iteration_of_the_loader_changes_nothing_in_the_probe(case):
    make, _ = SAMPLERS[case]
    source = make()
    before = read(Probe(source))
    if isinstance(source, DataLoader):
        list(source)
    torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    assert read(Probe(source)) == before


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", SAMPLERS)
def test_processes_share_a_probe_without_a_gap_or_a_repeat(case, world):
    make, wanted = SAMPLERS[case]
    probe = Probe(make())
    if case.startswith(("a stream", "whole batches")):
        with pytest.raises(ValueError, match=rf"a probe that streams cannot be shared by {world} processes"):
            probe.batches(0, world)
        return
    shares = [read(probe, rank, world) for rank in range(world)]
    together = sorted(itertools.chain(*(zip(*share, strict=True) for share in shares)))
    assert together == list(enumerate(wanted))


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(EVEN), Ordered(REVERSED), Shuffled(EVEN, "torch"), Shuffled(EVEN, generator()), None],
    ids=["a subset", "own, in order", "own, torch", "own, a generator", "none"],
)
def test_what_lightning_hands_to_two_processes_gives_what_one_process_gives(sampler):
    one = read(Probe(DataLoader(Numbers(), 5, sampler=sampler)))
    both = []
    for rank in range(2):
        if sampler is None:
            shared = DistributedSampler(Numbers(), 2, rank, shuffle=False)
        else:
            shared = DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank, shuffle=False)
        both += zip(*read(Probe(DataLoader(Numbers(), 5, sampler=shared)), rank, 2), strict=True)
    assert sorted(both) == list(zip(*one, strict=True))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (DataLoader(Numbers(3), 1), "a probe of 3 images for 4 processes"),
        (DataLoader(Numbers(), batch_sampler=[[1, 2], [3]]), "a probe of 2 batches for 4 processes"),
        (of_batches()[:3], "a probe of 3 batches for 4 processes"),
    ],
)
def test_a_probe_too_small_to_share_is_refused(source, said):
    with pytest.raises(ValueError, match=f"{said}: expected one for each at least"):
        list(Probe(source).batches(0, 4))


def test_the_size_cuts_an_order_and_draws_from_what_has_none():
    assert read(Probe(by(lambda: Ordered(REVERSED))(), 7))[1] == REVERSED[:7]
    for source in (Numbers(), by(lambda: None, shuffle=True)(), by(lambda: Shuffled(REVERSED, "torch"))()):
        drawn = read(Probe(source, 7))[1]
        assert len(drawn) == 7
        assert drawn == sorted(set(drawn)) != list(range(7))
        assert drawn == read(Probe(source, 7))[1]
    assert read(Probe(DataLoader(Numbers(), batch_sampler=GROUPS), 4))[1] == TORN[:4]
    assert read(Probe(DataLoader(Numbers(), batch_sampler=GROUPS), 5))[1] == TORN[:8]
    assert read(Probe(of_batches(), 6))[1] == list(range(8))


def test_a_fold_holds_none_of_the_training_images():
    train, held_out = torch.randperm(COUNT, generator=generator()).split([18, 6])
    probe = Probe(DataLoader(Numbers(), 4, sampler=SubsetRandomSampler(held_out.tolist())))
    assert set(read(probe)[1]) == set(held_out.tolist())
    assert not set(read(probe)[1]) & set(train.tolist())


def test_items_may_have_names_instead_of_numbers():
    names = [f"item {index}" for index in (4, 2, 9)]
    for sampler in (names, Ordered(names)):
        assert read(Probe(DataLoader(Keyed(), 2, sampler=sampler)))[1] == [4, 2, 9]
    assert sorted(read(Probe(DataLoader(Keyed(), 2, sampler=Shuffled(names, "torch"))))[1]) == [2, 4, 9]


@pytest.mark.parametrize(
    "loaders",
    [{"a": by(lambda: EVEN)(), "b": DataLoader(Stream())}, [by(lambda: EVEN)(), 3], [[by(lambda: EVEN)()], 3]],
)
def test_of_several_loaders_the_first_is_the_probe(loaders):
    assert read(Probe(CombinedLoader(loaders, "sequential")))[1] == EVEN


# --- streams --------------------------------------------------------------------------------------------------------

VIEW = torch.zeros(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((VIEW, torch.zeros(4)), 4),
        (VIEW, 4),
        ([[VIEW, VIEW], torch.zeros(4)], 4),
        (((VIEW, VIEW), torch.zeros(4)), 4),
        (((VIEW[0], VIEW[1], VIEW[2]), ({}, {}, {})), 3),
        ([[VIEW[0], VIEW[1]], [{}, {}]], 2),
        ({"image": VIEW, "label": None}, 4),
        ({"view 1": VIEW, "view 2": VIEW}, 4),
    ],
)
def test_images_of_a_streamed_batch_are_counted(batch, count):
    found = [indices.tolist() for indices, _ in Probe([batch, batch]).batches()]
    assert found == [list(range(count)), list(range(count, 2 * count))]


def test_what_is_no_batch_is_described():
    with pytest.raises(ValueError, match="a batch is an object of type int: expected"):
        list(Probe([1, 2, 3]).batches())


@pytest.mark.parametrize("source", [3, "images", b"images", {"image": VIEW}, VIEW, None])
def test_what_is_no_probe_is_refused(source):
    with pytest.raises(TypeError, match=r"(?s)probe=.*: expected a Dataset, a DataLoader, or an iterable of batches"):
        Probe(source)


@pytest.mark.parametrize("once", [iter(of_batches()), (batch for batch in of_batches()), map(tuple, of_batches())])
def test_what_can_be_read_only_once_is_refused_with_the_cure(once):
    with pytest.raises(TypeError, match=r"an iterator gives them once: pass a list, or the generator function itself"):
        Probe(once)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_images_are_told_at_once(count):
    with pytest.raises(ValueError, match=rf"the probe holds {count} images?, expected at least 3"):
        Probe(Numbers(count))
    assert too_small(count).startswith(f"the probe holds {count} image{'' if count == 1 else 's'},")


# --- random transforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Numbers(noisy=True), 5),
        lambda: DataLoader(Numbers(noisy=True), 5, num_workers=1),
        lambda: Numbers(noisy=True),
        lambda: lambda: DataLoader(Numbers(noisy=True), 5),
    ],
)
def test_random_transforms_draw_the_same_numbers_at_every_measurement(make):
    def pixels():
        return torch.cat([batch[0] for _, batch in probe.batches()])

    before, probe = streams(), Probe(make())
    first = pixels()
    assert streams() == before
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert torch.equal(pixels(), first)
    assert len((first - first.floor()).unique()) > COUNT / 2


def test_fixed_draws_give_an_item_its_own_numbers_whatever_was_drawn_before():
    data = FixedDraws(Numbers(noisy=True))
    before = streams()
    first = [data[index][0].item() for index in range(COUNT)]
    assert streams() == before
    assert len(data) == COUNT
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert [data[index][0].item() for index in reversed(range(COUNT))] == first[::-1]
    drawn = torch.tensor([value - index for index, value in enumerate(first)])
    assert len(drawn.unique()) == COUNT
    named = FixedDraws(Keyed(noisy=True))
    assert named["item 3"][0].item() == named["item 3"][0].item() != named["item 4"][0].item() - 1


# --- where a Trainer's probe comes from -----------------------------------------------------------------------------


def stand_in(**given):
    """What is asked of a Trainer."""
    return SimpleNamespace(**{"testing": True, "val_dataloaders": None, "train_dataloader": None} | given)


def test_a_probe_is_looked_for_in_order():
    a, b, c, d = (DataLoader(Numbers(), size) for size in (1, 2, 3, 4))
    offers = SimpleNamespace(probe_dataloader=lambda: b)
    everything = {"datamodule": offers, "val_dataloaders": c, "train_dataloader": d}
    assert find_probe(a, stand_in(**everything)) is a
    assert find_probe(None, stand_in(**everything)) is b
    for more in (
        everything | {"datamodule": SimpleNamespace()},
        *(
            {"val_dataloaders": held}
            for held in ([c, d], {"x": c, "y": d}, [[c], d], CombinedLoader([c, d], "sequential"))
        ),
    ):
        found = find_probe(None, stand_in(**{"train_dataloader": d} | more))
        assert (found.dataset, found.batch_size) == (c.dataset, c.batch_size)


def probed(source, size: int) -> list[int]:
    return read(Probe(source, size))[1]


def distributed(data):
    return DataLoader(data, 5, sampler=DistributedSampler(data, 2, 1, shuffle=False))


def by_batches(data):
    return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 5, False))


@pytest.mark.parametrize("make", [lambda data: DataLoader(data, 5), distributed, by_batches])
def test_validation_images_in_order_of_class_give_a_probe_of_all_classes(make):
    """The first images of a folder of classes would be of few."""
    data = Numbers(200)
    found = probed(find_probe(None, stand_in(val_dataloaders=make(data))), 20)
    assert len(found) == 20
    assert max(found) > 150
    assert found == probed(find_probe(None, stand_in(val_dataloaders=make(data))), 20)
    assert probed(find_probe(None, stand_in(val_dataloaders=make(data))), 500) == list(range(200))
    chosen = DataLoader(data, 5, sampler=Ordered(list(range(30))))  # another order is the user's
    assert probed(find_probe(None, stand_in(val_dataloaders=chosen)), 20) == list(range(20))


def test_of_a_fold_that_a_batch_sampler_makes_the_probe_holds_no_other_images():
    fold = BatchSampler(SubsetRandomSampler(range(12, 20)), 4, False)
    assert probed(find_probe(None, stand_in(val_dataloaders=DataLoader(Numbers(), batch_sampler=fold))), 500) == list(
        range(12, 20)
    )


def test_a_training_without_validation_leaves_the_datamodule_alone():
    class Given(L.LightningDataModule):
        def setup(self, stage: str) -> None:
            raise AssertionError(stage)

        def val_dataloader(self) -> DataLoader:
            raise AssertionError

    loop = SimpleNamespace(setup_data=lambda: None, _last_val_dl_reload_epoch=-1)
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=loop))
    module = SimpleNamespace(_current_fx_name="on_train_start")
    own = {"datamodule": Given(), "train_dataloader": DataLoader(Numbers(), 5), "lightning_module": module}
    fitting = stand_in(testing=False, fit_loop=loops, **own)
    with pytest.warns(UserWarning, match="measured on training images"):
        find_probe(None, fitting)


def test_a_mixed_probe_holds_the_same_images_in_a_fixed_random_order():
    in_order = probed(DataLoader(Numbers(200), 5), 100)
    mixed = [read(Probe(DataLoader(Numbers(200), 5), 100, mixed=True))[1] for _ in range(2)]
    assert mixed[0] == mixed[1] != in_order
    assert sorted(mixed[0]) == in_order


@pytest.mark.parametrize(
    ("sampler", "wanted"),
    [
        (SequentialSampler(range(10)), list(range(10))),
        (RandomSampler(range(10)), list(range(10))),
        (WeightedRandomSampler([float(index % 2) for index in range(COUNT)], 5), list(range(1, COUNT, 2))),
    ],
)
def test_a_sampler_of_some_items_gives_all_of_these_and_no_others(sampler, wanted):
    assert probed(DataLoader(Numbers(), 4, sampler=sampler), 500) == wanted


def test_a_sample_is_read_in_the_loaders_own_batches():
    """Images of several sizes fit into no larger ones."""

    class Sizes(Numbers):
        def __getitem__(self, index):
            return torch.zeros(3, 8 + index % 5, 8), index

    batches = Probe(DataLoader(Sizes(), 1)).sample(8)
    assert [labels.tolist() for _, labels in batches] == [[index] for index in range(0, COUNT, 3)]


@pytest.mark.parametrize("size", [3, 8])
def test_a_stream_of_too_few_batches_for_all_processes_is_refused(size):
    """Of the batch that lies beyond the probe nobody is given anything."""
    stream = [(torch.zeros(8, 1), torch.arange(8))] * 4
    probe = Probe(stream, size)
    assert len(list(probe.batches(0, 1))) == 1
    with pytest.raises(ValueError, match="a probe of 1 batches for 2 processes: expected one for each at least"):
        list(probe.batches(1, 2))


def test_a_data_set_that_fails_leaves_the_random_streams_alone():
    class Failing(Numbers):
        def __getitem__(self, index):
            raise KeyError(index)

    before = streams()
    with pytest.raises(KeyError):
        list(Probe(DataLoader(Failing(), 4)).batches())
    assert streams() == before


@pytest.mark.parametrize("loaders", [None, [], {}])
def test_where_there_is_none_the_ways_to_give_one_are_named(loaders):
    said = r"found no probe images: pass probe=.*probe_dataloader\(\).*limit_val_batches above 0"
    with pytest.raises(ValueError, match=said):
        find_probe(None, stand_in(val_dataloaders=loaders, train_dataloader=loaders))


@pytest.mark.parametrize(
    ("loader", "wanted"),
    [
        (DataLoader(Numbers(noisy=True), 5, shuffle=True), list(range(COUNT))),
        (DataLoader(Numbers(noisy=True), 5, sampler=SubsetRandomSampler(EVEN)), EVEN),
        (DataLoader(Numbers(noisy=True), batch_sampler=GROUPS), TORN),
        (DataLoader(Stream(), 5), list(range(COUNT))),
        (Batches(), list(range(COUNT))),
    ],
)
def test_training_images_are_the_last_resort_and_warned_of(loader, wanted):
    before = streams()
    with pytest.warns(UserWarning, match="measured on training images, with their random transforms under a fixed"):
        probe = Probe(find_probe(None, stand_in(train_dataloader=loader)))
    first = [batch[0] for _, batch in probe.batches()]
    assert torch.cat(first).floor()[:, 0].int().tolist() == wanted
    assert all(torch.equal(a, b[0]) for a, (_, b) in zip(first, probe.batches(), strict=True))
    assert streams() == before


def test_validation_that_was_not_set_up_is_set_up_to_be_asked(tmp_path):
    """Where not a single epoch is trained, Lightning sets up no validation by itself."""

    class Asks(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            self.found = find_probe(None, trainer)

    asks, given = Asks(), loaders()
    trainer(tmp_path, asks, max_epochs=0).fit(build(), **given)
    assert asks.found.dataset is given["val_dataloaders"].dataset


# --- images alone ---------------------------------------------------------------------------------------------------


def test_image_batches_are_the_first_images():
    place = Placement.of(build())
    found = list(ImageBatches(DataLoader(images(), 16), 20, place))
    assert [len(batch) for batch in found] == [16, 4]
    assert torch.equal(torch.cat(found), images().tensors[0][:20])


def test_a_step_may_make_several_images_of_an_item():
    views = [(torch.randn(16, 4, 3, 8, 8), torch.arange(16) % 4) for _ in range(4)]
    batches = ImageBatches(views, 40, Placement.of(build()), lambda batch: batch[0].flatten(0, 1))
    assert [len(batch) for batch in batches] == [40]
    assert batches.images == 40


def test_images_that_are_too_many_to_hold_are_read_anew():
    place, size = Placement.of(build()), images().tensors[0][:20].nbytes
    held, read = (ImageBatches(DataLoader(images(), 16), 20, place).within(bound) for bound in (size, size - 1))
    assert isinstance(held, list)
    assert isinstance(read, ImageBatches)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(held, read, strict=True))


def test_image_batches_refuse_what_no_network_reads():
    place = Placement.of(build())
    with pytest.raises(ValueError, match=r"the images of a batch are a list of 2: .*expected a tensor \[B, C, …\]"):
        list(ImageBatches([([VIEW, VIEW], torch.zeros(4))], 9, place))
    bad = VIEW.clone()
    bad[2] = torch.nan
    with pytest.raises(ValueError, match="image 6 of the probe holds NaN or infinity"):
        list(ImageBatches([(VIEW, torch.zeros(4)), (bad, torch.zeros(4))], 9, place))
