"""Early prediction: how well the axes at each checkpoint predict the damage and the pruning order at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from chanaxes_pl.analysis.correlations import AXES, NETWORK, layer_columns
from chanaxes_pl.analysis.damage import join_axes, score_damage_correlation
from chanaxes_pl.analysis.runs import Run
from chanaxes_pl.analysis.scores import OWN_SCORES, REVERSE, SCORE_COLUMN, base_score, own_scores, score_family
from chanaxes_pl.core.errors import ArgumentError, check_resampling, naming, short
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.core.statistics import MIN_CHANNELS
from chanaxes_pl.tables import KEYS, checked_table, read_parquet

#: Metrics and axis coordinates that predict.
PREDICTORS = (*METRICS, "peer_r2", *AXES)
#: Outcomes that are predicted.
TARGETS = ("damage", "order")
#: Minimum rank correlation of input capture between a run and its lesions.
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
    """Correlate every metric at every checkpoint of a run with two outcomes at its end: damage and pruning order.

    Damage is that of lesions of the trained network. The pruning order is the order in which a score at the last
    checkpoint would remove the channels of a layer. The lowest go first, so a positive correlation means that channels
    with more of the metric stay longer.

    Intervals are 95 % percentile bootstraps as in :func:`score_damage_correlation`: over units for damage, which
    coupled channels share, and over channels for the order. All checkpoints and metrics share the resamples.

    Args:
        run: run from :func:`~chanaxes_pl.analysis.runs.read_runs`.
        lesions: table of ``chanaxes lesion``, or its path; default the table in the run folder.
        damage: column of damage to predict.
        order: name of the score that orders the channels, see :mod:`scores`: one of our own, such as
            ``"input_capture"`` or ``"reverse_input_capture"``; or a baseline such as ``"l1"`` that the table of lesions
            holds, for the lesioned channels only. ``"local_axis"`` is an axis coordinate, not a score.
        resamples: number of bootstrap resamples; 0 for no intervals.
        seed: random seed of the resampling.

    Returns:
        One row per target (:data:`TARGETS`), checkpoint, metric (:data:`PREDICTORS`) and layer: ``run, epoch, step,
        target, metric, layer, rho, low, high, n`` (channels) and ``reason``, which says why there is no ``rho``. The
        layer ``"network"`` holds the mean over layers; without lesions, it is the only layer of damage.
        ``attrs["order"]`` and ``attrs["damage"]`` name the score and the column.

    Raises:
        FileNotFoundError: if there is no file of lesions at the given path.
        ValueError: if that file is cut off, the lesions are of another network, a column or score does not exist, or
            the run has several tables of lesions.
    """
    if not isinstance(run, Run):
        raise TypeError(f"early_prediction(run={short(run)}): expected one run, such as read_runs([FOLDER]).each[0]")
    check_resampling(resamples, seed)
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
    """Return the given table of lesions or else the run's own, or ``None`` if there is none."""
    if isinstance(given, pd.DataFrame):
        return checked_table(given, "early_prediction(lesions=…)", _CHANNEL)
    if given is not None:
        if not isinstance(given, (str, Path)):
            raise TypeError(f"early_prediction(lesions={short(given)}): expected a table of lesions, or its path")
        if not Path(given).is_file():
            raise FileNotFoundError(f"early_prediction(lesions={str(given)!r}): no such file")
        return read_parquet(Path(given), _CHANNEL)
    if len(run.lesions) > 1:
        raise ValueError(
            f"early_prediction: {run.folder} holds {len(run.lesions)} tables of lesions, in "
            f"{', '.join(list(run.lesions)[:3])}; pass that of the last checkpoint as lesions="
        )
    return next(iter(run.lesions.values()), None)


