"""Covariances of a layer's input patches with its outputs and with the target, for the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chanaxes_pl.core.moments import CrossMoments, accumulation_device
from chanaxes_pl.network.layers import CONVOLUTIONS, by_position, has_own_forward
from chanaxes_pl.network.moments_metric import MomentsMetric
from chanaxes_pl.network.sampling import Window, convolved, image_means, local_samples, patch_means, patches

# Largest number of patch values at a time, so that the patches of a map, kernel size times the map, need not all fit.
_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class PatchMoments:
    """Covariances of a layer's input patches with its outputs and with the target.

    Attributes:
        outputs: ``[C, F]``, Cov(x, y_i) of a channel's input patch with its output, over local samples.
        target: ``[C, F]``, Cov(x, T) of the input patch with the target, over all positions of every image.
    """

    outputs: Tensor
    target: Tensor


class PatchRecorder:
    """Recorder of the :class:`PatchMoments` of one layer: for each batch, first its inputs, then the target.

    Args:
        layer: convolution or Linear layer.
        shared: whether each of several processes reads a part of the probe.
    """

    def __init__(self, layer: nn.Module, shared: bool = False) -> None:
        self._shared = shared
        self._layer = layer
        self._blocks = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
        # Of a convolution; where it has a forward of its own, this tells what is convolved.
        self._window: Window | None = None
        self._pads_itself = isinstance(layer, CONVOLUTIONS) and has_own_forward(layer)
        if isinstance(layer, CONVOLUTIONS) and not self._pads_itself:
            self._window = Window.of(layer)
        self._outputs: MomentsMetric[CrossMoments] | None = None
        self._target: MomentsMetric[CrossMoments] | None = None
        self._means = torch.empty(0)

    def misread(self, inputs: Tensor, output: Tensor) -> str:
        """Why it is not known what a convolution with a forward of its own reads at each position; empty if it is."""
        if not self._pads_itself:
            return ""
        layer, found = self._layer, convolved(self._layer, inputs)  # type: ignore[arg-type]
        if found is None:
            size = "×".join(map(str, layer.kernel_size))  # type: ignore[arg-type]
            return f"the forward of {type(layer).__name__} does not run one {size} convolution of its own shape"
        positions = found[1].outputs(found[0].shape[2:])
        if len(found[0]) != len(inputs) or positions != tuple(output.shape[2:]):
            return f"the forward of {type(layer).__name__} gives another map than its convolution"
        return ""

    def read(self, inputs: Tensor, output: Tensor, seen: Tensor, places: Tensor | None, name: str) -> None:
        """Add the inputs and outputs of a batch.

        Args:
            inputs: the layer's inputs, ``[B, C, *spatial]`` or ``[B, …, F]``.
            output: the layer's output in its own shape.
            seen: the output as ``[B, C, P]``.
            places: ``[B, p]`` positions sampled in each image, or ``None`` for all.
            name: the layer's name, for errors.
        """
        inputs = self._as_read(inputs)
        self._means = self._means_of(inputs, output, name)
        images = torch.arange(len(seen), device=seen.device)
        if places is None:
            places = torch.arange(seen.shape[2], device=seen.device).expand(len(seen), -1)
        self._cover(inputs, output, seen, images, places, name)

    def read_runs(self, runs: Sequence[tuple[Tensor, Tensor, Tensor]], places: Tensor | None, name: str) -> None:
        """Take in a batch on which the layer ran several times.

        Args:
            runs: inputs, output and seen of each, as :meth:`read` has them.
            places: ``[B, p]``, positions sampled in each image, counted through the positions of all runs in turn, or
                ``None`` for all.
            name: the layer's name, for errors.
        """
        images, total = len(runs[0][2]), sum(seen.shape[2] for *_, seen in runs)
        if places is None:
            places = torch.arange(total, device=runs[0][2].device).expand(images, -1)
        means, start = [], 0
        for inputs, output, seen in runs:
            stop = start + seen.shape[2]
            inputs = self._as_read(inputs)
            self._means = self._means_of(inputs, output, name)
            means.append(self._means * (seen.shape[2] / max(1, total)))
            rows, columns = ((places >= start) & (places < stop)).nonzero(as_tuple=True)
            if len(rows):
                self._cover(inputs, output, seen, rows, places[rows, columns, None] - start, name)
            start = stop
        self._means = torch.stack(means).sum(0)

    def learn(self, values: Tensor) -> None:
        """Add the target ``[B, 1]`` of the last batch."""
        if self._target is None:
            self._target = self._metric(1, values.device)
        self._target.update(CrossMoments.of(self._means, values[:, None].expand(-1, self._blocks, -1)))

    @property
    def moments(self) -> PatchMoments:
        """Moments over all processes; a collective call if there are several."""
        assert self._outputs is not None
        assert self._target is not None
        outputs, target = self._outputs.merged.covariance, self._target.merged.covariance
        return PatchMoments(outputs.mT.flatten(0, 1), target.mT.repeat_interleave(outputs.shape[2], 0).flatten(0, 1))

    def _as_read(self, inputs: Tensor) -> Tensor:
        if not self._pads_itself:
            return inputs
        found = convolved(self._layer, inputs)  # type: ignore[arg-type]
        assert found is not None
        inputs, self._window = found
        return inputs

    def _means_of(self, inputs: Tensor, output: Tensor, name: str) -> Tensor:
        """``[B, G, F]``: what each block reads on average over all positions."""
        if self._window is not None:
            return self._by_block(patch_means(self._window, inputs, output.shape[2:]).flatten(1))
        return self._by_block(image_means(by_position(self._layer, inputs, len(output), name)))

    def _cover(self, inputs: Tensor, output: Tensor, seen: Tensor, images: Tensor, places: Tensor, name: str) -> None:
        """Take in the patches at positions ``[n, p]`` of the images ``[n]``."""
        window, width = self._window, self._means[0].numel()
        if window is None:
            inputs = by_position(self._layer, inputs, len(seen), name)
        rows_at_once = max(1, _NUMBERS // (width * places.shape[1]))
        for rows, at in zip(images.split(rows_at_once), places.split(rows_at_once), strict=True):
            if window is not None:
                read = patches(window, inputs, rows, at, output.shape[2:]).flatten(1)
            else:
                read = local_samples(inputs, rows, at)
            gave = local_samples(seen, rows, at)
            if self._outputs is None:
                self._outputs = self._metric(gave.shape[1] // self._blocks, seen.device)
            self._outputs.update(CrossMoments.of(self._by_block(read), self._by_block(gave)))

    def _by_block(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), self._blocks, -1)

    def _metric(self, right: int, device: torch.device) -> MomentsMetric[CrossMoments]:
        empty = CrossMoments.empty(self._blocks, self._means.shape[2], right)
        return MomentsMetric(empty, self._shared).to(accumulation_device(device))
