"""The four metrics of the two axes: each gives one value per channel, in nats, from moments of a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.gaussian import Association
from chanaxes_pl.core.moments import Moments, median
from chanaxes_pl.core.peers import peer_overlap


def input_capture(local: Moments, noise: str | float = "median") -> Tensor:
    """Compute the Gaussian information between a channel's output and its input patch, ½ ln(1 + J_i / σ₀²).

    For an affine channel the signal power J_i = w_iᵀ Σ_X w_i is the variance of its output.

    Args:
        local: moments of the layer's C channels over local samples.
        noise: noise power σ₀²: ``"median"`` or ``"mean"`` of J over the layer's live channels, a quantile of J such
            as ``"q0.25"``, or a number in the output's unit squared.

    Returns:
        ``[C]``, nats; NaN for dead channels.

    Raises:
        ValueError: if ``noise`` is none of these.
    """
    power = torch.where(local.live, local.variance, torch.nan)
    return captured(power, _noise_power(power[local.live], noise))


def captured(power: Tensor, noise: Tensor | float) -> Tensor:
    """Compute the input capture of a signal power J and a noise power σ₀² in the same unit, ½ ln(1 + J / σ₀²).

    Args:
        power: J, any shape.
        noise: σ₀², a scalar or a shape that broadcasts with ``power``.

    Returns:
        Nats, in the broadcast shape.
    """
    return 0.5 * torch.log1p(power / noise)


def check_noise(noise: str | float) -> None:
    """Raise ValueError if :func:`input_capture` cannot use ``noise``."""
    _noise_power(torch.ones(1), noise)


def _noise_power(power: Tensor, noise: str | float) -> Tensor:
    if len(power) == 0:
        return power.new_tensor(torch.nan)
    if noise == "median":
        return median(power)
    if noise == "mean":
        return power.mean()
    text = str(noise)  # a command line may give a number as text
    try:
        value = float(text.removeprefix("q"))
    except ValueError:
        value = float("nan")
    if text.startswith("q") and 0 < value <= 1:
        return torch.quantile(power, value)
    if not text.startswith("q") and 0 < value < math.inf:
        return power.new_tensor(value)
    raise ArgumentError(
        f"noise={noise!r}", "expected 'median', 'mean', a quantile such as 'q0.25', or a number above 0"
    )


def task_information(association: Association) -> Tensor:
    """Compute the Gaussian information between a channel's image mean and the target, −½ ln(1 − r_i²).

    Args:
        association: association of the layer's C channels with the target over image samples.

    Returns:
        ``[C]``, nats.
    """
    return association.single


def target_excess(association: Association, candidates: int = 50, partners: int = 10) -> Tensor:
    """Compute the mean Gaussian MMI synergy of a channel with its best partners.

    The excess of a pair is I(T; y_i, y_j) − max(I(T; y_i), I(T; y_j)). A channel's candidates are the peers with the
    highest absolute correlation, and its partners are the candidates with the largest excess.

    Args:
        association: association of the layer's C channels with the target over image samples.
        candidates: number of candidates; all peers if there are fewer.
        partners: number of partners to average over; all candidates if there are fewer.

    Returns:
        ``[C]``, nats, ≥ 0; NaN in a layer of one channel.
    """
    single = association.single
    count = len(single)
    if count < 2:
        return torch.full_like(single, torch.nan)
    near = association.nearest(min(candidates, count - 1))
    excess = association.with_peers(near) - torch.maximum(single[:, None], single[near])
    return excess.topk(min(partners, excess.shape[1]), sorted=False).values.mean(1)


#: Local axis: moments of a layer's channels over local samples → ``[C]``.
LOCAL_METRICS = {"input_capture": input_capture, "peer_overlap": peer_overlap}
#: Target axis: association of a layer's channels with the target over image samples → ``[C]``.
TARGET_METRICS = {"task_information": task_information, "target_excess": target_excess}
#: The four metrics that make up the two axes.
METRICS = LOCAL_METRICS | TARGET_METRICS
