"""One pass of a model over the probe set: the moments of every tracked layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, InputError, is_whole, short
from chanaxes_pl.core.metrics import check_noise
from chanaxes_pl.core.moments import Moments, accumulation_device
from chanaxes_pl.core.targets import Target, TargetSpec, doubt, infer_target, null_target
from chanaxes_pl.network.batches import Placement, Step, shortened, stepped, without_labels
from chanaxes_pl.network.hooks import observed, same_outputs
from chanaxes_pl.network.layers import (
    LayerSpec,
    Projection,
    affine,
    by_position,
    channel_count,
    listen,
    misfit,
    select_layers,
    used_elsewhere,
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
#: Why a layer that never ran has no moments.
UNREACHED = "the forward pass did not reach this layer"


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

    Args:
        parts: number of parts.
        width: number of variables.
        device: where sums are kept.
        shared: whether several processes record.
        precise: as for :meth:`Moments.of`.
    """

    def __init__(self, parts: int, width: int, device: torch.device, shared: bool, precise: bool = False) -> None:
        self._precise = precise
        self._metrics = [MomentsMetric(Moments.empty(width), shared).to(device) for _ in range(parts)]
        self._capacity = max(_WAITING // width, width // 2)
        self._buffers: list[Tensor | None] = [None] * parts
        self._filled = [0] * parts

    def update(self, rows: Iterable[Tensor]) -> None:
        for part, new in enumerate(rows):
            if self._filled[part] + len(new) > self._capacity:
                self._flush(part)
            if len(new) > self._capacity:
                self._metrics[part].update(Moments.of(new, self._precise))
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
            metric.update(Moments.of(buffer[: self._filled[part]], self._precise))
            self._filled[part] = 0


class Recorder:
    """Collects every tracked layer's moments while a model runs over the probe.

    A layer that runs several times in a forward pass has the positions of all its runs, in their order, as positions of
    the image. The first batch tells which layers these are, and is run again; from then on a copy of their outputs
    (with ``alignment`` also of their inputs) is held until the end of each forward pass. What runs once is not copied.

    A layer without moments is named in :meth:`left_out`.

    Args:
        layers: the tracked modules by name.
        target: what T is.
        positions: local samples an image, ``"all"``, or ``"mean"`` for one sample an image, the mean over positions.
        halves: keep even and odd images apart.
        alignment: collect what the gradients of both information terms need, too.
        shared: whether several processes record, each another part of the probe; then all of them call what is
            collective.

    Attributes:
        layers: as given.
        images: how many this process has run.
        targeted: how many of them have a target: all but those of dense prediction without a labelled position.
        repeated: names of layers that run several times in a forward pass.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        target: Target,
        positions: int | str = 16,
        halves: bool = True,
        alignment: bool = False,
        shared: bool = False,
    ) -> None:
        self.layers = layers
        self._shared = shared
        self.images = self.targeted = 0
        self.target = target
        self._positions = positions
        self._parts = 2 if halves else 1
        self._local: dict[str, _Parts] = {}
        self._joint: dict[str, _Parts] = {}
        self._maps: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._alignment = alignment
        self._patches = self._new_patches()
        self.repeated: set[str] = set()
        self._ran: dict[str, int] = {}
        self._unfit: dict[str, str] = {}
        self._square: dict[str, tuple[int, ...]] = {}
        self._batch = _Batch(np.arange(0), self._parts)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the layers' outputs."""
        with _listening(self.layers, self._listen):
            yield

    def record(self, indices: np.ndarray, forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Run ``forward`` → (logits, labels) on the images with these indices, and take in what the layers gave.

        Raises:
            ValueError: if logits, labels and target do not fit each other.
        """
        logits, labels = self._run(indices, forward)
        batch = self._batch
        values = self.target(logits, labels)
        if len(values) != len(indices):
            raise InputError(
                f"the target has {len(values)} rows for a batch of {len(indices)} images: expected one for each; if "
                "collate_fn drops images, pass a probe= without those, such as a Subset"
            )
        if self._patches and values.shape[1] > 1:
            raise InputError(
                f"alignment=True with a target of {values.shape[1]} numbers an image: expected one, for there is one "
                "gradient; use target='logit_margin' or 'log_probability', or a function that gives [B]"
            )
        null = torch.from_numpy(null_target(indices, values.shape[1])).to(values.device)
        parts = batch.parts(values.device)
        if self.target.of_maps and logits.ndim > 2:
            labelled = values.isfinite().all(1)
            if self._patches and not labelled.all():
                raise InputError(
                    "alignment=True with an image that has no labelled position: expected one in each; leave such "
                    "images out of the probe"
                )
            parts = [part[labelled[part]] for part in parts]
        self.targeted += sum(map(len, parts))
        for name, means in batch.means.items():
            rows = torch.cat([means, values, null], 1)
            if name not in self._joint:
                self._joint[name] = _Parts(self._parts, rows.shape[1], rows.device, self._shared)
            self._joint[name].update(rows[part] for part in parts)
            if name in self._patches:
                self._patches[name].learn(values)
            self._ran[name] = self._ran.get(name, 0) + len(indices)
        self.images += len(indices)

    def moments(self) -> Iterator[tuple[str, LayerMoments | None]]:
        """The result layer by layer, ``None`` for those that are :meth:`left_out`; collective calls.

        One at a time, so that no more than one layer's moments exist twice.
        """
        missing = self.left_out()
        for name in self.layers:
            yield name, None if name in missing else self._layer_moments(name)

    def left_out(self) -> dict[str, str]:
        """Why layers have no moments, by name; the same in all processes, a collective call."""
        narrow = {name for name, mapped in self._maps.items() if mapped is not None}
        told_here = _Told(self.images, self._ran, self._unfit, narrow)
        shares = _of_all_processes(told_here) if self._shared else [told_here]
        images = sum(share.images for share in shares)
        reasons = {}
        for name in self.layers:
            ran = sum(share.ran.get(name, 0) for share in shares)
            told = [share.unfit[name] for share in shares if name in share.unfit]
            if told or not ran:
                reasons[name] = told[0] if told else UNREACHED
            elif ran < images:
                reasons[name] = f"the forward pass reached this layer for {ran} of {images} images only"
            elif len({name in share.narrow for share in shares}) > 1:
                reasons[name] = "it could not be measured in the same way in all processes"
        return reasons

    def find_unreached(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        """Tell layers whose weights a plain function uses from those that take no part, by one more forward pass.

        A collective call; the model runs in all processes or in none, but for one that had no images.
        """
        unreached = {name: self.layers[name] for name, why in self.left_out().items() if why == UNREACHED}
        if unreached and self.images:
            self._unfit |= used_elsewhere(model, unreached, forward)

    @property
    def doubtful(self) -> bool:
        """Whether a layer gave as many rows as positions in every batch, so that either may have been the images."""
        return bool(self._square)

    @property
    def batch_size(self) -> int:
        """Number of images in the last batch."""
        return len(self._batch.indices)

    def settle(self, forward: Callable[[], Any]) -> None:
        """Leave out the layers that were in doubt and whose rows turn out not to be the images.

        Args:
            forward: runs the model on the last batch without its last image.
        """

        def see(name: str, _layer: nn.Module, _read: Any, gave: Any) -> None:
            if not isinstance(gave, Tensor) or len(gave) != self.batch_size - 1:
                shape = self._square[name]
                self._drop(name, f"it gave an output of shape {shape}, whose first dimension is not that of the images")

        with _listening({name: self.layers[name] for name in self._square}, see):
            forward()

    def without_alignment(self) -> dict[str, str]:
        """Why layers that may have moments have no patches where they were asked for, by name."""
        missing = self.layers.keys() - self._new_patches().keys() if self._alignment else ()
        return dict.fromkeys(missing, "no alignment: what this layer reads does not leave the attention")

    def _layer_moments(self, name: str) -> LayerMoments:
        local, joint = self._local[name].moments(), self._joint[name].moments()
        channels = channel_count(self.layers[name])
        if (mapped := self._maps[name]) is not None:
            weight, bias = (tensor.to(local[0].mean) for tensor in mapped)
            local = tuple(part.mapped(weight, bias) for part in local)
            extra = len(joint[0].mean) - weight.shape[1]
            weight = torch.block_diag(weight, torch.eye(extra).to(weight))
            bias = torch.cat([bias, bias.new_zeros(extra)])
            joint = tuple(part.mapped(weight, bias) for part in joint)
        return LayerMoments(channels, local, joint, self._patches[name].moments if name in self._patches else None)

    def _run(self, indices: np.ndarray, forward: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run ``forward`` with all that the layers give in the batch, again while layers turn out to run repeatedly."""
        while True:
            self._batch = batch = _Batch(indices, self._parts)
            given = forward()
            if not batch.repeated:
                break
            self.repeated |= batch.repeated
            self._local, self._maps, self._patches = {}, {}, self._new_patches()
        for name, runs in batch.runs.items():
            self._take_runs(name, self.layers[name], runs)
        batch.runs.clear()
        return given

    def _new_patches(self) -> dict[str, PatchRecorder]:
        if not self._alignment:
            return {}
        shown = (name for name, layer in self.layers.items() if not isinstance(layer, Projection) or layer.reads)
        return {name: PatchRecorder(self.layers[name], self._shared) for name in shown}

    def _listen(self, name: str, layer: nn.Module, read: Any, gave: Any) -> None:
        batch = self._batch
        if name in self._unfit:
            return
        if why := self._misfit(name, layer, read, gave):
            self._drop(name, why)
            return
        if not (isinstance(layer, nn.Linear) and gave.ndim > 2 and 1 < len(gave) == gave.shape[1]):
            self._square.pop(name, None)
        elif not self.images:
            self._square[name] = tuple(gave.shape)
        if name in self.repeated:
            # Copies: what comes next may write into what it is given.
            run = _Run(read.clone() if name in self._patches else None, gave.clone())
            batch.runs.setdefault(name, []).append(run)
        elif name not in batch.means:
            self._take(name, layer, read, gave)
        elif not self.images:
            batch.repeated.add(name)
        else:
            self._drop(name, "it ran once on the first images and several times in a forward pass on later ones")

    def _misfit(self, name: str, layer: nn.Module, read: Any, gave: Any) -> str:
        images = len(self._batch.indices)
        if why := _misgiven(layer, gave, images):
            return why
        if name not in self._patches:
            return ""
        if why := misfit(layer, read, images, "an input"):
            return f"it read {why}"
        return self._patches[name].misread(read, gave)

    def _drop(self, name: str, why: str) -> None:
        self._unfit[name] = why
        for kept in (self._local, self._joint, self._maps, self._patches, self._batch.means, self._batch.runs):
            kept.pop(name, None)

    def _take(self, name: str, layer: nn.Module, read: Any, gave: Tensor) -> None:
        """Take in what a layer that runs once has read and given."""
        images = len(self._batch.indices)
        seen = by_position(layer, gave, images, name)
        if name in self._patches:
            places = self._positions_of(seen.shape[2], seen.device)
            self._patches[name].read(read, gave, seen, places, name)
        if name not in self._maps:
            narrower = widens_pointwise(layer) and not misfit(layer, read, images)
            self._maps[name] = _affine_map(layer, by_position(layer, read, images, name), seen) if narrower else None
        if self._maps[name] is not None:
            seen = by_position(layer, read, images, name)
        self._sample(name, seen)

    def _take_runs(self, name: str, layer: nn.Module, runs: list[_Run]) -> None:
        """Take in all runs of a layer in one forward pass."""
        outputs = [by_position(layer, run.gave, len(run.gave), name) for run in runs]
        seen = torch.cat(outputs, 2)
        if name in self._patches:
            places = self._positions_of(seen.shape[2], seen.device)
            self._patches[name].read_runs(
                [(run.read, run.gave, output) for run, output in zip(runs, outputs, strict=True)], places, name
            )
        self._maps[name] = None
        self._sample(name, seen)

    def _sample(self, name: str, seen: Tensor) -> None:
        batch = self._batch
        batch.means[name] = means = image_means(seen)
        if name not in self._local:
            # A map may cancel what its inputs have in common, and with it the leading digits of their moments.
            mapped = self._maps[name] is not None
            device = accumulation_device(seen.device)
            self._local[name] = _Parts(self._parts, seen.shape[1], device, self._shared, mapped)
        if self._positions == "mean":
            self._local[name].update(means[part] for part in batch.parts(means.device))
            return
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
    """What the layers of one batch share.

    Attributes:
        indices: of its images.
        places: positions by map size.
        means: image means by layer.
        runs: of the layers that are known to run several times.
        repeated: layers that did so without being known to.
    """

    def __init__(self, indices: np.ndarray, parts: int) -> None:
        self.indices = indices
        self.places: dict[int, Tensor | None] = {}
        self.means: dict[str, Tensor] = {}
        self.runs: dict[str, list[_Run]] = {}
        self.repeated: set[str] = set()
        self._parts = [torch.from_numpy(np.flatnonzero(indices % parts == k)) for k in range(parts)]

    def parts(self, device: torch.device) -> list[Tensor]:
        """Rows of the batch in each part of the probe."""
        self._parts = [part.to(device) for part in self._parts]
        return self._parts


class _Run(NamedTuple):
    """What a layer read (where patches are asked for) and gave in one of several runs."""

    read: Any
    gave: Tensor


class _Told(NamedTuple):
    """What processes tell each other: how many images they ran, and each layer; what does not fit; how they measure."""

    images: int
    ran: dict[str, int]
    unfit: dict[str, str]
    narrow: set[str]


def _of_all_processes(told: _Told) -> list[_Told]:
    """What every process tells, in order of their ranks; a collective call."""
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, told)
    return shares


@contextmanager
def _listening(layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call ``hook(name, layer, input, output)`` whenever one of some layers has run inside the block."""
    handles = [listen(layer, partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _misgiven(layer: nn.Module, gave: Any, images: int) -> str:
    """Why what a layer gave for a batch cannot be measured; empty where it can."""
    if why := misfit(layer, gave, images):
        return f"it gave {why}"
    channels, width = gave.shape[-1 if isinstance(layer, nn.Linear) else 1], channel_count(layer)
    return "" if channels == width else f"it gave {channels} channels, expected {width}"


def unmeasured(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, str]:
    """Why layers could not be measured, by name, as far as a few images tell.

    Args:
        model: model; it does not change.
        layers: name → layer.
        images: ``[B, …]`` on the model's device.
    """
    why: dict[str, str] = {}
    # Two sizes of a batch, so that a number of positions does not pass for the number of images.
    for few in (images[:2], images[:3]):

        def see(name: str, layer: nn.Module, _read: Any, gave: Any, few: Tensor = few) -> None:
            why[name] = why.get(name) or _misgiven(layer, gave, len(few))

        with _listening(layers, see), observed(model):
            model(few)
    return {name: told for name in layers if (told := why.get(name, UNREACHED))}


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

    layers: LayerSpec | Mapping[str, nn.Module] = "auto"
    positions: int | str = 16
    target: TargetSpec = "auto"
    noise: str | float = "median"
    reliability: bool = True
    step: Step | None = None
    probe_size: int = 5000
    alignment: bool = False

    def __post_init__(self) -> None:
        for name in ("positions", "probe_size"):
            if isinstance(value := getattr(self, name), np.integer):  # which no checkpoint or JSON file could hold
                object.__setattr__(self, name, int(value))
        for name in ("reliability", "alignment"):
            if not isinstance(value := getattr(self, name), (bool, np.bool_)):
                raise ArgumentTypeError(f"{name}={short(value)}", "expected True or False")
        if not is_whole(self.positions, 1) and self.positions not in ("all", "mean"):
            raise ArgumentError(f"positions={self.positions!r}", "expected a whole number above 0, 'all' or 'mean'")
        if self.alignment and self.positions == "mean":
            raise ArgumentError(
                "alignment=True, positions='mean'",
                "expected a number of positions or 'all': the gradient of input capture is that at single positions",
            )
        check_sizes(self.probe_size)
        Target(self.target)
        check_noise(self.noise)


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
    step = stepped(settings.step)
    target = Target(settings.target)
    recorder = Recorder(
        layers, target, settings.positions, settings.reliability, settings.alignment, shared=place.world > 1
    )
    moved: Any = None

    def forward() -> Any:
        with place.forward_context():
            outputs, labels = step(model, moved)
        if (
            labels is None
            and not callable(settings.target)
            and settings.step is None
            and (told := without_labels(moved))
        ):
            raise InputError(told)
        if target.unsettled:
            target.settle(_agreed(infer_target(outputs, labels), place.world))
            if told := doubt(target.name, labels):
                warnings.warn(f'target="auto": {told}', stacklevel=2)
        return outputs, labels

    with observed(model):
        with recorder.attached():
            for indices, batch in probe.batches(place.rank, place.world):
                moved = place.to_device(batch)
                recorder.record(indices, forward)
        recorder.find_unreached(model, forward)
        if recorder.doubtful:
            moved = shortened(moved, recorder.batch_size)
            recorder.settle(forward)
    if place.world == 1 and recorder.images < MIN_IMAGES:
        raise InputError(too_small(recorder.images))
    if place.world == 1 and recorder.targeted < MIN_IMAGES:
        raise InputError(
            f"{recorder.targeted} of the probe's {recorder.images} images have a labelled position, expected at least "
            f"{MIN_IMAGES}; pass a probe= with more of them"
        )
    return recorder


def _agreed(name: str, world: int) -> str:
    """One target for all processes, of which one may see only zeros and ones among real labels."""
    if world == 1:
        return name
    names: list[Any] = [None] * world
    torch.distributed.all_gather_object(names, name)
    return "label" if "label" in names else name
