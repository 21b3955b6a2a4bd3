"""Whether a resumed run measures what it did before."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chanaxes_pl.network.hooks import isolated_rng
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import Settings

_COMPARED = ("target", "positions", "noise", "reliability", "alignment", "probe_size", "step")


def fingerprint(settings: Settings, probe: Probe) -> dict[str, str | int | float | bool | None]:
    """What must stay the same for one table: settings, the number of images, and a hash of some of their labels.

    Functions are told apart by name only; pictures by their shapes only, because decoders differ.
    """
    found = {name: _plain(getattr(settings, name)) for name in _COMPARED}
    with isolated_rng():
        digest = sha256()
        sample = [list(_tensors(batch)) for batch in probe.sample()]
        if len({len(parts) for parts in sample}) == 1:  # the same tensors in every batch
            alike = [list(parts) for parts in zip(*sample, strict=True)]
        else:
            alike = [[part] for parts in sample for part in parts]
        for parts in alike:
            shapes = dict.fromkeys(f"{part.dtype}{tuple(part.shape[1:])}" for part in parts)
            digest.update("".join(shapes).encode())
            if not parts[0].is_floating_point() and (parts[0].ndim < 3 or parts[0].dtype != torch.uint8):
                digest.update(str([row for part in parts for row in torch.atleast_1d(part).tolist()]).encode())
    return found | {"images in the probe": probe.images or "a stream", "labels of the probe": digest.hexdigest()[:12]}


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another measurement; a checkpoint of an older version may lack what is compared.

    Raises:
        ValueError: naming what differs.
    """
    parts = [f"{name}: {before[name]!r}, now {now[name]!r}" for name in now if before.get(name, now[name]) != now[name]]
    if parts:
        raise ValueError(
            f"the checkpoint's AxisTracker measured something else than this one would: {'; '.join(parts)}. Resume "
            "with the same settings and probe, or track under another name= to begin a new table"
        )


def check_same_layers(before: dict[str, int], now: dict[str, int]) -> None:
    """Refuse to go on with other layers, or other widths.

    Raises:
        ValueError: naming them.
    """
    if not before or before == now:
        return
    changed = [f"{n}: {before[n]} channels, now {now[n]}" for n in before if n in now and before[n] != now[n]]
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    parts = [*changed, *(f"{n}: gone" for n in gone), *(f"{n}: new" for n in new)]
    raise ValueError(
        f"the checkpoint's AxisTracker followed other layers than this one ({len(before)} before, {len(now)} now): "
        f"{'; '.join(parts[:5])}{' …' if len(parts) > 5 else ''}. Resume with the same model and layers=, or track "
        "under another name= to begin a new table"
    )


def _plain(value: Any) -> str | int | float | bool | None:
    """A value that a checkpoint can hold without pickling anything but builtins, which NumPy's numbers are not."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if value is None:
        return None
    return getattr(value, "__qualname__", type(value).__qualname__)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (dict, list, tuple)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(part)
