"""The task variable T of an image, its null, and what is scored of an image's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor
from torch.nn import functional as F

from chanaxes_pl.core.errors import ArgumentError, InputError
from chanaxes_pl.core.moments import accumulation_device

#: ``"auto"`` chooses one of the others from the shapes and values of outputs and labels.
TargetName = Literal["auto", "logit_margin", "log_probability", "signed_logit", "log_likelihood", "label"]
#: ``(outputs, labels) → [B]`` or ``[B, D]``; gets what the step returned.
TargetFunction = Callable[[Any, Any], Tensor]
TargetSpec = TargetName | TargetFunction

#: Targets of dense prediction too, where an image may have no labelled position.
MAP_TARGETS = ("logit_margin", "signed_logit", "log_likelihood")
#: Class index that marks a position of a map as not labelled, beside all negative ones, if there are no more classes.
_IGNORED = 255


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the correct class's logit less the largest other one.

    Args:
        logits: ``[B, K]``, or ``[B, K, *positions]`` of dense prediction.
        labels: ``[B]`` or ``[B, *positions]``, class indices.

    Returns:
        ``[B]``; of a map the mean over its labelled positions, NaN where it has none.

    Example:
        >>> import torch
        >>> logit_margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
        tensor([-1.])
    """
    labelled = _labelled(labels, logits.shape[1])
    index = labels.where(labelled, 0)[:, None]
    correct = logits.gather(1, index)[:, 0]
    return _mean(correct - logits.scatter(1, index, -torch.inf).amax(1), labelled)


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``[B]``, nats: the log-probability of the correct class, which is minus the cross-entropy."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def signed_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (2y − 1)·z of one logit z and a label y of 0 or 1: positive where the prediction is right.

    Args:
        logits: ``[B]``, ``[B, 1]``, or ``[B, 1, *positions]`` of dense prediction.
        labels: of as many numbers; in a map a label that is negative or 255 is left out.

    Returns:
        ``[B]``; of a map the mean over its labelled positions, NaN where it has none.

    Example:
        >>> import torch
        >>> signed_logit(torch.tensor([[2.0], [3.0]]), torch.tensor([1, 0]))
        tensor([ 2., -3.])
    """
    labels = labels.reshape(logits.shape)
    return _mean(((2 * labels - 1) * logits), _labelled(labels, 1))


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-likelihood of an image's labels, in nats, each a 0 or a 1 with a logit of its own.

    Args:
        logits: ``[B]``, ``[B, K]``, or ``[B, K, *positions]`` of dense prediction.
        labels: of as many numbers; in a map a label that is negative or 255 is left out.

    Returns:
        ``[B]``, the sum over labels; of a map the mean over those that are not left out, NaN where all are.

    Example:
        >>> import torch
        >>> log_likelihood(torch.zeros(1, 3), torch.tensor([[0, 1, 1]])).exp()
        tensor([0.1250])
    """
    labels = labels.reshape(logits.shape).to(logits.dtype)
    each = -F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return _mean(each, _labelled(labels, 1)) if logits.ndim > 2 else each.reshape(len(logits), -1).sum(1)


