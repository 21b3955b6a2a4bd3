"""Ridge regression of a layer's errors on its inputs, from a stream of samples, in bounded memory.

With more samples than inputs it is solved in the inputs, from moments; with fewer, in the samples. Both are exact, and
take memory in proportion to the square of the smaller of the two numbers. Where any value within bounds serves as well
as another, some samples are held, and the regression is solved in rounds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chanaxes_pl.core.moments import CrossMoments, Moments, accumulation_device

#: Number of rounds in which targets with bounds are found.
ROUNDS = 5
# At least this many samples are gathered before they are summed up.
_ROWS = 256
# Numbers that are widened to float64 at a time.
_WIDENED = 1 << 23


class Ridge:
    """Ridge regression of O errors e on F inputs x, separately for each of G blocks.

    Minimises E‖e − Dx − d‖² + λ v ‖D‖² over D and d, where v is the mean variance of x. With n centred samples X
    ``[n, F]`` and E ``[n, O]``, D = Eᵀ X (XᵀX + nλv I)⁻¹ = Eᵀ (XXᵀ + nλv I)⁻¹ X. The second form is the dual one of
    Saunders, Gammerman and Vovk (1998).

    An error may have an interval around it, all of which serves as well: then e is the value in it that is closest to
    Dx + d. That is a convex problem, whose value falls with every round of solving for the e that the last solution
    gives (Hunter and Lange, 2004), from the errors themselves on.

    Args:
        shape: G, F and O.
        samples: number of samples that will be added, at most.
        hold: whether to keep the samples with intervals, see :func:`held_bytes`; else these do not count.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0]], [[1.0]], [[2.0]], [[3.0]]])
        >>> regression = Ridge((1, 1, 1), 4)
        >>> regression.add(x, 2 * x + 1)
        >>> solution = regression.solve(0.0)
        >>> [change.item() for _, change in solution.changes()], solution.offset.item(), solution.before
        ([2.0], 1.0, 21.0)
    """

    def __init__(self, shape: tuple[int, int, int], samples: int, hold: bool = False) -> None:
        self._shape, self._samples, self._capacity = shape, samples, min(samples, _capacity(shape[1]))
        self._inputs: Tensor | None = None
        self._errors: Tensor | None = None
        self._filled = 0
        self._moments: Moments | None = None
        self._toward: CrossMoments | None = None
        self._squares = 0.0
        self._held = _Held(shape, samples) if hold else None

    def add(self, inputs: Tensor, errors: Tensor, serving: tuple[Tensor, Tensor] | None = None) -> None:
        """Add samples ``[n, G, F]`` and errors ``[n, G, O]`` of one floating type.

        Args:
            inputs: x.
            errors: e.
            serving: the least and the most that serves, which may be −∞ and ∞; default the errors alone. Those count
                that are held: from the first call on, and as long as there are no more samples than announced.
        """
        if self._inputs is None or self._errors is None:
            blocks, *widths = self._shape
            self._inputs, self._errors = (inputs.new_empty(self._capacity, blocks, width) for width in widths)
        if self._held is not None:
            started = self._filled > 0 or self._moments is not None
            if (serving is None and not started) or self._held.count + len(inputs) > self._samples:
                self._held = None
            else:
                self._held.add(inputs, errors, *(serving or (errors, errors)))
        start = 0
        while start < len(inputs):
            if self._filled == self._capacity:
                self._sum_up(self._inputs, self._errors)
            stop = min(len(inputs), start + self._capacity - self._filled)
            rows = slice(self._filled, self._filled + stop - start)
            self._inputs[rows], self._errors[rows] = inputs[start:stop], errors[start:stop]
            self._filled, start = rows.stop, stop

    def solve(self, ridge: float) -> Solution | None:
        """Solve for the samples added, after which no more can be added; ``None`` without any.

        Args:
            ridge: λ.
        """
        inputs, errors = self._inputs, self._errors
        self._inputs = self._errors = None
        if inputs is None or errors is None:
            return None
        held = self._held if self._held is not None and self._held.count else None
        if self._moments is None and self._filled < self._shape[1]:
            return _in_samples(inputs[: self._filled], errors[: self._filled], ridge, held)
        self._sum_up(inputs, errors)
        del inputs, errors
        assert self._moments is not None
        assert self._toward is not None
        return _in_inputs(self._moments, self._toward, self._squares, ridge, held)

    def _sum_up(self, inputs: Tensor, errors: Tensor) -> None:
        inputs, errors = inputs[: self._filled], errors[: self._filled]
        toward, moments = CrossMoments.of(inputs, errors), Moments.of(inputs.transpose(0, 1))
        self._moments = moments if self._moments is None else self._moments.merge_(moments)
        self._toward = toward if self._toward is None else self._toward.merge_(toward)
        self._squares += _squares(errors)
        self._filled = 0


class _Held:
    """Samples whose errors have intervals.

    Args:
        shape: G, F and O.
        samples: number of samples that will be added, at most.

    Attributes:
        count: number of samples.
    """

    def __init__(self, shape: tuple[int, int, int], samples: int) -> None:
        self._shape, self._samples, self.count = shape, samples, 0
        self._inputs: Tensor | None = None

    def add(self, inputs: Tensor, *errors: Tensor) -> None:
        """Add samples ``[n, G, F]``, and their errors ``[n, G, O]``, the least and the most that serves."""
        if self._inputs is None:
            blocks, *widths = self._shape
            self._inputs = inputs.new_empty(blocks, self._samples, widths[0])
            self._errors = [inputs.new_empty(blocks, self._samples, widths[1]) for _ in errors]
        rows = slice(self.count, self.count + len(inputs))
        self._inputs[:, rows] = inputs.transpose(0, 1)
        for held, given in zip(self._errors, errors, strict=True):
            held[:, rows] = given.transpose(0, 1)
        self.count = rows.stop

    @property
    def errors(self) -> Tensor:
        """``[G, n, O]``, the errors themselves."""
        return self._errors[0][:, : self.count]

    def nearest(self, fitted: Tensor) -> Tensor:
        """The values that serve ``[G, n, O]`` and are closest to some others."""
        _, lower, upper = (held[:, : self.count].to(fitted) for held in self._errors)
        return fitted.clamp(lower, upper)

    def left(self, fitted: Tensor) -> float:
        """Σ E e² over all that fitted values ``[G, n, O]`` leave."""
        return _squares(fitted - self.nearest(fitted)) / self.count

    def fitted(self, left: Tensor, offset: Tensor) -> Tensor:
        """D x + d for all samples, ``[G, n, O]``."""
        assert self._inputs is not None
        inputs = self._inputs[:, : self.count]
        return torch.baddbmm(offset[:, None].to(inputs), inputs, left.mT.to(inputs))

    def moved(self, errors: Tensor) -> tuple[Tensor, Tensor]:
        """The mean ``[G, O]`` of a change of the errors ``[G, n, O]``, and its covariance with the inputs."""
        assert self._inputs is not None
        mean = errors.mean(1, keepdim=True)
        # As the change is centred, the inputs need not be.
        return mean[:, 0], self._inputs[:, : self.count].mT @ (errors - mean) / self.count


@dataclass(frozen=True, eq=False)
class Solution:
    """Coefficients D and offsets d of a :class:`Ridge`, in float64.

    D is ``left`` itself, or where there are ``samples`` the product of ``left`` and the centred samples, which may be
    too large to hold.

    Attributes:
        left: ``[G, O, F]``, or ``[G, O, n]`` with samples.
        samples: ``[n, G, F]``, or ``None``.
        mean: ``[G, F]``, the samples' mean.
        offset: ``[G, O]``, d.
        before: Σ E e² over all errors, in their unit squared.
        after: the same for e − Dx − d.
    """

    left: Tensor
    samples: Tensor | None
    mean: Tensor
    offset: Tensor
    before: float
    after: float

    def changes(self, matrix: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Some columns of D, or of ``matrix @ D``, at a time: which, and their values ``[G, O or m, columns]``.

        Args:
            matrix: ``[G, m, O]``.
        """
        left = self.left if matrix is None else matrix.to(self.left) @ self.left
        if self.samples is None:
            yield slice(0, left.shape[2]), left
            return
        for columns, centred in _centred(self.samples, self.mean):
            yield columns, left @ centred


