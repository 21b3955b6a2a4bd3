"""Budgets: what a network costs, what it would cost without some units, and how many have to go."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18 as torchvision_resnet18

from chanaxes_pl.models import BACKBONES
from chanaxes_pl.pruning.allocation import GRID, check_budget, fit_budget, keep_best, threshold_order, uniform_order
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.macs import Macs, count_macs
from chanaxes_pl.units.removal import Group, remove
from tests.helpers.networks import IMAGES, NETS, ONE, build, halves

ORDERS = ("uniform", "threshold")
#: Found once: name → model, groups, cost.
_FOUND: dict[str, tuple[nn.Module, list[Group], Macs]] = {}


def found(name: str) -> tuple[nn.Module, list[Group], Macs]:
    if name not in _FOUND:
        model = build(name)
        groups = list(find_units(model, ONE).groups.values())
        _FOUND[name] = model, groups, Macs(model, groups, ONE)
    return _FOUND[name]


def fake(name: str, size: int) -> Group:
    return Group(name, size, {}, {}, {}, ())


def noise(groups: list[Group], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups}


def order_of(kind: str, groups: list[Group]) -> np.ndarray:
    return uniform_order(groups) if kind == "uniform" else threshold_order(groups, noise(groups))


def test_macs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8 outputs at 16×16, each from 3×3×3
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, groups=8),  # at 12×12, each from 5×5
        nn.Conv2d(8, 6, 1, groups=2),  # each from 4
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    by_hand = 8 * 16 * 16 * 27 + 8 * 12 * 12 * 25 + 6 * 12 * 12 * 4 + 24 * 5
    assert count_macs(model, ONE) == by_hand
    assert count_macs(model, IMAGES) == by_hand
    assert model.training
    assert model[1].num_batches_tracked == 0


def test_macs_of_torchvisions_resnet18():
    """The convention: 74,033,152 operations of PyTorch's counter, two to a multiply–add."""
    assert count_macs(torchvision_resnet18(num_classes=10), ONE) == 74_033_152 // 2


@pytest.mark.parametrize("name", NETS)
def test_cost_is_that_of_the_slim_network(name):
    model, groups, cost = found(name)
    assert cost.dense == count_macs(model, ONE) == cost.of(np.zeros(len(groups)))
    for seed, share in enumerate((0.5, 0.2, 0.9)):
        kept = halves(groups, seed, share)
        if seed == 2:  # only some of the groups
            kept = {group.name: kept[group.name] for group in groups[::2]}
        slim = copy.deepcopy(model)
        remove(slim, groups, kept)
        lost = np.array([group.size - len(kept.get(group.name, range(group.size))) for group in groups])
        assert cost.of(lost) == count_macs(slim, ONE)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["grouped", "concatenating", "squeezing", "flattening"]), st.data())
def test_cost_of_any_removal(name, data):
    model, groups, cost = found(name)
    lost = np.array([data.draw(st.integers(0, group.size - 1)) for group in groups])
    slim = copy.deepcopy(model)
    remove(slim, groups, {g.name: torch.arange(n, g.size) for g, n in zip(groups, lost, strict=True)})
    assert cost.of(lost) == count_macs(slim, ONE)


def test_a_layer_that_runs_twice_costs_twice():
    first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    model = nn.Sequential(first, second, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    groups = list(find_units(model, ONE).groups.values())
    slim = copy.deepcopy(model)
    remove(slim, groups, {groups[0].name: torch.arange(4)})
    assert Macs(model, groups, ONE).of(np.array([2])) == count_macs(slim, ONE) == 32 * 32 * 9 * (3 * 4 + 2 * 16) + 8


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_budget_is_met_to_half_a_percent_or_one_unit(name, kind):
    _, groups, cost = found(name)
    order = order_of(kind, groups)
    for budget in GRID:
        lost = fit_budget(cost, order, budget)
        turns = lost.sum()
        assert np.array_equal(np.bincount(order[:turns], minlength=len(groups)), lost)
        share = cost.of(lost) / cost.dense
        around = order[max(0, turns - 1) : turns + 1]  # the units on both sides of where it stops
        unit = max(
            abs(share - cost.of(lost + sign * (np.arange(len(groups)) == g)) / cost.dense)
            for g in around
            for sign in (1, -1)
            if 0 <= lost[g] + sign < groups[g].size
        )
        assert abs(share - budget) <= max(0.005, unit)
        assert all(lost < [group.size for group in groups])


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("name", ["resnet18", "grouped", "concatenating"])
def test_bisection_finds_the_closest_prefix(name, kind):
    _, groups, cost = found(name)
    order = order_of(kind, groups)
    shares = np.array(
        [cost.of(np.bincount(order[:turns], minlength=len(groups))) / cost.dense for turns in range(len(order) + 1)]
    )
    assert (np.diff(shares) < 0).all()
    for budget in (*GRID, 1.0, 0.99, shares[-1], (shares[3] + shares[4]) / 2 + 1e-9):
        assert fit_budget(cost, order, budget).sum() == np.abs(shares - budget).argmin()


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("name", NETS)
def test_no_layer_loses_its_last_channel(name, kind):
    model, groups, cost = found(name)
    order = order_of(kind, groups)
    ends = np.array([group.size - 1 for group in groups])
    least = cost.of(ends) / cost.dense
    lost = fit_budget(cost, order, least)
    assert np.array_equal(lost, ends)
    slim = copy.deepcopy(model)
    remove(slim, groups, keep_best(groups, lost, noise(groups)))
    assert slim(ONE).isfinite().all()
    assert count_macs(slim, ONE) / cost.dense == pytest.approx(least)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.data())
