"""Early prediction: how well the axes at a checkpoint predict the damage and the pruning order at the end of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from chanaxes_pl.analysis.correlations import AXES, NETWORK, layer_columns
from chanaxes_pl.analysis.damage import join_axes, score_damage_correlation
from chanaxes_pl.analysis.runs import Run
from chanaxes_pl.analysis.scores import REVERSE, SCORE_COLUMN, own_scores, score_family
from chanaxes_pl.core.errors import naming
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.tables import KEYS, read_parquet

#: What predicts.
PREDICTORS = (*METRICS, "peer_r2", *AXES)
#: What is predicted.
TARGETS = ("damage", "order")
#: Minimum rank correlation of input capture for lesions to belong to this run.
SAME_NETWORK = 0.5
_CHANNEL = ["layer", "channel"]


def early_prediction(
    run: Run,
    lesions: str | Path | pd.DataFrame | None = None,
    *,
    damage: str = "zero_loss",
    order: str = "input_capture",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation of every metric, at every checkpoint of a run, with what becomes of the channels in the end.

    Two ends are predicted: the damage that lesions of the trained network do, and the order in which pruning it would
    remove the channels of a layer, a score's ranks at the last checkpoint (low goes first: where the correlation is
    positive, channels with more of the metric stay longer).

    Intervals are 95 % percentile bootstraps as in :func:`score_damage_correlation`:
    over units for damage, which coupled channels share, and over channels for the order. All checkpoints and metrics
    are measured on the same resamples.

    Args:
        run: from :func:`~chanaxes_pl.analysis.runs.read_runs`.
        lesions: the table of ``chanaxes lesion`` or where it is; default the run's own.
        damage: its column to predict.
        order: the score that orders channels, by its name in :mod:`scores`: one of ours
            (``"input_capture"``, ``"keep_both"``, ``"minus_peer_r2"``, ``"reverse_input_capture"``), or a baseline
            such as ``"l1"``, of the lesioned channels alone, where the lesions' table holds it. ``"local_axis"``, which
            is among :data:`PREDICTORS`, is an axis coordinate and no score.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the resamples.

    Returns:
        One row per target (:data:`TARGETS`), checkpoint, metric (:data:`PREDICTORS`) and layer: ``run, epoch, step,
        target, metric, layer, rho, low, high, n`` (channels) and ``reason``, which says why there is no ``rho``. The
        mean over layers is the layer ``"network"``. Without lesions, damage has rows for that alone.
        ``attrs["order"]`` and ``attrs["damage"]`` name what was predicted.

    Raises:
        FileNotFoundError: if there are no lesions where they should be.
        ValueError: if their file is cut off, the lesions are not of this network, a column or score does not exist, or
            the run has several tables of lesions.
    """
    table = run.table
    last = table[table["step"] == table["step"].max()]
    hurt = _lesions(run, lesions)
    if hurt is not None:
        _check_same_network(last, hurt)
    values = _wide(table)
    rows = [
        _predicted("order", _order(last, hurt, order), "order", values, resamples, seed),
        _predicted("damage", hurt, damage, values, resamples, seed),
    ]
    checkpoints = table[list(KEYS)].drop_duplicates()
    result = checkpoints.merge(pd.concat(rows, ignore_index=True), on="step")
    result = result.sort_values("target", kind="stable", ignore_index=True)
    result.attrs |= {"order": order, "damage": damage}
    return result


def _lesions(run: Run, given: str | Path | pd.DataFrame | None) -> pd.DataFrame | None:
    """The table of lesions, the given one or the run's own; ``None`` where it has none."""
    if isinstance(given, pd.DataFrame):
        return given
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"early_prediction(lesions={str(given)!r}): no such file")
        return read_parquet(Path(given), _CHANNEL)
    if len(run.lesions) > 1:
        raise ValueError(
            f"early_prediction: {run.folder} holds {len(run.lesions)} tables of lesions, in "
            f"{', '.join(list(run.lesions)[:3])}; pass lesions=, the one of the last checkpoint"
        )
    return next(iter(run.lesions.values()), None)


