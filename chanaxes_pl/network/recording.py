"""One pass of a model over the probe set: the moments of every tracked layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import ArgumentError, InputError
from chanaxes_pl.core.metrics import check_noise
from chanaxes_pl.core.moments import Moments, accumulation_device
from chanaxes_pl.core.targets import Target, TargetSpec, infer_target, null_target
from chanaxes_pl.network.batches import Placement, Step, default_step
from chanaxes_pl.network.hooks import observed, same_outputs
from chanaxes_pl.network.layers import (
    LayerSpec,
    affine,
    by_position,
    channel_count,
    select_layers,
    widens_pointwise,
)
from chanaxes_pl.network.moments_metric import MomentsMetric
from chanaxes_pl.network.patches import PatchMoments, PatchRecorder
from chanaxes_pl.network.probe import MIN_IMAGES, Probe, check_sizes, too_small
from chanaxes_pl.network.sampling import image_means, local_samples, sample_positions

# Numbers that a buffer holds at least: an eighth of a megabyte of float32.
_WAITING = 1 << 15
# A widening layer's output is compared with its affine map at about this many positions of as many images, up to this
# share of the largest value: far above what TF32 rounds off, far below what another map would give.
_CHECKED = 8
_CHECK_SHARE = 1e-2


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What a probe pass leaves of one layer.

    Attributes:
        channels: C.
        local: moments of the channels over local samples, one a part of the probe (even and odd images).
        joint: moments of ``[ȳ (C), T (D), null target (D)]`` over images, likewise.
        patches: of the layer's input, where they were asked for.
    """

    channels: int
    local: tuple[Moments, ...]
    joint: tuple[Moments, ...]
    patches: PatchMoments | None = None

    @property
    def targets(self) -> int:
        """D."""
        return (len(self.joint[0].mean) - self.channels) // 2


