"""The one table: a row a channel, a column a metric; in and out of Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from chanaxes_pl.core.files import replacing
from chanaxes_pl.core.gaussian import MAX_CORRELATION, Association
from chanaxes_pl.core.gradients import alignment
from chanaxes_pl.core.metrics import (
    METRICS,
    TARGET_METRICS,
    input_capture,
    peer_overlap,
    target_excess,
    task_information,
)
from chanaxes_pl.core.moments import Moments, live_mask
from chanaxes_pl.core.peers import peer_r2, peer_reconstruction
from chanaxes_pl.network.recording import LayerMoments

#: What is computed of every channel on the whole probe, in nats but for the last three (shares and a count).
COLUMNS = (*METRICS, "peer_r2", "hull_size", "hull_score")
#: What is computed on the even and on the odd images too, as ``<name>_even`` and ``<name>_odd``.
SPLIT_HALF = (*METRICS, "peer_r2")
HALVES = ("even", "odd")
#: The target metrics against a target that knows nothing, as ``<name>_null``.
WITH_NULL = tuple(TARGET_METRICS)
#: The columns that ``alignment=True`` adds: see :func:`alignment`.
ALIGNMENT = ("alignment", "signal_power", "task_covariance", "capture_norm", "task_norm", "residual_norm")
#: Which checkpoint a row belongs to.
KEYS = ("run", "epoch", "step")


def axes_table(
    layers: Iterable[tuple[str, LayerMoments | None]], widths: Mapping[str, int], noise: str | float = "median"
) -> pd.DataFrame:
    """The table of one checkpoint.

    Args:
        layers: names and moments, ``None`` for a layer that the forward pass never reached.
        widths: channels by layer.
        noise: σ₀² of input capture.

    Returns:
        ``layer, channel``, :data:`COLUMNS`, ``dead`` (bool), ``at_ceiling`` (bool: a correlation of this channel
        with a peer or with the target was clipped), the halves', the nulls', :data:`ALIGNMENT` where patches were
        recorded, and ``reason``, which says why a row holds NaN and is empty elsewhere. The half columns are NaN where
        the halves were not kept apart.
    """
    frames = [_layer_frame(name, moments, widths[name], noise) for name, moments in layers]
    return pd.concat(frames, ignore_index=True)


def _layer_frame(name: str, moments: LayerMoments | None, width: int, noise: str | float) -> pd.DataFrame:
    if moments is None:
        columns = {column: np.full(width, np.nan) for column in _columns()}
        columns |= {"dead": np.ones(width, bool), "at_ceiling": np.zeros(width, bool)}
        columns["reason"] = np.full(width, "the forward pass did not reach this layer", object)
    else:
        columns = measure(moments, noise)
    frame = pd.DataFrame({"layer": name, "channel": np.arange(width), **columns})
    others = [*_columns()[len(COLUMNS) :], *(column for column in ALIGNMENT if column in frame)]
    return frame[["layer", "channel", *COLUMNS, "dead", "at_ceiling", *others, "reason"]]


def _columns() -> list[str]:
    halves = [f"{column}_{half}" for column in SPLIT_HALF for half in HALVES]
    return [*COLUMNS, *halves, *(f"{column}_null" for column in WITH_NULL)]


def measure(moments: LayerMoments, noise: str | float = "median") -> dict[str, np.ndarray]:
    """Every column of one layer, ``[C]`` each, from its moments."""
    local, joint = Moments.merge_all(moments.local), Moments.merge_all(moments.joint)
    live = _live(local, joint)
    channels = local.select(live)
    association, null = associations(joint, live, moments.targets)
    peers = peer_reconstruction(channels)
    values = _axes(channels, association, noise) | {"peer_r2": peers.r2}
    values |= {"hull_size": peers.hull_size, "hull_score": peers.hull_score}
    values |= {f"{name}_null": metric(null) for name, metric in TARGET_METRICS.items()}
    if moments.patches is not None:
        shared = joint.covariance[: moments.channels, moments.channels]
        gradients = alignment(moments.patches.outputs, local.variance, moments.patches.target, shared)
        values |= {name: column[live] for name, column in gradients.items()}
    columns = dict.fromkeys(_columns(), np.full(moments.channels, np.nan)) | _spread(values, live)
    if len(moments.local) == len(HALVES):
        for half, part_local, part_joint in zip(HALVES, moments.local, moments.joint, strict=True):
            columns |= _half(half, part_local, part_joint, live, moments.targets, noise)
    return columns | {
        "dead": ~live.cpu().numpy(),
        "at_ceiling": _spread({"clipped": _clipped(channels, association)}, live)["clipped"] > 0,
        "reason": _reasons(local, joint, live, moments.targets),
    }


def _live(local: Moments, joint: Moments) -> Tensor:
    return local.live & live_mask(joint.variance[: len(local.mean)])  # the targets have a scale of their own


def associations(joint: Moments, live: Tensor, targets: int) -> tuple[Association, Association]:
    """Of the live channels with the target, and with the null target that stands behind it.

    Args:
        joint: of ``[ȳ (C), T (D), null target (D)]``.
        live: ``[C]`` mask.
        targets: D.
    """
    others = torch.ones(2 * targets, dtype=torch.bool, device=live.device)
    channels, joint = int(live.sum()), joint.select(torch.cat([live, others]))
    null = channels + targets
    association = Association.of(joint, channels, slice(channels, null))
    return association, association.with_target(joint, slice(null, null + targets))


def _axes(local: Moments, association: Association, noise: str | float) -> dict[str, Tensor]:
    return {
        "input_capture": input_capture(local, noise),
        "peer_overlap": peer_overlap(local),
        "task_information": task_information(association),
        "target_excess": target_excess(association),
    }


def _half(
    half: str, local: Moments, joint: Moments, live: Tensor, targets: int, noise: str | float
) -> dict[str, np.ndarray]:
    live = live & _live(local, joint)
    channels = local.select(live)
    values = _axes(channels, associations(joint, live, targets)[0], noise) | {"peer_r2": peer_r2(channels)}
    return _spread({f"{name}_{half}": column for name, column in values.items()}, live)


def _spread(values: dict[str, Tensor], live: Tensor) -> dict[str, np.ndarray]:
    """``[C]`` columns from those of the live channels, NaN for the others."""
    mask = live.cpu().numpy()
    columns = {}
    for name, column in values.items():
        columns[name] = np.full(len(mask), np.nan)
        columns[name][mask] = column.double().cpu().numpy()
    return columns


def _clipped(local: Moments, association: Association) -> Tensor:
    """``[C]`` mask: some correlation of this channel is above what a logarithm takes."""
    clipped = association.explained.diagonal() >= MAX_CORRELATION**2
    for correlation in (local.correlation, association.correlation):
        clipped = clipped | ((correlation.abs() >= MAX_CORRELATION).sum(1) > 1)  # each is 1 with itself
    return clipped


def _reasons(local: Moments, joint: Moments, live: Tensor, targets: int) -> np.ndarray:
    """``[C]``, why a channel's row holds NaN; empty where it does not."""
    channels = len(live)
    finite = (local.variance.isfinite() & joint.variance[:channels].isfinite()).cpu().numpy()
    reasons = np.where(live.cpu().numpy(), "", np.where(finite, "dead: its output does not vary", "output not finite"))
    spread = joint.variance[channels : channels + targets]
    if not spread.isfinite().all():
        reasons = np.where(reasons == "", "target not finite", reasons)
    elif not (spread > 0).any():
        reasons = np.where(reasons == "", "target does not vary", reasons)
    return reasons.astype(object)


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table so that ``path`` holds it whole or does not change, also when the process dies.

    Raises:
        OSError: if the folder cannot be written.
    """
    with replacing(path) as draft:
        table.to_parquet(draft, index=False)


def read_parquet(path: Path, required: Iterable[str] = ("layer", "channel", *COLUMNS)) -> pd.DataFrame:
    """Read one table back.

    Args:
        path: the file.
        required: columns that it has to have.

    Raises:
        ValueError: if the file is not a whole table of this schema.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); it was cut off or is none of ours") from error
    missing = [column for column in required if column not in table]
    if missing:
        raise ValueError(f"{path}: a Parquet file without the columns {', '.join(missing)}: not a table of channels")
    return table


def read_run(folder: str | Path) -> pd.DataFrame:
    """All checkpoints of a run as one table, in order of ``step``.

    Args:
        folder: where a tracker wrote, ``<run folder>/axis`` or whatever its ``name``.

    Raises:
        FileNotFoundError: if there is no checkpoint in it.
        ValueError: if one of its files is cut off.
    """
    paths = sorted(Path(folder).glob("step-*.parquet"))
    if not paths:
        raise FileNotFoundError(
            f"{Path(folder).absolute()} holds no step-*.parquet: expected the folder that AxisTracker writes, "
            "<run folder>/<name of the tracker>"
        )
    return pd.concat([read_parquet(path) for path in paths], ignore_index=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a tracker keeps the table of one step."""
    return folder / f"step-{step:09d}.parquet"


#: The name of the unpruned network in the column ``score``.
DENSE = "dense"
#: What tells the rows of a grid apart.
VARIANT = ("score", "allocation", "compensate", "budget")
