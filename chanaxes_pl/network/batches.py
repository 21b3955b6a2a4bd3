"""What a batch and an output hold: images, labels, logits; and where a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from chanaxes_pl.core.errors import ArgumentError, InputError
from chanaxes_pl.core.targets import describe
from chanaxes_pl.network.lightning_twins import overrides

#: ``(module, batch) → (outputs, labels)``, such as logits ``[B, K]`` and class indices ``[B]``.
Step = Callable[[nn.Module, Any], tuple[Any, Any]]

#: Under which of these keys a mapping holds its images, and its labels.
IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs", "img")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "mask", "masks")
#: Under which of these a mapping or an object holds its logits.
_OUTPUT_KEYS = ("logits", "out")
#: Errors that a network may raise on other images, or with fewer channels, than it was written for. A device without
#: memory is another matter, and goes first where they are caught.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Find the images and the labels of a batch.

    Args:
        batch: a mapping, a dataclass or a namedtuple with one of :data:`IMAGE_KEYS` and at most one of
            :data:`LABEL_KEYS`; a tuple or list of images, labels and whatever follows; or the images alone.

    Returns:
        The images, and the labels or ``None``.

    Raises:
        ValueError: if the batch is anything else, or has several keys for either.

    Example:
        >>> split_batch({"img": [1, 2], "label": [0, 1], "path": ["a", "b"]})
        ([1, 2], [0, 1])
    """
    if isinstance(batch, Tensor):
        return batch, None
    named = _named(batch)
    if named is not None:
        images = [key for key in IMAGE_KEYS if key in named]
        labels = [key for key in LABEL_KEYS if key in named]
        if len(images) == 1 and len(labels) <= 1:
            return named[images[0]], named[labels[0]] if labels else None
        if not (isinstance(batch, tuple) and not images):
            raise InputError(_which(batch, [str(key) for key in named], images, labels))
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0], batch[1] if len(batch) > 1 else None
    raise InputError(
        f"a batch is {describe(batch)}: expected (images, labels), or a mapping, a dataclass or a namedtuple of them; "
        "for anything else pass step=lambda module, batch: (outputs, labels)"
    )


def _named(batch: Any) -> Mapping[Any, Any] | None:
    if isinstance(batch, Mapping):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return batch._asdict()  # type: ignore[attr-defined]
    return None


def _which(batch: Any, keys: list[str], images: list[str], labels: list[str]) -> str:
    found = [f"{len(named)} for {what}" for named, what in ((images, "the images"), (labels, "the labels"))]
    get = "batch[{!r}]" if isinstance(batch, Mapping) else "batch.{}"
    example = ", ".join(
        pattern.format(get.format(chosen[0] if chosen else usual))
        for pattern, chosen, usual in (("module({})", images, "image"), ("{}", labels, "label"))
    )
    return (
        f"a batch has the keys {', '.join(keys[:12])}: {found[0]} and {found[1]}. Expected one of "
        f"{', '.join(IMAGE_KEYS)} and at most one of {', '.join(LABEL_KEYS)}; "
        f"otherwise pass step=lambda module, batch: ({example})"
    )


def without_labels(batch: Any) -> str:
    """Return what to do about a batch that :func:`split_batch` finds no labels in, if they may be under another key.

    Example:
        >>> print(without_labels({"image": 0, "klass": 1}).partition("; ")[2])
        pass step=lambda module, batch: (module(batch['image']), batch['klass'])
    """
    named = _named(batch) or {}
    image = next((key for key in IMAGE_KEYS if key in named), None)
    others = [key for key in named if key != image]
    if image is None or not others:
        return ""
    get = "batch[{!r}]" if isinstance(batch, Mapping) else "batch.{}"
    return (
        f"a batch has the keys {', '.join(map(str, list(named)[:12]))}, and none of them is a known one of labels "
        f"({', '.join(LABEL_KEYS)}); pass step=lambda module, batch: "
        f"(module({get.format(image)}), {get.format(others[0])})"
    )


