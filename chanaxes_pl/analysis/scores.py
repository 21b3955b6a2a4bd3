"""Scores by name: which axis each stands for, and those that follow from the table of channels; low = remove.

A score has one name everywhere: in a pruning grid, a table of lesions, a plot, and ``early_prediction(order=…)``.

- The name of a metric, such as ``input_capture``, is that metric.
- ``minus_<metric>`` is the layer's maximum less the metric, for metrics that are high where a channel is redundant.
- ``keep_local``, ``keep_target`` and ``keep_both`` are means of signed z-scores, see :data:`COMPOSITES`.
- ``reverse_<score>`` is the control: the opposite order of one of the above.
- Any other name is a baseline.

A table of lesions holds metrics and scores of the same channels. There the column of a score is :data:`SCORE_COLUMN`
and its name, as in ``score_keep_local``. ``local_axis`` and ``target_axis`` are axis coordinates, not scores: see
:data:`AXES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError
from chanaxes_pl.core.statistics import composite

#: Score → which axis it stands for.
SCORES = {
    "input_capture": "local",
    "minus_peer_overlap": "local",
    "minus_peer_r2": "local",
    "keep_local": "local",
    "task_information": "target",
    "target_excess": "target",
    "keep_target": "target",
    "keep_both": "both",
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
#: Before the name of a metric that is high where a channel is redundant.
MINUS = "minus_"
#: Before the name of a score in a table of lesions, which holds the metrics' columns too.
SCORE_COLUMN = "score_"
_LOCAL, _TARGET = {"input_capture": 1, "peer_overlap": -1}, {"task_information": 1, "target_excess": 1}
#: Composite → the signs of the metrics whose within-layer z-scores it averages.
COMPOSITES = {"keep_local": _LOCAL, "keep_target": _TARGET, "keep_both": _LOCAL | _TARGET}
_METRICS = ("input_capture", "peer_overlap", "peer_r2", "task_information", "target_excess")
_RENAMED = {
    "local_axis": "keep_local",
    "target_axis": "keep_target",
    "two_axis": "keep_both",
    "peer_overlap": "minus_peer_overlap",
    "peer_r2": "minus_peer_r2",
}


def score_family(score: str) -> str:
    """Which axis a score stands for: ``"local"``, ``"target"``, ``"both"``, or ``"baseline"``.

    Args:
        score: a key of :data:`SCORES`, one of our own (no baseline) after ``"reverse_"``, or ``"random_1"``,
            ``"random_2"`` and so on for further draws.

    Raises:
        ValueError: for any other name.

    Example:
        >>> score_family("reverse_input_capture"), score_family("random_3")
        ('local', 'baseline')
    """
    base = base_score(score)
    if base in SCORES and (score == base or base == "random" or base in OWN_SCORES):
        return SCORES[base]
    near = get_close_matches(score, [*SCORES, *(REVERSE + name for name in OWN_SCORES)], n=2)
    if base in _RENAMED:
        near = [score.removesuffix(base) + _RENAMED[base]]
    raise ArgumentError(
        f"score={score!r}",
        f"no such score{'; did you mean ' + ' or '.join(map(repr, near)) if near else ''}? "
        f"Expected one of {', '.join(SCORES)}; random_1, random_2, … for further draws; {REVERSE}NAME for the "
        f"opposite of {', '.join(OWN_SCORES)}",
    )


def base_score(score: str) -> str:
    """The key of :data:`SCORES` behind a score's name: without ``reverse_``, or the number of a random draw."""
    kind, _, draw = score.rpartition("_")
    return "random" if kind == "random" and draw.isdecimal() else score.removeprefix(REVERSE)


def from_maximum(values: Tensor, finite: Tensor) -> Tensor:
    """``[C]`` values subtracted from the largest finite one, so that the highest comes first."""
    return values[finite].max() - values if finite.any() else values


def own_scores(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Our own scores of one layer; low = remove.

    Args:
        columns: a layer's columns of the table of channels, ``[C]`` each.

    Returns:
        ``[C]`` each: nats for metrics, unitless for ``minus_peer_r2`` and the composites; −inf for dead channels. A
        metric that needs peers ties all live channels at 0 where there are too few of them.
    """
    live = ~columns["dead"]
    metrics = {name: np.nan_to_num(columns[name][live].astype(float)) for name in _METRICS}
    values = {name: metrics[name] for name in OWN_SCORES if name in metrics}
    for name in OWN_SCORES:
        if name.startswith(MINUS):
            values[name] = -metrics[name.removeprefix(MINUS)]
        elif name in COMPOSITES:
            signs = COMPOSITES[name]
            values[name] = composite([metrics[metric] for metric in signs], list(signs.values()), constant=0.0)
        else:
            continue
        if live.any():
            values[name] = values[name] - values[name].min()
    whole = {name: np.full(len(live), -np.inf) for name in OWN_SCORES}
    for name, score in whole.items():
        score[live] = values[name]
    return {name: torch.from_numpy(score) for name, score in whole.items()}
