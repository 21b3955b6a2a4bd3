"""Closed-form gradients of Gaussian information: against autograd, with the laws of the residual."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from chanaxes_pl.core.gradients import alignment, capture_gradient, cosine, residual, residual_of, task_gradient

SIZES = {"channels": st.integers(1, 6), "inputs": st.integers(2, 9), "seed": st.integers(0, 10_000)}
#: A unit of input, weight and target: nothing may depend on it.
UNITS = st.sampled_from([1e-6, 1.0, 1e4])


def drawn(channels: int, inputs: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, float]:
    """Weights, Σ with eigenvalues over three decades, c, and a variance of T that leaves R² = ½."""
    generator = torch.Generator().manual_seed(seed)
    weights, cross = (torch.randn(n, inputs, dtype=torch.float64, generator=generator) for n in (channels, 1))
    basis = torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)).Q
    covariance = scale**2 * basis @ torch.diag(torch.logspace(-2, 1, inputs, dtype=torch.float64)) @ basis.T
    covariance, cross = (covariance + covariance.T) / 2, scale * cross[0]
    return weights, covariance, cross, 2 * float(cross @ torch.linalg.solve(covariance, cross))


def zoo() -> dict[str, tuple[Tensor, Tensor, Tensor, float]]:
    """Cases that go wrong first."""
    weights, covariance, cross, variance = drawn(4, 5, 0)
    across = torch.stack([cross[1], -cross[0], *torch.zeros(3)]).double()  # b = 0
    samples = 1e4 + torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moments = torch.cov(samples.T, correction=0)
    return {
        "plain": (weights, covariance, cross, variance),
        "D of 1e-12": (1e-6 * weights, covariance, cross, variance),
        "input of 1e4": drawn(4, 5, 0, scale=1e4),
        "mean of 1e4": (weights, moments[:5, :5], moments[:5, 5], float(moments[5, 5])),
        "repeated channels": (weights[[0, 0, 1, 1]], covariance, cross, variance),
        "opposite channels": (torch.stack([weights[0], -weights[0]]), covariance, cross, variance),
        "at the optimum": (torch.linalg.solve(covariance, cross)[None], covariance, cross, variance),
        "knows nothing": (across[None], covariance, cross, variance),
        "singular Σ": (weights, torch.outer(cross, cross) + torch.diag(torch.tensor([1.0, 0, 0, 0, 0])), cross, 3.0),
        "one input": drawn(3, 1, 0),
    }


def information_terms(weights: Tensor, covariance: Tensor, cross: Tensor, variance: float, noise: float):
    """I_X and I_T as they are defined, of weights that want a gradient."""
    power = torch.einsum("ci,ij,cj->c", weights, covariance, weights)
    known = (weights @ cross).square() / (power * variance)
    return torch.log(1 + power / noise) / 2, -torch.log(1 - known) / 2


def by_autograd(case, noise: float) -> list[Tensor]:
    weights = case[0].clone().requires_grad_()
    values = information_terms(weights, *case[1:], noise)
    return [torch.autograd.grad(value.sum(), weights, retain_graph=True)[0] for value in values]


def close(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Every channel's row to 1e-9 of its own length, or of what it is the difference of."""
    scale = (expected if scale is None else scale).norm(dim=-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("name", zoo())
def test_gradients_are_those_of_autograd(name, noise):
    case = zoo()[name]
    weights, covariance, cross, variance = case
    capture, task = by_autograd(case, noise)
    close(capture_gradient(weights, covariance, noise), capture)
    power, shared = torch.einsum("ci,ij,cj->c", weights, covariance, weights), weights @ cross
    rate = shared / (variance * power - shared.square())
    close(task_gradient(weights, covariance, cross, variance), task, rate[:, None] * cross)


def test_alignment_is_the_cosine_between_the_gradients_with_its_sign():
    """Of autograd's gradients of both information terms; channels whose covariance with the target is < 0 included."""
    case = weights, covariance, cross, _ = zoo()["plain"]
    case = (torch.cat([weights, -weights]), *case[1:])
    capture, task = by_autograd(case, noise=1.0)
    sigma_w = case[0] @ covariance
    power, shared = (case[0] * sigma_w).sum(1), case[0] @ cross
    assert (shared < 0).any()
    assert (shared > 0).any()
    found = alignment(sigma_w, power, cross.expand_as(case[0]), shared)["alignment"]
    assert_close(found, torch.nn.functional.cosine_similarity(capture, task), rtol=1e-9, atol=1e-12)


def test_alignment_is_undefined_where_task_information_has_no_gradient():
    sigma_w, cross = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    found = alignment(sigma_w, torch.ones(1), cross, torch.zeros(1))["alignment"]
    assert found.isnan().all()


@settings(deadline=None, max_examples=60)
@given(**SIZES, scale=UNITS)
def test_gradients_are_those_of_autograd_in_any_unit(channels, inputs, seed, scale):
    case = drawn(channels, inputs, seed, scale)
    weights, covariance, cross, variance = case
    noise = float((weights @ covariance * weights).sum(1).median())
    capture, task = by_autograd(case, noise)
    close(capture_gradient(weights, covariance, noise), capture)
    power, shared = (weights @ covariance * weights).sum(1), weights @ cross
    close(
        task_gradient(weights, covariance, cross, variance),
        task,
        (shared / (variance * power - shared.square()))[:, None] * cross,
    )


def test_a_noise_for_every_channel():
    weights, covariance, _, _ = zoo()["plain"]
    noise = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)
    expected = torch.cat([capture_gradient(w[None], covariance, float(n)) for w, n in zip(weights, noise, strict=True)])
    assert_close(capture_gradient(weights, covariance, noise), expected)


