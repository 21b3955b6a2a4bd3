"""Copies of modules that hold more than parameters: what is copied, what is shared, and what is left out."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from chanaxes_pl import LesionExperiment, PruningExperiment, find_units, lesion_table, prune, pruning_grid
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.tracing import PartialForward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's old spectral norm

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(24) % 4)


class Helper:
    """An object of a class of its own."""

    def __init__(self, **held) -> None:
        self.__dict__.update(held)


class Net(L.LightningModule):
    """A small network, whose attributes the cases below extend."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 4)
        self.keeps = False
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x).mean((2, 3)))
        if self.keeps:
            self.last = {"logits": [logits]}
        return logits

    def count(self, *_) -> None:
        self.runs += 1


def last_logits(net: Net) -> None:
    net.keeps = True
    net(IMAGES)


def state_of_a_step(net: Net) -> None:
    net.losses = deque([net(IMAGES).square().sum()])
    net.register_buffer("average", net(IMAGES).mean(0))


def lock(net: Net) -> None:
    net.lock = threading.Lock()
    net.locks = [{"deep": (threading.RLock(), threading.Condition())}]


def bound_hook(net: Net) -> None:
    net.head.register_forward_hook(net.count)
    net.body[0].register_forward_pre_hook(partial(net.count, 1))


def trainer(net: Net) -> None:
    net.mine = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    net.trainer = net.mine
    net.mine.strategy.connect(net)
    net.weak = weakref.proxy(net.mine)


def file(net: Net) -> None:
    net.file = sys.__stdout__
    net.helper = Helper(log=net.file, owner=None)


def generator(net: Net) -> None:
    net.numbers = (number for number in range(3))
    net.draws = torch.Generator().manual_seed(3)


def loader(net: Net) -> None:
    net.loader = torch.utils.data.DataLoader(DATA, batch_size=4)
    net.batches = iter(net.loader)


def module(net: Net) -> None:
    net.functional = nn.functional
    net.helper = Helper(lock=threading.Lock(), head=net.head)


def hooked_weight(net: Net) -> None:
    net.body[0] = nn.utils.spectral_norm(net.body[0])
    net(IMAGES)


CASES = [last_logits, state_of_a_step, lock, bound_hook, trainer, file, generator, loader, module, hooked_weight]


def made(case) -> Net:
    torch.manual_seed(1)
    net = Net()
    case(net)
    return net.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_copy_computes_the_same_and_shares_no_tensor(case):
    net = made(case)
    net(IMAGES).sum().backward()
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    copied = clone(net)
    assert torch.equal(copied(IMAGES), net(IMAGES))
    assert all(parameter.grad is None for parameter in copied.parameters())
    assert all(parameter.grad is not None for parameter in net.parameters())
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_module_holds_it_is_pruned_and_lesioned(case):
    net = made(case)
    held = dict(vars(net))
    assert find_units(net, IMAGES[:1]).groups
    slim = prune(net, DATA, budget=0.8, score="taylor")
    assert slim.macs < slim.dense_macs
    batches = [(IMAGES, DATA.tensors[1])]
    few = LesionExperiment(channels=3, operations=("zero",))
    assert len(lesion_table(net, None, batches, few)) == 6
    grid = PruningExperiment(budgets=(0.8,), scores=("l1",), allocations=("uniform",), compensate=("refit",))
    assert len(pruning_grid(net, DATA, batches, grid, progress=False)) == 2
    assert vars(net).keys() == held.keys()


def test_references_lead_into_the_copy():
    net = made(bound_hook)
    net.parts = {"head": [net.head]}
    net.call = net.body.forward
    net.helper = Helper(lock=threading.Lock(), owner=net)
    net.head.weight_of_a_twin = (net.head.weight,)
    net.twin = nn.Linear(6, 4)
    net.twin.weight = net.head.weight
    copied = clone(net)
    assert copied.parts["head"][0] is copied.head is not net.head
    assert copied.call.__self__ is copied.body
    assert copied.helper.owner is copied
    assert copied.helper.lock is net.helper.lock
    assert copied.twin.weight is copied.head.weight is copied.head.weight_of_a_twin[0]
    assert copied.twin.weight is not net.twin.weight
    copied(IMAGES)
    assert (copied.runs, net.runs) == (2, 0)


def test_what_cannot_be_copied_is_shared_and_a_trainer_left_out():
    net = Net()
    for case in (last_logits, lock, trainer, file, generator, loader):
        case(net)
    copied = clone(net)
    for name in ("lock", "file", "helper", "numbers", "loader", "batches"):
        assert getattr(copied, name) is getattr(net, name), name
    assert copied.locks[0]["deep"][0] is net.locks[0]["deep"][0]
    assert copied.locks is not net.locks
    assert copied._trainer is copied.mine is copied.weak is None
    assert net.mine is net.trainer
    logits = copied.last["logits"][0]
    assert logits.grad_fn is None
    assert torch.equal(logits, net.last["logits"][0])
    assert net.last["logits"][0].grad_fn is not None
    assert torch.equal(torch.rand(3, generator=copied.draws), torch.rand(3, generator=net.draws))


def test_tracing_leaves_no_stand_in_for_the_logits():
    net = made(last_logits)
    with torch.no_grad():
        logits = net(IMAGES)
    PartialForward(net)
    assert net.last["logits"][0] is logits


def test_an_object_that_refuses_is_named():
    class Refuses:
        def __deepcopy__(self, memo):
            raise RuntimeError("never")

    net = Net()
    net.odd = Refuses()
    with pytest.raises(ValueError, match=r"prune: Net cannot be copied \(RuntimeError: never\): expected a module"):
        prune(net, DATA, budget=0.5)
