"""Peer replacement as a change of one filter: that it gives the lesion's logits is a law of the method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chanaxes_pl.lesions.replacements import REPLACEMENTS, Replacement, check_channels, check_operations
from chanaxes_pl.network.layers import channel_count


@contextmanager
def as_filter(layer: nn.Module, channel: int, statistics: Replacement, operation: str = "peer") -> Iterator[None]:
    """A layer whose filter for one channel is replaced by its peers' filters, W_i ← Σ β_ij W_j, b_i ← a_i + Σ β_ij b_j.

    Gives what the lesion of the same name gives, because one position's outputs are linear in one and the same patch.
    A layer without bias has one meanwhile.

    Args:
        layer: a convolution or Linear.
        channel: its output feature.
        statistics: of the layer.
        operation: a key of :data:`REPLACEMENTS`.

    Raises:
        ValueError: for an unknown operation or channel, or if the layer is grouped: its channels read different inputs.
    """
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(
            f"as_filter({layer}): a grouped convolution's channels read different inputs, so no filter computes one "
            "from the others"
        )
    check_operations([operation], REPLACEMENTS)
    check_channels(type(layer).__name__, [channel], channel_count(layer))
    offset, peers, weights = statistics.rule(operation, channel)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    before = weight[channel].detach().clone()
    own = bias if isinstance(bias, Tensor) else nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
    own_before = own[channel].detach().clone()
    peers, weights = peers.to(weight.device), weights.to(weight)
    try:
        with torch.no_grad():
            weight[channel] = torch.tensordot(weights, weight[peers], dims=1)
            own[channel] = offset + weights @ own[peers]
        layer.bias = own  # type: ignore[assignment]
        yield
    finally:
        layer.bias = bias  # type: ignore[assignment]
        with torch.no_grad():
            weight[channel] = before
            own[channel] = own_before