def ridge_bytes(shape: tuple[int, int, int], samples: int, itemsize: int) -> int:
    """Bytes that a :class:`Ridge` takes at most.

    Args:
        shape: G, F and O.
        samples: number of samples.
        itemsize: bytes of one number in a sample.
    """
    blocks, inputs, outputs = shape
    if samples < inputs:
        held = samples * (inputs + outputs) * itemsize
        solving = 8 * (2 * samples**2 + 3 * samples * outputs) + 2 * 8 * min(_WIDENED, samples * inputs)
    else:
        rows = min(samples, _capacity(inputs))
        # Samples and their centred copy; sums, those of the latest samples, and the latter in single precision.
        held = 2 * rows * (inputs + outputs) * itemsize
        solving = (16 + itemsize) * inputs * (inputs + outputs) + 8 * inputs * outputs
    return blocks * (held + solving)


def held_bytes(shape: tuple[int, int, int], samples: int, itemsize: int) -> int:
    """Bytes that a :class:`Ridge` takes beside that if it holds its samples."""
    blocks, inputs, outputs = shape
    solving = 4 * itemsize if samples >= inputs else 5 * 8  # in the samples it is solved in float64
    return blocks * samples * ((inputs + 3 * outputs) * itemsize + solving * outputs)


def samples_within(shape: tuple[int, int, int], samples: int, memory: float, itemsize: int) -> int:
    """Return how many of some samples a :class:`Ridge` may have in order to take at most ``memory`` bytes."""
    if ridge_bytes(shape, samples, itemsize) <= memory:
        return samples
    few = range(min(samples, shape[1]))
    return max(0, bisect_right(few, memory, key=lambda count: ridge_bytes(shape, count, itemsize)) - 1)


