"""Upstream channels: which channels of which layers each layer reads, and with which weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chanaxes_pl.core.moments import Moments
from chanaxes_pl.core.statistics import z_scores
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import hooked
from chanaxes_pl.network.layers import CONVOLUTIONS
from chanaxes_pl.units.groups import Units, find_units


@dataclass(frozen=True, eq=False)
class Upstream:
    """The channels that one layer reads.

    Attributes:
        layer: name of that layer.
        channels: name of a layer whose outputs it reads directly → ``[F]``, that layer's channel behind each input, or
            −1. An input may read a sum of several layers' maps.
        norms: ``[C, F / groups]``, norm of the weights between each channel and each input that it reads.
        spread: ``[F]``, standard deviation of each input.
        reason: why the inputs cannot be traced to channels; empty if they can.
    """

    layer: str
    channels: dict[str, np.ndarray]
    norms: np.ndarray
    spread: np.ndarray
    reason: str

    def from_upstream(self, given: Mapping[str, np.ndarray], norms: np.ndarray | None = None) -> np.ndarray:
        """Average a metric over each channel's inputs, weighted by ‖W‖ times their standard deviation, ``[C]``.

        Args:
            given: layer → ``[C']``, metric of its channels, which is z-scored here so that layers can be averaged.
                Inputs that read only undefined values are left out.
            norms: ``[C, F / groups]``, norms to use in place of the layer's own.
        """
        worth = np.full((len(self.channels), len(self.spread)), np.nan)
        for row, (name, channels) in zip(worth, self.channels.items(), strict=True):
            scores, read = np.full(len(given[name]), np.nan), channels >= 0
            known = np.isfinite(given[name])
            scores[known] = z_scores(given[name][known])
            row[read] = scores[channels[read]]
        defined = np.isfinite(worth)
        mean = np.where(defined, worth, 0.0).sum(0) / np.maximum(defined.sum(0), 1)
        weights = self._whole(self.norms if norms is None else norms) * self.spread * defined.any(0)
        total = weights.sum(1)
        return np.divide(weights @ mean, total, out=np.full_like(total, np.nan), where=total > 0)

    def _whole(self, norms: np.ndarray) -> np.ndarray:
        """Expand ``[C, F / groups]`` to ``[C, F]``, with 0 between a channel and the inputs of other groups."""
        groups = len(self.spread) // norms.shape[1]
        whole = np.zeros((groups, len(norms) // groups, groups, norms.shape[1]))
        each = np.arange(groups)
        whole[each, :, each] = norms.reshape(groups, -1, norms.shape[1])
        return whole.reshape(len(norms), -1)


def find_upstream(
    model: nn.Module, layers: Mapping[str, nn.Module], spread: Mapping[str, Tensor], example: Tensor
) -> dict[str, Upstream]:
    """Find what each of some layers reads from the others; the model does not change.

    Autograd's graph of one forward pass connects the layers, and removable units connect the channels.

    Args:
        model: network that gives logits.
        layers: name → convolution or Linear layer of the model.
        spread: layer name → standard deviations, from :func:`input_spread`; without layers that did not run.
        example: ``[B, …]`` images.
    """
    spelt = {module: name for name, module in model.named_modules()}  # units name compiled layers like this
    ours = {spelt[module]: name for name, module in layers.items()}
    try:
        units, refused = find_units(model, example), ""
    except ValueError as error:
        units, refused = Units({}, {}), str(error)
    givers = {} if refused else direct_producers(model, example)
    upstream = {}
    for name, layer in layers.items():
        own = spelt[layer]
        weight: Tensor = layer.weight.detach().double().cpu()  # type: ignore[union-attr,operator]
        norms = weight.reshape(*weight.shape[:2], -1).norm(dim=2).numpy()
        inputs = norms.shape[1] * (layer.groups if isinstance(layer, CONVOLUTIONS) else 1)
        channels = {giver: _read(units, own, giver, inputs) for giver in givers.get(own, ())}
        reason = refused or _why_unknown(layer, name in spread, channels, units, ours)
        of_layer = spread[name].numpy() if name in spread else np.full(inputs, np.nan)
        known = {} if reason else {ours[giver]: of for giver, of in channels.items()}
        upstream[name] = Upstream(name, known, norms, of_layer, reason)
    return upstream


def direct_producers(model: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """Find, for each convolution and Linear layer, the others whose outputs reach its input directly.

    Args:
        model: model to search; it does not change.
        example: ``[B, …]`` images.
    """
    copied = clone(model).eval().requires_grad_(True)
    outputs: dict[Any, str] = {}
    inputs: dict[str, Any] = {}

    def note(name: str, _layer: nn.Module, seen: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[output.grad_fn] = name

    def look(name: str, _layer: nn.Module, seen: tuple[Tensor, ...]) -> None:
        inputs[name] = seen[0].grad_fn

    layers = [(n, m) for n, m in copied.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for name, layer in layers:
            layer.register_forward_hook(partial(note, name))
            layer.register_forward_pre_hook(partial(look, name))
        copied(example)
    order = list(outputs.values())
    return {name: sorted(_reached(node, outputs), key=order.index) for name, node in inputs.items()}


def _reached(node: Any, outputs: Mapping[Any, str]) -> set[str]:
    found, seen, waiting = set(), set(), [node]
    while waiting:
        node = waiting.pop()
        if node in outputs:
            found.add(outputs[node])
        elif node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found


def _read(units: Units, layer: str, giver: str, inputs: int) -> np.ndarray:
    """Return which channel of the giver each input of a layer reads, or −1, ``[F]``."""
    read = np.full(inputs, -1)
    for group in units.groups.values():
        if layer in group.consumers and giver in group.producers:
            places, channels = group.consumers[layer].flatten(), group.producers[giver].flatten()
            if len(places) < len(channels):  # as behind a PixelShuffle
                continue
            # Behind a flattened map, a channel has several consecutive inputs.
            read[places] = channels.repeat_interleave(len(places) // len(channels))
    return read


def _why_unknown(
    layer: nn.Module, reached: bool, channels: Mapping[str, np.ndarray], units: Units, ours: Mapping[str, str]
) -> str:
    if not reached:
        return "the forward pass did not reach it"
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.weight.shape[1] == 1:
        return "depthwise: each channel reads one input alone, so its weights mix no channels"
    if not channels:
        return "it reads the images"
    others = [giver for giver in channels if giver not in ours]
    if others:
        return f"it reads {others[0]!r}, which is not among the layers"
    lost = np.all([of < 0 for of in channels.values()], axis=0)
    if lost.any():
        why = next((f": {units.fixed[giver]}" for giver in channels if giver in units.fixed), "")
        return f"{lost.sum()} of its {len(lost)} inputs cannot be followed to a channel{why}"
    return ""


@contextmanager
def input_spread(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Measure the standard deviation ``[F]`` of every input of some layers, over all positions and images of the block.

    Args:
        layers: name → convolution or Linear layer; layers that do not run in the block are left out.

    Yields:
        Layer name → standard deviations, filled at the end of the block.
    """
    moments: dict[str, Moments] = {}

    def read(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        part = Moments.of(rows[:, :, None])  # each input is its own block, which skips covariances
        moments[name] = moments[name].merge_(part) if name in moments else part

    spread: dict[str, Tensor] = {}
    with hooked(((layer, partial(read, name)) for name, layer in layers.items()), before=True):
        yield spread
    for name, found in moments.items():
        spread[name] = found.variance[:, 0].sqrt().cpu()
