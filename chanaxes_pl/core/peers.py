"""Peer reconstruction: how well a channel's same-layer peers together could stand in for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chanaxes_pl.core.moments import Moments

RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class PeerReconstruction:
    """Ridge regression of every channel on its peers, in units of standard deviations.

    Attributes:
        live: ``[C]`` mask, the channels that vary.
        precision: ``[L, L]``, K = (ρ + λI)⁻¹ over the live channels.
        r2: ``[C]``, the share of a channel's variance that all its peers explain, 0 to 1; NaN for dead channels.
        hull_size: ``[C]``, how many peers, taken by |ρ|, reach :data:`HULL_SHARE` of ``r2``; the
            cap (10) where that many do not.
        hull_score: ``[C]``, ``r2 / hull_size``.
    """

    live: Tensor
    precision: Tensor
    r2: Tensor
    hull_size: Tensor
    hull_score: Tensor

    @cached_property
    def coefficients(self) -> Tensor:
        """``[C, C]``, row i holds β_i, the weights of the peers that rebuild channel i.

        0 on the diagonal and for dead channels.
        """
        beta = (-self.precision / self.precision.diagonal()[:, None]).fill_diagonal_(0.0)
        channels = len(self.live)
        return beta.new_zeros(channels, channels).masked_scatter_(torch.outer(self.live, self.live), beta)


#: The share of the all-peer R² that a compact hull has to reach, and the most peers it may take.
HULL_SHARE = 0.95
HULL_CAP = 10


def peer_reconstruction(local: Moments, ridge: float = RIDGE) -> PeerReconstruction:
    """Reconstruct every channel from all its peers at once, and from the smallest sufficient few.

    One Cholesky factor serves all channels: with K = (ρ + λI)⁻¹ the coefficients are
    β_ij = −K_ij / K_ii and R²_i = 1 + λ − 1/K_ii + λ‖β_i‖².

    Args:
        local: moments of the layer's C channels over local samples.
        ridge: λ, in units of a channel's variance, > 0.
    """
    live = local.live
    rho = local.select(live).correlation
    precision, explained = _all_peers(rho, ridge)
    size = _hull_sizes(rho, explained, ridge)
    dead = torch.full_like(local.mean, torch.nan)
    r2, hull_size, hull_score = (dead.masked_scatter(live, values) for values in (explained, size, explained / size))
    return PeerReconstruction(live, precision, r2, hull_size, hull_score)


def peer_r2(local: Moments, ridge: float = RIDGE) -> Tensor:
    """``[C]``: just the ``r2`` of :func:`peer_reconstruction`."""
    live = local.live
    explained = _all_peers(local.select(live).correlation, ridge)[1]
    return torch.full_like(local.mean, torch.nan).masked_scatter(live, explained)


def _all_peers(rho: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``[C, C]`` K = (ρ + λI)⁻¹, and ``[C]`` R² of every channel on all its peers."""
    regular = rho.clone()
    regular.diagonal().add_(ridge)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    own = precision.diagonal()
    weight = (torch.linalg.vector_norm(precision, dim=1) / own).square() - 1  # ‖β_i‖², without β
    return precision, (1 + ridge - 1 / own + ridge * weight).clamp(0.0, 1.0)


def hull_coefficients(local: Moments, ridge: float = RIDGE) -> Tensor:
    """Ridge regression of every channel on its compact hull alone, in units of standard deviations.

    Args:
        local: moments of the layer's C channels over local samples.
        ridge: λ, in units of a channel's variance, > 0.

    Returns:
        ``[C, C]``, row i holds the weights of the ``hull_size`` peers that stand in for channel i, 0 elsewhere; a row
        of zeros for a dead channel.
    """
    live = local.live
    rho = local.select(live).correlation
    size = _hull_sizes(rho, _all_peers(rho, ridge)[1], ridge)
    coefficients = torch.zeros_like(local.scatter)
    if len(rho) < 2:
        return coefficients
    nearest, beta, _ = _nested(rho, ridge)
    chosen = beta[torch.arange(len(rho), device=rho.device), size.long() - 1]
    coefficients[torch.outer(live, live)] = torch.zeros_like(rho).scatter(1, nearest, chosen).flatten()
    return coefficients


def _hull_sizes(rho: Tensor, r2: Tensor, ridge: float) -> Tensor:
    """``[C]``, the number of nearest peers whose own R² reaches ``HULL_SHARE`` of ``r2``."""
    if len(rho) < 2:
        return torch.full_like(r2, torch.nan)
    enough = _nested(rho, ridge)[2] >= HULL_SHARE * r2[:, None]
    enough[:, -1] = True
    return enough.int().argmax(1).to(r2.dtype) + 1


def _nested(rho: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The K nearest peers ``[C, K]``, and for the first k of them coefficients ``[C, k, K]`` and R² ``[C, k]``."""
    cap = min(HULL_CAP, len(rho) - 1)
    nearest = rho.abs().fill_diagonal_(-1.0).topk(cap).indices
    toward = rho.gather(1, nearest)
    among = rho[nearest[:, :, None], nearest[:, None, :]]
    identity = torch.eye(cap, dtype=rho.dtype, device=rho.device)
    factor = torch.linalg.cholesky(among + ridge * identity)
    # The first k rows of the factor are the factor of the first k peers: one factor serves all k.
    half = torch.linalg.solve_triangular(factor, toward[:, :, None], upper=False)
    coefficients, reached = rho.new_zeros(len(rho), cap, cap), []
    for k in range(1, cap + 1):
        beta = torch.linalg.solve_triangular(factor[:, :k, :k].mT, half[:, :k], upper=True)
        coefficients[:, k - 1, :k] = beta[:, :, 0]
        reached.append((half[:, :k].square() + ridge * beta.square()).sum((1, 2)))
    return nearest, coefficients, torch.stack(reached, 1)
