"""Augmentation of whole batches on their device, with random parameters for every image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift every image by up to ``padding`` pixels, filling with 0, and mirror half of them, in one gather.

    torchvision's transforms draw one crop for a whole batch; here each image has its own.

    Args:
        images: ``[B, C, H, W]``, any dtype and device.
        padding: the largest shift, in pixels, along both axes and in both directions.
        flip: mirror each image left-right with probability ½.
        generator: a generator on the CPU, so that the draws are the same for every device.

    Returns:
        ``[B, C, H, W]``, a copy.
    """
    batch, channels, height, width = images.shape
    draws = torch.rand((3, batch), generator=generator)
    top, left = (draws[:2] * (2 * padding + 1)).long().to(images.device)
    mirrored = (draws[2] < 0.5).to(images.device) & flip

    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, [padding] * 4)
    pixels = pixels.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view_as(images)
