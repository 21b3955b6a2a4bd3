"""Information between jointly Gaussian variables, in nats; no other module computes −½ ln(1 − ρ²)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from chanaxes_pl.core.moments import Moments

#: Largest correlation that enters a logarithm; larger ones are clipped.
MAX_CORRELATION = 0.999
#: Largest information between two variables, in nats (3.107).
CEILING = -0.5 * math.log1p(-(MAX_CORRELATION**2))
# Numbers that are handled at a time.
_CACHED = 1 << 16
# Halvings of a row of factors before a logarithm: (1 − 0.999²) to the power of 2⁶ + 6 is far from 0 still.
_LOGS_SHARED = 6
# A direction of the target has at least this share of the largest one's variance, in units of standard deviations.
_INDEPENDENT = 1e-10


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


def total_information(upper: Iterable[Tensor]) -> Tensor:
    """Sum the information between each variable and all others, Σ_{j≠i} −½ ln(1 − ρ_ij²).

    Args:
        upper: the correlation of C variables, unitless: blocks of rows, each from its diagonal on.

    Returns:
        ``[C]``, nats.

    Example:
        >>> import torch
        >>> rho = torch.tensor([[1.0, 0.6, 0.8], [0.6, 1.0, 0.0], [0.8, 0.0, 1.0]], dtype=torch.float64)
        >>> total_information([rho[:2], rho[2:, 2:]])
        tensor([0.7340, 0.2231, 0.5108], dtype=torch.float64)
    """
    mine, theirs = [], []
    for rows in upper:
        count = len(rows)
        left = torch.addcmul(rows.new_ones(()), rows, rows, value=-1.0).clamp_(min=1 - MAX_CORRELATION**2)
        left.diagonal().fill_(1.0)
        theirs.append(_sum_of_logs(left[:, count:].T))
        mine.append(_sum_of_logs(left))
    total = torch.cat(mine)
    for others in theirs:
        total[len(total) - len(others) :] += others
    return total.mul_(-0.5)


def _sum_of_logs(factors: Tensor) -> Tensor:
    """Sum the logarithms of ``[n, m]`` along a row, ``[n]``; logarithms take longest: one for some 2⁶ factors."""
    for _ in range(_LOGS_SHARED):
        half, odd = divmod(factors.shape[1], 2)
        if not half:
            break
        paired = factors[:, :half] * factors[:, half : 2 * half]
        if odd:
            paired[:, 0].mul_(factors[:, -1])
        factors = paired
    return factors.log().sum(1)


def row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Split ``[n, m]`` into blocks of rows small enough for what is computed from one to stay in a cache."""
    return matrix.split(max(1, _CACHED // max(1, matrix.shape[1])))


def nearest_peers(correlation: Tensor, count: int) -> Tensor:
    """Return the ``count`` < C others that each of C variables correlates with most, ``[C, count]``, in any order.

    Args:
        correlation: ``[C, C]``.
        count: number of peers.
    """
    found, start = [], 0
    for rows in row_blocks(correlation):
        near = rows.abs()
        near.diagonal(start).fill_(-1.0)
        start += len(rows)
        if near.device.type == "cpu":  # in a third of the time of topk
            found.append(torch.from_numpy(np.argpartition(near.numpy(), -count, 1)[:, -count:]))
        else:
            found.append(near.topk(count, sorted=False).indices)
    return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Association:
    """Correlations of C variables, and the part of them that a target explains.

    Attributes:
        correlation: ``[C, C]``, correlation of the variables.
        loadings: ``[C, D]``, correlation of the variables with D uncorrelated directions of the target; for a scalar
            target that with the target.
    """

    correlation: Tensor
    loadings: Tensor
    _nearest: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, joint: Moments, channels: int, targets: slice) -> Association:
        """Compute it from the moments of ``[y₁ … y_C, …, t₁ … t_D, …]``; a target that never varies gives NaN.

        Args:
            joint: moments of channels and targets over image samples.
            channels: C; the first C variables are channels.
            targets: slice of the variables that form the target.
        """
        return cls(joint.correlation[:channels, :channels], _loadings(joint, channels, targets))

    def with_target(self, joint: Moments, targets: slice) -> Association:
        """Return the association of the same variables with another target of the same ``joint``."""
        return Association(self.correlation, _loadings(joint, len(self.correlation), targets), self._nearest)

    @cached_property
    def explained(self) -> Tensor:
        """The part of ``correlation`` that linear regression on the target explains, ``[C, C]``.

        It is ``r rᵀ`` for a scalar target with correlations r, the between-class part for a one-hot label.
        """
        return self.loadings @ self.loadings.T

    @cached_property
    def shares(self) -> Tensor:
        """The share of each variable's variance that the target explains, ``[C]``, the diagonal of ``explained``."""
        return self.loadings.square().sum(1)

    @property
    def single(self) -> Tensor:
        """Information of each variable about the target, I(T; y_i), ``[C]`` in nats."""
        return information(self.shares)

    def nearest(self, count: int) -> Tensor:
        """Return :func:`nearest_peers`, cached."""
        if count not in self._nearest:
            self._nearest[count] = nearest_peers(self.correlation, count)
        return self._nearest[count]

    @property
    def closest(self) -> Tensor:
        """The largest |ρ| of each variable with another one, ``[C]``; 0 where there is none."""
        if len(self.correlation) < 2:
            return torch.zeros_like(self.shares)
        nearest = self.nearest(max(self._nearest, default=1))
        return self.correlation.gather(1, nearest).abs().amax(1)

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
        own = 1 - self.shares
        scalar = self.loadings.shape[1] == 1
        shared = self.loadings * self.loadings[peers, 0] if scalar else self.explained.gather(1, peers)
        left = own[:, None] * own[peers] - (q - shared).square()
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
            >>> alone = Association(torch.eye(3), torch.full((3, 1), 0.5))  # each explains a quarter
            >>> alone.with_sets(torch.tensor([[0], [1]])), alone.with_sets(torch.tensor([[0, 1, 2]]))
            (tensor([0.1438, 0.1438]), tensor([0.6931]))
        """
        rows, columns = sets[:, :, None], sets[:, None, :]
        values, vectors = torch.linalg.eigh(self.correlation[rows, columns])
        q = (vectors * values.clamp(min=1 - MAX_CORRELATION)[:, None]) @ vectors.mT
        return information(1 - torch.linalg.det(q - self.explained[rows, columns]) / torch.linalg.det(q))


def _loadings(joint: Moments, channels: int, targets: slice) -> Tensor:
    """Correlations of the channels with the principal directions of the targets; NaN if a target is not finite."""
    variance, correlation = joint.variance[targets], joint.correlation[:, targets]
    varies = variance > 0
    if not variance.isfinite().all() or not varies.any():
        return torch.full_like(correlation[:channels, :1], torch.nan)
    cross, among = correlation[:channels, varies], correlation[targets][varies][:, varies]
    if len(among) == 1:
        return cross
    values, vectors = torch.linalg.eigh(among)
    kept = values > _INDEPENDENT * values[-1]
    return cross @ (vectors[:, kept] * values[kept].rsqrt())