@settings(deadline=None)
@given(**SIZES, scale=UNITS)
def test_the_residual_is_orthogonal_where_it_has_to_be(channels, inputs, seed, scale):
    """⟨Σw, g⟩ = 0 in the inner product of Σ⁻¹, and wᵀg = 0; not so in the Euclidean one, nor with the wrong sign."""
    weights, covariance, cross, _ = drawn(channels, inputs, seed, scale)
    sigma_w, left = weights @ covariance, residual(weights, covariance, cross)
    power, shared = (weights * sigma_w).sum(1), weights @ cross

    def product(first: Tensor, second: Tensor) -> Tensor:
        return (first * torch.linalg.solve(covariance, second.T).T).sum(1)

    unit = (product(sigma_w, sigma_w) * product(cross[None], cross[None])).sqrt()
    assert (product(sigma_w, left) / unit).abs().max() < 1e-9
    assert ((weights * left).sum(1) / (weights.norm(dim=1) * cross.norm())).abs().max() < 1e-10
    wrong = cross + (shared / power)[:, None] * sigma_w
    assert_close(product(sigma_w, wrong) / unit, 2 * shared / unit, rtol=1e-6, atol=1e-9)


def test_the_euclidean_product_does_not_vanish():
    """Else the angle would have nothing to say; and the wrong sign would be noticed."""
    weights, covariance, cross, variance = zoo()["plain"]
    assert cosine(weights @ covariance, residual(weights, covariance, cross)).abs().min() > 0.05
    task = by_autograd((weights, covariance, cross, variance), 1.0)[1]
    wrong = cross + (weights @ cross / (weights @ covariance * weights).sum(1))[:, None] * (weights @ covariance)
    assert cosine(wrong, task).abs().min() < 0.9
    assert_close(cosine(residual(weights, covariance, cross), task).abs(), torch.ones(4).double())


def test_on_a_white_input_both_gradients_are_orthogonal():
    weights, _, cross, _ = zoo()["plain"]
    identity = torch.eye(5, dtype=torch.float64)
    assert cosine(weights @ identity, residual(weights, identity, cross)).abs().max() < 1e-12


