"""Task information: what a channel alone says about the task."""

from __future__ import annotations

from torch import Tensor

from chanaxes_pl.gaussian import Association


def task_information(association: Association) -> Tensor:
    """Gaussian information between a channel's image mean and the target, −½ ln(1 − r_i²).

    Args:
        association: of the layer's C channels with the target, over image samples.

    Returns:
        ``[C]``, nats.
    """
    return association.single
