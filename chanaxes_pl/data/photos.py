"""Crops of the photographs that scikit-image and scikit-learn ship: natural images without a download."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2.functional import resize

from chanaxes_pl.data.base import InMemoryDataModule, Split
from chanaxes_pl.data.files import TensorImages, read_image
from chanaxes_pl.data.splits import seeded_generator

#: The classes: each photograph's package, and its file in the package's folder.
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
CROP_STREAM, TEST_STREAM = 4, 5  # of random numbers; the other data modules use 0 to 3


class PhotosDataModule(InMemoryDataModule):
    """32×32 crops of 15 photographs; the label is the photograph that a crop was cut from.

    Training crops come from the left 70 % of a photograph, validation and test crops from the rest: validation crops
    from the upper half of it, test crops from the lower half. No pixel belongs to two of the three parts. Each
    photograph is first shrunk until its shorter side has 128 pixels, so that a crop shows more than plain texture.
    The test crops are the same whatever the seed.

    Needs scikit-image (``pip install "chanaxes_pl[demo]"``), whose wheel holds 13 of the photographs; nothing is
    downloaded.

    Args:
        crops: training crops of each photograph, those that ``val_size`` holds out included.
        test_crops: test crops of each photograph.
        options: those of :class:`InMemoryDataModule`; ``seed`` also fixes where the training and validation crops are.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: from ``setup``, if scikit-image or one of its photographs is missing.
    """

    num_classes = len(PHOTOS)
    image_size = 32
    # of the training crops of seed 0
    mean = (0.477, 0.387, 0.353)
    std = (0.273, 0.218, 0.224)
    side: int = 128
    left: float = 0.7

    def __init__(self, *, crops: int = 300, test_crops: int = 100, **options: Any) -> None:
        super().__init__(**options)
        if crops < 1 or test_crops < 1:
            raise ValueError(f"crops={crops}, test_crops={test_crops}: expected at least 1 of each.")
        self.crops = crops
        self.test_crops = test_crops

    def read(self, split: Split) -> TensorImages:
        """Cut the training crops, those to be held out from the validation part, or the test crops."""
        count = self.crops if split == "train" else self.test_crops
        labels = torch.arange(self.num_classes).repeat_interleave(count)
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        if split == "train":
            held_out[self._split(labels)[1]] = True
        stream = (self.seed, CROP_STREAM) if split == "train" else (0, TEST_STREAM)
        places = torch.rand((len(labels), 2), generator=seeded_generator(*stream), dtype=torch.float64)

        photos = [resize(read_image(path), [self.side], antialias=True) for path in photo_files()]
        images = torch.empty((len(labels), 3, self.image_size, self.image_size), dtype=torch.uint8)
        for image, label, held, place in zip(images, labels, held_out, places, strict=True):
            photo = photos[int(label)]
            height, width = photo.shape[1:]
            border, middle = round(self.left * width), height // 2
            if split == "test":
                part = photo[:, middle:, border:]
            else:
                part = photo[:, :middle, border:] if held else photo[:, :, :border]
            free = torch.tensor(part.shape[1:]) - self.image_size + 1  # places along each axis
            top, left = (place * free).long().tolist()
            image.copy_(part[:, top : top + self.image_size, left : left + self.image_size])
        return TensorImages(images, labels, list(PHOTOS))


def photo_files() -> list[Path]:
    """The photographs' files in the installed packages, in the order of :data:`PHOTOS`; neither is imported.

    Raises:
        FileNotFoundError: if a package or one of its files is missing; says how to get it.
    """
    remedy = 'pip install "scikit-image>=0.22" (or chanaxes_pl[demo]) brings them, and nothing else is downloaded.'
    files = []
    for package, file in PHOTOS.values():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"PhotosDataModule: the package {package}, which ships photographs, is missing. {remedy}"
            )
        path = Path(spec.submodule_search_locations[0]) / file
        if not path.is_file():
            raise FileNotFoundError(f"PhotosDataModule: {path}: no such photograph. {remedy}")
        files.append(path)
    return files
