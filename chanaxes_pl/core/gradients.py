"""Closed-form gradients of a linear channel's Gaussian information with respect to its weights.

Let y = wᵀx with x ~ N(0, Σ), Cov(x, T) = c and Var T = σ_T². Then Var y = D = wᵀΣw and Cov(y, T) = b = wᵀc, and

- input capture I_X = ½ ln(1 + D/σ₀²) grows along Σw,
- task information I_T = −½ ln(1 − b²/(D σ_T²)) grows along b·g, with the residual g = c − (b/D) Σw.

The residual is c minus its projection on Σw in the inner product of Σ⁻¹: ⟨Σw, g⟩_{Σ⁻¹} = wᵀg = b − (b/D) D = 0. Their
Euclidean product need not vanish; its cosine says how much a gradient step on one information changes the other.
Definitions: arXiv 2605.07086.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A residual below this share of c is rounding error, and has no direction.
_ROUNDING = 1e-6


def capture_gradient(weights: Tensor, covariance: Tensor, noise: Tensor | float) -> Tensor:
    """Compute the gradient of input capture, Σw / (σ₀² + D).

    Args:
        weights: ``[C, F]``, one channel per row.
        covariance: ``[F, F]``, Σ of the input.
        noise: scalar or ``[C]``, σ₀² in the output's unit squared, held fixed.

    Returns:
        ``[C, F]``, nats per unit of weight.
    """
    sigma_w = weights @ covariance
    return sigma_w / (noise + _dot(weights, sigma_w)).unsqueeze(-1)


def residual(weights: Tensor, covariance: Tensor, cross: Tensor) -> Tensor:
    """Compute the direction in which task information changes, g = c − (b/D) Σw.

    Args:
        weights: ``[C, F]``, one channel per row.
        covariance: ``[F, F]``, Σ of the input.
        cross: ``[F]``, c, the covariance of input and target.

    Returns:
        ``[C, F]``, in the unit of ``cross``; NaN for a channel without variance.

    Example:
        >>> import torch
        >>> w, sigma, c = torch.tensor([[1.0, 1.0]]), torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 1.0])
        >>> g = residual(w, sigma, c)
        >>> g, w @ g.T
        (tensor([[-0.5000,  0.5000]]), tensor([[0.]]))
    """
    sigma_w = weights @ covariance
    return residual_of(sigma_w, _dot(weights, sigma_w), cross, weights @ cross)


def residual_of(sigma_w: Tensor, power: Tensor, cross: Tensor, shared: Tensor) -> Tensor:
    """Compute the residual from moments that can be measured without the weights.

    Args:
        sigma_w: ``[C, F]``, Σw = Cov(x, y).
        power: ``[C]``, D = Var y.
        cross: c = Cov(x, T), ``[F]``, or ``[C, F]`` if channels see different inputs.
        shared: ``[C]``, b = Cov(y, T).

    Returns:
        ``[C, F]``, in the unit of ``cross``; NaN for a channel without variance.
    """
    return cross - (shared / power).unsqueeze(-1) * sigma_w


def task_gradient(weights: Tensor, covariance: Tensor, cross: Tensor, target_variance: Tensor | float) -> Tensor:
    """Compute the gradient of task information, b / (σ_T² D − b²) · g.

    Args:
        weights: ``[C, F]``, one channel per row.
        covariance: ``[F, F]``, Σ of the input.
        cross: ``[F]``, c, the covariance of input and target.
        target_variance: scalar, σ_T², in the target's unit squared.

    Returns:
        ``[C, F]``, nats per unit of weight; NaN for a channel without variance.
    """
    sigma_w = weights @ covariance
    power, shared = _dot(weights, sigma_w), weights @ cross
    rate = shared / (target_variance * power - shared.square())
    return rate.unsqueeze(-1) * residual_of(sigma_w, power, cross, shared)


def alignment(sigma_w: Tensor, power: Tensor, cross: Tensor, shared: Tensor) -> dict[str, Tensor]:
    """Compute the cosine between the gradients of input capture and task information, and its parts, for C channels.

    Args:
        sigma_w: ``[C, F]``, Σw = Cov(x, y).
        power: ``[C]``, D = Var y.
        cross: ``[C, F]``, c = Cov(x, T).
        shared: ``[C]``, b = Cov(y, T).

    Returns:
        ``[C]`` each: ``alignment``, cos(Σw, b·g) = sign(b)·cos(Σw, g), NaN if the gradient of task information is 0
        because b is 0 or g is 0 up to rounding (as with a single input); ``signal_power``, D; ``task_covariance``, b;
        ``capture_norm``, ‖Σw‖; ``task_norm``, ‖c‖; ``residual_norm``, ‖g‖. Other products follow from these and
        Σw·c = sign(b)·alignment·‖Σw‖·‖g‖ + (b/D)·‖Σw‖².
    """
    residuals = residual_of(sigma_w, power, cross, shared)
    capture, task, left = (vectors.norm(dim=1) for vectors in (sigma_w, cross, residuals))
    angle = shared.sign() * cosine(sigma_w, residuals)
    return {
        "alignment": torch.where((left > _ROUNDING * task) & (shared != 0), angle, torch.nan),
        "signal_power": power,
        "task_covariance": shared,
        "capture_norm": capture,
        "task_norm": task,
        "residual_norm": left,
    }


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Compute the cosine of the Euclidean angle between rows.

    Args:
        first: ``[C, F]``.
        second: ``[C, F]``, or ``[F]`` for one direction.

    Returns:
        ``[C]``, between −1 and 1 up to rounding; NaN, not 0, if a row is zero.

    Example:
        >>> import torch
        >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0.6000,    nan])
    """
    return _dot(first, second) / (first.norm(dim=-1) * second.norm(dim=-1))


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(-1)