def label(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the label itself, on which the outputs have no influence.

    Returns:
        ``[B, K − 1]`` of class indices, one-hot with the last class as reference: regression on it explains a
        channel's between-class variance. ``[B, D]`` of any other labels, as they are.
    """
    if are_classes(outputs, labels):
        return F.one_hot(labels, outputs.shape[1])[:, :-1]
    return labels.reshape(len(labels), -1)


TARGETS: dict[str, TargetFunction] = {
    "logit_margin": logit_margin,
    "log_probability": log_probability,
    "signed_logit": signed_logit,
    "log_likelihood": log_likelihood,
    "label": label,
}


class Target:
    """T of every image of a batch, by a name of :data:`TARGETS`, by a function, or as outputs and labels suggest.

    Args:
        spec: what T is.

    Attributes:
        name: of the target; ``"auto"`` until :meth:`settle` has chosen one. A function goes by its own name.

    Raises:
        ValueError: for a name that is not known.

    Example:
        >>> import torch
        >>> target = Target("auto")
        >>> target(torch.tensor([[2.0], [3.0]]), torch.tensor([1, 0])).tolist(), target.name
        ([[2.0], [-3.0]], 'signed_logit')
    """

    def __init__(self, spec: TargetSpec = "auto") -> None:
        self._function = spec if callable(spec) else None
        self._width: int | None = None
        if callable(spec):
            self.name = getattr(spec, "__name__", type(spec).__name__)
            return
        if spec == "cross_entropy":
            raise ArgumentError(
                "target='cross_entropy'",
                "expected 'log_probability', which is minus the cross-entropy: the same "
                "information, and the opposite sign of covariances",
            )
        if spec not in get_args(TargetName):
            names = ", ".join(map(repr, get_args(TargetName)))
            raise ArgumentError(f"target={spec!r}", f"expected {names} or a function (outputs, labels) → [B] or [B, D]")
        self.name = str(spec)

    @property
    def unsettled(self) -> bool:
        """Whether outputs and labels are still to tell what ``"auto"`` stands for."""
        return self._function is None and self.name == "auto"

    @property
    def of_maps(self) -> bool:
        """Whether a map is a mean over its labelled positions, of which it may have none."""
        return self._function is None and self.name in MAP_TARGETS

    def settle(self, name: str) -> None:
        """Fix the target that ``"auto"`` stands for."""
        if self.unsettled:
            self.name = name

    def __call__(self, outputs: Any, labels: Any) -> Tensor:
        """Return T as ``[B, D]`` float64; NaN for a map without a labelled position.

        Raises:
            ValueError: if outputs and labels do not fit each other or the target, or a function gives something that
                is not one row an image.
        """
        if self._function is None:
            if self.unsettled:
                self.settle(infer_target(outputs, labels))
            _CHECKS[self.name](outputs, labels)
            return _evaluate(TARGETS[self.name], outputs, labels)
        values = self._given(self._function(lifted(outputs), lifted(labels)))
        if self._width not in (None, values.shape[1]):
            raise InputError(
                f"the target function {self.name} gave {values.shape[1]} numbers an image after {self._width} in an "
                "earlier batch: expected as many for every image"
            )
        self._width = values.shape[1]
        return values

    def _given(self, values: Any) -> Tensor:
        """``[B, D]`` float64, of what a target function gave."""
        if not isinstance(values, Tensor) or values.ndim not in (1, 2) or not values.shape[-1] or values.is_complex():
            kind = " of complex numbers" if isinstance(values, Tensor) and values.is_complex() else ""
            raise InputError(
                f"the target function {self.name} gave {describe(values)}{kind}: expected a tensor of real numbers "
                "[B] or [B, D], one row an image, D at least 1"
            )
        return values.reshape(len(values), -1).to(accumulation_device(values.device)).double()


def infer_target(outputs: Any, labels: Any) -> str:
    """Choose the task variable from what a network gives and what the labels are.

    Args:
        outputs: ``[B, …]``, of the network.
        labels: ``[B, …]``.

    Returns:
        ``"logit_margin"`` for K ≥ 2 classes and integer labels, of images or of positions; ``"signed_logit"`` for one
        logit and labels of 0 and 1; ``"log_likelihood"`` for K ≥ 2 logits and as many labels of 0 and 1; ``"label"``
        for as many real numbers as there are outputs (regression).

    Raises:
        ValueError: for anything else; the message shows a target.

    Example:
        >>> import torch
        >>> infer_target(torch.zeros(8, 10), torch.arange(8)), infer_target(torch.zeros(8, 1), torch.rand(8))
        ('logit_margin', 'label')
    """
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor) or not outputs.ndim or not labels.ndim:
        raise InputError(_unknown_task(outputs, labels))
    whole = not labels.is_floating_point() and not labels.is_complex()
    if len(outputs) != len(labels) or not len(labels):
        raise InputError(_unknown_task(outputs, labels))
    if outputs.ndim >= 2 and outputs.shape[1] >= 2:
        if whole and labels.shape == outputs.shape[:1] + outputs.shape[2:]:
            return "logit_margin"
        if outputs.ndim == 2 and labels.shape == outputs.shape:
            return "log_likelihood" if _are_bits(labels) else "label"
    elif _same_numbers(outputs, labels):
        dense = outputs.ndim > 2
        if _are_bits(labels if not dense else labels[_labelled(labels, 1)]):
            return "signed_logit"
        if not dense:
            return "label"
    raise InputError(_unknown_task(outputs, labels))


def doubt(name: str, labels: Any) -> str:
    """What speaks against the task that labels were taken for, and what to pass; empty if nothing does.

    Args:
        name: the target that :func:`infer_target` chose.
        labels: ``[B, …]``, by which it did.

    Example:
        >>> import torch
        >>> doubt("log_likelihood", torch.eye(10)).split(";")[0]
        'every row of labels sums to 1, as one-hot classes do'
        >>> doubt("log_likelihood", torch.ones(10, 4)), doubt("label", torch.rand(10, 4))
        ('', '')
    """
    if name not in _TAKEN or not isinstance(labels, Tensor) or len(labels) < _FEW or labels.is_complex():
        return ""
    labels, meant = labels.double(), f"if that is meant, pass target={name!r}"
    rows = labels.ndim == 2 and labels.shape[1] > 1 and bool((labels >= 0).all())
    if rows and bool(((labels.sum(1) - 1).abs() < 1e-3).all()):
        return (
            f"every row of labels sums to 1, as one-hot classes do; they are taken for {_TAKEN[name]}. For classes "
            f"pass step=(module, batch) → (logits, labels.argmax(1)); {meant}"
        )
    if name == "label" and bool((labels.abs() <= 1).all()) and bool((labels == labels.round()).all()):
        found = ", ".join(str(int(value)) for value in labels.unique())
        return (
            f"labels of {found} alone are taken for {_TAKEN[name]}. For what is absent or present pass "
            f"step=(module, batch) → (logits, labels of 0 and 1); {meant}"
        )
    return ""


_TAKEN = {"log_likelihood": "labels of 0 and 1 that do not exclude each other", "label": "real numbers (regression)"}
_FEW = 8  # rows that may all sum to 1 by chance


def _unknown_task(outputs: Any, labels: Any) -> str:
    text = f"outputs: {describe(outputs)}, labels: {describe(labels)}. "
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 1:
        text += f"Labels of type {labels.dtype} are no class indices, expected whole numbers. "
    return text + (
        "Expected outputs [B, K] with labels [B] (classes) or [B, K] (multi-label, regression), outputs [B, 1] with "
        "labels [B] (binary, regression), or outputs [B, K, …] with labels [B, …] (dense). For another task pass "
        "target=a function of both that gives [B] or [B, D]; without labels for example "
        "target=lambda outputs, labels: outputs.norm(dim=1)"
    )


_CLASSES_ALONE = (
    "Lesions, pruning grids and training on labels are for classes; other tasks have prune, and PruneModule(slim, "
    "teacher=model) or a training of your own"
)


def _check_classes(outputs: Any, labels: Any) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor) or not _fit_classes(outputs, labels):
        raise InputError(
            f"outputs: {describe(outputs)}, labels: {describe(labels)}. Expected [B, K] with K ≥ 2 classes and [B]; "
            f"where they have another form pass step=(module, batch) → (logits, labels). {_CLASSES_ALONE}"
        )
    if labels.is_floating_point():
        raise InputError(f"labels of type {labels.dtype}: expected whole numbers, the index of each image's class")
    if outputs.ndim > 2:
        labels = labels[_labelled(labels, outputs.shape[1])]
    if not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[1]:
        left = ", or a negative number or 255 where a position is not labelled" if outputs.ndim > 2 else ""
        raise InputError(
            f"label {low if low < 0 else high}, but the logits have {outputs.shape[1]} classes: expected "
            f"labels from 0 to {outputs.shape[1] - 1}{left}"
        )


def check_classes(outputs: Any, labels: Any) -> None:
    """Check logits ``[B, K]`` and class indices ``[B]``.

    Raises:
        ValueError: if they do not fit each other, or a label is none of the logits' classes.
    """
    if isinstance(outputs, Tensor) and outputs.ndim > 2:
        raise InputError(
            f"outputs: {describe(outputs)}, labels: {describe(labels)}. Expected [B, K] with K ≥ 2 classes "
            f"and [B], one class an image, for accuracies and the probability of the right class. {_CLASSES_ALONE}"
        )
    _check_classes(outputs if isinstance(outputs, Tensor) and outputs.ndim == 2 else None, labels)


def check_finite(logits: Tensor, network: str) -> None:
    """Check the logits ``[B, …]`` of a network.

    Raises:
        ValueError: if some are not finite.
    """
    bad = ~logits.reshape(len(logits), -1).isfinite().all(1)
    if bad.any():
        raise InputError(
            f"{network} gives logits with NaN or infinity for {int(bad.sum())} of {len(logits)} images: "
            "expected finite ones; look for such values in those images and in the weights"
        )


def _check_bits(outputs: Any, labels: Any) -> None:
    fit = isinstance(outputs, Tensor) and isinstance(labels, Tensor) and labels.numel() == outputs.numel()
    if not fit:
        raise InputError(
            f"outputs: {describe(outputs)}, labels: {describe(labels)}. Expected one label of 0 or 1 for each output"
        )
    known = labels[_labelled(labels, 1)] if outputs.ndim > 2 else labels
    if not _are_bits(known):
        other = known[(known != 0) & (known != 1)].flatten()[0]
        raise InputError(
            f"label {other.item():g} after labels of 0 and 1: expected only these; for regression pass target='label'"
        )


def _check_label(outputs: Any, labels: Any) -> None:
    if not isinstance(labels, Tensor) or not labels.ndim or labels.is_complex():
        raise InputError(f"labels: {describe(labels)}. target='label' expects a tensor [B] or [B, D]")
    if are_classes(outputs, labels):
        _check_classes(outputs, labels)


_CHECKS = {
    "logit_margin": _check_classes,
    "log_probability": check_classes,
    "signed_logit": _check_bits,
    "log_likelihood": _check_bits,
    "label": _check_label,
}


def _evaluate(function: TargetFunction, outputs: Any, labels: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim <= 2:
        values = function(lifted(outputs), lifted(labels))
    else:  # image by image, because the maps of a batch in float64, several times, may not fit into memory
        pairs = zip(outputs.split(1), labels.split(1), strict=True)
        values = torch.cat([function(lifted(one), lifted(its)) for one, its in pairs])
    return values.reshape(len(labels), -1).double()


def lifted(value: Any) -> Any:
    """Return a tensor where moments are summed, in float64 or int64, and anything else as it is."""
    if not isinstance(value, Tensor) or value.is_complex():
        return value
    return value.to(accumulation_device(value.device)).to(torch.float64 if value.is_floating_point() else torch.int64)


def _fit_classes(outputs: Tensor, labels: Tensor) -> bool:
    return outputs.ndim >= 2 and outputs.shape[1] >= 2 and labels.shape == outputs.shape[:1] + outputs.shape[2:]


def are_classes(outputs: Any, labels: Any) -> bool:
    """Whether labels are indices of the outputs' classes."""
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    return whole and isinstance(outputs, Tensor) and outputs.ndim == 2 and _fit_classes(outputs, labels)


def _same_numbers(outputs: Tensor, labels: Tensor) -> bool:
    """Whether there is one label for each output, be there a dimension of size 1 after the batch or not."""
    squeezed = [value.squeeze(1) if value.ndim > 1 and value.shape[1] == 1 else value for value in (outputs, labels)]
    return squeezed[0].shape == squeezed[1].shape


def _are_bits(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all())


def _labelled(labels: Tensor, classes: int) -> Tensor:
    """Mask of the labels that name a class; where there are more than 255 classes, 255 is one of them."""
    known = labels >= 0
    return known if classes > _IGNORED else known & (labels != _IGNORED)


def _mean(values: Tensor, labelled: Tensor) -> Tensor:
    """``[B]``: the mean over the labelled positions of a map; of one number an image the number itself."""
    if values.ndim <= 2 and values[0].numel() == 1:
        return values.reshape(-1)
    sums = values.where(labelled, 0).flatten(1).sum(1)
    return sums / labelled.flatten(1).sum(1)  # 0/0 is NaN: nothing is labelled


def describe(value: Any) -> str:
    """What a value is, in a few words, for an error.

    Example:
        >>> import torch
        >>> describe((torch.zeros(2, 3), {"boxes": 0}))
        "a tuple of 2: a tensor of shape (2, 3), a dict with keys ['boxes']"
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with keys {list(value)[:12]}"
    if isinstance(value, (tuple, list)):
        few = ", ".join(describe(one) for one in value[:4])
        return f"a {type(value).__name__} of {len(value)}: {few}" if value else f"an empty {type(value).__name__}"
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


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
    """Return ``[B, 3]``: cross-entropy in nats, whether the label comes first of finite logits, logit margin."""
    correct = ((logits.argmax(1) == labels) & logits.isfinite().all(1)).to(logits.dtype)
    return torch.stack([-log_probability(logits, labels), correct, logit_margin(logits, labels)], 1)
