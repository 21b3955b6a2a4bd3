"""The task variable T of an image, its null, and what is scored of an image's logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.moments import accumulation_device

#: The name of a target in :data:`TARGETS`, or ``(logits [B, K], labels [B]) → [B]`` or ``[B, D]``.
TargetSpec = str | Callable[[Tensor, Tensor], Tensor]


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B]``: the correct class's logit less the largest other one.

    Example:
        >>> import torch
        >>> logit_margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
        tensor([-1.])
    """
    correct = logits.gather(1, labels[:, None])[:, 0]
    return correct - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B]``, nats: log-probability of the correct class, which is minus the cross-entropy."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def label(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, K − 1]``: the label itself, one-hot with the last class as reference.

    Regression on it explains a channel's between-class variance.
    """
    return torch.nn.functional.one_hot(labels, logits.shape[1])[:, :-1]


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit_margin": logit_margin,
    "log_probability": log_probability,
    "label": label,
}


def target_function(target: TargetSpec) -> Callable[[Tensor, Tensor], Tensor]:
    """The function behind ``target``.

    Raises:
        ValueError: for a name that is not in :data:`TARGETS`.
    """
    if callable(target):
        return target
    if target in TARGETS:
        return TARGETS[target]
    if target == "cross_entropy":
        raise ArgumentError(
            "target='cross_entropy'",
            "expected 'log_probability', which is minus the cross-entropy: the same "
            "information, and the opposite sign of covariances",
        )
    raise ArgumentError(
        f"target={target!r}", f"expected {', '.join(map(repr, TARGETS))} or a function (logits, labels) → [B] or [B, D]"
    )


def task_variable(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """T of a batch as ``[B, D]`` float64, from ``[B, K]`` logits and ``[B]`` labels.

    Raises:
        ValueError: if logits and labels do not fit each other, a label is none of the logits' classes, or
            ``function`` gives something that is not one row an image.
    """
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}: expected "
            "[B, K] with K ≥ 2 classes and [B]; for anything else pass "
            "step=(module, batch) → (logits, labels)"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels of type {labels.dtype}: expected whole numbers, the index of each image's class")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"label {low if low < 0 else high} in the probe, but the logits have {logits.shape[1]} "
            f"classes: expected labels from 0 to {logits.shape[1] - 1}"
        )
    home = accumulation_device(logits.device)
    values = function(logits.to(home).double(), labels.to(home).long())
    if values.ndim not in (1, 2) or len(values) != len(labels):
        raise ValueError(
            f"target function gave shape {tuple(values.shape)} for {len(labels)} images: expected [B] or [B, D]"
        )
    return values.reshape(len(labels), -1).to(home).double()


def scrambled(indices: np.ndarray) -> np.ndarray:
    """``indices`` hashed to uniform uint64 (the finaliser of SplitMix64), the same on every machine."""
    with np.errstate(over="ignore"):
        z = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def null_target(indices: np.ndarray, width: int) -> np.ndarray:
    """``[B, width]``: a target that knows nothing, standard normal numbers hashed from the images' indices.

    Correlations with it are distributed as with T permuted across images, to all orders that matter here
    (mean 0, variance 1/(N − 1) either way), but it needs neither the whole probe at once nor one process.
    """
    numbers = scrambled(
        np.uint64(2**32) + indices[:, None].astype(np.uint64) * np.uint64(width) + np.arange(width, dtype=np.uint64)
    )
    return ndtri((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)


def image_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, 3]``: cross-entropy in nats, whether the label comes first, logit margin."""
    correct = (logits.argmax(1) == labels).to(logits.dtype)
    return torch.stack([-log_probability(logits, labels), correct, logit_margin(logits, labels)], 1)
