"""Input capture: how much of its input a channel carries."""

from __future__ import annotations

import torch
from torch import Tensor

from chanaxes_pl.moments import Moments, median


def input_capture(local: Moments, noise: str | float = "median") -> Tensor:
    """Gaussian information between a channel's output and its input patch, ½ ln(1 + J_i / σ₀²).

    For an affine channel the signal power J_i = w_iᵀ Σ_X w_i is the variance of its output.

    Args:
        local: moments of the layer's C channels over local samples.
        noise: σ₀², the noise power that the signal is set against: ``"median"`` or ``"mean"`` of J over
            the layer's live channels, ``"q0.25"`` for a quantile of it, or a number in the output's
            unit squared.

    Returns:
        ``[C]``, nats; NaN for dead channels.

    Raises:
        ValueError: if ``noise`` is none of these.
    """
    power = torch.where(local.live, local.variance, torch.nan)
    return 0.5 * torch.log1p(power / _noise_power(power[local.live], noise))


def check_noise(noise: str | float) -> None:
    """Refuse a ``noise`` that :func:`input_capture` could not use, before any data is there."""
    _noise_power(torch.ones(1), noise)


def _noise_power(power: Tensor, noise: str | float) -> Tensor:
    if len(power) == 0:
        return power.new_tensor(torch.nan)
    if isinstance(noise, str):
        if noise == "median":
            return median(power)
        if noise == "mean":
            return power.mean()
        level = _quantile_level(noise)
        if level is not None:
            return torch.quantile(power, level)
    elif noise > 0:
        return power.new_tensor(float(noise))
    raise ValueError(f"noise={noise!r}: expected 'median', 'mean', a quantile such as 'q0.25', or a number above 0")


def _quantile_level(noise: str) -> float | None:
    try:
        level = float(noise.removeprefix("q"))
    except ValueError:
        return None
    return level if noise.startswith("q") and 0 < level <= 1 else None
