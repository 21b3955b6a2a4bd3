"""Polish: a pruned network comes closer to the dense one, the same way each time, and nothing else changes."""

import copy
import re
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from chanaxes_pl import prune
from chanaxes_pl.compensation import polish as home
from chanaxes_pl.compensation.polish import distillation_loss, polish
from chanaxes_pl.pruning.pruner import Pruner
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.removal import Group, remove
from tests.helpers.networks import ONE, build, halves

BATCHES = list(torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(6)).split(40))


def pruned(name: str) -> tuple[nn.Module, nn.Module, list[Group], dict[str, Tensor]]:
    model = build(name)
    groups = list(find_units(model, ONE).groups.values())
    kept = halves(groups)
    slim = copy.deepcopy(model)
    remove(slim, groups, kept)
    return model, slim, groups, kept


@torch.no_grad()
def distance(model: nn.Module, slim: nn.Module) -> float:
    return float(distillation_loss(slim(torch.cat(BATCHES)), model(torch.cat(BATCHES))))


@pytest.mark.parametrize("name", ["resnet18", "normed", "concatenating"])
def test_a_polished_network_is_closer_to_the_dense_one_than_a_cut_one(name):
    model, slim, groups, kept = pruned(name)
    before, state = distance(model, slim), copy.deepcopy(model.state_dict())
    statistics = {key: value.clone() for key, value in slim.state_dict().items() if "running" in key}
    polish(slim, model, groups, kept, BATCHES, steps=40)
    assert distance(model, slim) < 0.75 * before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(slim.state_dict()[key], value) for key, value in statistics.items())
    assert not any(module._forward_pre_hooks for net in (model, slim) for module in net.modules())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *slim.parameters()])


def test_the_same_seed_gives_the_same_network_and_leaves_the_generator_alone():
    found = []
    for seed in (1, 1, 2):
        model, slim, groups, kept = pruned("concatenating")
        torch.manual_seed(len(found))
        polish(slim, model, groups, kept, BATCHES, steps=3, seed=seed)
        found.append(torch.cat([value.flatten().float() for value in slim.state_dict().values()]))
        state = torch.get_rng_state()
        torch.manual_seed(len(found) - 1)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_parameters_stay_as_trainable_as_they_were():
    model, slim, groups, kept = pruned("concatenating")
    first = next(slim.parameters()).requires_grad_(False)
    before = first.clone()
    slim.train()
    polish(slim, model, groups, kept, BATCHES, steps=2)
    flags = [parameter.requires_grad for parameter in slim.parameters()]
    assert flags == [False] + [True] * (len(flags) - 1)
    assert not torch.equal(before, first)
    assert slim.training


@pytest.mark.parametrize("name", ["concatenating", "normed", "one output"])
def test_little_memory_takes_parts_of_a_batch_and_gives_the_same_network(name):
    found, sizes = [], []
    for memory in (2.0, 1e-3):
        model, slim, groups, kept = pruned("concatenating" if name == "one output" else name)
        if name == "one output":  # a regression
            torch.manual_seed(0)
            model.head, slim.head = (nn.Linear(net.head.in_features, 1) for net in (model, slim))
        handle = slim.register_forward_pre_hook(lambda _, args, seen=sizes: seen.append(len(args[0])))
        polish(slim, model, groups, kept, BATCHES, steps=3, memory=memory)
        handle.remove()
        found.append(slim)
    assert {1, 96} <= set(sizes)
    assert max(size for size in sizes[sizes.index(96) + 3 :] if size > 1) < 96
    for key, value in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_images_that_are_streamed_are_read_again_as_often_as_it_takes():
    class Streamed:
        reads = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.reads += 1
            yield from BATCHES

    model, slim, groups, kept = pruned("concatenating")
    streamed = Streamed()
    polish(slim, model, groups, kept, streamed, steps=7)
    assert streamed.reads == 8  # one for an image; then all of them together are less than a step takes


