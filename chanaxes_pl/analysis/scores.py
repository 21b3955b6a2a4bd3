"""Scores by name, the axis that each stands for, and the scores that follow from the table; low = remove."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor

#: Score → which axis it stands for.
SCORES = {
    "input_capture": "local",
    "peer_overlap": "local",
    "peer_r2": "local",
    "local_axis": "local",
    "task_information": "target",
    "target_excess": "target",
    "target_axis": "target",
    "two_axis": "both",
    "random": "baseline",
    "l1": "baseline",
    "l2": "baseline",
    "bn_scale": "baseline",
    "fpgm": "baseline",
    "lamp": "baseline",
    "taylor": "baseline",
    "activation_rms": "baseline",
    "hrank": "baseline",
    "chip": "baseline",
}
#: Before the name of one of our own scores: its control, in the opposite order.
REVERSE = "reverse_"
OWN_SCORES = tuple(name for name, family in SCORES.items() if family != "baseline")
HIGH_GOES = ("peer_overlap", "peer_r2")


def score_family(score: str, caller: str = "score_family") -> str:
    """Which axis a score stands for: ``"local"``, ``"target"``, ``"both"``, or ``"baseline"``.

    Args:
        score: a key of :data:`SCORES`, one of our own (no baseline) after ``"reverse_"``, or ``"random_1"``,
            ``"random_2"`` and so on for further draws.
        caller: how an error names the call.

    Raises:
        ValueError: for any other name.

    Example:
        >>> score_family("reverse_peer_r2"), score_family("random_3")
        ('local', 'baseline')
    """
    base = base_score(score)
    if base in SCORES and (score == base or base == "random" or base in OWN_SCORES):
        return SCORES[base]
    near = get_close_matches(score, [*SCORES, *(REVERSE + name for name in OWN_SCORES)], n=2)
    raise ValueError(
        f"{caller}(score={score!r}): no such score{'; did you mean ' + ' or '.join(map(repr, near)) if near else ''}? "
        f"Expected one of {', '.join(SCORES)}; random_1, random_2, … for further draws; {REVERSE}NAME for the "
        f"opposite of {', '.join(OWN_SCORES)}"
    )


def base_score(score: str) -> str:
    kind, _, draw = score.rpartition("_")
    return "random" if kind == "random" and draw.isdecimal() else score.removeprefix(REVERSE)


def from_maximum(values: Tensor, finite: Tensor) -> Tensor:
    return values[finite].max() - values if finite.any() else values


def own_scores(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Our own scores of one layer; low = remove.

    Args:
        columns: a layer's columns of the table of channels, ``[C]`` each.

    Returns:
        ``[C]`` each: nats for metrics, unitless for ``peer_r2`` and the composites; −inf for dead channels. A metric
        that needs peers ties all live channels at 0 where there are too few of them.
    """
    live = torch.from_numpy(~columns["dead"])
    names = [name for name in OWN_SCORES if name in columns]
    values = {name: torch.from_numpy(columns[name])[live].nan_to_num(0.0) for name in names}
    for name in HIGH_GOES:
        values[name] = from_maximum(values[name], values[name].isfinite())
    local = (_z_scores(values["input_capture"]) + _z_scores(values["peer_overlap"])) / 2
    target = (_z_scores(values["task_information"]) + _z_scores(values["target_excess"])) / 2
    for name, axis in {"local_axis": local, "target_axis": target, "two_axis": (local + target) / 2}.items():
        values[name] = axis - axis.min() if len(axis) else axis
    whole = torch.full((len(live),), -torch.inf, dtype=torch.float64)
    return {name: whole.masked_scatter(live, found) for name, found in values.items()}


def _z_scores(values: Tensor) -> Tensor:
    """0 throughout where all values are the same: such a metric prefers no channel."""
    spread = values.std(correction=0) if len(values) else values
    return (values - values.mean()) / torch.where(spread > 0, spread, 1.0)
