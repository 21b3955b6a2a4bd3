"""What a channel shares with the other channels of its layer: peer overlap, and reconstruction by its peers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chanaxes_pl.core.gaussian import nearest_peers, total_information
from chanaxes_pl.core.moments import Moments, ridge_inverse, symmetric_product

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
    total = total_information(local.select(live).upper)
    return torch.full_like(local.mean, torch.nan).masked_scatter(live, total / (len(total) - 1))


@dataclass(frozen=True, eq=False)
class PeerReconstruction:
    """Ridge regression of every channel on its peers, in units of standard deviations; NaN for dead channels.

    Attributes:
        r2: ``[C]``, the share of a channel's variance that all its peers explain, 0 to 1.
        hull_size: ``[C]``, number of peers, in the order of |ρ|, that reach :data:`HULL_SHARE` of ``r2``; at most
            :data:`HULL_CAP`.
        hull_score: ``[C]``, ``r2 / hull_size``.
        closest: ``[C]``, the largest |ρ| with a peer.
    """

    r2: Tensor
    hull_size: Tensor
    hull_score: Tensor
    closest: Tensor


#: Share of the all-peer R² that a compact hull has to reach, and its largest number of peers.
HULL_SHARE = 0.95
HULL_CAP = 10


def peer_reconstruction(local: Moments, ridge: float = RIDGE) -> PeerReconstruction:
    """Reconstruct every channel from all its peers, and find the size of its compact hull.

    Args:
        local: moments of the layer's C channels over local samples.
        ridge: λ, in units of a channel's variance, > 0.
    """
    live, channels = local.live, local.select(local.live)
    rho, explained = _all_peers(channels, ridge)
    size, closest = _hull_sizes(rho, explained, ridge)
    dead = torch.full_like(local.mean, torch.nan)
    return PeerReconstruction(
        *(dead.masked_scatter(live, values) for values in (explained, size, explained / size, closest))
    )


def peer_r2(local: Moments, ridge: float = RIDGE) -> Tensor:
    """Compute only ``r2`` of :func:`peer_reconstruction`, ``[C]``."""
    channels = local.select(local.live)
    root = channels.root  # where there is one, the whole correlation matrix is never made
    explained = _all_peers(channels, ridge)[1] if root is None else _low_rank_r2(root, ridge)
    return torch.full_like(local.mean, torch.nan).masked_scatter(local.live, explained)


def peer_coefficients(local: Moments, ridge: float = RIDGE) -> Tensor:
    """Regress every channel on all its peers, with a ridge, in units of standard deviations.

    One Cholesky factor serves all channels: with K = (ρ + λI)⁻¹, the coefficients are β_ij = −K_ij / K_ii.

    Args:
        local: moments of the layer's C channels over local samples.
        ridge: λ, in units of a channel's variance, > 0.

    Returns:
        Coefficients ``[C, C]``: row i holds β_i, which rebuilds channel i from its peers. They are 0 on the diagonal
        and for dead channels.
    """
    live = local.live
    _, precision = _inverted(local.select(live).correlation, ridge)
    beta = (-precision / precision.diagonal()[:, None]).fill_diagonal_(0.0)
    return beta.new_zeros(len(live), len(live)).masked_scatter_(torch.outer(live, live), beta)


def _inverted(rho: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return ρ and K = (ρ + λI)⁻¹.

    Channels that hardly vary have correlations that are mostly rounding, and ρ may then have eigenvalues below −λ. The
    negative ones become 0, and the diagonal 1 again.
    """
    precision, failed = ridge_inverse(rho, ridge)
    if failed:
        values, vectors = torch.linalg.eigh(rho)
        rho = vectors * values.clamp(min=0.0) @ vectors.mT
        scale = rho.diagonal().rsqrt()
        rho = rho * scale * scale[:, None]
        precision, _ = ridge_inverse(rho, ridge)
    return rho, precision


def _all_peers(channels: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """Return ρ, ``[C, C]``, and R² of every channel on all its peers, ``[C]``, all of which vary.

    With K = (ρ + λI)⁻¹ and β_i as in :func:`peer_coefficients`, R²_i = 1 + λ − 1/K_ii + λ‖β_i‖².
    """
    if channels.root is not None:
        return channels.correlation, _low_rank_r2(channels.root, ridge)
    rho, precision = _inverted(channels.correlation, ridge)
    own = precision.diagonal()
    weight = (torch.linalg.vector_norm(precision, dim=0) / own).square() - 1  # ‖β_i‖², without β
    return rho, (1 + ridge - 1 / own + ridge * weight).clamp_(0.0, 1.0)


def _low_rank_r2(root: Tensor, ridge: float) -> Tensor:
    """Return the R² of :func:`_all_peers` where ρ = A Aᵀ has a low rank, from A, ``[C, r]``.

    M = (AᵀA + λI)⁻¹ is smaller and gives K = (I − A M Aᵀ) / λ, so that with u_i = 1 − a_iᵀ M a_i it is
    R²_i = 1 − λ²‖M a_i‖² / u_i².
    """
    solved = root @ ridge_inverse(symmetric_product(root.T, root), ridge)[0]
    own = 1 - (solved * root).sum(1)
    return (1 - (ridge * torch.linalg.vector_norm(solved, dim=1) / own).square()).clamp_(0, 1)


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
    rho, explained = _all_peers(local.select(live), ridge)
    size, _ = _hull_sizes(rho, explained, ridge)
    coefficients = torch.zeros_like(local.scatter)
    if len(rho) < 2:
        return coefficients
    nearest, beta, _ = _nested(rho, ridge)
    chosen = beta[torch.arange(len(rho), device=rho.device), size.long() - 1]
    coefficients[torch.outer(live, live)] = torch.zeros_like(rho).scatter(1, nearest, chosen).flatten()
    return coefficients


def _hull_sizes(rho: Tensor, r2: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return how many nearest peers have a joint R² of ``HULL_SHARE`` of ``r2``, and the largest |ρ|, ``[C]`` each."""
    if len(rho) < 2:
        return torch.full_like(r2, torch.nan), torch.full_like(r2, torch.nan)
    nearest, _, reached = _nested(rho, ridge)
    enough = reached >= HULL_SHARE * r2[:, None]
    enough[:, -1] = True
    return enough.int().argmax(1).to(r2.dtype) + 1, rho.gather(1, nearest[:, :1]).abs().flatten()


def _nested(rho: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K nearest peers ``[C, K]``, and for the first k, coefficients ``[C, k, K]`` and R² ``[C, k]``."""
    cap = min(HULL_CAP, len(rho) - 1)
    nearest = nearest_peers(rho, cap)
    nearest = nearest.gather(1, rho.gather(1, nearest).abs().argsort(1, descending=True))
    toward = rho.gather(1, nearest)
    among = rho[nearest[:, :, None], nearest[:, None, :]]
    among.diagonal(dim1=1, dim2=2).add_(ridge)
    unit = torch.eye(cap).to(among)
    # The first k rows of the factor L, and of T = L⁻¹, are those of the first k peers: one factor serves all k. With
    # h = T ρ, the coefficients of the first k are the sum over j ≤ k of h_j times row j of T.
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(among), unit.expand_as(among), upper=False)
    half = inverse @ toward[:, :, None]
    coefficients = (half * inverse).cumsum(1)
    return nearest, coefficients, half.square().cumsum(1)[:, :, 0] + ridge * coefficients.square().sum(2)
