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
    return captured(power, _noise_power(power[local.live], noise))


def captured(power: Tensor, noise: Tensor | float) -> Tensor:
    """Input capture of a signal power J against a noise power σ₀² of the same unit, ½ ln(1 + J / σ₀²).

    Args:
        power: any shape.
        noise: scalar, or a shape that broadcasts with ``power``.

    Returns:
        The shape of both, nats.
    """
    return 0.5 * torch.log1p(power / noise)


def check_noise(noise: str | float) -> None:
    """Refuse a ``noise`` that :func:`input_capture` could not use, before any data is there."""
    _noise_power(torch.ones(1), noise)


def _noise_power(power: Tensor, noise: str | float) -> Tensor:
    if len(power) == 0:
        return power.new_tensor(torch.nan)
    if noise == "median":
        return median(power)
    if noise == "mean":
        return power.mean()
    text = str(noise)  # a number may come as text, from a command line
    try:
        value = float(text.removeprefix("q"))
    except ValueError:
        value = float("nan")
    if text.startswith("q") and 0 < value <= 1:
        return torch.quantile(power, value)
    if not text.startswith("q") and value > 0:
        return power.new_tensor(value)
    raise ValueError(f"noise={noise!r}: expected 'median', 'mean', a quantile such as 'q0.25', or a number above 0")
