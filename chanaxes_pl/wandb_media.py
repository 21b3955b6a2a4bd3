"""What W&B gets beside the scalars: histograms of the four metrics, and one table of channels a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from chanaxes_pl.metrics import METRICS
from chanaxes_pl.tables import ALIGNMENT, COLUMNS

#: Bins of a histogram.
BINS = 64
#: Rows of a W&B table at the most; the Parquet files hold every channel.
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
    """All channels, or else every k-th of each layer, the same ones at every checkpoint: ``rows`` at the most.

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
