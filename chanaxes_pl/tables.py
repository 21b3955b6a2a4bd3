"""The table of channels, with a row per channel and a column per metric, and its Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

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
    target_excess,
    task_information,
)
from chanaxes_pl.core.moments import Moments, live_mask
from chanaxes_pl.core.peers import PeerReconstruction, peer_overlap, peer_r2, peer_reconstruction
from chanaxes_pl.network.recording import UNREACHED, LayerMoments
from chanaxes_pl.run_folder import table_paths

#: Columns from the whole probe: in nats, except the last three (a share, a count and a share per count).
COLUMNS = (*METRICS, "peer_r2", "hull_size", "hull_score")
#: Columns that are also computed on the even and on the odd images, as ``<name>_even`` and ``<name>_odd``.
SPLIT_HALF = (*METRICS, "peer_r2")
HALVES = ("even", "odd")
#: Columns that are also computed with a random target, as ``<name>_null``.
WITH_NULL = tuple(TARGET_METRICS)
#: Columns that ``alignment=True`` adds, see :func:`alignment`.
ALIGNMENT = ("alignment", "signal_power", "task_covariance", "capture_norm", "task_norm", "residual_norm")
#: Columns that name the checkpoint of a row.
KEYS = ("run", "epoch", "step")
#: Columns of text, and of whole numbers; all other columns that are checked hold numbers.
TEXTS = {"run", "layer", "score", "family", "allocation", "compensate", "budget_of", "settings"}
COUNTS = {"step", "channel"}
_FINITE = {"epoch", "budget", "macs_share"}
#: The reason of a channel whose target columns are NaN for the target's sake.
TARGET_NOT_FINITE = "target not finite"


def axes_table(
    layers: Iterable[tuple[str, LayerMoments | None]],
    widths: Mapping[str, int],
    noise: str | float = "median",
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Make the table of channels of one checkpoint.

    Args:
        layers: names of layers with their moments, or ``None`` for a layer that has none.
        widths: layer name → number of channels.
        noise: noise power σ₀² of input capture.
        reasons: why a layer has no moments, or lacks some of the columns; the default for a layer without moments is
            that the forward pass never reached it.

    Returns:
        ``layer, channel``, :data:`COLUMNS`, ``dead`` (bool), ``at_ceiling`` (bool: a correlation of this channel
        with a peer or with the target was clipped), the columns of the halves and of the null target,
        :data:`ALIGNMENT` if patches were recorded, and ``reason``, which says why a row holds NaN, or is empty. The
        columns of the halves are NaN if the halves were not kept apart.
    """
    frames = [_layer_frame(name, moments, widths[name], noise, reasons.get(name, "")) for name, moments in layers]
    table = pd.concat(frames, ignore_index=True)
    return table[[*(column for column in table if column != "reason"), "reason"]]


def _layer_frame(name: str, moments: LayerMoments | None, width: int, noise: str | float, reason: str) -> pd.DataFrame:
    if moments is None:
        columns = {column: np.full(width, np.nan) for column in _columns()}
        columns |= {"dead": np.ones(width, bool), "at_ceiling": np.zeros(width, bool)}
        columns["reason"] = np.full(width, reason or UNREACHED, object)
    else:
        columns = measure(moments, noise)
        columns["reason"] = np.where(columns["reason"] == "", reason, columns["reason"]).astype(object)
    frame = pd.DataFrame({"layer": name, "channel": np.arange(width), **columns})
    others = [*_columns()[len(COLUMNS) :], *(column for column in ALIGNMENT if column in frame)]
    return frame[["layer", "channel", *COLUMNS, "dead", "at_ceiling", *others, "reason"]]


def _columns() -> list[str]:
    halves = [f"{column}_{half}" for column in SPLIT_HALF for half in HALVES]
    return [*COLUMNS, *halves, *(f"{column}_null" for column in WITH_NULL)]


def measure(moments: LayerMoments, noise: str | float = "median") -> dict[str, np.ndarray]:
    """Compute every column of one layer, ``[C]`` each, from its moments."""
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
        "at_ceiling": _spread({"clipped": _clipped(peers, association)}, live)["clipped"] > 0,
        "reason": _reasons(local, joint, live, moments.targets),
    }