def _check_same_network(last: pd.DataFrame, lesions: pd.DataFrame) -> None:
    """Raise ValueError if lesions are of another network: equal names may be chance, so compare input capture."""
    joined = join_axes(last, lesions[_CHANNEL])
    if len(joined) < len(lesions):
        known = pd.MultiIndex.from_frame(last[_CHANNEL])
        layer, channel = lesions[~pd.MultiIndex.from_frame(lesions[_CHANNEL]).isin(known)].iloc[0][_CHANNEL]
        raise ValueError(f"early_prediction: lesions of another network: the run has no channel {channel} of {layer!r}")
    if "input_capture" not in lesions:  # the table is from lesion_table
        return
    both = joined.merge(lesions[[*_CHANNEL, "input_capture"]], on=_CHANNEL, suffixes=("", "_lesions"))
    if not _measurable(both, "input_capture_lesions"):
        return  # too few to tell
    agreement = score_damage_correlation(both, ["input_capture"], "input_capture_lesions", resamples=0)["rho"].iloc[-1]
    if agreement < SAME_NETWORK:
        raise ValueError(
            f"early_prediction: lesions of another network than the run's last checkpoint: within layers, "
            f"the rank correlation of input capture in both tables is {agreement:.2f}, expected nearly 1; make them "
            "from this run's last checkpoint (chanaxes lesion --ckpt_path RUN/checkpoints/last.ckpt)"
        )


def _measurable(table: pd.DataFrame, column: str) -> bool:
    """Return whether a layer has enough channels with a value to rank them."""
    layers = table.loc[np.isfinite(table[column].to_numpy(float)), "layer"]
    return bool((layers.value_counts() >= MIN_CHANNELS).any())


def _wide(run: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a row per channel and a column per step and metric."""
    live, axes = ~run["dead"].to_numpy(bool), np.full((len(run), len(AXES)), np.nan)
    for rows in run.groupby(["step", "layer"], sort=False).indices.values():
        found = layer_columns(run.iloc[rows])
        axes[rows[live[rows]]] = np.stack([found[axis] for axis in AXES], 1)
    run = run.assign(**dict(zip(AXES, axes.T, strict=True)))
    wide = run.pivot(index=_CHANNEL, columns="step", values=list(PREDICTORS))
    return wide.loc[pd.MultiIndex.from_frame(run[_CHANNEL].drop_duplicates())]  # in the order of the network


def _order(last: pd.DataFrame, lesions: pd.DataFrame | None, score: str) -> pd.DataFrame:
    """Return ``layer, channel, order``: the rank in its layer at which a channel goes; dead channels go first."""
    with naming("early_prediction"):
        try:
            score_family(score)
        except ArgumentError as error:  # which names its own argument
            raise ArgumentError(f"order={short(score)}", error.text) from None
    if base_score(score) not in OWN_SCORES:
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
    """Return ``step, target, metric, layer, rho, low, high, n, reason`` for one outcome."""
    names = {f"{metric} at {step}": (metric, step) for metric, step in values.columns}
    if table is not None and not (column in table and pd.api.types.is_numeric_dtype(table[column])):
        there = [name for name in table if str(name).endswith(("_loss", "_accuracy", "_margin"))]
        raise ValueError(f"early_prediction(damage={short(column)}): no such column of lesions; there are {there}")
    if table is None or not _measurable(table, column):
        rows = pd.DataFrame({"score": list(names), "layer": NETWORK, "n": 0}).assign(
            rho=np.nan, low=np.nan, high=np.nan
        )
        reason = (
            "no lesions.parquet in the run folder: run chanaxes lesion, or pass lesions="
            if table is None
            else f"no layer has {MIN_CHANNELS} channels for which it is known"
        )
    else:
        kept = [name for name in (*_CHANNEL, "unit", column) if name in table]
        flat = values.set_axis(list(names), axis=1).reset_index()
        rows = score_damage_correlation(table[kept].merge(flat, on=_CHANNEL), list(names), column, resamples, seed)
        reason = "fewer than 3 channels have it, or it is the same for all"
    metrics, steps = zip(*(names[score] for score in rows["score"]), strict=True)
    rows = rows.assign(target=target, metric=metrics, step=steps, reason=np.where(rows["rho"].isna(), reason, ""))
    return rows[["step", "target", "metric", "layer", "rho", "low", "high", "n", "reason"]]
