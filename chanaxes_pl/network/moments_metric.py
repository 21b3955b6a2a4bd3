"""Moments as the state of a torchmetrics metric, which merges them across processes."""

from __future__ import annotations

from dataclasses import fields
from typing import Generic, TypeVar

from torch import Tensor
from torchmetrics import Metric

from chanaxes_pl.core.moments import CrossMoments, Moments

Kind = TypeVar("Kind", Moments, CrossMoments)


class MomentsMetric(Metric, Generic[Kind]):
    """:class:`Moments`, :class:`CrossMoments` or another frozen dataclass of tensors with ``merge_``, as a metric.

    Args:
        empty: neutral element of ``merge_``; its tensors become the metric's states.
        shared: whether each of several processes holds a part.

    Example:
        >>> import torch
        >>> metric = MomentsMetric(Moments.empty(2))
        >>> for batch in torch.arange(8.0).reshape(2, 2, 2):
        ...     metric.update(Moments.of(batch))
        >>> metric.merged.mean
        tensor([3., 4.], dtype=torch.float64)
    """

    full_state_update = False

    def __init__(self, empty: Kind, shared: bool = False) -> None:
        super().__init__(sync_on_compute=shared)
        self._kind = type(empty)
        self._shapes = {field.name: getattr(empty, field.name).shape for field in fields(empty)}
        for name, shape in self._shapes.items():
            state: Tensor = getattr(empty, name)
            # Without a reduction, a sync stacks the processes' states, and compute() merges them.
            self.add_state(name, state, dist_reduce_fx=None)
            # reset() copies this: one zero, expanded. By default, torchmetrics would keep a second square matrix.
            self._defaults[name] = state.new_zeros(()).expand(shape)

    def update(self, part: Kind) -> None:
        """Merge in the moments of a batch."""
        self._kind(*(getattr(self, name) for name in self._shapes)).merge_(part)  # type: ignore[arg-type]

    def compute(self) -> tuple[Tensor, ...]:
        """Merge the states over all processes."""
        stacked = [getattr(self, name).reshape(-1, *shape) for name, shape in self._shapes.items()]
        first, *others = (self._kind(*states) for states in zip(*stacked, strict=True))
        merged = self._kind(*(getattr(first, name).clone() for name in self._shapes))
        for other in others:
            merged.merge_(other)  # type: ignore[arg-type]
        return tuple(getattr(merged, name) for name in self._shapes)

    @property
    def merged(self) -> Kind:
        """Moments merged over the processes that share them, then a collective call."""
        # torchmetrics squeezes results of one number.
        states = zip(self.compute(), self._shapes.values(), strict=True)
        return self._kind(*(state.reshape(shape) for state, shape in states))
