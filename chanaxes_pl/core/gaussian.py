"""Information between jointly Gaussian variables, in nats; no other module computes −½ ln(1 − ρ²)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chanaxes_pl.core.moments import Moments

#: Largest correlation that enters a logarithm; larger ones are clipped.
MAX_CORRELATION = 0.999
#: Largest information between two variables, in nats (3.107).
CEILING = -0.5 * math.log1p(-(MAX_CORRELATION**2))


def information(squared_correlation: Tensor) -> Tensor:
    """Compute the mutual information of Gaussian variables, −½ ln(1 − ρ²).

    Args:
        squared_correlation: any shape, unitless; ρ² of two variables or R² of a regression.

    Returns:
        The same shape, in nats, between 0 and :data:`CEILING`; NaN stays NaN.

    Example:
        >>> import torch
        >>> information(torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64))
        tensor([0.0000, 0.6931, 3.1076], dtype=torch.float64)
    """
    return squared_correlation.clamp(0.0, MAX_CORRELATION**2).neg_().log1p_().mul_(-0.5)


@dataclass(frozen=True, eq=False)
class Association:
    """Correlations of C variables, and the part of them that a target explains.

    Attributes:
        correlation: ``[C, C]``, correlation of the variables.
        explained: ``[C, C]``, the part of ``correlation`` that linear regression on the target explains:
            ``r rᵀ`` for a scalar target with correlations r, the between-class part for a one-hot label.
    """

    correlation: Tensor
    explained: Tensor
    _nearest: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, joint: Moments, channels: int, targets: slice) -> Association:
        """Compute it from the moments of ``[y₁ … y_C, …, t₁ … t_D, …]``; a target that never varies gives NaN.

        Args:
            joint: moments of channels and targets over image samples.
            channels: C; the first C variables are channels.
            targets: slice of the variables that form the target.
        """
        return cls(joint.correlation[:channels, :channels], _explained(joint, channels, targets))

    def with_target(self, joint: Moments, targets: slice) -> Association:
        """Return the association of the same variables with another target of the same ``joint``."""
        return Association(self.correlation, _explained(joint, len(self.correlation), targets), self._nearest)

    @property
    def single(self) -> Tensor:
        """Information of each variable about the target, I(T; y_i), ``[C]`` in nats."""
        return information(self.explained.diagonal())

    def nearest(self, count: int) -> Tensor:
        """Return the peers that each variable correlates with most, ``[C, count]``, unordered and cached."""
        if count not in self._nearest:
            nearness = self.correlation.abs().fill_diagonal_(-1.0)
            self._nearest[count] = nearness.topk(count, sorted=False).indices
        return self._nearest[count]

    def with_peers(self, peers: Tensor) -> Tensor:
        """Compute I(T; y_i, y_j) of each channel i with some of its peers j.

        It uses the ratio of generalised variances with and without the target, 1 − R²_ij = det(Q − B) / det Q, over
        the 2×2 blocks of the correlation Q and its explained part B. For a scalar target, R² is the usual one of two
        regressors; for a label, the ratio is Wilks' Λ.

        Args:
            peers: ``[C, k]``, indices of each channel's peers; a channel is not its own peer.

        Returns:
            ``[C, k]``, nats.
        """
        q = self.correlation.gather(1, peers).clamp_(-MAX_CORRELATION, MAX_CORRELATION)
        own = 1 - self.explained.diagonal()
        left = own[:, None] * own[peers] - (q - self.explained.gather(1, peers)).square()
        return information(1 - left / (1 - q.square()))

    def with_sets(self, sets: Tensor) -> Tensor:
        """Compute I(T; y_i, y_j, …), the joint information of each set of channels.

        As for pairs, 1 − R² = det(Q − B) / det Q over a set's blocks. Eigenvalues of Q are at least
        1 − :data:`MAX_CORRELATION`, the smaller one of a pair at the ceiling.

        Args:
            sets: ``[n, k]``, indices of the k different channels of each set.

        Returns:
            ``[n]``, nats.

        Example:
            >>> import torch
            >>> alone = Association(torch.eye(3), torch.full((3, 3), 0.25))  # each explains a quarter
            >>> alone.with_sets(torch.tensor([[0], [1]])), alone.with_sets(torch.tensor([[0, 1, 2]]))
            (tensor([0.1438, 0.1438]), tensor([0.6931]))
        """
        rows, columns = sets[:, :, None], sets[:, None, :]
        values, vectors = torch.linalg.eigh(self.correlation[rows, columns])
        q = (vectors * values.clamp(min=1 - MAX_CORRELATION)[:, None]) @ vectors.mT
        return information(1 - torch.linalg.det(q - self.explained[rows, columns]) / torch.linalg.det(q))


def _explained(joint: Moments, channels: int, targets: slice) -> Tensor:
    scale = joint.variance[:channels].rsqrt()
    cross = joint.scatter[:channels, targets] / joint.count * scale[:, None]
    return cross @ _pseudo_inverse(joint.scatter[targets, targets] / joint.count) @ cross.T


def _pseudo_inverse(covariance: Tensor) -> Tensor:
    """Invert on the span of the targets that vary; all NaN if none varies or one is not finite."""
    variance = covariance.diagonal()
    if not covariance.isfinite().all() or not (variance > 0).any():
        return torch.full_like(covariance, torch.nan)
    if len(covariance) == 1:
        return 1 / covariance
    return torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True)