def _check_same_network(last: pd.DataFrame, lesions: pd.DataFrame) -> None:
    """Names can agree by chance of architecture; a network's variances cannot."""
    joined = join_axes(last, lesions[_CHANNEL])
    if len(joined) < len(lesions):
        known = pd.MultiIndex.from_frame(last[_CHANNEL])
        layer, channel = lesions[~pd.MultiIndex.from_frame(lesions[_CHANNEL]).isin(known)].iloc[0][_CHANNEL]
        raise ValueError(f"early_prediction: lesions of another network: the run has no channel {channel} of {layer!r}")
    if "input_capture" not in lesions:  # as lesion_table leaves it
        return
    both = joined.merge(lesions[[*_CHANNEL, "input_capture"]], on=_CHANNEL, suffixes=("", "_lesions"))
    agreement = score_damage_correlation(both, ["input_capture"], "input_capture_lesions", resamples=0)["rho"].iloc[-1]
    if agreement < SAME_NETWORK:
        raise ValueError(
            f"early_prediction: lesions of another network than the run's last checkpoint: within layers the input "
            f"capture in both tables has rank correlation {agreement:.2f}, expected nearly 1; make the lesions from "
            "this run's last checkpoint (chanaxes lesion --ckpt_path RUN/checkpoints/last.ckpt)"
        )


def _wide(run: pd.DataFrame) -> pd.DataFrame:
    """A row a channel, a column for each step and metric."""
    live, axes = ~run["dead"].to_numpy(bool), np.full((len(run), len(AXES)), np.nan)
    for rows in run.groupby(["step", "layer"], sort=False).indices.values():
        found = layer_columns(run.iloc[rows])
        axes[rows[live[rows]]] = np.stack([found[axis] for axis in AXES], 1)
    run = run.assign(**dict(zip(AXES, axes.T, strict=True)))
    wide = run.pivot(index=_CHANNEL, columns="step", values=list(PREDICTORS))
    return wide.loc[pd.MultiIndex.from_frame(run[_CHANNEL].drop_duplicates())]  # as they lie in the network


def _order(last: pd.DataFrame, lesions: pd.DataFrame | None, score: str) -> pd.DataFrame:
    """``layer, channel, order``, the rank within its layer at which each channel is removed; dead ones go first."""
    with naming("early_prediction"):
        family = score_family(score)
    if family == "baseline":
        column = SCORE_COLUMN + score
        if lesions is None or column not in lesions:
            raise ValueError(
                f"early_prediction(order={score!r}): the tracker's tables cannot give this score, and no lesions have "
                f"the column {column!r}; expected one of our own scores, or lesions made with --scores '[\"{score}\"]'"
            )
        return lesions[_CHANNEL].assign(order=lesions.groupby("layer")[column].rank())
    name, sign = score.removeprefix(REVERSE), -1 if score.startswith(REVERSE) else 1
    frames = []
    for _, frame in last.groupby("layer", sort=False):
        values = own_scores({str(column): frame[column].to_numpy(copy=True) for column in frame})[name].numpy()
        values = np.where(np.isfinite(values), sign * values, -np.inf)
        frames.append(frame[_CHANNEL].assign(order=rankdata(values)))
    return pd.concat(frames, ignore_index=True)


def _predicted(
    target: str, table: pd.DataFrame | None, column: str, values: pd.DataFrame, resamples: int, seed: int
) -> pd.DataFrame:
    """``step, target, metric, layer, rho, low, high, n, reason`` for one column of a table of channels."""
    names = {f"{metric} at {step}": (metric, step) for metric, step in values.columns}
    if table is None:
        rows = pd.DataFrame({"score": list(names), "layer": NETWORK, "n": 0}).assign(
            rho=np.nan, low=np.nan, high=np.nan
        )
        reason = "no lesions.parquet in the run folder: run chanaxes lesion, or pass lesions="
    else:
        kept = [name for name in (*_CHANNEL, "unit", column) if name in table or name == column]
        if column not in table:
            there = [name for name in table if str(name).endswith(("_loss", "_accuracy", "_margin"))]
            raise ValueError(f"early_prediction(damage={column!r}): no such column of lesions; there are {there}")
        flat = values.set_axis(list(names), axis=1).reset_index()
        rows = score_damage_correlation(table[kept].merge(flat, on=_CHANNEL), list(names), column, resamples, seed)
        reason = "fewer than 3 channels have it, or it is the same for all"
    metrics, steps = zip(*(names[score] for score in rows["score"]), strict=True)
    rows = rows.assign(target=target, metric=metrics, step=steps, reason=np.where(rows["rho"].isna(), reason, ""))
    return rows[["step", "target", "metric", "layer", "rho", "low", "high", "n", "reason"]]