def _live(local: Moments, joint: Moments) -> Tensor:
    return local.live & live_mask(joint.variance[: len(local.mean)])  # the targets have another scale


def associations(joint: Moments, live: Tensor, targets: int) -> tuple[Association, Association]:
    """Return the associations of the live channels with the target and with the null target.

    Args:
        joint: moments of ``[ȳ (C), T (D), null target (D)]``.
        live: ``[C]`` mask of the live channels.
        targets: D, the dimension of the target.
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
    """Spread the columns of the live channels over all ``[C]`` channels, with NaN for the others."""
    mask = live.cpu().numpy()
    columns = {}
    for name, column in values.items():
        columns[name] = np.full(len(mask), np.nan)
        columns[name][mask] = column.double().cpu().numpy()
    return columns


def _clipped(peers: PeerReconstruction, association: Association) -> Tensor:
    """Return a ``[C]`` mask of the channels with a correlation that is clipped before the logarithm."""
    closest = torch.stack([peers.closest, association.closest, association.shares.sqrt()])
    return (closest >= MAX_CORRELATION).any(0)


def _reasons(local: Moments, joint: Moments, live: Tensor, targets: int) -> np.ndarray:
    """Return why each channel's row holds NaN, or an empty string, ``[C]``."""
    channels = len(live)
    finite = (local.variance.isfinite() & joint.variance[:channels].isfinite()).cpu().numpy()
    reasons = np.where(live.cpu().numpy(), "", np.where(finite, "dead: its output does not vary", "output not finite"))
    spread = joint.variance[channels : channels + targets]
    if not spread.isfinite().all():
        reasons = np.where(reasons == "", TARGET_NOT_FINITE, reasons)
    elif not (spread > 0).any():
        reasons = np.where(reasons == "", "target does not vary", reasons)
    return reasons.astype(object)


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table to ``path``, which holds it whole or does not change, even if the process dies.

    Raises:
        OSError: if the folder cannot be written.
    """
    with replacing(path) as draft:
        table.to_parquet(draft, index=False)


def read_parquet(
    path: Path, required: Iterable[str] = ("layer", "channel", *COLUMNS), optional: Iterable[str] = ()
) -> pd.DataFrame:
    """Read and check one table.

    Args:
        path: path of the file.
        required: columns that the table must have.
        optional: columns whose type is checked if the table has them.

    Raises:
        ValueError: if the file is not a whole table of this schema: it was cut off, is empty, lacks columns, or has
            text in place of numbers, or numbers in place of text.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:  # from pyarrow and pandas
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not a whole Parquet file ({told}); it was cut off or is not from chanaxes_pl"
        ) from error
    return checked_table(table, path, list(required), optional)


def checked_table(
    table: pd.DataFrame, path: str | Path, required: Sequence[str], optional: Iterable[str] = ()
) -> pd.DataFrame:
    """Check a table's columns, as :func:`read_parquet` does, and return it.

    Args:
        table: table to check.
        path: what it is called in errors.
        required: columns that the table must have.
        optional: columns whose type is checked if the table has them.

    Raises:
        ValueError: as :func:`read_parquet`.
    """
    missing = [column for column in required if column not in table]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        hint = "; tables of AxisTracker name a checkpoint, those of compute_axes do not" if missing[0] in KEYS else ""
        raise ValueError(f"{path}: lacks the columns {shown}{hint}")
    if not len(table):
        raise ValueError(f"{path}: has no rows")
    wrong = [column for column in (*required, *optional) if column in table and not _has_type(table[column])]
    if wrong:
        expected = "text" if wrong[0] in TEXTS else "whole numbers from 0 on" if wrong[0] in COUNTS else "numbers"
        raise ValueError(f"{path}: the column {wrong[0]} holds {_kind(table[wrong[0]])}, expected {expected}")
    return table


def read_channels(path: Path) -> pd.DataFrame:
    """Read one checkpoint's table of channels, as a tracker wrote it.

    Raises:
        ValueError: if :func:`read_parquet` raises it, or a channel has two rows.
    """
    table = read_parquet(path, (*KEYS, "layer", "channel", *_columns(), "dead"), ALIGNMENT)
    twice = table.duplicated(["step", "layer", "channel"])
    if twice.any():
        layer, channel = table.loc[twice, ["layer", "channel"]].iloc[0]
        raise ValueError(f"{path}: channel {channel} of {layer} has two rows, expected one")
    return table.astype({"dead": bool})


