"""Two information axes of every channel of a vision network while it trains, and pruning that uses them.

    trainer = L.Trainer(callbacks=[AxisTracker()])              # both axes at every checkpoint of a training
    axes = compute_axes(model, loader)                          # the same once, without a Trainer
    History("runs/mine").add(step, epoch, axes)                 # and kept as a run, for read_run and the report
    slim = prune(model, loader, budget=0.5)                     # half the multiply-accumulates, nothing retrained
    trainer.test(PruneModule(model, "lesion"), datamodule=dm)   # what removing each channel costs

The names load on first use, so that ``chanaxes --help`` does not wait for torch and Lightning.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chanaxes_pl.analysis.correlations import axis_correlations as axis_correlations
    from chanaxes_pl.analysis.prediction import early_prediction as early_prediction
    from chanaxes_pl.analysis.runs import read_runs as read_runs
    from chanaxes_pl.analysis.structure import layer_structure as layer_structure
    from chanaxes_pl.axes import Axes as Axes
    from chanaxes_pl.axes import compute_axes as compute_axes
    from chanaxes_pl.lesions.damage_table import LesionExperiment as LesionExperiment
    from chanaxes_pl.lesions.damage_table import lesion_table as lesion_table
    from chanaxes_pl.models.checkpoints import load_classifier as load_classifier
    from chanaxes_pl.prune_module import PruneModule as PruneModule
    from chanaxes_pl.pruning.grid import PruningExperiment as PruningExperiment
    from chanaxes_pl.pruning.grid import pruning_grid as pruning_grid
    from chanaxes_pl.pruning.pruner import Slim as Slim
    from chanaxes_pl.pruning.pruner import prune as prune
    from chanaxes_pl.pruning.pruner import sensitivity as sensitivity
    from chanaxes_pl.pruning.slim_file import load_slim as load_slim
    from chanaxes_pl.simulation import Problem as Problem
    from chanaxes_pl.simulation import simulate as simulate
    from chanaxes_pl.tables import read_run as read_run
    from chanaxes_pl.tracking.history import History as History
    from chanaxes_pl.tracking.tracker import AxisTracker as AxisTracker
    from chanaxes_pl.units.groups import find_units as find_units
    from chanaxes_pl.units.macs import count_macs as count_macs

_HOMES = {
    "Axes": "axes",
    "AxisTracker": "tracking.tracker",
    "History": "tracking.history",
    "LesionExperiment": "lesions.damage_table",
    "Problem": "simulation",
    "PruneModule": "prune_module",
    "PruningExperiment": "pruning.grid",
    "Slim": "pruning.pruner",
    "axis_correlations": "analysis.correlations",
    "compute_axes": "axes",
    "count_macs": "units.macs",
    "early_prediction": "analysis.prediction",
    "find_units": "units.groups",
    "layer_structure": "analysis.structure",
    "lesion_table": "lesions.damage_table",
    "load_classifier": "models.checkpoints",
    "load_slim": "pruning.slim_file",
    "prune": "pruning.pruner",
    "pruning_grid": "pruning.grid",
    "read_run": "tables",
    "read_runs": "analysis.runs",
    "sensitivity": "pruning.pruner",
    "simulate": "simulation",
}
__version__ = version("chanaxes_pl")
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"chanaxes_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