class _Parts:
    """Moments of the same variables over each part of the probe.

    Rows wait for more: merging costs a pass over a square matrix, and some twenty calls, however few rows come. They
    wait in one buffer each, made once: many small tensors that live on would fragment the heap.
    """

    def __init__(self, parts: int, width: int, device: torch.device) -> None:
        self._metrics = [MomentsMetric(Moments.empty(width)).to(device) for _ in range(parts)]
        self._capacity = max(_WAITING // width, width // 2)
        self._buffers: list[Tensor | None] = [None] * parts
        self._filled = [0] * parts

    def update(self, rows: Iterable[Tensor]) -> None:
        for part, new in enumerate(rows):
            if self._filled[part] + len(new) > self._capacity:
                self._flush(part)
            if len(new) > self._capacity:
                self._metrics[part].update(Moments.of(new))
            else:
                self._keep(part, new)

    def moments(self) -> tuple[Moments, ...]:
        for part in range(len(self._metrics)):
            self._flush(part)
        return tuple(metric.merged for metric in self._metrics)

    def _keep(self, part: int, new: Tensor) -> None:
        buffer = self._buffers[part]
        if buffer is None:
            buffer = self._buffers[part] = new.new_empty(self._capacity, new.shape[1])
        start, stop = self._filled[part], self._filled[part] + len(new)
        buffer[start:stop] = new
        self._filled[part] = stop

    def _flush(self, part: int) -> None:
        buffer, metric = self._buffers[part], self._metrics[part]
        # A process whose share holds none of this part's images says so too: a metric has to be told something.
        if buffer is not None and (self._filled[part] or not metric.update_called):
            metric.update(Moments.of(buffer[: self._filled[part]]))
            self._filled[part] = 0


class Recorder:
    """Collects every tracked layer's moments while a model runs over the probe.

    Args:
        layers: the tracked modules by name.
        target: what T is.
        positions: local samples an image, or ``"all"``.
        halves: keep even and odd images apart.
        alignment: collect what the gradients of both information terms need, too.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        target: Target,
        positions: int | str = 16,
        halves: bool = True,
        alignment: bool = False,
    ) -> None:
        self.layers = layers
        self.images = 0
        self.target = target
        self._positions = positions
        self._parts = 2 if halves else 1
        self._local: dict[str, _Parts] = {}
        self._joint: dict[str, _Parts] = {}
        self._maps: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._patches = {name: PatchRecorder(layer) for name, layer in layers.items()} if alignment else {}
        self._batch = _Batch(np.arange(0), self._parts)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the layers' outputs."""
        handles = [layer.register_forward_hook(partial(self._listen, name)) for name, layer in self.layers.items()]
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
        self._batch = batch = _Batch(indices, self._parts)
        logits, labels = forward()
        values = self.target(logits, labels)
        if len(values) != len(indices):
            raise InputError(f"the target has {len(values)} rows for a batch of {len(indices)} images")
        if self._patches and values.shape[1] > 1:
            raise InputError(
                f"alignment=True with a target of {values.shape[1]} numbers an image: expected one, for there is one "
                "gradient; use target='logit_margin' or 'log_probability', or a function that gives [B]"
            )
        null = torch.from_numpy(null_target(indices, values.shape[1])).to(values.device)
        for name, means in batch.means.items():
            rows = torch.cat([means, values, null], 1)
            if name not in self._joint:
                self._joint[name] = _Parts(self._parts, rows.shape[1], rows.device)
            self._joint[name].update(rows[part] for part in batch.parts(rows.device))
            if self._patches:
                self._patches[name].learn(values)
        self.images += len(indices)

    def moments(self) -> Iterator[tuple[str, LayerMoments | None]]:
        """The result layer by layer, ``None`` where the forward pass never reached it; collective calls.

        One at a time, so that no more than one layer's moments exist twice.
        """
        for name in self.layers:
            yield name, self._layer_moments(name) if name in self._joint else None

    def _layer_moments(self, name: str) -> LayerMoments:
        local, joint = self._local[name].moments(), self._joint[name].moments()
        channels = channel_count(self.layers[name])
        if (mapped := self._maps[name]) is not None:
            weight, bias = mapped
            local = tuple(part.mapped(weight, bias) for part in local)
            extra = len(joint[0].mean) - weight.shape[1]
            weight = torch.block_diag(weight, torch.eye(extra).to(weight))
            joint = tuple(part.mapped(weight, torch.cat([bias, bias.new_zeros(extra)])) for part in joint)
        return LayerMoments(channels, local, joint, self._patches[name].moments if self._patches else None)

    def _listen(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        batch = self._batch
        if name in batch.means:
            raise ValueError(
                f"layer {name!r} ran twice in one forward pass: a channel would have two outputs an image; "
                "leave the layer out with layers=[…]"
            )
        seen = by_position(layer, output, len(batch.indices), name)
        if self._patches:
            places = self._positions_of(seen.shape[2], seen.device)
            self._patches[name].read(inputs[0], output, seen, places, name)
        if name not in self._maps:
            read = by_position(layer, inputs[0], len(batch.indices), name) if widens_pointwise(layer) else None
            self._maps[name] = None if read is None else _affine_map(layer, read, seen)
        if self._maps[name] is not None:
            seen = by_position(layer, inputs[0], len(batch.indices), name)
        batch.means[name] = image_means(seen)
        if name not in self._local:
            self._local[name] = _Parts(self._parts, seen.shape[1], accumulation_device(seen.device))
        places = self._positions_of(seen.shape[2], seen.device)
        self._local[name].update(
            local_samples(seen, part, None if places is None else places[part]) for part in batch.parts(seen.device)
        )

    def _positions_of(self, total: int, device: torch.device) -> Tensor | None:
        places = self._batch.places
        if total not in places:
            count = total if self._positions == "all" else int(self._positions)
            chosen = sample_positions(self._batch.indices, total, count)
            places[total] = None if chosen is None else chosen.to(device)
        return places[total]


class _Batch:
    """What the layers of one batch share: its images, its parts, positions by map size, image means by layer."""

    def __init__(self, indices: np.ndarray, parts: int) -> None:
        self.indices = indices
        self.places: dict[int, Tensor | None] = {}
        self.means: dict[str, Tensor] = {}
        self._parts = [torch.from_numpy(np.flatnonzero(indices % parts == k)) for k in range(parts)]

    def parts(self, device: torch.device) -> list[Tensor]:
        """Rows of the batch in each part of the probe."""
        self._parts = [part.to(device) for part in self._parts]
        return self._parts


def _affine_map(layer: nn.Module, read: Tensor, gave: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a layer that widens pointwise; ``None`` where its output is not their map of its input.

    Args:
        layer: for which :func:`widens_pointwise` holds.
        read: ``[B, F, P]``, its input.
        gave: ``[B, C, P]``, its output.
    """
    if not gave.dtype == read.dtype in (torch.float32, torch.float64):
        return None  # in lower precision an output is not quite the affine map of its input
    weight, bias = affine(layer)
    few = [slice(None, None, max(1, size // _CHECKED)) for size in (len(read), read.shape[2])]
    found, wanted = (part[few[0], :, few[1]].mT for part in (read, gave))
    same = same_outputs(nn.functional.linear(found, weight, bias), wanted, _CHECK_SHARE)
    return (weight, bias) if same else None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how: the arguments that :func:`compute_axes` and ``AxisTracker`` share.

    Raises:
        ValueError: for a value that is out of range, quoting it.
    """

    layers: LayerSpec = "conv"
    positions: int | str = 16
    target: TargetSpec = "auto"
    noise: str | float = "median"
    reliability: bool = True
    step: Step | None = None
    probe_size: int = 5000
    alignment: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.positions, int) and self.positions > 0
        if not whole and self.positions != "all":
            raise ArgumentError(f"positions={self.positions!r}", "expected a whole number above 0, or 'all'")
        check_sizes(self.probe_size)
        Target(self.target)
        if self.alignment and self.target == "label":
            raise ArgumentError(
                "alignment=True, target='label'",
                "the label is K − 1 numbers an image, expected one, "
                "for there is one gradient; use 'logit_margin' or 'log_probability'",
            )
        try:
            check_noise(self.noise)
        except ValueError as error:
            raise InputError(f"{error}") from None


def record(
    model: nn.Module,
    probe: Probe,
    settings: Settings,
    place: Placement,
) -> Recorder:
    """One pass of ``model`` over the probe: the moments that everything else is computed from.

    Args:
        model: gives logits (or whatever ``settings.step`` makes logits of); left as it was.
        probe: the images.
        settings: what is measured.
        place: where the model runs; with several processes every one calls this with its own.

    Raises:
        ValueError: if the images or the layers are not what ``settings`` need.
    """
    layers = select_layers(model, settings.layers)
    step = settings.step or default_step
    target = Target(settings.target)
    recorder = Recorder(layers, target, settings.positions, settings.reliability, settings.alignment)
    with observed(model), recorder.attached():
        for indices, batch in probe.batches(place.rank, place.world):
            moved = place.to_device(batch)

            def forward(moved: Any = moved) -> Any:
                with place.forward_context():
                    outputs, labels = step(model, moved)
                if target.name == "auto":
                    target.settle(_agreed(infer_target(outputs, labels), place.world))
                return outputs, labels

            recorder.record(indices, forward)
    if place.world == 1 and recorder.images < MIN_IMAGES:
        raise InputError(too_small(recorder.images))
    return recorder


def _agreed(name: str, world: int) -> str:
    """One target for all processes, of which one may see only zeros and ones among real labels."""
    if world == 1:
        return name
    names: list[Any] = [None] * world
    torch.distributed.all_gather_object(names, name)
    return "label" if "label" in names else name