def logits_of(output: Any) -> Any:
    """Find the logits in what a network gives.

    Args:
        output: a tensor; a mapping or an object with ``logits`` or ``out``; a tuple or list whose first item is a
            tensor.

    Returns:
        The logits, or ``output`` itself where there are none, for a ``target=`` function to read.
    """
    if isinstance(output, Tensor):
        return output
    for key in _OUTPUT_KEYS:
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return output


def default_step(module: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run ``module(images)`` on a batch: see :func:`split_batch` and :func:`logits_of` for what both may be.

    Raises:
        ValueError: if the batch is not understood, or the forward pass fails on its images.
    """
    images, labels = split_batch(batch)
    try:
        output = module(images)
    except (InputError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        told = str(error).partition("\n")[0]
        raise InputError(
            f"{type(module).__name__}.forward was called with the images of a batch, {describe(images)}, and failed: "
            f"{type(error).__name__}: {told}. If forward expects something else, pass step=lambda module, batch: "
            "(outputs, labels), which calls the module as your validation step does"
        ) from error
    return logits_of(output), labels


def shortened(batch: Any, images: int) -> Any:
    """Return a batch with all its tensors of ``images`` entries cut to one image fewer."""

    def cut(value: Tensor) -> Tensor:
        return value[:-1] if value.ndim and len(value) == images else value

    return apply_to_collection(batch, Tensor, cut, allow_frozen=True)


def pair_of(result: Any) -> tuple[Any, Any]:
    """Return what a step gave, if it is a pair.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ArgumentError(f"step=… gave {describe(result)}", "expected a pair (outputs, labels)")
    return result[0], result[1]


def stepped(step: Step | None) -> Step:
    """Return a user's step, checked to give a pair, or without one :func:`default_step`."""
    return default_step if step is None else lambda module, batch: pair_of(step(module, batch))


@dataclass(frozen=True)
class Placement:
    """Where a model runs, and which share of the work is this process's.

    Attributes:
        to_device: moves a batch to the model, and converts it to the model's precision.
        forward_context: what a forward pass runs in, such as a precision plugin's.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: unless 0 ≤ rank < world.
    """

    to_device: Callable[[Any], Any]
    forward_context: Callable[[], AbstractContextManager] = nullcontext
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ArgumentError(f"rank={self.rank}, world={self.world}", "expected rank from 0 to world − 1")

    @classmethod
    def of(cls, model: nn.Module) -> Placement:
        """Return a single process, on the device of the model's first parameter.

        Floating-point tensors are converted to a half or double precision model's dtype, as under a
        Trainer's ``"16-true"``, ``"bf16-true"`` or ``"64-true"``.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        device = parameters[0].device if parameters else torch.device("cpu")
        kinds = {parameter.dtype for parameter in parameters}
        return cls(partial(_moved, device=device, precision=_precision(kinds.pop() if len(kinds) == 1 else None)))

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Placement:
        """Return where a Trainer's modules run; batches pass the same hooks as validation batches."""
        return cls(
            partial(_as_in_validation, trainer),
            trainer.precision_plugin.forward_context,
            trainer.global_rank,
            trainer.world_size,
        )


def _precision(kind: torch.dtype | None) -> Precision:
    if kind == torch.float64:
        return DoublePrecision()
    if kind in (torch.float16, torch.bfloat16):
        return HalfPrecision("16-true" if kind == torch.float16 else "bf16-true")
    return Precision()


def _moved(batch: Any, device: torch.device, precision: Precision) -> Any:
    return move_data_to_device(precision.convert_input(batch), device)


def _as_in_validation(trainer: Trainer, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    datamodule: Any = getattr(trainer, "datamodule", None)
    own = datamodule is not None and overrides(datamodule, "on_before_batch_transfer")
    hooks: Any = datamodule if own else trainer.lightning_module
    batch = hooks.on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch)
