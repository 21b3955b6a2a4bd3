"""Both axes of a model's channels at one moment: one pass over a probe, a table, its correlations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from torch import nn

from chanaxes_pl.analysis.correlations import axis_correlations, reliabilities
from chanaxes_pl.analysis.groupings import groupings
from chanaxes_pl.core.errors import check_resampling, naming
from chanaxes_pl.core.targets import TargetSpec
from chanaxes_pl.network.batches import Placement, Step
from chanaxes_pl.network.hooks import check_network, preserved
from chanaxes_pl.network.layers import LayerSpec, channel_count
from chanaxes_pl.network.probe import Probe, ProbeSource
from chanaxes_pl.network.recording import UNREACHED, Settings, record
from chanaxes_pl.tables import TARGET_NOT_FINITE, axes_table


def measure_axes(
    model: nn.Module,
    probe: Probe,
    settings: Settings,
    place: Placement,
) -> pd.DataFrame:
    """The table of channels of ``model`` as it stands; the model is left as it was.

    With several processes every one calls this with its place, and all get the same table. See :func:`record`.
    """
    with preserved(model):
        recorder = record(model, probe, settings, place)
    widths = {name: channel_count(layer) for name, layer in recorder.layers.items()}
    missing = recorder.left_out()
    if missing.keys() >= widths.keys():
        warnings.warn(_nothing_measured(missing, list(widths)), stacklevel=2)
    reasons = missing | recorder.without_alignment()
    table = axes_table(recorder.moments(), widths, settings.noise, reasons)
    if (table["reason"] == TARGET_NOT_FINITE).any():
        warnings.warn(
            f"the task variable ({recorder.target.name}) is not finite for some images of the probe, because a label "
            "or an output of theirs is NaN or infinite, so the target axis is NaN: leave those images out of the "
            "probe, or pass a target= that is finite for all",
            stacklevel=2,
        )
    return table.assign(target=recorder.target.name)


def _nothing_measured(missing: Mapping[str, str], layers: list[str]) -> str:
    """What to tell where every tracked layer was left out."""
    if all(missing[name] == UNREACHED for name in layers):
        return (
            f"the forward pass reached none of the {len(layers)} tracked layers ({', '.join(layers[:3])}"
            f"{', …' if len(layers) > 3 else ''}), so nothing was measured: choose others with layers="
        )
    text = f"none of the {len(layers)} tracked layers could be measured, so all axes are NaN. {layers[0]!r}: "
    return text + (
        f"{missing[layers[0]]}. Choose other layers with layers=; a network that puts several frames or views of an "
        "image side by side in a batch is measured on its part for one of them"
    )


@dataclass(frozen=True, eq=False)
class Axes:
    """Both axes of every channel of a network.

    Attributes:
        table: one row a channel: ``layer, channel, input_capture, peer_overlap, task_information, target_excess``
            (nats), ``peer_r2`` (share), ``hull_size``, ``hull_score``, ``dead``, ``at_ceiling``, the
            values on the probe's two halves and against the null target, ``reason``, and ``target``, the name of the
            task variable.
    """

    table: pd.DataFrame
    _resamples: int = 1000

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """One row per layer and metric pair, and the mean over layers: see :func:`axis_correlations`."""
        return axis_correlations(self.table, self._resamples)

    @cached_property
    def reliabilities(self) -> pd.DataFrame:
        """Split-half reliability of every metric: see :func:`reliabilities`."""
        return reliabilities(self.table)

    @cached_property
    def groupings(self) -> pd.DataFrame:
        """Agreement of the axes' channel groups: see :func:`groupings`."""
        return groupings(self.table)


def compute_axes(
    model: nn.Module,
    probe: ProbeSource,
    *,
    layers: LayerSpec = "auto",
    positions: int | str = 16,
    target: TargetSpec = "auto",
    noise: str | float = "median",
    reliability: bool = True,
    alignment: bool = False,
    probe_size: int = 5000,
    step: Step | None = None,
    resamples: int = 1000,
) -> Axes:
    """Both axes of every channel of a model, without a Trainer.

    Args:
        model: ``model(images)`` gives logits ``[B, K]``. It stays where it is and as it is.
        probe: the probe set: a DataLoader of ``(images, labels)`` or a Dataset of ``(image, label)``, labels
            ``[B]`` from 0 to K − 1. See :class:`Probe` for which images are taken.
        layers: ``"auto"`` (convolutions, and Linear layers where those hold less than half of the weights, without
            the head), ``"conv"``, ``"conv+linear"``, globs over layer names, or ``(name, module) → bool``; see
            :func:`select_layers`.
        positions: local samples an image, ``"all"``, or ``"mean"``: the local axis then measures image means, as the
            target axis does, and not single positions.
        target: task variable T: ``"auto"`` (from outputs and labels, see :func:`infer_target`), ``"logit_margin"``,
            ``"log_probability"``, ``"signed_logit"``, ``"log_likelihood"``, ``"label"``, or
            ``(outputs, labels) → [B]`` or ``[B, D]``.
        noise: σ₀² of input capture: ``"median"``, ``"mean"``, a quantile such as ``"q0.25"``, a number.
        reliability: keep the probe's two halves apart, for reliabilities.
        alignment: add :data:`ALIGNMENT`, the cosine between the gradients of input capture and
            task information.
        probe_size: images at most.
        step: ``(model, batch) → (logits, labels)`` for other batches or outputs.
        resamples: bootstrap resamples for the intervals of the correlations.

    Raises:
        ValueError: for settings out of range, a batch that is not (images, labels), labels outside the
            logits' classes, fewer than 3 images, or no layer that matches.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
        >>> axes = compute_axes(model, data)
        >>> axes.table[["layer", "channel", "input_capture"]].head(2).round(3)
          layer  channel  input_capture
        0     0        0          0.291
        1     0        1          0.360
    """
    with naming("compute_axes"):
        check_network(model)
        check_resampling(resamples)
        settings = Settings(
            layers=layers,
            positions=positions,
            target=target,
            noise=noise,
            reliability=reliability,
            step=step,
            probe_size=probe_size,
            alignment=alignment,
        )
        table = measure_axes(model, Probe(probe, probe_size), settings, Placement.of(model))
        return Axes(table, resamples)
