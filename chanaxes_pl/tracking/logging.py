"""What a measurement logs: scalars to every logger; histograms and a table to W&B."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from chanaxes_pl.analysis.correlations import MAIN_PAIR, NETWORK, PAIRS, main_correlation, reliabilities, task_masses
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.tables import ALIGNMENT, COLUMNS

# Layers that get scalars of their own, at most; the tables hold all of them.
MAX_LAYERS = 100


def checkpoint_scalars(table: pd.DataFrame, correlations: pd.DataFrame, prefix: str = "axis") -> dict[str, float]:
    """Scalars by key: a fixed number for the network and three or four for each layer.

    Args:
        table: one checkpoint's table of channels.
        correlations: its axis correlations.
        prefix: first part of every key.

    Returns:
        ``<prefix>/rho`` is the headline, ρ(input capture, task information), the mean over layers;
        ``<prefix>/alignment``, where the table has it, the mean of |cos(Σw, g)|. Undefined ones are NaN.
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
    values |= {f"rho/{local}-{target}": network[local, target]["rho"] for local, target in PAIRS[1:]}
    masses = task_masses(table)[["duplicate", "nonreplaceable"]].sum()
    values |= {f"task_mass/{kind}": mass for kind, mass in masses.items()}
    values |= {f"reliability/{local}": network[local, target]["reliability_local"] for local, target in PAIRS[:-1]}
    values |= {f"reliability/{target}": network[local, target]["reliability_target"] for local, target in PAIRS[:-1]}
    values["reliability/peer_r2"] = reliabilities(table, ["peer_r2"])["reliability"].iloc[-1]
    if "alignment" in table:
        alignment = table["alignment"].abs().groupby(table["layer"], sort=False).mean()
        values["alignment"] = alignment.mean()
        values |= {f"layer/{layer}/alignment": value for layer, value in alignment.iloc[:MAX_LAYERS].items()}
    values |= _per_layer(table, correlations)
    return {f"{prefix}/{key}": float(value) for key, value in values.items()}


def _per_layer(table: pd.DataFrame, correlations: pd.DataFrame) -> dict[str, float]:
    rho = correlations.set_index(["layer", "local", "target"])["rho"]
    dead = table.groupby("layer", sort=False)["dead"].sum()
    values = {}
    for layer in dead.index[:MAX_LAYERS]:
        values[f"layer/{layer}/rho"] = rho[(layer, *MAIN_PAIR)]
        values[f"layer/{layer}/rho_axes"] = rho[(layer, "local_axis", "target_axis")]
        values[f"layer/{layer}/dead"] = dead[layer]
    return values


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
        # By way of float32: between float64 values a last digit apart there is no room for bins.
        values = table[metric].to_numpy(np.float32).astype(float)
        values = values[np.isfinite(values)]
        if len(values):
            media[f"{prefix}/hist/{metric}"] = wandb.Histogram(np_histogram=np.histogram(values, BINS))
    rows = spread(table)[[column for column in TABLE_COLUMNS if column in table]]
    kinds = [{"O": str, "i": int, "b": bool}.get(rows[column].dtype.kind, float) for column in rows]
    shown = wandb.Table(columns=[*map(str, rows)], data=[], dtype=kinds)
    # Not by its constructor, which looks at the type of every cell: three times as slow.
    shown.data = rows.astype(object).where(rows.notna(), None).to_numpy().tolist()
    return media | {f"{prefix}/table/step-{step:09d}": shown}


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