def _capacity(inputs: int) -> int:
    return max(_ROWS, inputs)


def _in_inputs(
    moments: Moments, toward: CrossMoments, squares: float, ridge: float, held: _Held | None = None
) -> Solution:
    """Solve from the moments of the inputs, which are overwritten."""
    count = float(moments.count)
    among, target = moments.scatter.div_(count), toward.scatter.div_(count)
    spread = among.diagonal(dim1=1, dim2=2)
    penalty = _penalty(ridge, spread.mean(1))
    spread.add_(penalty[:, None])
    factor = torch.linalg.cholesky(among)
    found = torch.cholesky_solve(target, factor)
    left, error_mean, before = found.mT, toward.right, squares / count
    if held is None:
        # With G = Cov(x, e) and D = (C + p I)⁻¹ G, the error falls by 2 D·G − D·CD = D·G + p D·D.
        gain = (found * target).sum() + (penalty[:, None, None] * found.square()).sum()
        after = before - float(error_mean.square().sum() + gain)
        return Solution(left, None, moments.mean, error_mean - _times(left, moments.mean), before, after)
    offset = error_mean - _times(left, moments.mean)
    for _ in range(ROUNDS):
        mean, covariance = held.moved(held.nearest(held.fitted(left, offset)) - held.errors)
        left = torch.cholesky_solve(target + covariance.to(target), factor).mT
        offset = error_mean + mean.to(target) - _times(left, moments.mean)
    before, after = held.left(torch.zeros_like(held.errors)), held.left(held.fitted(left, offset))
    return Solution(left, None, moments.mean, offset, before, after)


def _in_samples(inputs: Tensor, errors: Tensor, ridge: float, held: _Held | None = None) -> Solution:
    """Solve from fewer samples ``[n, G, F]`` and ``[n, G, O]`` than inputs."""
    device = accumulation_device(inputs.device)
    inputs, errors = inputs.to(device), errors.to(device)
    count, blocks, width = inputs.shape
    mean = inputs.mean(0, dtype=torch.float64)
    kernel, toward_mean = mean.new_zeros(blocks, count, count), mean.new_zeros(blocks, count)
    for columns, centred in _centred(inputs, mean):
        kernel.baddbmm_(centred, centred.mT)
        toward_mean += _times(centred, mean[:, columns])
    penalty = count * _penalty(ridge, kernel.diagonal(dim1=1, dim2=2).sum(1) / (count * width))
    kernel.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    factor, rest = torch.linalg.cholesky(kernel), errors.transpose(0, 1).double()

    def solve() -> tuple[Tensor, Tensor]:
        mean = rest.mean(1)
        return mean, torch.cholesky_solve(rest - mean[:, None], factor)

    error_mean, solved = solve()
    for _ in range(ROUNDS if held else 0):
        assert held is not None
        # The errors that remain are E − XXᵀ A = nλv A.
        rest = held.nearest(rest - penalty[:, None, None] * solved)
        error_mean, solved = solve()
    remain, left = penalty[:, None, None] * solved, solved.mT
    before, after = _squares(errors) / count, float(remain.square().sum()) / count
    if held:
        before, after = held.left(torch.zeros_like(rest)), held.left(rest - remain)
    return Solution(left, inputs, mean, error_mean - _times(left, toward_mean), before, after)


def _penalty(ridge: float, spread: Tensor) -> Tensor:
    return (ridge * spread).clamp_min(torch.finfo(torch.float64).tiny)


def _centred(samples: Tensor, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some columns of centred samples at a time, ``[G, n, columns]`` in float64."""
    count, blocks, width = samples.shape
    step = max(1, _WIDENED // (count * blocks))
    for start in range(0, width, step):
        columns = slice(start, start + step)
        yield columns, samples[:, :, columns].transpose(0, 1).double().sub_(mean[:, None, columns])


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """``[G, m, k]`` times ``[G, k]``."""
    return (matrices @ vectors[..., None])[..., 0]


def _squares(errors: Tensor) -> float:
    return float(torch.linalg.vector_norm(errors, dtype=torch.float64)) ** 2
