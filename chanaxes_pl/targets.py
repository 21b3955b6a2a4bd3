"""The task variable T of an image, from a network's logits and the labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chanaxes_pl.moments import accumulation_device

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
    "cross_entropy": log_probability,
    "label": label,
}


def target_function(target: TargetSpec, caller: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function behind ``target``.

    Raises:
        ValueError: for a name that is not in :data:`TARGETS`.
    """
    if callable(target):
        return target
    if target in TARGETS:
        return TARGETS[target]
    raise ValueError(
        f"{caller}(target={target!r}): expected {', '.join(map(repr, TARGETS))} or a function "
        "(logits, labels) → [B] or [B, D]"
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
