"""Ridge regression is least squares with more rows, whether solved in inputs or in samples, within the bytes stated."""

import numpy as np
import pytest
import torch
from torch import Tensor

from chanaxes_pl.compensation import ridge as home
from chanaxes_pl.compensation.ridge import Ridge, Solution, ridge_bytes, samples_within


def slow_ridge(x: np.ndarray, e: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with λ·(mean variance) of each predictor's as further observations of the coefficients."""
    features = x.shape[1]
    centred = x - x.mean(0)
    penalty = ridge * centred.var(0).mean()
    among = np.vstack([centred / np.sqrt(len(x)), np.sqrt(penalty) * np.eye(features)])
    toward = np.vstack([(e - e.mean(0)) / np.sqrt(len(x)), np.zeros((features, e.shape[1]))])
    fitted = np.linalg.lstsq(among, toward, rcond=None)[0].T
    return fitted, e.mean(0) - fitted @ x.mean(0)


def solved(x: Tensor, e: Tensor, ridge: float, sizes: tuple[int, ...] | None = None) -> Solution:
    regression = Ridge((x.shape[1], x.shape[2], e.shape[2]), len(x))
    for inputs, errors in zip(x.split(sizes or len(x)), e.split(sizes or len(x)), strict=True):
        regression.add(inputs, errors)
    solution = regression.solve(ridge)
    assert solution is not None
    return solution


def coefficients(solution: Solution, matrix: Tensor | None = None) -> Tensor:
    return torch.cat([change for _, change in solution.changes(matrix)], 2)


def samples(count: int, blocks: int, features: int, outputs: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Correlated inputs, and errors that depend on them."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(blocks, count, features, generator=rng, dtype=torch.float64)
    x = x @ (torch.randn(blocks, features, features, generator=rng, dtype=torch.float64) + torch.eye(features))
    e = x @ torch.randn(blocks, features, outputs, generator=rng, dtype=torch.float64) / features
    e += torch.randn(blocks, count, outputs, generator=rng, dtype=torch.float64)
    return (x + offset).transpose(0, 1).contiguous(), (e + offset / 100).transpose(0, 1).contiguous()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("ridge", [1e-3, 10.0])
@pytest.mark.parametrize(
    ("count", "features", "sizes"),
    [(200, 6, None), (700, 6, (3, 500, 150, 47)), (900, 300, (500, 400)), (40, 60, (9, 31)), (300, 301, None)],
)
def test_ridge_is_least_squares(offset, ridge, count, features, sizes):
    """In float64 from few inputs or from samples; what is summed in between is in the samples' own precision."""
    x, e = samples(count, 3, features, 2, offset)
    solution = solved(x, e, ridge, sizes)
    assert (solution.samples is None) == (count > features)
    found = coefficients(solution)
    before = after = 0.0
    for block in range(3):
        inputs, errors = x[:, block].numpy(), e[:, block].numpy()
        slow, slow_offset = slow_ridge(inputs, errors, ridge)
        np.testing.assert_allclose(found[block], slow, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(solution.offset[block], slow_offset, rtol=1e-6, atol=1e-8 * (1 + offset))
        before += np.square(errors).mean(0).sum()
        after += np.square(errors - inputs @ slow.T - slow_offset).mean(0).sum()
    assert solution.before == pytest.approx(before, rel=1e-9)
    assert solution.after == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("widened", [1 << 23, 50])
def test_both_forms_are_one(widened, monkeypatch):
    """Every sample twice is the same regression, which then has more samples than inputs."""
    monkeypatch.setattr(home, "_WIDENED", widened)
    x, e = samples(40, 2, 64, 5, 3.0)
    few, many = solved(x, e, 1e-2), solved(torch.cat([x, x]), torch.cat([e, e]), 1e-2)
    assert few.samples is not None
    assert many.samples is None
    torch.testing.assert_close(coefficients(few), coefficients(many), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(few.offset, many.offset, rtol=1e-8, atol=1e-8)
    assert few.before == pytest.approx(many.before, rel=1e-10)
    assert few.after == pytest.approx(many.after, rel=1e-8)
    matrix = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for solution in (few, many):
        product = coefficients(solution, matrix)
        torch.testing.assert_close(product, matrix @ coefficients(solution), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("count", "features"), [(300, 4), (30, 90)])
def test_much_ridge_corrects_the_mean_alone(count, features):
    x, e = samples(count, 1, features, 3, 2.0)
    solution = solved(x, e, 1e9)
    assert coefficients(solution).abs().max() < 1e-6
    torch.testing.assert_close(solution.offset, e.mean(0), rtol=1e-5, atol=1e-5)
    assert solution.after == pytest.approx(float(e.var(0, unbiased=False).sum()), rel=1e-6)


def test_in_single_precision_it_is_as_good_as_its_samples():
    x, e = (part.float() for part in samples(2000, 2, 300, 4, 1.0))
    exact, found = solved(x.double(), e.double(), 1e-2), solved(x, e, 1e-2, (1500, 500))
    torch.testing.assert_close(coefficients(found), coefficients(exact), rtol=1e-4, atol=1e-5)
    assert found.after == pytest.approx(exact.after, rel=1e-5)


def test_without_samples_there_is_no_solution():
    assert Ridge((1, 2, 3), 10).solve(1e-2) is None


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("memory", [1e5, 1e6, 1e7, 1e12])
@pytest.mark.parametrize("samples", [10, 300, 100_000])
@pytest.mark.parametrize("shape", [(1, 100, 50), (64, 9, 1), (1, 5000, 300)])
def test_as_many_samples_as_fit(shape, samples, memory, itemsize):
    within = samples_within(shape, samples, memory, itemsize)
    assert 0 <= within <= samples
    assert within == 0 or ridge_bytes(shape, within, itemsize) <= memory
    assert within == samples or ridge_bytes(shape, samples, itemsize) > memory
    if within < min(samples, shape[1]) - 1:
        assert ridge_bytes(shape, within + 1, itemsize) > memory