def test_a_uniform_order_takes_equal_shares_at_every_turn(sizes, data):
    groups = [fake(str(g), size) for g, size in enumerate(sizes)]
    order = uniform_order(groups)
    assert np.array_equal(np.bincount(order, minlength=len(sizes)), np.array(sizes) - 1)
    turns = data.draw(st.integers(0, len(order)))
    lost = np.bincount(order[:turns], minlength=len(sizes))
    shares = [(n / size, 1 / size) for n, size in zip(lost, sizes, strict=True) if n < size - 1]
    for share, unit in shares:
        for other, other_unit in shares:
            assert share - other <= max(unit, other_unit) + 1e-9


@given(st.lists(st.lists(st.integers(-5, 5), min_size=2, max_size=9), min_size=1, max_size=5), st.data())
def test_a_threshold_order_takes_what_is_below_one_threshold(columns, data):
    groups = [fake(str(g), len(column)) for g, column in enumerate(columns)]
    values = {group.name: torch.tensor(column) / 2 for group, column in zip(groups, columns, strict=True)}
    order = threshold_order(groups, values)
    assert np.array_equal(np.bincount(order, minlength=len(groups)), [group.size - 1 for group in groups])
    threshold = data.draw(st.sampled_from(np.unique(np.concatenate(columns)).tolist())) / 2
    lost = np.array([min(int((values[g.name] < threshold).sum()), g.size - 1) for g in groups])
    assert np.array_equal(np.bincount(order[: lost.sum()], minlength=len(groups)), lost)


