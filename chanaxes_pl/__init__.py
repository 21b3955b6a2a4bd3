"""chanaxes_pl: two information axes of every channel of a vision network, while it trains.

The names below load on first use, so that ``chanaxes --help`` does not wait for torch and Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chanaxes_pl.axes import Axes, compute_axes
    from chanaxes_pl.prune_module import PruneModule
    from chanaxes_pl.pruning.plans import load_slim
    from chanaxes_pl.pruning.pruner import Slim, prune
    from chanaxes_pl.tables import read_run
    from chanaxes_pl.tracking.tracker import AxisTracker

_HOMES = {
    "AxisTracker": "chanaxes_pl.tracking.tracker",
    "Axes": "chanaxes_pl.axes",
    "PruneModule": "chanaxes_pl.prune_module",
    "Slim": "chanaxes_pl.pruning.pruner",
    "compute_axes": "chanaxes_pl.axes",
    "load_slim": "chanaxes_pl.pruning.plans",
    "prune": "chanaxes_pl.pruning.pruner",
    "read_run": "chanaxes_pl.tables",
}

__all__ = ["Axes", "AxisTracker", "PruneModule", "Slim", "compute_axes", "load_slim", "prune", "read_run"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
