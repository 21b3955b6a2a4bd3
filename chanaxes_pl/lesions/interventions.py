"""Interventions on single channels: the operations, and the context that applies one to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import ArgumentError, InputError, nearest
from chanaxes_pl.lesions.replacements import REPLACEMENTS, Replacement, check_channels, replacement
from chanaxes_pl.network.layers import channel_count
from chanaxes_pl.network.tracing import Edit, PartialForward, edited
from chanaxes_pl.units.flow import LAYERS
from chanaxes_pl.units.groups import Units
from chanaxes_pl.units.removal import Group, masked

#: An item of :data:`OPERATIONS`.
Operation = Literal["zero", "mean", "peer", "hull"]
#: Operations on a channel: ``"zero"`` removes it with its whole unit, the others replace its output.
OPERATIONS: tuple[Operation, ...] = ("zero", *REPLACEMENTS)


@dataclass(frozen=True, eq=False)
class Intervention:
    """Intervention of one lesion on a model: it rewrites a layer's output, or masks a unit of a group.

    Attributes:
        edits: module name → the edit of its output.
        group: group that loses a unit; ``None`` if an output is rewritten.
        unit: number of that unit in its group.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    group: Group | None = None
    unit: int = -1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Apply the intervention to ``model`` inside the block."""
        if self.group is None:
            with edited(model, self.edits):
                yield
            return
        units = torch.arange(self.group.size)
        with masked(model, [self.group], {self.group.name: units[units != self.unit]}):
            yield

    def rerun(self, model: nn.Module, forward: PartialForward) -> Tensor:
        """Return the logits under the intervention; only the modules downstream of it run again."""
        if self.group is None:
            return forward.rerun(edits=self.edits)
        with self.applied(model):
            return forward.rerun(self.group.masks)


def check_places(modules: Mapping[str, nn.Module], chosen: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError if a layer or channel does not exist."""
    for layer, channels in chosen.items():
        if layer not in modules:
            raise InputError(f"no layer {layer!r}; {nearest(layer, modules)}")
        check_channels(layer, channels, channel_count(modules[layer]))


#: Key of an intervention: the operation with a layer and channel, or with the name of a unit and −1.
Key = tuple[Operation, str, int]


class Row(TypedDict):
    """Start of a row of a table of damage.

    Attributes:
        layer: layer name.
        channel: output feature of the layer.
        unit: name of the channel's unit; empty if it cannot be removed.
        keys: operation → the key of its intervention; ``None`` if there is none.
        reason: why interventions are missing; empty if none is.
    """

    layer: str
    channel: int
    unit: str
    keys: dict[Operation, Key | None]
    reason: str


def _check_units(groups: Mapping[str, Group], modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if units are not of the network with these modules."""
    for group in groups.values():
        for name, members in group.producers.items():
            width = channel_count(modules[name]) if isinstance(modules.get(name), LAYERS) else None
            if width is None or members.max() >= width or members.numel() > width:
                has = "has no such layer" if width is None else f"has {width} channels there"
                raise ArgumentError(
                    "units=…",
                    f"group {group.name!r} has {members.numel()} channels of {name!r}, and this network {has}: "
                    "expected find_units(model, images) of the same network",
                )


class Interventions:
    """Interventions behind the rows of a table of damage; the channels of one unit share one removal.

    Attributes:
        chosen: the interventions of all rows so far, by key.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        replacements: Mapping[str, Replacement],
        units: Units | None,
    ) -> None:
        self.chosen: dict[Key, Intervention] = {}
        self._modules = modules
        self._paths = {module: name for name, module in model.named_modules()}
        self._replacements = replacements
        self._fixed = {} if units is None else units.fixed
        groups = {} if units is None else units.groups
        _check_units(groups, dict(model.named_modules()))
        self._units = {
            (path, channel): (group, unit)
            for group in groups.values()
            for path, members in group.producers.items()
            for unit, channels in enumerate(members.tolist())
            for channel in channels
        }

    def find(self, layer: str, channel: int, operation: Operation) -> tuple[Intervention | None, str]:
        """Return the intervention of one lesion, or ``None`` and the reason why there is none."""
        module = self._modules[layer]
        path = self._paths[module]
        if operation == "zero":
            group, unit = self._units.get((path, channel), (None, -1))
            why = self._fixed.get(path, "its layer is in no removable group")
            return (None, f"cannot be removed: {why}") if group is None else (Intervention(group=group, unit=unit), "")
        if layer not in self._replacements:
            return None, "the forward pass did not reach this layer, or not with one output an image"
        statistics = self._replacements[layer]
        if not statistics.mean[channel].isfinite():
            return None, "output not finite"
        return Intervention({path: replacement(module, channel, statistics, operation)}), ""

    def row(self, layer: str, channel: int, operations: Iterable[Operation]) -> Row:
        """Start the row of one channel, and add its interventions to ``chosen``."""
        group, unit = self._units.get((self._paths[self._modules[layer]], channel), (None, -1))
        name = "" if group is None else f"{group.name}[{unit}]"
        keys: dict[Operation, Key | None] = {}
        reasons = {}
        for operation in operations:
            key: Key | None = (operation, name, -1) if operation == "zero" and name else (operation, layer, channel)
            if key not in self.chosen:
                intervention, why = self.find(layer, channel, operation)
                if intervention is None:
                    key, reasons[why] = None, True
                else:
                    self.chosen[key] = intervention
            keys[operation] = key
        return {"layer": layer, "channel": channel, "unit": name, "keys": keys, "reason": "; ".join(reasons)}