def test_task_information_does_not_change_with_the_norm():
    weights, covariance, cross, variance = zoo()["plain"]
    tripled = task_gradient(3 * weights, covariance, cross, variance)
    assert_close(tripled, task_gradient(weights, covariance, cross, variance) / 3)


def measured(weights, covariance, cross):
    """``alignment`` of what the moments of these channels come to, and Σw."""
    sigma_w = weights @ covariance
    return sigma_w, alignment(sigma_w, (weights * sigma_w).sum(1), cross.expand_as(weights), weights @ cross)


@settings(deadline=None)
@given(**SIZES, scale=UNITS)
def test_measured_moments_give_the_weights_angle(channels, inputs, seed, scale):
    """``alignment`` of Cov(x, y), Var y, Cov(x, T) and Cov(y, T) against the definition by the weights, in NumPy."""
    weights, covariance, cross, _ = drawn(channels, inputs, seed, scale)
    _, found = measured(weights, covariance, cross)
    for channel, w in enumerate(weights.numpy()):
        direction, c = covariance.numpy() @ w, cross.numpy()
        left = c - (w @ c) / (w @ direction) * direction
        expected = {
            "alignment": np.sign(w @ c) * (direction @ left) / np.linalg.norm(direction) / np.linalg.norm(left),
            "signal_power": w @ direction,
            "task_covariance": w @ c,
            "capture_norm": np.linalg.norm(direction),
            "task_norm": np.linalg.norm(c),
            "residual_norm": np.linalg.norm(left),
        }
        assert set(found) == set(expected)
        tolerance = 1e-9 * max(1, expected["task_norm"] / expected["residual_norm"])
        for name, value in expected.items():
            unit = 1.0 if name == "alignment" else scale * {"task_covariance": np.linalg.norm(w)}.get(name, 0)
            np.testing.assert_allclose(found[name][channel], value, 10 * tolerance, tolerance * unit, err_msg=name)


@settings(deadline=None)
@given(**SIZES, scale=UNITS)
def test_ingredients_put_the_product_together(channels, inputs, seed, scale):
    """Σw·c = sign(b) alignment ‖Σw‖ ‖g‖ + (b/D) ‖Σw‖²."""
    weights, covariance, cross, _ = drawn(channels, inputs, seed, scale)
    sigma_w, found = measured(weights, covariance, cross)
    again = found["task_covariance"].sign() * found["alignment"] * found["capture_norm"] * found["residual_norm"]
    again += found["task_covariance"] / found["signal_power"] * found["capture_norm"].square()
    assert_close(again / (found["capture_norm"] * found["task_norm"]), cosine(sigma_w, cross), rtol=0, atol=1e-8)


def test_no_residual_has_no_angle():
    """One input, and a channel that already is at its best: g is 0, the angle NaN, though rounding leaves something."""
    for name in ("one input", "at the optimum"):
        weights, covariance, cross, _ = zoo()[name]
        sigma_w = weights @ covariance
        found = alignment(sigma_w, (weights * sigma_w).sum(1), cross.expand_as(weights), weights @ cross)
        assert found["alignment"].isnan().all()
        assert (found["residual_norm"] <= 1e-9 * found["task_norm"]).all()
    weights = torch.zeros(1, 3, dtype=torch.float64)
    assert residual(weights, torch.eye(3).double(), torch.ones(3).double()).isnan().all()  # no variance, no direction


def test_channels_may_see_different_inputs():
    weights, covariance, cross, _ = zoo()["plain"]
    sigma_w, others = weights @ covariance, torch.stack([cross, 2 * cross, -cross, cross.flip(0)])
    power, shared = (weights * sigma_w).sum(1), (weights * others).sum(1)
    rows = [residual(w[None], covariance, c) for w, c in zip(weights, others, strict=True)]
    assert_close(residual_of(sigma_w, power, others, shared), torch.cat(rows))