def widths(groups: list[Group], lost: np.ndarray) -> list[tuple[int, int]]:
    """Channels that each producing layer keeps and had."""
    return [
        ((group.size - int(n)) * channels.shape[1], group.size * channels.shape[1])
        for group, n in zip(groups, lost, strict=True)
        for channels in group.producers.values()
    ]


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("name", NETS)
def test_rounded_widths_are_multiples_and_the_budget_is_a_bound(name, kind, round_to):
    _, groups, cost = found(name)
    order = order_of(kind, groups)
    steps = [math.lcm(*(round_to // math.gcd(round_to, c.shape[1]) for c in g.producers.values())) for g in groups]
    for budget in (0.9, 0.7, 0.5):
        try:
            lost = fit_budget(cost, order, budget, round_to)
        except ValueError as error:
            if f"every group is down to {round_to} channels" not in str(error):
                assert round_to > max(whole for _, whole in widths(groups, np.zeros(len(groups))))
            continue
        assert all(left % round_to == 0 or left == whole for left, whole in widths(groups, lost))
        assert all(left >= min(round_to, whole) for left, whole in widths(groups, lost))
        assert cost.of(lost) <= budget * cost.dense
        for g, step in enumerate(steps):  # no group could keep the next larger width
            more = lost.copy()
            more[g] = max(0, more[g] - step)
            assert (more == lost).all() or cost.of(more) > budget * cost.dense


class Sizes:
    """Cost of units that cost the same."""

    unit, exact = "units", True

    def __init__(self, groups: list[Group]) -> None:
        self.groups = tuple(groups)
        self.dense = sum(group.size for group in groups)

    def of(self, removed: np.ndarray) -> float:
        return self.dense - removed.sum()


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6),
    st.sampled_from([2, 3, 8, 12]),
    st.sampled_from([1.0, 0.9, 0.61, 0.5, 0.3]),
    st.integers(0, 9),
)
def test_a_rounded_network_is_near_the_unrounded_one(sizes, round_to, budget, seed):
    groups = [fake(str(g), size) for g, size in enumerate(sizes)]
    cost = Sizes(groups)
    assume(round_to <= max(sizes))
    for order in (uniform_order(groups), threshold_order(groups, noise(groups, seed))):
        ends = sum(size if size < round_to else round_to for size in sizes)
        if budget < ends / cost.dense:
            with pytest.raises(ValueError, match=rf"of the units remain when every group is down to {round_to} cha"):
                fit_budget(cost, order, budget, round_to)
            continue
        left = np.array(sizes) - fit_budget(cost, order, budget, round_to)
        assert all(n % round_to == 0 or n == size for n, size in zip(left, sizes, strict=True))
        assert budget * cost.dense - round_to < left.sum() <= budget * cost.dense
        near = np.array(sizes) - fit_budget(cost, order, left.sum() / cost.dense)
        inside = [size >= 3 * round_to and n > round_to for n, size in zip(left, sizes, strict=True)]
        if all(inside):  # groups that cannot follow the order leave more to the others
            assert np.abs(left - near).max() <= 2 * round_to


def test_a_unit_of_several_channels_goes_in_steps_of_its_layers():
    """Three channels a unit in one layer and two in another: multiples of 8 in both are 8 units."""
    producers = {"a": torch.zeros(32, 3), "b": torch.zeros(32, 2)}
    group = Group("a", 32, producers, {}, {}, ())
    for budget, left in ((0.9, 24), (0.75, 24), (0.7, 16), (0.25, 8)):
        assert fit_budget(Sizes([group]), uniform_order([group]), budget, 8) == 32 - left


@pytest.mark.parametrize(
    ("round_to", "message"),
    [
        (0, r"round_to=0: expected a whole number of channels, such as 8, of which every layer keeps a multiple"),
        (-8, r"round_to=-8: expected a whole number"),
        (3.5, r"round_to=3\.5: expected a whole number"),
        (8.0, r"round_to=8\.0: expected a whole number"),
        (True, r"round_to=True: expected a whole number"),
        ("8", r"round_to='8': expected a whole number"),
        (129, r"round_to=129: expected at most 128, the channels of the widest layer"),
    ],
)
def test_a_width_that_no_layer_can_have_is_refused(round_to, message):
    _, groups, cost = found("resnet18")
    with pytest.raises(ValueError, match=message):
        fit_budget(cost, uniform_order(groups), 0.5, round_to)


def test_the_lowest_go_and_of_equals_the_first():
    groups = [fake("a", 5), fake("b", 3), fake("c", 2)]
    scores = {"a": torch.tensor([3.0, -1.0, 2.0, 0.0, 5.0]), "b": torch.tensor([1.0, 1.0, 1.0]), "c": torch.rand(2)}
    kept = keep_best(groups, np.array([2, 1, 0]), scores)
    assert {name: units.tolist() for name, units in kept.items()} == {"a": [0, 2, 4], "b": [1, 2], "c": [0, 1]}


@pytest.mark.parametrize("budget", [0, 0.0, 1.2, -0.5, float("nan"), float("inf")])
def test_a_budget_that_is_no_share_is_refused(budget):
    _, groups, cost = found("grouped")
    message = rf"budget={budget}: expected the share of the dense network's MACs that remains, above 0"
    with pytest.raises(ValueError, match=message):
        check_budget(budget)
    with pytest.raises(ValueError, match=message):
        fit_budget(cost, uniform_order(groups), budget)


def test_a_budget_below_what_is_protected_names_the_least():
    model, _, _ = found("resnet18")
    units = find_units(model, ONE).protect(["layer[1-3]*"])
    groups = list(units.groups.values())
    cost = Macs(model, groups, ONE)
    least = cost.of(np.array([group.size - 1 for group in groups])) / cost.dense
    assert 0.3 < least < 0.9
    with pytest.raises(ValueError, match=rf"budget=0\.2: {least:.4f} of the MACs remain .* expected a budget from"):
        fit_budget(cost, uniform_order(groups), 0.2)
    assert fit_budget(cost, uniform_order(groups), 1.0).sum() == 0
