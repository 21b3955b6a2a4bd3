"""How far the outputs of a changed network are from those of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.targets import infer_target

#: ``"kl"``: Kullback–Leibler divergence of the probabilities of classes, ``"bits"``: that of each yes-or-no, summed,
#: both in nats; ``"square"``: squared error as a share of the dense outputs' variance.
Divergence = Literal["kl", "bits", "square"]
_OF_TARGETS: dict[str, Divergence] = {
    "logit_margin": "kl",
    "signed_logit": "bits",
    "log_likelihood": "bits",
    "label": "square",
}


def divergence_for(outputs: Any, labels: Any) -> Divergence:
    """Return what outputs are compared by, from their shape and the kind of their labels, if there are any.

    Example:
        >>> divergence_for(torch.zeros(4, 3), None), divergence_for(torch.zeros(4, 3), torch.ones(4, 3))
        ('kl', 'bits')
    """
    if labels is None:
        return "kl" if outputs.ndim >= 2 and outputs.shape[1] > 1 else "square"
    try:
        return _OF_TARGETS[infer_target(outputs, labels)]
    except InputError:
        return "square"


def mean_divergence(divergence: Divergence, dense: Sequence[Tensor], cut: Sequence[Tensor]) -> float:
    """Return the mean divergence of outputs from those of the dense network, over images and their positions.

    Args:
        divergence: what they are compared by.
        dense: outputs ``[B, K, …]`` or ``[B]`` of the dense network, batch by batch.
        cut: the same of another network.
    """
    wanted, found = (torch.cat([by_position(outputs) for outputs in each]).double() for each in (dense, cut))
    if divergence == "square":
        return float((wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())
    return float(divergences(divergence, wanted, found).mean())


def divergences(divergence: Literal["kl", "bits"], wanted: Tensor, found: Tensor) -> Tensor:
    """Return the divergence in nats of each row of logits ``[N, K]`` from the row that was wanted, ``[N]``."""
    if divergence == "kl":
        wanted, found = (F.log_softmax(outputs, 1) for outputs in (wanted, found))
        return (wanted.exp() * (wanted - found)).sum(1)
    log_yes, log_no = (F.logsigmoid(sign * wanted) - F.logsigmoid(sign * found) for sign in (1, -1))
    return (wanted.sigmoid() * log_yes + (-wanted).sigmoid() * log_no).sum(1)


def by_position(outputs: Tensor) -> Tensor:
    """Return outputs ``[B, K, …]`` or ``[B]`` as rows ``[N, K]``, one for each image and position."""
    return outputs.movedim(1, -1).flatten(0, -2) if outputs.ndim > 1 else outputs[:, None]
