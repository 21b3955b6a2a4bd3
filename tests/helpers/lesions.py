"""One lesion of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from chanaxes_pl.lesions.interventions import Interventions, Operation
from chanaxes_pl.lesions.replacements import Replacement
from chanaxes_pl.network.layers import select_layers
from chanaxes_pl.units.groups import Units


@contextmanager
def lesion(
    model: nn.Module,
    layer: str,
    channel: int,
    operation: Operation,
    *,
    statistics: Replacement | None = None,
    units: Units | None = None,
) -> Iterator[None]:
    """Lesion one channel of a model inside the block, as ``lesion_table`` does; ValueError says why it cannot be."""
    modules = select_layers(model, "conv+linear", whole=True)
    replacements = {} if statistics is None else {layer: statistics}
    intervention, why = Interventions(model, modules, replacements, units).find(layer, channel, operation)
    if intervention is None:
        raise ValueError(why)
    with intervention.applied(model):
        yield
