"""The start of a simulation: the spectrum of the input, the target's covariance with it, and random channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError, is_whole, short
from chanaxes_pl.core.statistics import MIN_CHANNELS

# Ratio of eigenvalues beyond which float64 loses the smallest one.
_MOST_SPREAD = 1e12


class Draw(NamedTuple):
    """One random start of S seeds, float64, in the basis of the input's eigenvectors, the leading one first.

    Attributes:
        weights: ``[S, C, F]``, weights of the channels, each of norm 1.
        covariance: ``[F, F]``, Σ, a diagonal matrix of trace F.
        cross: ``[S, F]``, c, the input's covariance with the target, which has variance 1.
        noise: ``[S]``, σ₀², the median over channels of their variance at the start.
    """

    weights: Tensor
    covariance: Tensor
    cross: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Problem:
    """Channels y = wᵀx of a Gaussian input x ~ N(0, Σ), and a scalar target T of variance 1 with Cov(x, T) = c.

    Random weights have no preferred direction, so a diagonal Σ stands for every Σ of its spectrum. The direction of c
    is random within the leading eigenvectors and within the others, such that each of them says the same about T on
    average; ``share`` then divides c between both groups, and ``explained`` sets its length.

    Attributes:
        spectrum: exponent a of the eigenvalues ∝ k^−a of the input's covariance, or the eigenvalues themselves, in any
            unit and order.
        inputs: F, number of eigenvalues of a power law; eigenvalues given one by one bring their own number.
        leading: m, number of eigenvectors that count as leading.
        share: share of the task covariance ‖c‖² that lies in the leading eigenvectors, 0 to 1.
        explained: R², share of the target's variance that the whole input explains; a channel knows at most
            −½ ln(1 − R²) nats.
        channels: C, number of channels in a run.
        seeds: S, number of runs; run k draws its weights and its task from seed k.

    Raises:
        ValueError: for a value that is out of range, quoting it.

    Example:
        >>> Problem(inputs=4).eigenvalues
        tensor([1.9200, 0.9600, 0.6400, 0.4800], dtype=torch.float64)
    """

    spectrum: float | Sequence[float] = 1.0
    inputs: int = 32
    leading: int = 1
    share: float = 0.9
    explained: float = 0.5
    channels: int = 128
    seeds: int = 10

    def __post_init__(self) -> None:
        for name, least, expected in (
            ("inputs", 2, "expected at least 2"),
            ("channels", MIN_CHANNELS, f"expected at least {MIN_CHANNELS}: fewer have no rank correlation"),
            ("seeds", 1, "expected at least 1"),
        ):
            if not is_whole(getattr(self, name), least):
                raise self._refused(name, expected)
        self._check_spectrum()
        count = len(self.eigenvalues)
        if not is_whole(self.leading, 1) or self.leading >= count:
            raise self._refused("leading", f"expected 1 to {count - 1} of the {count} eigenvectors")
        if not isinstance(self.share, Real) or not 0 <= self.share <= 1:
            raise self._refused("share", "expected a share of ‖c‖², between 0 and 1")
        if not isinstance(self.explained, Real) or not 0 < self.explained <= 0.99:
            raise self._refused("explained", "expected an R² above 0 and up to 0.99")

    def _check_spectrum(self) -> None:
        if not isinstance(self.spectrum, Real) and not _are_numbers(self.spectrum):
            raise self._refused("spectrum", "expected an exponent above 0, or a list of eigenvalues")
        values = self._values()
        ordered = len(values) > 1 and 0 < values.min() < values.max() <= _MOST_SPREAD * values.min()
        if not ordered or (isinstance(self.spectrum, Real) and self.spectrum < 0):
            raise self._refused(
                "spectrum",
                "expected an exponent above 0, or two or more eigenvalues above 0, at most twelve decades apart, not "
                "all the same: under a flat spectrum all channels of norm 1 have the same input capture",
            )

    def _refused(self, name: str, expected: str) -> ArgumentError:
        return ArgumentError(f"{name}={short(getattr(self, name))}", expected)

    @property
    def eigenvalues(self) -> Tensor:
        """``[F]``, of Σ, descending, scaled to mean 1: neither information has a unit."""
        values = self._values().sort(descending=True).values
        return values / values.mean()

    def _values(self) -> Tensor:
        if isinstance(self.spectrum, Real):
            return torch.arange(1, self.inputs + 1, dtype=torch.float64) ** -float(self.spectrum)
        return torch.as_tensor(self.spectrum, dtype=torch.float64)

    def draw(self) -> Draw:
        """Weights and c of every seed."""
        eigenvalues, cross, weights = self.eigenvalues, [], []
        for seed in range(self.seeds):
            generator = torch.Generator().manual_seed(seed)
            normal = torch.randn(self.channels + 1, len(eigenvalues), dtype=torch.float64, generator=generator)
            cross.append(self._cross(normal[0]))
            weights.append(normal[1:] / normal[1:].norm(dim=1, keepdim=True))
        start = torch.stack(weights)
        noise = (start.square() @ eigenvalues).quantile(0.5, dim=1)
        return Draw(start, torch.diag(eigenvalues), torch.stack(cross), noise)

    def _cross(self, normal: Tensor) -> Tensor:
        """``[F]``, c from standard normal numbers ``[F]``."""
        eigenvalues = self.eigenvalues
        parts = (normal * eigenvalues.sqrt()).tensor_split([self.leading])
        shares = (self.share, 1 - self.share)
        cross = torch.cat([part / part.norm() * share**0.5 for part, share in zip(parts, shares, strict=True)])
        return cross * (self.explained / (cross.square() / eigenvalues).sum()).sqrt()


def _are_numbers(values: object) -> bool:
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    return isinstance(values, Iterable) and all(isinstance(value, Real) for value in values)
