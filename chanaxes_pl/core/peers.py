"""What a channel shares with the other channels of its layer: peer overlap, and reconstruction by its peers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chanaxes_pl.core.gaussian import information
from chanaxes_pl.core.moments import Moments

#: Default ridge λ, in units of a channel's variance.
RIDGE = 1e-3


def peer_overlap(local: Moments) -> Tensor:
    """Compute the mean pairwise Gaussian information between a channel and its live peers.

    Args:
        local: moments of the layer's C channels over local samples.

    Returns:
        ``[C]``, nats; NaN for dead channels, and for all channels if fewer than two are live.
    """
    live = local.live
    shared = information(local.select(live).correlation.square()).fill_diagonal_(0.0)
    overlap = torch.full_like(local.mean, torch.nan)
    overlap[live] = shared.sum(0) / (len(shared) - 1)
    return overlap


@dataclass(frozen=True, eq=False)
class PeerReconstruction:
    """Ridge regression of every channel on its peers, in units of standard deviations.

    Attributes:
        live: ``[C]`` mask of the channels that vary.
        precision: ``[L, L]``, K = (ρ + λI)⁻¹ over the live channels.
        r2: ``[C]``, the share of a channel's variance that all its peers explain, 0 to 1; NaN for dead channels.
        hull_size: ``[C]``, number of peers, in the order of |ρ|, that reach :data:`HULL_SHARE` of ``r2``; at most
            :data:`HULL_CAP`.
        hull_score: ``[C]``, ``r2 / hull_size``.
    """

    live: Tensor
    precision: Tensor
    r2: Tensor
    hull_size: Tensor
    hull_score: Tensor

    @cached_property
    def coefficients(self) -> Tensor:
        """Coefficients ``[C, C]``: row i holds β_i, which rebuilds channel i from its peers.

        They are 0 on the diagonal and for dead channels.
        """
        beta = (-self.precision / self.precision.diagonal()[:, None]).fill_diagonal_(0.0)
        channels = len(self.live)
        return beta.new_zeros(channels, channels).masked_scatter_(torch.outer(self.live, self.live), beta)


#: Share of the all-peer R² that a compact hull has to reach, and its largest number of peers.
HULL_SHARE = 0.95
HULL_CAP = 10


def peer_reconstruction(local: Moments, ridge: float = RIDGE) -> PeerReconstruction:
    """Reconstruct every channel from all its peers, and find the size of its compact hull.

    One Cholesky factor serves all channels: with K = (ρ + λI)⁻¹, the coefficients are
    β_ij = −K_ij / K_ii, and R²_i = 1 + λ − 1/K_ii + λ‖β_i‖².

    Args:
        local: moments of the layer's C channels over local samples.
        ridge: λ, in units of a channel's variance, > 0.
    """
    live = local.live
    rho, factor = _factored(local.select(live).correlation, ridge)
    precision, explained = _all_peers(factor, ridge)
    size = _hull_sizes(rho, explained, ridge)
    dead = torch.full_like(local.mean, torch.nan)
    r2, hull_size, hull_score = (dead.masked_scatter(live, values) for values in (explained, size, explained / size))
    return PeerReconstruction(live, precision, r2, hull_size, hull_score)


def peer_r2(local: Moments, ridge: float = RIDGE) -> Tensor:
    """Compute only ``r2`` of :func:`peer_reconstruction`, ``[C]``."""
    live = local.live
    explained = _all_peers(_factored(local.select(live).correlation, ridge)[1], ridge)[1]
    return torch.full_like(local.mean, torch.nan).masked_scatter(live, explained)


def _factored(rho: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return ρ and the Cholesky factor of ρ + λI.

    Channels that hardly vary have correlations that are mostly rounding, and ρ may then have eigenvalues below −λ. The
    negative ones become 0, and the diagonal 1 again.
    """
    identity = torch.eye(len(rho), dtype=rho.dtype, device=rho.device)
    factor, failed = torch.linalg.cholesky_ex(rho + ridge * identity)
    if failed:
        values, vectors = torch.linalg.eigh(rho)
        rho = vectors * values.clamp(min=0.0) @ vectors.mT
        scale = rho.diagonal().rsqrt()
        rho = rho * scale * scale[:, None]
        factor = torch.linalg.cholesky(rho + ridge * identity)
    return rho, factor


def _all_peers(factor: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return K = (ρ + λI)⁻¹, ``[C, C]``, and R² of every channel on all its peers, ``[C]``, from :func:`_factored`."""
    precision = torch.cholesky_inverse(factor)
    own = precision.diagonal()
    weight = (torch.linalg.vector_norm(precision, dim=1) / own).square() - 1  # ‖β_i‖², without β
    return precision, (1 + ridge - 1 / own + ridge * weight).clamp(0.0, 1.0)


def hull_coefficients(local: Moments, ridge: float = RIDGE) -> Tensor:
    """Regress every channel on its compact hull alone, with a ridge, in units of standard deviations.

    Args:
        local: moments of the layer's C channels over local samples.
        ridge: λ, in units of a channel's variance, > 0.

    Returns:
        Coefficients ``[C, C]``: row i holds those of the ``hull_size`` peers that rebuild channel i, and 0 elsewhere.
        The row of a dead channel is 0.
    """
    live = local.live
    rho, factor = _factored(local.select(live).correlation, ridge)
    size = _hull_sizes(rho, _all_peers(factor, ridge)[1], ridge)
    coefficients = torch.zeros_like(local.scatter)
    if len(rho) < 2:
        return coefficients
    nearest, beta, _ = _nested(rho, ridge)
    chosen = beta[torch.arange(len(rho), device=rho.device), size.long() - 1]
    coefficients[torch.outer(live, live)] = torch.zeros_like(rho).scatter(1, nearest, chosen).flatten()
    return coefficients


def _hull_sizes(rho: Tensor, r2: Tensor, ridge: float) -> Tensor:
    """Return the number of nearest peers whose joint R² reaches ``HULL_SHARE`` of ``r2``, ``[C]``."""
    if len(rho) < 2:
        return torch.full_like(r2, torch.nan)
    enough = _nested(rho, ridge)[2] >= HULL_SHARE * r2[:, None]
    enough[:, -1] = True
    return enough.int().argmax(1).to(r2.dtype) + 1


def _nested(rho: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K nearest peers ``[C, K]``, and for the first k, coefficients ``[C, k, K]`` and R² ``[C, k]``."""
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
