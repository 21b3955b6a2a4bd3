"""Trained networks from Lightning's checkpoints, of which only tensors and plain values are unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import short
from chanaxes_pl.models import Classifier

# Errors of a constructor that gets settings of the wrong kind or size.
_NO_SETTINGS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Errors of torch.load for a damaged file.
_UNREADABLE = (*_NO_SETTINGS, AssertionError, EOFError, OSError, StructError, UnpicklingError)
# An error's text of so few characters says nothing by itself, such as the key of a KeyError.
_TERSE = 8


def load_classifier(path: str | Path) -> Classifier:
    """Load the :class:`Classifier` of a checkpoint on the CPU; only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not the checkpoint of a :class:`Classifier`.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters")
    advice = "for another class pass the network itself: PruneModule(network with its weights loaded)"
    if "chanaxes_plan" in checkpoint:
        raise ValueError(f"{path}: a checkpoint of a pruned network; load it with load_slim(path, the dense network)")
    if not isinstance(settings, Mapping) or "backbone" not in settings:
        raise ValueError(f"{path}: no checkpoint of a Classifier (it names no backbone); {advice}")
    settings = {name: value for name, value in settings.items() if not str(name).startswith("_")}
    try:
        with torch.device("meta"):  # without memory, as the settings may ask for any size
            empty = Classifier(**settings)
    except _NO_SETTINGS as error:
        raise ValueError(f"{path}: its settings make no Classifier ({short(str(error))}); {advice}") from error
    _check(empty, checkpoint["state_dict"], path)
    classifier = Classifier(**settings)
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this model, which then stays as it was.
    """
    weights = read_checkpoint(path)["state_dict"]
    _check(model, weights, path)
    model.load_state_dict(weights)


def _check(model: nn.Module, weights: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError if the weights do not have the names and shapes of the model's."""
    own = model.state_dict()
    unlike = [name for name in {**own, **weights} if _shape(own, name) != _shape(weights, name)]
    if unlike:
        first = ", ".join(f"{name} is {_shape(weights, name)}, here {_shape(own, name)}" for name in unlike[:3])
        raise ValueError(
            f"{path}: a checkpoint of another network than this {type(model).__name__} ({len(unlike)} tensors differ: "
            f"{first}); expected the model's own config and checkpoint"
        )


def _shape(weights: Mapping[str, Any], name: str) -> str:
    if name not in weights:
        return "missing"
    tensor = weights[name]
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return f"a {type(tensor).__name__}"
    # With a stride of 0, a tensor of any size holds a single number.
    repeats = not tensor.is_meta and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return f"{list(tensor.shape)} of repeated numbers" if repeats else str(list(tensor.shape))


def check_whole(path: str | Path) -> None:
    """Check that a checkpoint was not cut off, such as by a full disk.

    Raises:
        ValueError: if it was, or the file is of another kind.
    """
    if is_zipfile(path):
        return
    others = sorted(other.name for other in Path(path).parent.glob("*.ckpt") if other != Path(path))
    whole = [name for name in others if is_zipfile(Path(path).parent / name)]
    remedy = f"; {', '.join(whole)} beside it can be given as --ckpt_path" if whole else ""
    raise ValueError(f"{path}: not a whole checkpoint; it was cut off, or is of another kind{remedy}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds anything but tensors and plain values, or no ``state_dict``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a file such as RUN/checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        told = (str(error).splitlines() or [""])[0]
        reason = told if len(told) > _TERSE else f"{type(error).__name__}: {told}"
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values ({reason}); it was cut off or changed, or holds "
            "objects, which are never unpickled here"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path}: holds no state_dict; expected a checkpoint that a Lightning Trainer wrote")
    return checkpoint
