"""Which weights are measured where callbacks average them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

from chanaxes_pl.network.lightning_twins import is_a

# By name, for Lightning has these classes from 2.6 on, and again in a package named pytorch_lightning.
#: Callbacks that give validation the averages of the weights.
SWAPPING = "WeightAveraging"
#: Callbacks that leave averages as the network's weights when training ends.
AVERAGING = ("StochasticWeightAveraging", SWAPPING)


def averaging(trainer: L.Trainer) -> list[Callback]:
    """The Trainer's callbacks that average weights."""
    return [callback for callback in _callbacks(trainer) if any(is_a(callback, name) for name in AVERAGING)]


def move_behind_averaging(trainer: L.Trainer, callback: Callback) -> None:
    """Have a callback called after those that average: of the same batch it then sees their averages."""
    others = [other for other in _callbacks(trainer) if other is not callback]
    place = max((others.index(other) + 1 for other in averaging(trainer)), default=0)
    if place > _callbacks(trainer).index(callback):
        trainer.callbacks = [*others[:place], callback, *others[place:]]  # type: ignore[attr-defined]


@contextmanager
def as_validated(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """The weights that validation sees meanwhile: averages where a ``WeightAveraging`` holds them."""
    with ExitStack() as stack:
        for callback in averaging(trainer):
            if is_a(callback, SWAPPING):
                callback.on_validation_epoch_start(trainer, module)
                stack.callback(callback.on_validation_epoch_end, trainer, module)
        yield


def measured_weights(trainer: L.Trainer) -> str:
    """What to tell a reader of the tables about the weights that they are of."""
    names = {is_a(each, SWAPPING): type(each).__name__ for each in averaging(trainer)}
    if True in names:
        return f"averages of {names[True]}, as in validation"
    return f"training, at the end averages of {names[False]}" if names else "training"


def weight_sums(module: L.LightningModule) -> list[float]:
    """A number a tensor that changes when the weights do."""
    return torch.stack(
        [tensor.detach().float().sum().cpu() for tensor in [*module.parameters(), *module.buffers()]]
    ).tolist()


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # which Lightning does not declare
