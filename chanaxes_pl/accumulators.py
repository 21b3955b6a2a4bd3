"""Streaming moments of every tracked layer, as torchmetrics state that sums up across processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn
from torchmetrics import Metric

from chanaxes_pl.layers import (
    by_position,
    channel_count,
    image_means,
    local_samples,
    sample_positions,
    scrambled,
)
from chanaxes_pl.moments import Moments, accumulation_device
from chanaxes_pl.targets import task_variable


class MomentsMetric(Metric):
    """:class:`Moments` of ``width`` variables as a torchmetrics metric: ``update`` with samples ``[n, width]``."""

    full_state_update = False
    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        empty = Moments.empty(width)
        for name in ("count", "mean", "scatter"):
            # No reduction: a sync stacks the processes' states, and compute() merges them.
            self.add_state(name, getattr(empty, name), dist_reduce_fx=None)

    def update(self, samples: Tensor) -> None:
        """Merge in a batch of samples."""
        merged = Moments(self.count, self.mean, self.scatter).merge(Moments.of(samples))
        self.count, self.mean, self.scatter = merged.count, merged.mean, merged.scatter

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and scatter over all processes."""
        width = self.mean.shape[-1]
        stacked = zip(
            self.count.reshape(-1),
            self.mean.reshape(-1, width),
            self.scatter.reshape(-1, width, width),
            strict=True,
        )
        merged = Moments.merge_all(Moments(*state) for state in stacked)
        return merged.count, merged.mean, merged.scatter

    @property
    def moments(self) -> Moments:
        """The result as :class:`Moments`; a collective call where several processes run."""
        count, mean, scatter = self.compute()
        width = self.mean.shape[-1]
        return Moments(count, mean.reshape(width), scatter.reshape(width, width))


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What a probe pass leaves of one layer.

    Attributes:
        channels: C.
        local: moments of the channels over local samples, one a part of the probe (even and odd images).
        joint: moments of ``[ȳ (C), T (D), null target (D)]`` over images, likewise.
    """

    channels: int
    local: tuple[Moments, ...]
    joint: tuple[Moments, ...]

    @property
    def targets(self) -> int:
        """D."""
        return (len(self.joint[0].mean) - self.channels) // 2


class Recorder:
    """Collects every tracked layer's moments while a model runs over the probe.

    Args:
        layers: the tracked modules by name.
        target: ``(logits, labels) → [B]`` or ``[B, D]``.
        positions: local samples an image, or ``"all"``.
        halves: keep even and odd images apart.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        target: Callable[[Tensor, Tensor], Tensor],
        positions: int | str = 16,
        halves: bool = True,
    ) -> None:
        self.layers = layers
        self.images = 0
        self._target = target
        self._positions = positions
        self._parts = 2 if halves else 1
        self._local: dict[str, list[MomentsMetric]] = {}
        self._joint: dict[str, list[MomentsMetric]] = {}
        self._means: dict[str, Tensor] = {}
        self._indices = np.arange(0)
        self._parts_of_batch: list[Tensor] = []
        self._places: dict[int, Tensor | None] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the layers' outputs."""
        handles = [
            layer.register_forward_hook(partial(self._listen, name)) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, indices: np.ndarray, forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Run ``forward`` → (logits, labels) on the images with these indices, and take in what the layers gave.

        Raises:
            ValueError: if a layer ran twice, or logits, labels and target do not fit each other.
        """
        self._indices, self._places = indices, {}
        self._parts_of_batch = [torch.from_numpy(np.flatnonzero(indices % self._parts == k)) for k in range(self._parts)]
        self._means.clear()
        logits, labels = forward()
        values = task_variable(self._target, logits, labels)
        if len(values) != len(indices):
            raise ValueError(f"the probe step gave {len(values)} labels for a batch of {len(indices)} images")
        null = torch.from_numpy(_null_target(indices, values.shape[1])).to(values.device)
        parts = [part.to(values.device) for part in self._parts_of_batch]
        for name, means in self._means.items():
            rows = torch.cat([means, values, null], 1)
            metrics = self._metrics(self._joint, name, rows.shape[1], rows.device)
            for metric, part in zip(metrics, parts, strict=True):
                metric.update(rows[part])
        self.images += len(indices)

    def moments(self) -> dict[str, LayerMoments | None]:
        """The result by layer, ``None`` where the forward pass never reached it; a collective call."""
        return {
            name: LayerMoments(
                channel_count(layer),
                tuple(metric.moments for metric in self._local[name]),
                tuple(metric.moments for metric in self._joint[name]),
            )
            if name in self._joint
            else None
            for name, layer in self.layers.items()
        }

    def _listen(self, name: str, layer: nn.Module, _inputs: object, output: Tensor) -> None:
        if name in self._means:
            raise ValueError(
                f"layer {name!r} ran twice in one forward pass: a channel would have two outputs an image; "
                "leave the layer out with layers=[…]"
            )
        output = by_position(layer, output, len(self._indices), name)
        self._means[name] = image_means(output)
        metrics = self._metrics(self._local, name, output.shape[1], accumulation_device(output.device))
        places = self._positions_of(output.shape[2], output.device)
        for metric, part in zip(metrics, self._parts_of_batch, strict=True):
            rows = part.to(output.device)
            metric.update(local_samples(output, rows, None if places is None else places[rows]))

    def _metrics(
        self, kind: dict[str, list[MomentsMetric]], name: str, width: int, device: torch.device
    ) -> list[MomentsMetric]:
        """A layer's accumulators, one a part of the probe, made on first use."""
        if name not in kind:
            kind[name] = [MomentsMetric(width).to(device) for _ in range(self._parts)]
        return kind[name]

    def _positions_of(self, total: int, device: torch.device) -> Tensor | None:
        if total not in self._places:
            count = total if self._positions == "all" else int(self._positions)
            places = sample_positions(self._indices, total, count)
            self._places[total] = None if places is None else places.to(device)
        return self._places[total]


def _null_target(indices: np.ndarray, width: int) -> np.ndarray:
    """``[B, width]``: a target that knows nothing, standard normal numbers hashed from the images' indices.

    Correlations with it are distributed as with T permuted across images, to all orders that matter here
    (mean 0, variance 1/(N − 1) either way), but it needs neither the whole probe at once nor one process.
    """
    numbers = scrambled(
        np.uint64(2**32)
        + indices[:, None].astype(np.uint64) * np.uint64(width)
        + np.arange(width, dtype=np.uint64)
    )
    return ndtri((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)
