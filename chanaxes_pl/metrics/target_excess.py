"""Target-excess information: what a channel adds about the task together with its peers."""

from __future__ import annotations

import torch
from torch import Tensor

from chanaxes_pl.gaussian import Association


def target_excess(association: Association, candidates: int = 50, partners: int = 10) -> Tensor:
    """Mean Gaussian MMI synergy of a channel with its best partners.

    The excess of a pair is I(T; y_i, y_j) − max(I(T; y_i), I(T; y_j)). A channel's partners are, of the
    ``candidates`` peers it overlaps with most, the ``partners`` with the largest excess.

    Args:
        association: of the layer's C channels with the target, over image samples.
        candidates: peers looked at, nearest by correlation first; all where there are fewer.
        partners: peers averaged over; all candidates where there are fewer.

    Returns:
        ``[C]``, nats, ≥ 0; NaN in a layer of one channel.
    """
    single = association.single
    count = len(single)
    if count < 2:
        return torch.full_like(single, torch.nan)
    near = association.nearest(min(candidates, count - 1))
    excess = association.with_peers(near) - torch.maximum(single[:, None], single[near])
    return excess.topk(min(partners, excess.shape[1]), sorted=False).values.mean(1)