def read_lesions(path: Path) -> pd.DataFrame:
    """Read a table of lesions with the axes of its channels, as ``chanaxes lesion`` wrote it.

    Raises:
        ValueError: if :func:`read_parquet` raises it, or the table has no column of damage.
    """
    table = read_parquet(path, ("layer", "channel", *METRICS, "peer_r2"))
    damages = [name for name in map(str, table) if name.endswith(("_loss", "_accuracy", "_margin"))]
    if not any(name.endswith("_loss") for name in damages):
        raise ValueError(f"{path}: lacks a column of damage, such as zero_loss")
    scores = [name for name in map(str, table) if name.startswith("score_")]
    return checked_table(table, path, [*damages, *scores])


def read_grid(path: Path) -> pd.DataFrame:
    """Read a pruning grid, as ``chanaxes prune`` wrote it.

    Raises:
        ValueError: if :func:`read_parquet` raises it, or the grid lacks the dense network.
    """
    optional = ("budget_of", "loss", "margin", "tuned_accuracy")
    table = read_parquet(path, (*VARIANT, "family", "macs_share", "accuracy"), optional)
    if not (table["score"] == DENSE).any():
        raise ValueError(f"{path}: lacks the row of the dense network, score {DENSE!r}")
    return table


def budget_words(grid: pd.DataFrame) -> str:
    """Name what the budgets of a grid are shares of; a grid without the column ``budget_of`` is older, and of MACs.

    Example:
        >>> budget_words(pd.DataFrame({"budget": [0.5], "budget_of": ["latency"]}))
        'latency'
    """
    kinds = grid["budget_of"].dropna().unique() if "budget_of" in grid else ["macs"]
    return " or ".join("multiply–accumulates" if kind == "macs" else kind for kind in kinds)


def _has_type(column: pd.Series) -> bool:
    if column.name in TEXTS:
        return pd.api.types.infer_dtype(column, skipna=False) == "string"
    if not (pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)):
        return False
    if column.name in COUNTS:
        return bool(pd.api.types.is_integer_dtype(column) and column.notna().all() and (column >= 0).all())
    return column.name not in _FINITE or bool(np.isfinite(column.astype(float)).all())


def _kind(column: pd.Series) -> str:
    kind = pd.api.types.infer_dtype(column, skipna=False)
    if pd.api.types.is_numeric_dtype(column):
        return "undefined, negative or broken numbers"
    return {"string": "text", "empty": "nothing"}.get(kind, kind)


def read_run(folder: str | Path) -> pd.DataFrame:
    """Read all checkpoints of a run as one table, in the order of ``step``.

    Args:
        folder: folder that a tracker wrote, ``<run folder>/<name of the tracker>``, by default ``<run folder>/axis``.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint.
        ValueError: if one of its files is cut off, or is no table of channels, or two hold the same step.
    """
    paths = table_paths(folder)
    if not paths:
        below = sorted(path.parent for path in Path(folder).glob("*/step-*.parquet"))
        hint = f"; did you mean {below[0]}?" if below else ""
        raise FileNotFoundError(
            f"{Path(folder).absolute()} holds no step-*.parquet: expected the folder that AxisTracker writes, "
            f"<run folder>/<name of the tracker>{hint}"
        )
    tables = [read_channels(path) for path in paths]
    whole = pd.concat(tables, ignore_index=True)
    twice = whole.duplicated(["step", "layer", "channel"])
    if twice.any():
        step = whole.loc[twice, "step"].iloc[0]
        names = [path.name for path, table in zip(paths, tables, strict=True) if (table["step"] == step).any()]
        raise ValueError(
            f"{Path(folder).absolute()}: {', '.join(names)} all hold step {step}; expected the tables of one run"
        )
    return whole.sort_values("step", kind="stable", ignore_index=True)


#: Name of the dense network in the column ``score``.
DENSE = "dense"
#: Prefix of columns that were measured after fine-tuning.
TUNED = "tuned_"
#: Columns that tell the rows of a grid apart.
VARIANT = ("score", "allocation", "compensate", "budget")
