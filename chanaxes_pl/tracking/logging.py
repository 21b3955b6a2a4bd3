"""What a measurement logs: scalars to every logger, and pictures and tables to those that can show them.

Nothing of W&B, TensorBoard or MLflow is imported before a logger of theirs is in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from chanaxes_pl.analysis.correlations import MAIN_PAIR, NETWORK, PAIRS, main_correlation, reliabilities, task_masses
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.network.hooks import isolated_rng
from chanaxes_pl.network.lightning_twins import is_a
from chanaxes_pl.run_folder import ABOUT, checkpoint_path
from chanaxes_pl.tables import ALIGNMENT, COLUMNS, write_parquet

# Layers that get scalars of their own, at most; the tables hold all of them.
MAX_LAYERS = 100


@dataclass(frozen=True, eq=False)
class Measurement:
    """What loggers are told of one checkpoint.

    Attributes:
        name: of the tracker, first part of every key.
        epoch: passes over the training data before it.
        step: optimiser steps before it.
        table: of its channels.
        correlations: axis correlations of the run so far.
        scalars: by key, see :func:`checkpoint_scalars`.
        folder: where the tables are written; ``None`` where none are.
        first: whether this training's loggers have been told nothing before.
    """

    name: str
    epoch: float
    step: int
    table: pd.DataFrame
    correlations: pd.DataFrame
    scalars: dict[str, float]
    folder: Path | None = None
    first: bool = False


def log(logger: Any, shown: Measurement, media: bool = True) -> None:
    """Log one measurement: scalars, with ``epoch`` in the row because W&B can only plot over what a row holds.

    Args:
        logger: W&B gets histograms and a table too, TensorBoard histograms and the figure of the correlations, MLflow
            the table as an artefact.
        shown: what was measured.
        media: whether to log anything but scalars: true on one process.
    """
    more: dict[str, Any] = {}
    with isolated_rng():  # what loggers draw, such as names, is not taken from training
        if media and is_a(logger, "WandbLogger"):
            more = _to_wandb(logger, shown)
        elif media and is_a(logger, "TensorBoardLogger"):
            _to_tensorboard(logger, shown)
        elif media and is_a(logger, "MLFlowLogger"):
            _to_mlflow(logger, shown)
        logger.log_metrics({**shown.scalars, **more, "epoch": shown.epoch}, step=shown.step)
        logger.save()


def _to_wandb(logger: WandbLogger, shown: Measurement) -> dict[str, Any]:
    media = checkpoint_media(shown.table, shown.step, shown.name)
    if shown.first:
        target = {f"{shown.name}/target": shown.table["target"].iloc[0]}
        logger.experiment.config.update(target, allow_val_change=True)
    # One by one: a pattern would lose to the one that Lightning registers first.
    for key in [*(shown.scalars if shown.first else ()), *media]:
        logger.experiment.define_metric(key, step_metric="epoch")
    return media


def _to_tensorboard(logger: TensorBoardLogger, shown: Measurement) -> None:
    from chanaxes_pl.plots import plot_correlations  # a second that those who log elsewhere need not wait

    writer: Any = logger.experiment
    for metric in METRICS:
        values = _finite(shown.table[metric])
        if len(values):
            writer.add_histogram(f"{shown.name}/hist/{metric}", values, shown.step)
    writer.add_figure(f"{shown.name}/correlations", plot_correlations(shown.correlations), shown.step)


def _to_mlflow(logger: MLFlowLogger, shown: Measurement) -> None:
    """A folder of artefacts ``<name>``: once downloaded it can be read as a tracker's own."""
    with TemporaryDirectory() as folder:
        path = checkpoint_path(Path(folder), shown.step)
        write_parquet(shown.table, path)
        about = shown.folder / ABOUT if shown.folder else Path(folder) / ABOUT
        for file in [path, *([about] if shown.first and about.is_file() else [])]:
            logger.experiment.log_artifact(logger.run_id, str(file), shown.name)


def checkpoint_scalars(table: pd.DataFrame, correlations: pd.DataFrame, prefix: str = "axis") -> dict[str, float]:
    """Scalars by key: a fixed number for the network and three or four for each layer.

    Args:
        table: one checkpoint's table of channels.
        correlations: its axis correlations.
        prefix: first part of every key.

    Returns:
        ``<prefix>/rho`` is the headline, ρ(input capture, task information), the mean over layers;
        ``<prefix>/alignment``, where the table has it, the mean of |cos(Σw, g)|. Undefined ones are NaN. No key is
        another one's folder: stores that keep a file a key can hold all of them.
    """
    main = main_correlation(correlations).iloc[0]
    values = {
        "rho": main["rho"],
        "rho_null": main["null"],
        "rho_disattenuated": main["disattenuated"],
        "dead": table["dead"].sum(),
        "at_ceiling": table["at_ceiling"].sum(),
    }
    network = correlations[correlations["layer"] == NETWORK].set_index(["local", "target"]).to_dict("index")
    values |= {f"rho_pairs/{local}-{target}": network[local, target]["rho"] for local, target in PAIRS[1:]}
    masses = task_masses(table)[["duplicate", "nonreplaceable"]].sum()
    values |= {f"task_mass/{kind}": mass for kind, mass in masses.items()}
    values |= {f"reliability/{local}": network[local, target]["reliability_local"] for local, target in PAIRS[:-1]}
    values |= {f"reliability/{target}": network[local, target]["reliability_target"] for local, target in PAIRS[:-1]}
    values["reliability/peer_r2"] = reliabilities(table, ["peer_r2"])["reliability"].iloc[-1]
    if "alignment" in table:
        alignment = table["alignment"].abs().groupby(table["layer"], sort=False).mean()
        values["alignment"] = alignment.mean()
        names = layer_names(map(str, alignment.index[:MAX_LAYERS]))
        values |= {f"layer/{name}/alignment": alignment[layer] for layer, name in names.items()}
    values |= _per_layer(table, correlations)
    return {f"{prefix}/{key}": float(value) for key, value in values.items()}


