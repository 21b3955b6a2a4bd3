"""Handwritten digits that scikit-learn ships: real images without a download."""

from typing import Any

import torch
import torch.nn.functional as F

from chanaxes_pl.data.base import InMemoryDataModule, Split
from chanaxes_pl.data.files import TensorImages
from chanaxes_pl.data.splits import seeded_generator, stratified_split


class DigitsDataModule(InMemoryDataModule):
    """The 1,797 grey 8×8 digits of scikit-learn, enlarged, in three equal channels; 360 of them for testing.

    The test images do not depend on the seed. The default size of 32×32 is the smallest that all backbones of the
    package take (VGG-16 halves it five times); 16×16 costs a quarter of the arithmetic. Augmentation shifts by up to
    one pixel of the original and never mirrors, because a mirrored 2 is no digit.

    Args:
        image_size: height and width in pixels, at least 8.
        options: arguments of :class:`InMemoryDataModule`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> dm = DigitsDataModule(batch_size=64, image_size=16)
        >>> dm.setup("fit")
        >>> images, labels = next(iter(dm.probe_dataloader()))
        >>> images.shape, images.dtype, labels[:10].tolist()
        (torch.Size([64, 3, 16, 16]), torch.float32, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    num_classes = 10
    # of all 1,797 images at 32×32; enlarging smooths, so the spread is below the 8×8 originals' 0.376
    mean = (0.305, 0.305, 0.305)
    std = (0.324, 0.324, 0.324)
    flip = False

    def __init__(self, *, image_size: int = 32, **options: Any) -> None:
        if image_size < 8:
            raise ValueError(f"image_size={image_size}: the digits have 8×8 pixels and are only ever enlarged.")
        super().__init__(**options)
        self.image_size = image_size
        self.padding = image_size // 8

    def read(self, split: Split) -> TensorImages:
        """Read and enlarge the training or test images."""
        from sklearn.datasets import load_digits  # takes a second, so only those who need it import it

        pixels, target = load_digits(return_X_y=True)
        labels = torch.as_tensor(target).long()
        train, test = stratified_split(labels, 360, seeded_generator(0))
        indices = train if split == "train" else test
        grey = torch.as_tensor(pixels)[indices].view(-1, 1, 8, 8) * (255 / 16)  # 17 shades, 0 to 16
        enlarged = F.interpolate(grey, size=(self.image_size, self.image_size), mode="bilinear")
        images = enlarged.round().to(torch.uint8).repeat(1, 3, 1, 1)
        return TensorImages(images, labels[indices], [str(digit) for digit in range(10)])
