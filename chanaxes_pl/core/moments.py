"""First and second moments of a stream of samples, and the formula that merges them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise

import torch
from torch import Tensor

# Minimum number of rows in one float32 product; the products are then summed in float64. Rounding inside a product
# grows with its rows. A wide layer uses twice as many rows as variables, or the sums would cost more than the products.
_ROWS = 256
# Up to this width, everything runs in float64: it costs no more, and the correlations are exact to the last digits.
_NARROW = 16
# Number of samples whose mean is close enough to the mean of all.
_NEAR = 64
# From this width on, only the upper block triangle of the Gram matrix is computed, in up to 8 block rows.
_BLOCKED_WIDTH = 256
_BLOCK = 64
_MOST_BLOCKS = 8
# Rows of a correlation that are handled at a time.
_UPPER = 128
# Columns that lie a multiple of this apart share the lines of a cache: LAPACK then takes up to three times as long for
# a Cholesky factor, and a transpose twice. Some more columns cure it.
_ALIASED, _PADDING = 256, 8
# A channel whose variance is below this share of its layer's median holds only rounding error.
DEAD_SHARE = 1e-12


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred scatter of F variables, in float64, or of G blocks of F variables.

    :meth:`merge` makes a new object and changes neither input. Merging is associative and independent of the order up
    to float64 rounding, and :meth:`empty` is its neutral element.

    Attributes:
        count: scalar, number of samples.
        mean: ``[F]``, in the samples' unit; ``[G, F]`` for blocks.
        scatter: ``[F, F]``, sum over samples of the centred outer products, in the unit squared; ``[G, F, F]`` for
            blocks.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
        >>> halves = Moments.of(samples[:1]).merge(Moments.of(samples[1:]))
        >>> halves.covariance
        tensor([[1.2500, 2.5000],
                [2.5000, 5.0000]], dtype=torch.float64)
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Return the neutral element of :meth:`merge` for ``width`` variables."""
        zeros = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        return cls(zeros.new_zeros(()), zeros[0], zeros[1:])

    @classmethod
    def of(cls, samples: Tensor, precise: bool = False) -> Moments:
        """Compute the moments of one batch, or of one batch for each of several blocks.

        The batch is centred on itself before anything is squared, so a mean of 1e4 costs no digits. Products run in
        the samples' own precision, but at least in float32, and never in TF32 or autocast.

        Args:
            samples: ``[n, F]`` of any floating type, n ≥ 0; ``[G, n, F]`` for blocks, n ≥ 1.
            precise: run the products in float64.
        """
        count, width = samples.shape[-2:]
        if count == 0:
            return cls.empty(width, accumulation_device(samples.device))
        precise = precise or samples[..., 0, :].numel() <= _NARROW
        samples = _accumulated(samples) if precise or samples.dtype == torch.float64 else samples.float()
        with true_float32(samples.device):
            shift = samples.mean(-2, keepdim=True)
            centred = samples - shift
            # Subtracting a large mean leaves rounding error, so centre again on the small rest.
            rest = centred.mean(-2, keepdim=True)
            centred -= rest
            step = max(_ROWS, 2 * width) if centred.dtype == torch.float32 else count
            products = (_accumulated(_gram(rows)) for rows in centred.split(step, -2))
            scatter = reduce(torch.Tensor.add_, products)
        mean = (_accumulated(shift) + _accumulated(rest)).squeeze(-2)
        return cls(scatter.new_tensor(float(count)), mean, scatter)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together; neither input changes."""
        return Moments(self.count.clone(), self.mean.clone(), self.scatter.clone()).merge_(other)

    def merge_(self, other: Moments) -> Moments:
        """Merge into the tensors of ``self``, for an accumulator that owns them."""
        _merge_((self.count, other.count), [(self.mean, other.mean)], (self.scatter, other.scatter))
        return self

    def mapped(self, weight: Tensor, bias: Tensor) -> MappedMoments:
        """Return the moments of the variables ``weight @ x + bias``.

        Args:
            weight: ``[G, F]``.
            bias: ``[G]``.
        """
        return MappedMoments(self, weight, bias)

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """Return the moments of all ``parts`` together, merged from left to right.

        Parts that one map made are merged before it, among fewer variables.
        """
        first, *others = parts
        if isinstance(first, MappedMoments) and all(map(first.shares_map, others)):
            sources = (part.source for part in (first, *others))  # type: ignore[attr-defined]
            return cls.merge_all(sources).mapped(first.weight, first.bias)
        merged = cls(first.count.clone(), first.mean.clone(), first.scatter.clone())
        for other in others:
            merged.merge_(other)
        return merged

    def select(self, keep: Tensor) -> Moments:
        """Return the moments of the variables in ``keep``, an ``[F]`` mask or indices."""
        if keep.dtype == torch.bool and keep.all():
            return self
        names = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        return Moments(self.count, self.mean[names], self.scatter.index_select(0, names).index_select(1, names))

    @cached_property
    def covariance(self) -> Tensor:
        """Population covariance (divided by n), ``[F, F]``; NaN without samples."""
        return self.scatter / self.count

    @cached_property
    def variance(self) -> Tensor:
        """Population variance, ``[F]``."""
        return self.scatter.diagonal(dim1=-2, dim2=-1) / self.count

    @cached_property
    def correlation(self) -> Tensor:
        """Pearson correlation, ``[F, F]``, not clipped; NaN where a variance is 0 or not finite."""
        scale = self.scatter.diagonal().rsqrt()
        return torch.mul(self.scatter, scale, out=_room(self.scatter, *self.scatter.shape)).mul_(scale[:, None])

    @property
    def upper(self) -> Iterator[Tensor]:
        """Blocks of rows of ``correlation``, each from its diagonal on: ``[k, F]``, ``[l, F - k]``, …"""
        yield from (self.correlation[start:stop, start:] for start, stop in _blocks(len(self.mean), _UPPER))

    @cached_property
    def live(self) -> Tensor:
        """Mask ``[F]`` of the variables that vary, see :func:`live_mask`."""
        return live_mask(self.variance)

    @property
    def root(self) -> Tensor | None:
        """``[F, r]``, r < F, whose rows have the products ``correlation``; ``None`` where no such factor is known."""
        return None

    @cached_property
    def _factor(self) -> Tensor | None:
        """``[F, r]`` with the products ``scatter``, r variables of which vary; ``None`` unless they are independent."""
        factor, failed = cholesky(self.scatter)
        if failed:  # perhaps because of variables that do not vary
            varies = self.scatter.diagonal() != 0
            part, failed = cholesky(self.scatter[varies][:, varies])
            factor = part.new_zeros(len(varies), len(part)).index_put_((varies,), part)
        return None if failed else factor


class MappedMoments(Moments):
    """Moments of the variables ``weight @ x + bias``, kept as those of x; what follows is computed when asked for.

    Where there are fewer variables x, the mapped ones have correlations of low rank, and :attr:`root` tells them.

    Attributes:
        source: moments of the F variables x.
        weight: ``[G, F]``, as given.
        bias: ``[G]``, as given.
    """

    source: Moments
    weight: Tensor
    bias: Tensor

    def __init__(self, source: Moments, weight: Tensor, bias: Tensor) -> None:
        mean = weight.to(source.mean) @ source.mean + bias.to(source.mean)
        vars(self).update(count=source.count, mean=mean, source=source, weight=weight, bias=bias)

    def shares_map(self, other: Moments) -> bool:
        """Whether the same tensors map ``other``."""
        return isinstance(other, MappedMoments) and other.weight is self.weight and other.bias is self.bias

    def select(self, keep: Tensor) -> Moments:
        """As :meth:`Moments.select`."""
        if keep.dtype == torch.bool and keep.all():
            return self
        keep = keep.to(self.weight.device)
        return MappedMoments(self.source, self.weight[keep], self.bias[keep])

    @cached_property
    def scatter(self) -> Tensor:  # type: ignore[override]
        """``[G, G]``, as that of :class:`Moments`."""
        weight = self.weight.to(self.mean)
        return symmetric_product(weight @ self.source.scatter, weight.T) + self._spoiled[:, None] + self._spoiled

    @cached_property
    def variance(self) -> Tensor:
        """Population variance, ``[G]``."""
        return super().variance if self._rows is None else self._rows.square().sum(1) / self.count

    @cached_property
    def correlation(self) -> Tensor:
        """Pearson correlation, ``[G, G]``, not clipped; NaN where a variance is 0 or not finite."""
        return super().correlation if self.root is None else symmetric_product(self.root, self.root.T)

    @property
    def upper(self) -> Iterator[Tensor]:
        """As that of :class:`Moments`; it does not hold the whole matrix if nothing else has asked for it."""
        root = self.root
        if root is None or "correlation" in vars(self):
            yield from super().upper
        else:
            yield from (root[start:stop] @ root[start:].T for start, stop in _blocks(len(root), _UPPER))

    @cached_property
    def root(self) -> Tensor | None:  # type: ignore[override]
        """As that of :class:`Moments`; known where there are fewer variables x, none a combination of the others."""
        return None if self._rows is None else self._rows / torch.linalg.vector_norm(self._rows, dim=1, keepdim=True)

    @cached_property
    def _rows(self) -> Tensor | None:
        """``[G, r]``, r < G, with the products ``scatter``."""
        factor = self.source._factor if len(self.weight) > self.weight.shape[1] else None
        return None if factor is None else (self.weight.to(factor) @ factor).add_(self._spoiled[:, None])

    @property
    def _spoiled(self) -> Tensor:
        """``[G]``, NaN where the mean is not finite, which a bias alone can do, and else 0."""
        return 0.0 * self.mean


@dataclass(frozen=True, eq=False)
class CrossMoments:
    """Count, means and centred cross products of two sets of variables, in float64, for G blocks.

    Attributes:
        count: scalar, number of samples.
        left: ``[G, F]``, means of the first set.
        right: ``[G, R]``, means of the second set.
        scatter: ``[G, F, R]``, sum over samples of the centred outer products of left and right.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0]], [[1.0]], [[2.0]], [[3.0]]])
        >>> CrossMoments.of(x, 2 * x).covariance
        tensor([[[2.5000]]], dtype=torch.float64)
    """

    count: Tensor
    left: Tensor
    right: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, blocks: int, left: int, right: int, device: torch.device | str = "cpu") -> CrossMoments:
        """Return the neutral element of :meth:`merge_`."""
        scatter = torch.zeros(blocks, left, right, dtype=torch.float64, device=device)
        return cls(scatter.new_zeros(()), scatter.new_zeros(blocks, left), scatter.new_zeros(blocks, right), scatter)

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> CrossMoments:
        """Compute the moments of one batch of ``[n, G, F]`` and ``[n, G, R]``, n ≥ 1, centred on itself.

        Products run in float64 if both inputs have it or R is small, otherwise in float32.
        """
        narrow = right.shape[2] <= _NARROW and left.device.type != "mps"
        precise = narrow or left.dtype == right.dtype == torch.float64
        with true_float32(left.device):
            kind = torch.float64 if precise else torch.float32
            wide, narrow = (samples.transpose(0, 1).to(kind) for samples in (left, right))
            # Only the few right variables are centred: the left means then cancel in the products.
            shift = narrow.mean(1, keepdim=True)
            rows = narrow - shift
            rest = rows.mean(1, keepdim=True)  # rounding error of a large mean
            # Shifting the left variables close to their means keeps their digits; a column of ones sums up the rest.
            near = wide[:, :_NEAR].mean(1, keepdim=True)
            products = _accumulated((wide - near).mT @ torch.cat([rows - rest, torch.ones_like(rows[:, :, :1])], 2))
        first = _accumulated(near[:, 0]) + products[..., -1] / len(left)
        second = _accumulated(shift[:, 0]) + _accumulated(rest[:, 0])
        return cls(products.new_tensor(float(len(left))), first, second, products[..., :-1].contiguous())

    def merge_(self, other: CrossMoments) -> CrossMoments:
        """Merge the moments of both sets of samples into the tensors of ``self``."""
        means = [(self.left, other.left), (self.right, other.right)]
        _merge_((self.count, other.count), means, (self.scatter, other.scatter))
        return self

    @property
    def covariance(self) -> Tensor:
        """Population covariance of left and right, ``[G, F, R]``; NaN without samples."""
        return self.scatter / self.count


def _merge_(counts: tuple[Tensor, Tensor], means: list[tuple[Tensor, Tensor]], scatters: tuple[Tensor, Tensor]) -> None:
    """Merge two sets of samples into the tensors of the first with the formula of Chan, Golub and LeVeque (1979).

    With d = mean₂ − mean₁ for each side, the scatter becomes S₁ + S₂ + d dᵀ · n₁n₂ / (n₁ + n₂), and the mean
    mean₁ + d · n₂ / (n₁ + n₂).

    Args:
        counts: counts of both sets.
        means: means of both sets, for each side of the scatter; one entry if both sides are the same variables.
        scatters: scatters of both sets.
    """
    (count, more), (scatter, other) = counts, scatters
    share = more / (count + more).clamp(min=1)
    gaps = [theirs - ours for ours, theirs in means]
    left, right = gaps[0], gaps[-1] * (count * share)
    if scatter.ndim == 2:
        scatter.addr_(left, right)
    else:
        scatter.baddbmm_(left[:, :, None], right[:, None])
    scatter.add_(other)
    for (ours, _), gap in zip(means, gaps, strict=True):
        ours.add_(gap * share)
    count.add_(more)


def live_mask(variance: Tensor) -> Tensor:
    """Return an ``[F]`` mask of finite variances above ``DEAD_SHARE`` of the median of the finite ones."""
    finite = variance.isfinite()
    if not finite.any():
        return finite
    return finite & (variance > DEAD_SHARE * median(variance[finite]))


def median(values: Tensor) -> Tensor:
    """Return the median of ``[n]`` values: the mean of the middle two for even n, where torch takes the lower one."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def accumulation_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums of data on ``device``: the host for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _accumulated(values: Tensor) -> Tensor:
    return values.to(accumulation_device(values.device)).double()


