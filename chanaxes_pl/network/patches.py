"""Covariances of a layer's input patches with its outputs and with the target, for the gradients."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from chanaxes_pl.core.moments import CrossMoments, accumulation_device
from chanaxes_pl.network.layers import CONVOLUTIONS, by_position
from chanaxes_pl.network.sampling import image_means, local_samples, patch_means, patches

# Numbers of patches looked at at a time: a map's patches, kernel size times the map, need not exist as a whole.
_NUMBERS = 1 << 22
_STATES = tuple(field.name for field in fields(CrossMoments))


class CrossMetric(Metric):
    """:class:`CrossMoments` as a torchmetrics metric: ``update`` with samples ``[n, G, F]`` and ``[n, G, R]``."""

    full_state_update = False
    count: Tensor
    scatter: Tensor

    def __init__(self, blocks: int, left: int, right: int) -> None:
        super().__init__()
        empty = CrossMoments.empty(blocks, left, right)
        for name in _STATES:
            state: Tensor = getattr(empty, name)
            # No reduction: a sync stacks the processes' states, and compute() merges them.
            self.add_state(name, state, dist_reduce_fx=None)
            self._defaults[name] = state.new_zeros(()).expand(state.shape)  # torchmetrics would keep a second one

    def update(self, left: Tensor, right: Tensor) -> None:
        """Merge in a batch of samples."""
        CrossMoments(*(getattr(self, name) for name in _STATES)).merge_(CrossMoments.of(left, right))

    def compute(self) -> Tensor:
        """Covariance over all processes, flat; a collective call where several run."""
        states = [getattr(self, name) for name in _STATES]
        processes = zip(*states, strict=True) if self.count.ndim else [states]
        merged = CrossMoments.empty(*self.scatter.shape[-3:], device=self.scatter.device)
        for state in processes:
            merged.merge_(CrossMoments(*state))
        return merged.covariance.flatten()

    @property
    def covariance(self) -> Tensor:
        """``[G, F, R]`` over all processes; a collective call where several run."""
        return self.compute().reshape(self.scatter.shape[-3:])


@dataclass(frozen=True, eq=False)
class PatchMoments:
    """What a layer's input patches have to do with its outputs and with the target.

    Attributes:
        outputs: ``[C, F]``, Cov(x, y_i) of the patch that a channel reads with its output, over local samples.
        target: ``[C, F]``, Cov(x, T) with the target, over all positions of every image.
    """

    outputs: Tensor
    target: Tensor


class PatchRecorder:
    """Collects :class:`PatchMoments` of one layer, batch by batch: what it read, then what the images' target is."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._blocks = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
        self._outputs: CrossMetric | None = None
        self._target: CrossMetric | None = None
        self._means = torch.empty(0)

    def read(self, inputs: Tensor, output: Tensor, seen: Tensor, places: Tensor | None, name: str) -> None:
        """Take in a batch.

        Args:
            inputs: of the layer, ``[B, C, *spatial]`` or ``[B, …, F]``.
            output: of the layer, in its own shape.
            seen: the same as ``[B, C, P]``.
            places: ``[B, p]``, positions sampled in each image, or ``None`` for all.
            name: the layer's name, for errors.
        """
        layer, images = self._layer, len(seen)
        if isinstance(layer, CONVOLUTIONS):
            self._means = self._by_block(patch_means(layer, inputs, output.shape[2:]).flatten(1))
        else:
            inputs = by_position(layer, inputs, images, name)
            self._means = self._by_block(image_means(inputs))
        if places is None:
            places = torch.arange(seen.shape[2], device=seen.device).expand(images, -1)
        width = self._means[0].numel()
        for rows in torch.arange(images, device=seen.device).split(max(1, _NUMBERS // (width * places.shape[1]))):
            if isinstance(layer, CONVOLUTIONS):
                read = patches(layer, inputs, rows, places[rows], output.shape[2:]).flatten(1)
            else:
                read = local_samples(inputs, rows, places[rows])
            gave = local_samples(seen, rows, places[rows])
            if self._outputs is None:
                self._outputs = self._metric(gave.shape[1] // self._blocks, seen.device)
            self._outputs.update(self._by_block(read), self._by_block(gave))

    def learn(self, values: Tensor) -> None:
        """Take in the target of the batch just read, ``[B, 1]``."""
        if self._target is None:
            self._target = self._metric(1, values.device)
        self._target.update(self._means, values[:, None].expand(-1, self._blocks, -1))

    @property
    def moments(self) -> PatchMoments:
        """The result; a collective call where several processes run."""
        assert self._outputs is not None
        assert self._target is not None
        outputs, target = self._outputs.covariance, self._target.covariance
        return PatchMoments(outputs.mT.flatten(0, 1), target.mT.repeat_interleave(outputs.shape[2], 0).flatten(0, 1))

    def _by_block(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), self._blocks, -1)

    def _metric(self, right: int, device: torch.device) -> CrossMetric:
        return CrossMetric(self._blocks, self._means.shape[2], right).to(accumulation_device(device))
