"""Checks of arguments that several public functions take."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from chanaxes_pl import (
    LesionExperiment,
    PruningExperiment,
    axis_correlations,
    compute_axes,
    layer_structure,
    prune,
    sensitivity,
)
from chanaxes_pl.core.errors import is_whole

SEEDED = {
    "prune": lambda model, data, seed: prune(model, data, budget=0.5, score="random", seed=seed),
    "sensitivity": lambda model, data, seed: sensitivity(model, data, seed=seed),
    "layer_structure": lambda model, data, seed: layer_structure(model, data, seed=seed),
    "LesionExperiment": lambda model, data, seed: LesionExperiment(seed=seed),
    "PruningExperiment": lambda model, data, seed: PruningExperiment(seed=seed),
}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model.append(nn.Linear(4, 3)), TensorDataset(torch.randn(64, 3, 6, 6), torch.arange(64) % 3)


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("seed", ["a", -1, 1.5, True, None, 2**63])
def test_what_is_no_seed_is_refused_before_anything_runs(small, name, seed):
    text = rf"{name}\(seed={seed!r}\): expected a whole number from 0 on, below 2 to the power of 63"
    with pytest.raises(ValueError, match=text):
        SEEDED[name](*small, seed)


def test_seeds_of_numpy_and_the_largest_are_seeds(small):
    model, data = small
    slim, same = (prune(model, data, budget=0.5, score="random", seed=seed) for seed in (3, np.int64(3)))
    assert slim.plan.kept == same.plan.kept
    assert all(map(torch.equal, slim.model.state_dict().values(), same.model.state_dict().values()))
    prune(model, data, budget=0.5, score="random", compensate="distill", probe_size=16, seed=2**63 - 1)


def test_resamples_below_none_are_refused(small):
    model, data = small
    with pytest.raises(ValueError, match=r"compute_axes\(resamples=-1\): expected a whole number from 0 on, such as"):
        compute_axes(model, data, resamples=-1)
    table = compute_axes(model, data).table
    with pytest.raises(ValueError, match=r"axis_correlations\(seed='a'\): expected a whole number"):
        axis_correlations(table, 10, seed="a")


@pytest.mark.parametrize(
    ("value", "whole"), [(1, True), (np.int32(1), True), (0, False), (True, False), (1.0, False), ("1", False)]
)
def test_whole_numbers(value, whole):
    assert is_whole(value, 1) == whole
