"""Interventions on single channels: the operations, and the context in which a model runs with one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError, naming, nearest
from chanaxes_pl.lesions.replacements import REPLACEMENTS, Replacement, check_channels, check_operations, replacement
from chanaxes_pl.network.groups import Units
from chanaxes_pl.network.layers import channel_count, select_layers
from chanaxes_pl.network.removal import Group, masked
from chanaxes_pl.network.tracing import Edit, PartialForward, edited

#: What may happen to a channel: removal with all its unit, or one of the replacements.
OPERATIONS = ("zero", *REPLACEMENTS)


@dataclass(frozen=True, eq=False)
class Intervention:
    """What a lesion does to a model: an output rewritten, or a unit taken out of its group.

    Attributes:
        edits: name of a module → the edit of its output.
        group: that the unit is removed from, ``None`` where an output is rewritten.
        unit: its number.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    group: Group | None = None
    unit: int = -1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Run the block with the intervention in place."""
        if self.group is None:
            with edited(model, self.edits):
                yield
            return
        units = torch.arange(self.group.size)
        with masked(model, [self.group], {self.group.name: units[units != self.unit]}):
            yield

    def rerun(self, model: nn.Module, forward: PartialForward) -> Tensor:
        """Logits with the intervention; only what lies downstream of it runs again."""
        if self.group is None:
            return forward.rerun(edits=self.edits)
        with self.applied(model):
            return forward.rerun((*self.group.consumers, *self.group.layer_norms))


@contextmanager
def lesion(
    model: nn.Module,
    layer: str,
    channel: int,
    operation: str,
    *,
    statistics: Replacement | None = None,
    units: Units | None = None,
) -> Iterator[None]:
    """A model with one channel damaged, which is bit for bit as before afterwards.

    ``"zero"``: what its consumers read becomes 0 and LayerNorms leave it out, as if its unit had been removed.
    ``"mean"``, ``"peer"``, ``"hull"``: the layer's own output for it becomes its probe mean, or what all its peers,
    or those of its compact hull, make of it.

    Args:
        model: run it under :func:`observed`, or in eval mode.
        layer: name of a convolution or Linear layer.
        channel: its output feature, from 0.
        operation: one of :data:`OPERATIONS`.
        statistics: of the layer, for all but ``"zero"``; see :func:`measure_replacements`.
        units: of the model, for ``"zero"``; see :func:`find_units`.

    Raises:
        ValueError: for an unknown operation, layer or channel, if what the operation needs is missing, or if the
            channel cannot be removed.
    """
    with naming("lesion"):
        check_operations([operation], OPERATIONS)
        modules = select_layers(model, "conv+linear", whole=True)
        check_places(modules, {layer: [channel]})
    if operation == "zero" and units is None:
        raise ValueError("lesion(operation='zero'): pass units=find_units(model, images)")
    if operation != "zero" and statistics is None:
        raise ValueError(f"lesion(operation={operation!r}): pass statistics=measure_replacements(…)[{layer!r}]")
    replacements = {} if statistics is None else {layer: statistics}
    intervention, why = Interventions(model, modules, replacements, units).find(layer, channel, operation)
    if intervention is None:
        raise ValueError(f"lesion(layer={layer!r}, channel={channel}, operation={operation!r}): {why}")
    with intervention.applied(model):
        yield


def check_places(modules: Mapping[str, nn.Module], chosen: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError if a layer or channel does not exist."""
    for layer, channels in chosen.items():
        if layer not in modules:
            raise InputError(f"no layer {layer!r}; {nearest(layer, modules)}")
        check_channels(layer, channels, channel_count(modules[layer]))


#: Of a change: the operation with layer and channel, or with the unit.
Key = tuple[str, str, int]


class Interventions:
    """The changes behind the rows of a table; channels of one unit share its removal."""

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
        self._units = {
            (path, channel): (group, unit)
            for group in (() if units is None else units.groups.values())
            for path, members in group.producers.items()
            for unit, channels in enumerate(members.tolist())
            for channel in channels
        }

    def find(self, layer: str, channel: int, operation: str) -> tuple[Intervention | None, str]:
        """The change that a lesion makes, or why there is none."""
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

    def row(self, layer: str, channel: int, operations: Iterable[str]) -> dict[str, Any]:
        """A row's beginning, with the key of each operation's change, which is noted."""
        group, unit = self._units.get((self._paths[self._modules[layer]], channel), (None, -1))
        name = "" if group is None else f"{group.name}[{unit}]"
        keys: dict[str, Key | None] = {}
        reasons = {}
        for operation in operations:
            key = (operation, name, -1) if operation == "zero" and name else (operation, layer, channel)
            if key not in self.chosen:
                intervention, why = self.find(layer, channel, operation)
                if intervention is None:
                    key, reasons[why] = None, True
                else:
                    self.chosen[key] = intervention
            keys[operation] = key
        return {"layer": layer, "channel": channel, "unit": name, "keys": keys, "reason": "; ".join(reasons)}