def _per_layer(table: pd.DataFrame, correlations: pd.DataFrame) -> dict[str, float]:
    rho = correlations.set_index(["layer", "local", "target"])["rho"]
    dead = table.groupby("layer", sort=False)["dead"].sum()
    values = {}
    for layer, name in layer_names(map(str, dead.index[:MAX_LAYERS])).items():
        values[f"layer/{name}/rho"] = rho[(layer, *MAIN_PAIR)]
        values[f"layer/{name}/rho_axes"] = rho[(layer, "local_axis", "target_axis")]
        values[f"layer/{name}/dead"] = dead[layer]
    return values


def layer_names(layers: Iterable[str]) -> dict[str, str]:
    """What each layer is called in keys, where ``/`` divides: its name, with ``.`` for ``/`` and no two alike.

    Example:
        >>> layer_names(["stem.conv", "stem/conv"])
        {'stem.conv': 'stem.conv', 'stem/conv': 'stem.conv_'}
    """
    names: dict[str, str] = {}
    for layer in layers:
        name = layer.replace("/", ".")
        while name in names.values():
            name += "_"
        names[layer] = name
    return names


#: Bins of a histogram.
BINS = 64
#: Rows of a W&B table at most; the Parquet files hold every channel.
MAX_ROWS = 800
#: Columns of a W&B table; the Parquet files hold the halves and the nulls too.
TABLE_COLUMNS = ("layer", "channel", *COLUMNS, ALIGNMENT[0], "dead")


def checkpoint_media(table: pd.DataFrame, step: int, prefix: str = "axis") -> dict[str, Any]:
    """Histograms and the table of one checkpoint, by key, as W&B's own objects.

    Args:
        table: one checkpoint's table of channels.
        step: optimiser steps before it: part of the table's key, because W&B does not update a table that it has.
        prefix: first part of every key.

    Returns:
        ``<prefix>/hist/<metric>``: the finite values of all channels in :data:`BINS` bins; left out where there is
        none. ``<prefix>/table/step-000000128``: :data:`TABLE_COLUMNS` of :func:`spread` channels; undefined is null.
    """
    import wandb  # half a second that those who log elsewhere need not wait

    media: dict[str, Any] = {}
    for metric in METRICS:
        values = _finite(table[metric])
        if len(values):
            media[f"{prefix}/hist/{metric}"] = wandb.Histogram(np_histogram=np.histogram(values, BINS))
    rows = spread(table)[[column for column in TABLE_COLUMNS if column in table]]
    kinds = [{"O": str, "i": int, "b": bool}.get(rows[column].dtype.kind, float) for column in rows]
    shown = wandb.Table(columns=[*map(str, rows)], data=[], dtype=kinds)
    # Not by its constructor, which looks at the type of every cell: three times as slow.
    shown.data = rows.astype(object).where(rows.notna(), None).to_numpy().tolist()
    return media | {f"{prefix}/table/step-{step:09d}": shown}


def _finite(column: pd.Series) -> np.ndarray:
    # By way of float32: between float64 values a last digit apart there is no room for bins.
    values = column.to_numpy(np.float32).astype(float)
    return values[np.isfinite(values)]


def spread(table: pd.DataFrame, rows: int = MAX_ROWS) -> pd.DataFrame:
    """All channels, or else every k-th of each layer, the same ones at every checkpoint: ``rows`` at most.

    k is the smallest that certainly keeps to ``rows``. Every layer keeps its share and its first channel, unless there
    are as many layers as rows: then the first layers are shown.

    Example:
        >>> table = pd.DataFrame({"layer": ["a"] * 6 + ["b"] * 2, "channel": [*range(6), *range(2)]})
        >>> spread(table, rows=5).to_numpy().tolist()
        [['a', 0], ['a', 3], ['b', 0]]
    """
    if len(table) <= rows:
        return table
    k = math.ceil(len(table) / max(rows - table["layer"].nunique(), 1))
    return table[table["channel"] % k == 0].head(rows)
