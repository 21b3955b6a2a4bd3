"""Peer overlap: how much a channel shares with each of its same-layer peers."""

from __future__ import annotations

import torch
from torch import Tensor

from chanaxes_pl.gaussian import information
from chanaxes_pl.moments import Moments


def peer_overlap(local: Moments) -> Tensor:
    """Mean pairwise Gaussian information between a channel and its live peers.

    Args:
        local: moments of the layer's C channels over local samples.

    Returns:
        ``[C]``, nats; NaN for dead channels, and for all where fewer than two are live.
    """
    live = local.live
    shared = information(local.select(live).correlation.square()).fill_diagonal_(0.0)
    overlap = torch.full_like(local.mean, torch.nan)
    overlap[live] = shared.sum(0) / (len(shared) - 1)
    return overlap
