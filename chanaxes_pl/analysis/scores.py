"""Names of scores, the axis that each represents, and the scores from the table of channels; low = remove.

A score has the same name in a pruning grid, a table of lesions, a plot, and ``early_prediction(order=…)``.

- The name of a metric, such as ``input_capture``, means that metric.
- ``minus_<metric>`` is the layer's maximum minus the metric, for metrics that are high if a channel is redundant.
- ``keep_local``, ``keep_target`` and ``keep_both`` are means of signed z-scores, see :data:`COMPOSITES`.
- ``reconstruction`` is joint: it judges a channel by what is left of its peers when it goes, and where they are read.
- ``reverse_<score>`` is a control: the opposite order of a score of an axis.
- Any other name is a baseline.

A table of lesions holds metrics and scores of the same channels, so there the columns of scores have a prefix
(:data:`SCORE_COLUMN`), as in ``score_keep_local``. ``local_axis`` and ``target_axis`` are axis coordinates, not scores:
see :data:`AXES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, nearest, short
from chanaxes_pl.core.statistics import composite

#: Family of a score: the axis that it represents, ``"joint"`` where it judges units together, or ``"baseline"``.
Family = Literal["local", "target", "both", "joint", "baseline"]
#: Score → its family.
SCORES: dict[str, Family] = {
    "input_capture": "local",
    "minus_peer_overlap": "local",
    "minus_peer_r2": "local",
    "keep_local": "local",
    "task_information": "target",
    "target_excess": "target",
    "keep_target": "target",
    "keep_both": "both",
    "reconstruction": "joint",
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
#: Prefix of a control, which orders channels opposite to one of our own scores.
REVERSE = "reverse_"
#: Scores of an axis, which come from our own metrics in the table of channels.
OWN_SCORES = tuple(name for name, family in SCORES.items() if family in ("local", "target", "both"))
#: Prefix of a score that is high if its metric is low.
MINUS = "minus_"
#: Prefix of the columns of scores in a table of lesions, which holds columns of metrics too.
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


def score_family(score: str) -> Family:
    """Return the axis that a score represents (``"local"``, ``"target"`` or ``"both"``), ``"joint"`` or ``"baseline"``.

    Args:
        score: a key of :data:`SCORES`; ``"reverse_"`` and the name of a score of an axis; or ``"random_1"``,
            ``"random_2"``, … for further random draws.

    Raises:
        ValueError: if there is no such score.

    Example:
        >>> score_family("reverse_input_capture"), score_family("random_3")
        ('local', 'baseline')
    """
    if not isinstance(score, str):
        raise ArgumentTypeError(
            f"score={short(score)}", f"expected the name of a score, such as {next(iter(SCORES))!r}"
        )
    base = base_score(score)
    if base in SCORES and (score == base or base == "random" or base in OWN_SCORES):
        return SCORES[base]
    names = [*SCORES, *(REVERSE + name for name in OWN_SCORES)]
    if base in _RENAMED:
        names = [score.removesuffix(base) + _RENAMED[base]]
    near = nearest(score, names)
    near = near if near.endswith("?") else f"{near}."
    raise ArgumentError(
        f"score={score!r}",
        f"no such score; {near} Expected one of {', '.join(SCORES)}; random_1, random_2, … for "
        f"further random draws; {REVERSE}NAME for the opposite order of {', '.join(OWN_SCORES)}",
    )


def base_score(score: str) -> str:
    """Return a score's key in :data:`SCORES`: its name without ``reverse_`` and without the number of a random draw."""
    kind, _, draw = score.rpartition("_")
    return "random" if kind == "random" and draw.isdecimal() else score.removeprefix(REVERSE)


def from_maximum(values: Tensor, finite: Tensor) -> Tensor:
    """Subtract ``[C]`` values from the largest finite one, so that the highest goes first."""
    return values[finite].max() - values if finite.any() else values


def own_scores(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Compute our own scores of one layer; low = remove.

    Args:
        columns: the layer's columns of the table of channels, ``[C]`` each.

    Returns:
        Score → ``[C]``, in nats for metrics, unitless for ``minus_peer_r2`` and the composites; −inf for dead channels.
        If a layer has too few live channels for a metric that needs peers, they all get 0.
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