def _gram(rows: Tensor) -> Tensor:
    """Multiply the columns of ``[n, F]``, which gives ``[F, F]``; ``[G, n, F]`` gives ``[G, F, F]``."""
    if rows.ndim == 2:
        return symmetric_product(rows.T, rows)
    return symmetric_product(rows[0].T, rows[0])[None] if len(rows) == 1 else rows.mT @ rows


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute a symmetric product ``left @ right``; a wide one from its upper block triangle, 9/16 of the work."""
    width = len(left)
    if width < _BLOCKED_WIDTH:
        return left @ right
    product = _room(left, width, width)
    for start, stop in _blocks(width, max(_BLOCK, width // _MOST_BLOCKS)):
        torch.mm(left[start:stop], right[:, start:], out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """Return the lower Cholesky factor of ``[n, n]``, and whether there is none."""
    factor, failed = _padded_factor(matrix, 0.0)
    return factor[: len(matrix), : len(matrix)], failed


def ridge_inverse(matrix: Tensor, ridge: float) -> tuple[Tensor, bool]:
    """Return ``(matrix + ridge I)⁻¹`` of a symmetric ``[n, n]``, and whether the sum has no Cholesky factor."""
    factor, failed = _padded_factor(matrix, ridge)
    if not failed:
        torch.cholesky_inverse(factor, out=factor)
    return factor[: len(matrix), : len(matrix)], failed


def _padded_factor(matrix: Tensor, ridge: float) -> tuple[Tensor, bool]:
    """Return the lower Cholesky factor of ``matrix + ridge I``, perhaps with more ones on its diagonal, or True."""
    width = len(matrix)
    size = width + (_PADDING if width % _ALIASED == 0 else 0)
    padded = _room(matrix, size, size)
    padded[:width, :width] = matrix
    padded[width:], padded[:, width:] = 0.0, 0.0
    padded.diagonal()[:width].add_(ridge)
    padded.diagonal()[width:].fill_(1.0)
    factor, failed = _room(matrix, size, size).mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(padded, out=(factor, failed))
    return factor, bool(failed)


def _room(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an uninitialised ``[rows, columns]`` like ``like``, a part of a matrix whose columns are not aliased."""
    padding = _PADDING if columns % _ALIASED == 0 else 0
    return like.new_empty(rows, columns + padding)[:, :columns]


def _blocks(width: int, size: int) -> Iterable[tuple[int, int]]:
    """Split a width into blocks of about the same size, the first and the last index of each."""
    count = max(1, width // size)
    return pairwise(width * k // count for k in range(count + 1))


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Compute products in full float32, whatever autocast, TF32 or bfloat16 setting surrounds the block."""
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    # After the newer of torch's two switches has been set, reading the older one may raise an error.
    switch, off = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, switch, off)
    if before != off:
        setattr(matmul, switch, off)
    try:
        with torch.autocast(device.type, enabled=False, cache_enabled=False):
            yield
    finally:
        if before != off:
            setattr(matmul, switch, before)
