"""Trained networks out of Lightning's checkpoints, without unpickling anything but tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from chanaxes_pl.models import Classifier


def load_classifier(path: str | Path) -> Classifier:
    """The :class:`Classifier` of a checkpoint, on the CPU; nothing is unpickled but tensors and plain values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of a :class:`Classifier`.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters", {})
    advice = "for another class pass the network itself: PruneModule(network with its weights loaded)"
    if "backbone" not in settings:
        raise ValueError(f"{path}: no checkpoint of a Classifier (it names no backbone); {advice}")
    try:
        classifier = Classifier(**{name: value for name, value in settings.items() if not name.startswith("_")})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its settings make no Classifier ({error}); {advice}") from error
    _fill(classifier, checkpoint["state_dict"], path)
    return classifier.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a model with a checkpoint's weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, or another model's; the model is then as it was.
    """
    _fill(model, read_checkpoint(path)["state_dict"], path)


def _fill(model: nn.Module, weights: Mapping[str, Any], path: str | Path) -> None:
    own = model.state_dict()
    unlike = [name for name in {**own, **weights} if _shape(own, name) != _shape(weights, name)]
    if unlike:
        first = ", ".join(f"{name} is {_shape(weights, name)}, here {_shape(own, name)}" for name in unlike[:3])
        raise ValueError(
            f"{path}: a checkpoint of another network than this {type(model).__name__} ({len(unlike)} tensors differ: "
            f"{first}); expected the model's own config and checkpoint"
        )
    model.load_state_dict(weights)


def _shape(weights: Mapping[str, Any], name: str) -> str:
    return str(list(weights[name].shape)) if name in weights else "missing"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but tensors and plain values, or no ``state_dict``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a file such as RUN/checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values ({str(error).splitlines()[0]}); it was cut off, or "
            "holds objects, which are never unpickled here"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path}: holds no state_dict; expected a checkpoint that a Lightning Trainer wrote")
    return checkpoint
