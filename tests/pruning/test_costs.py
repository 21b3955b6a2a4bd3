"""What a budget is a share of: parameters are counted exactly, and latency is measured beside the dense network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from chanaxes_pl.pruning import latency
from chanaxes_pl.pruning.allocation import fit_budget, uniform_order
from chanaxes_pl.pruning.costs import Parameters, count_parameters
from chanaxes_pl.pruning.latency import Latency
from chanaxes_pl.pruning.pruner import prune
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.removal import remove, without
from tests.helpers.networks import IMAGES, NETS, ONE, build, halves

DATA = TensorDataset(IMAGES, torch.arange(len(IMAGES)) % 7)


def count(model: nn.Module) -> int:
    """Weights, biases, norms and bare parameters, one by one."""
    total = 0
    for module in model.modules():
        for parameter in module._parameters.values():
            total += 0 if parameter is None else int(np.prod(parameter.shape))
    return total


@pytest.mark.parametrize("name", NETS)
def test_the_predicted_parameters_are_those_of_the_slim_network(name):
    model = build(name)
    groups = list(find_units(model, ONE).groups.values())
    cost = Parameters(model, groups, ONE)
    assert cost.dense == cost.of(np.zeros(len(groups))) == count(model)
    for seed, share in enumerate((0.5, 0.2)):
        slim, kept = copy.deepcopy(model), halves(groups, seed, share)
        remove(slim, groups, kept)
        assert cost.of(np.array([group.size - len(kept[group.name]) for group in groups])) == count(slim)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["grouped", "concatenating", "squeezing", "normed"]), st.data())
def test_the_predicted_parameters_of_any_removal(name, data):
    model = build(name)
    groups = list(find_units(model, ONE).groups.values())
    lost = np.array([data.draw(st.integers(0, group.size - 1)) for group in groups])
    slim = copy.deepcopy(model)
    remove(slim, groups, {g.name: torch.arange(g.size - n) for g, n in zip(groups, lost, strict=True)})
    assert Parameters(model, groups, ONE).of(lost) == count(slim)


@pytest.mark.parametrize("name", ["resnet18", "grouped", "normed"])
@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_a_budget_of_parameters(name, budget):
    model = build(name)
    slim = prune(model, DATA, budget=budget, budget_of="parameters", compensate=False)
    share = count(slim.model) / count(model)
    assert share == pytest.approx(budget, abs=0.005 if name == "resnet18" else 0.05)
    assert slim.plan.notes["budget_of"] == "parameters"
    assert slim.macs / slim.dense_macs != pytest.approx(budget, abs=1e-4)


def test_a_shared_parameter_counts_once():
    layer = nn.Conv2d(4, 4, 1)
    assert count_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 20


@pytest.fixture
def clocked(monkeypatch):
    """A clock on which every parameter takes a microsecond on a machine that is slower at every look."""
    looks = []

    def once(model: nn.Module, _batch: torch.Tensor) -> float:
        looks.append(model)
        return 1e-3 * count_parameters(model) * (1 + 1e-5 * len(looks))

    monkeypatch.setattr(latency, "_once", once)
    return looks


def test_latency_is_measured_once_for_each_removal_and_in_turns_with_the_dense_network(clocked):
    model = build("resnet18")
    groups = list(find_units(model, ONE).groups.values())
    cost, lost = Latency(model, groups, ONE), np.array([group.size // 2 for group in groups])
    clocked.clear()
    first = cost.of(lost)
    assert first / cost.dense == pytest.approx(count(without(model, groups, lost)) / count(model), rel=1e-3)
    assert [run is model for run in clocked[1:]] == [False, True] * (len(clocked) // 2)
    clocked.clear()
    assert cost.of(lost.copy()) == first
    assert cost.of(np.zeros(len(groups), int)) == cost.dense
    assert not clocked


def test_a_budget_of_latency_records_how_it_was_measured(clocked):
    model = build("resnet18")
    slim = prune(model, DATA, budget=0.6, budget_of="latency", round_to=4, example_input=IMAGES[:3], compensate=False)
    measured = slim.plan.notes["latency"]
    assert list(measured) == ["device", "batch", "threads", "dense_ms", "slim_ms"]
    assert (measured["batch"], measured["threads"]) == (3, torch.get_num_threads())
    assert measured["device"].startswith("cpu")
    assert measured["slim_ms"] / measured["dense_ms"] == pytest.approx(0.6, abs=0.05)
    assert count(slim.model) / count(model) == pytest.approx(0.6, abs=0.05)
    one = prune(model, DATA, budget=0.6, budget_of="latency", compensate=False)
    assert one.plan.notes["latency"]["batch"] == 1


def test_a_real_measurement_leaves_the_network_as_it_was():
    model = build("resnet18").train()
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    groups = list(find_units(model, ONE).groups.values())
    cost = Latency(model, groups, ONE)
    lost = fit_budget(cost, uniform_order(groups), 0.9)
    assert 0 < cost.of(lost) < 1e4
    assert cost.conditions["dense_ms"] > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_unknown_costs_and_budgets_out_of_reach_are_refused(clocked):
    model = build("resnet18")
    with pytest.raises(ValueError, match=r"prune\(budget_of='flops'\): expected one of 'macs', 'param"):
        prune(model, DATA, budget=0.5, budget_of="flops")
    for budget_of in ("parameters", "latency"):
        with pytest.raises(ValueError, match=rf"prune\(budget=1\.5\): expected the share of .* network's {budget_of}"):
            prune(model, DATA, budget=1.5, budget_of=budget_of)
        with pytest.raises(ValueError, match=rf"prune\(budget=0\.0001\): 0\.00\d\d of the {budget_of} remain when"):
            prune(model, DATA, budget=1e-4, budget_of=budget_of)
        with pytest.raises(
            ValueError, match=rf"prune\(budget=0\.2\): 0\.\d+ of the {budget_of} remain .* smaller round_"
        ):
            prune(model, DATA, budget=0.2, budget_of=budget_of, round_to=64)
    with pytest.raises(
        ValueError, match=r"prune\(round_to=129\): expected at most 128, the channels of the widest layer"
    ):
        prune(model, DATA, budget=0.5, round_to=129)
    with pytest.raises(ValueError, match=r"prune\(round_to=0\): expected a whole number of channels"):
        prune(model, DATA, budget=0.5, round_to=0)