@pytest.mark.parametrize("side", [(8, 8), (16, 24)])
def test_images_are_flipped_and_shifted_and_no_pixel_is_made_up(side):
    images = torch.arange(1.0, 1 + 20 * 2 * side[0] * side[1]).view(20, 2, *side)
    found = home._moved(images, torch.Generator().manual_seed(3))
    margins, seen = [length // 8 for length in side], set()
    for image, moved in zip(images, found, strict=True):
        options = {}
        for flipped in (False, True):
            padded = F.pad(image.flip(2) if flipped else image, (margins[1], margins[1], margins[0], margins[0]))
            for row in range(2 * margins[0] + 1):
                for column in range(2 * margins[1] + 1):
                    options[flipped, row, column] = padded[:, row : row + side[0], column : column + side[1]]
        (chosen,) = [key for key, option in options.items() if torch.equal(option, moved)]
        seen.add(chosen)
    assert len(seen) > 3
    assert {flipped for flipped, *_ in seen} == {False, True}
    assert home._moved(torch.zeros(3, 5), torch.Generator()).shape == (3, 5)  # no images: nothing to flip


def test_the_loss_is_the_divergence_at_a_temperature_or_a_share_of_the_variance():
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(5, 4, generator=generator) for _ in range(2))
    p, q = ((outputs / 2).softmax(1) for outputs in (wanted, logits))
    assert float(distillation_loss(logits, wanted)) == pytest.approx(
        float(4 * (p * (p / q).log()).sum(1).mean()), rel=1e-5
    )
    maps = [outputs[:, :, None].expand(-1, -1, 3) for outputs in (logits, wanted)]
    assert float(distillation_loss(*maps)) == pytest.approx(float(distillation_loss(logits, wanted)), rel=1e-5)
    one = [outputs[:, :1] for outputs in (logits, wanted)]
    shares = (one[0] - one[1]).square().mean() / one[1].var()
    assert float(distillation_loss(*one)) == pytest.approx(float(shares), rel=1e-5)
    assert float(distillation_loss(logits, logits)) == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_another_shape_is_refused():
    text = "the teacher gives outputs [4, 3], the network [4, 5]: expected the same shape"
    with pytest.raises(ValueError, match=re.escape(text)):
        distillation_loss(torch.zeros(4, 5), torch.zeros(4, 3))


