"""Ridge regression is least squares with more rows, whether solved in inputs or in samples, within the bytes stated."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
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


def bounded(count: int, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples some of whose errors are bounded on one side alone, or may be anything: with the least and the most."""
    x, e = samples(count, 2, features, 3, 1.0)
    kind = torch.rand(e.shape, generator=torch.Generator().manual_seed(2))
    return x, e, torch.where(kind < 0.3, -torch.inf, e), torch.where((kind > 0.8) | (kind < 0.05), torch.inf, e)


def slow_intervals(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Least squared distance to the intervals, by a general minimiser: coefficients with the offset last, its value."""
    penalty = ridge * x.var(0).mean()

    def objective(packed: np.ndarray) -> tuple[float, np.ndarray]:
        found = packed.reshape(lower.shape[1], -1)
        fitted = x @ found[:, :-1].T + found[:, -1]
        off = fitted - np.clip(fitted, lower, upper)
        slope = np.hstack([2 * off.T @ x / len(x) + 2 * penalty * found[:, :-1], 2 * off.mean(0)[:, None]])
        return np.square(off).sum() / len(x) + penalty * np.square(found[:, :-1]).sum(), slope.ravel()

    start = np.zeros(lower.shape[1] * (x.shape[1] + 1))
    best = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    return best.x.reshape(lower.shape[1], -1), best.fun


@pytest.mark.parametrize(("count", "features", "sizes"), [(400, 6, (3, 350, 47)), (30, 50, (9, 21))])
def test_with_intervals_it_is_least_squared_distance_to_them(count, features, sizes, monkeypatch):
    monkeypatch.setattr(home, "ROUNDS", 1000)
    x, e, lower, upper = bounded(count, features)
    regression = Ridge((2, features, 3), count, hold=True)
    for inputs, errors, *serving in zip(*(part.split(sizes) for part in (x, e, lower, upper)), strict=True):
        regression.add(inputs, errors, tuple(serving))
    solution = regression.solve(1e-1)
    assert (solution.samples is None) == (count > features)
    found, before, after = coefficients(solution), 0.0, 0.0
    for block in range(2):
        inputs, least, most = (part[:, block].numpy() for part in (x, lower, upper))
        slow, _ = slow_intervals(inputs, least, most, 1e-1)
        np.testing.assert_allclose(found[block], slow[:, :-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(solution.offset[block], slow[:, -1], rtol=1e-4, atol=1e-4)
        fitted = inputs @ found[block].numpy().T + solution.offset[block].numpy()
        after += np.square(fitted - np.clip(fitted, least, most)).sum() / count
        before += np.square(np.clip(0.0, least, most)).sum() / count
    assert solution.before == pytest.approx(before, rel=1e-9)
    assert solution.after == pytest.approx(after, rel=1e-6)
    assert solution.after < solution.before


@pytest.mark.parametrize(("count", "features"), [(400, 6), (30, 50)])
def test_every_round_gains(count, features, monkeypatch):
    x, e, lower, upper = bounded(count, features)

    def value(rounds: int) -> float:
        monkeypatch.setattr(home, "ROUNDS", rounds)
        regression = Ridge((2, features, 3), count, hold=True)
        regression.add(x, e, (lower, upper))
        solution = regression.solve(1e-1)
        penalty = 1e-1 * x.var(0, correction=0).mean(1)
        return solution.after + float((penalty[:, None, None] * coefficients(solution).square()).sum())

    found = [value(rounds) for rounds in (1, 2, 5, 10, 100)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < (1 - 1e-4) * found[0]


def test_what_can_be_fitted_exactly_is():
    """Whatever else would serve."""
    x, e, _, upper = bounded(400, 6)
    weight = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    e = (x.transpose(0, 1) @ weight).transpose(0, 1)
    regression = Ridge((2, 6, 3), 400, hold=True)
    regression.add(x, e, (torch.full_like(e, -torch.inf), torch.maximum(e, upper.nan_to_num(posinf=9.0))))
    solution = regression.solve(1e-12)
    torch.testing.assert_close(coefficients(solution), weight.mT, rtol=1e-5, atol=1e-6)
    assert solution.after < 1e-12


def test_without_held_samples_intervals_do_not_count():
    x, e, lower, upper = bounded(400, 6)
    plain, bare, held = Ridge((2, 6, 3), 400, hold=True), Ridge((2, 6, 3), 400), Ridge((2, 6, 3), 400, hold=True)
    plain.add(x, e)
    bare.add(x, e, (lower, upper))
    held.add(x, e, (lower, upper))
    plain, bare, held = (coefficients(regression.solve(1e-2)) for regression in (plain, bare, held))
    assert bare.equal(plain)
    assert not held.allclose(plain, rtol=0.1)


def test_calls_without_intervals_and_more_samples_than_announced_are_no_harm():
    x, e, lower, upper = bounded(400, 6)
    first, last = slice(0, 300), slice(300, 400)

    def fitted(samples: int, *parts: tuple[slice, bool]) -> Tensor:
        regression = Ridge((2, 6, 3), samples, hold=True)
        for rows, intervals in parts:
            regression.add(x[rows], e[rows], (lower[rows], upper[rows]) if intervals else None)
        return coefficients(regression.solve(1e-2))

    plain = fitted(400, (first, False), (last, False))
    torch.testing.assert_close(fitted(399, (first, True), (last, True)), plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fitted(400, (first, False), (last, True)), plain, rtol=1e-9, atol=1e-9)
    lower[last], upper[last] = e[last], e[last]
    mixed, same = fitted(400, (first, True), (last, False)), fitted(400, (first, True), (last, True))
    torch.testing.assert_close(mixed, same, rtol=1e-9, atol=1e-9)
    assert not mixed.allclose(plain, rtol=0.01)