@pytest.mark.parametrize("compensate_", [False, "fold", "refit", "distill"])
def test_prune_tells_what_each_step_gained(compensate_, monkeypatch):
    monkeypatch.setattr("chanaxes_pl.pruning.pruner.polish", partial(polish, steps=30))
    model, images = build("resnet18"), torch.cat(BATCHES)
    slim = prune(model, TensorDataset(images, torch.arange(96) % 7), budget=0.5, compensate=compensate_)
    expected = {
        False: ["cut"],
        "fold": ["cut", "fold"],
        "refit": ["cut", "refit"],
        "distill": ["cut", "refit", "polish"],
    }
    assert slim.steps["step"].tolist() == expected[compensate_]
    assert slim.steps["divergence"].iloc[1:].max() < 0.5 * slim.steps["divergence"].iloc[0] or not compensate_
    assert (slim.steps["seconds"] > 0).all()
    with torch.no_grad():
        wanted, found = (network(images).double().log_softmax(1) for network in (model, slim.model))
    last = float((wanted.exp() * (wanted - found)).sum(1).mean())
    assert slim.steps["divergence"].iloc[-1] == pytest.approx(last, rel=1e-3)
    assert slim.plan.notes["compensate"] == (compensate_ or "none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_of_half_precision_learns_and_stays_one(dtype):
    model, slim, groups, kept = pruned("concatenating")
    model, slim = model.to(dtype), slim.to(dtype)
    before = copy.deepcopy(slim.state_dict())
    polish(slim, model, groups, kept, [images.to(dtype) for images in BATCHES], steps=2)
    for name, value in slim.state_dict().items():
        assert value.dtype == before[name].dtype
        assert value.isfinite().all()
    assert not torch.equal(slim.state_dict()["head.weight"], before["head.weight"])


def test_no_number_moves_by_more_than_a_share_of_its_layers_size_a_step():
    model, slim, groups, kept = pruned("resnet18")
    with torch.no_grad():
        for network in (model, slim):
            network.fc.weight.mul_(1e-3)  # a wide layer's are small too
            network.fc.bias.zero_()
    before, steps = copy.deepcopy(dict(slim.named_parameters())), 4
    polish(slim, model, groups, kept, BATCHES, steps=steps)
    for name, parameter in slim.named_parameters():
        size = float(before[name].detach().square().mean().sqrt())
        bound = min(home.RATE, home.SHARE * size) if size else home.RATE
        moved = float((parameter - before[name]).detach().abs().max())
        assert 0.02 * bound < moved < 1.5 * steps * bound


@pytest.mark.parametrize(
    ("size", "expected", "same"), [(96, 96, False), (97, 96, True), (40, 96, False), (5, 50, False)]
)
def test_polish_sees_ten_times_as_many_images_where_there_are_as_many(size, expected, same, monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr("chanaxes_pl.pruning.pruner.polish", lambda *args, **_: seen.extend(args[4]))
    data = TensorDataset(torch.cat(BATCHES), torch.arange(96) % 7)
    pruner = Pruner(build("concatenating"), data, probe_size=size)
    kept = halves(pruner.groups)
    pruner.compensate(pruner.cut(kept), kept, "distill")
    images = torch.cat(seen)
    assert len(images) == expected
    assert len({image.sum().item() for image in images}) == expected  # none twice
    assert (pruner.more is pruner.batches) == same


class Sequences(nn.Module):
    """Ends in a Conv1d, whose channels come before its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3), nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu()).mean(2)


class LastChannels(nn.Module):
    """Ends in a Linear layer on ``[B, H, W, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu().movedim(1, -1)).mean((1, 2))


@pytest.mark.parametrize(
    ("module", "images"),
    [
        (Sequences, [torch.randn(20, 3, 16)]),
        (LastChannels, [torch.randn(20, 3, 9, 9)]),
        (LastChannels, [torch.randn(20, 3, 9, 9), torch.randn(12, 3, 11, 8)]),
    ],
    ids=["Conv1d", "channels last", "two sizes"],
)
def test_other_heads_and_images_of_several_sizes(module, images):
    torch.manual_seed(0)
    model = module().eval()
    groups = list(find_units(model, images[0][:1]).groups.values())
    kept = halves(groups)
    slim = copy.deepcopy(model)
    remove(slim, groups, kept)
    before = slim.head.weight.clone()
    polish(slim, model, groups, kept, images, steps=2)
    assert not torch.equal(slim.head.weight, before)
    assert all(value.isfinite().all() for value in slim.state_dict().values())


def test_yes_or_no_outputs_are_compared_one_by_one():
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(5, 4, generator=generator).double() for _ in range(2))
    p, q = ((outputs / 2).sigmoid() for outputs in (wanted, logits))
    bits = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    assert float(distillation_loss(logits, wanted, divergence="bits")) == pytest.approx(float(bits), rel=1e-10)
    shares = (logits - wanted).square().mean() / wanted.var()
    assert float(distillation_loss(logits, wanted, divergence="square")) == pytest.approx(float(shares), rel=1e-10)


class Again:
    """A stream that can be read again."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def test_single_images_are_joined_to_batches():
    images = [torch.full((1, 1, 2, 2), float(number)) for number in range(300)]
    source = home._endless(Again(images), torch.Generator().manual_seed(0))
    drawn = [next(source) for _ in range(6)]
    assert {len(batch) for batch in drawn} == {128, 44}
    assert sorted(torch.cat(drawn[:3])[:, 0, 0, 0].tolist()) == list(range(300))
    sizes = [torch.zeros(1, 1, 2, 2 + number // 2) for number in range(4)]
    source = home._endless(sizes, torch.Generator().manual_seed(0))
    assert [tuple(next(source).shape) for _ in range(2)] == [(2, 1, 2, 2), (2, 1, 2, 3)]
