"""CIFAR-10 and CIFAR-100, as torchvision stores them or as class folders."""

from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from chanaxes_pl.data.base import InMemoryDataModule, Split
from chanaxes_pl.data.files import TensorImages, find_tree, list_classes, list_images, load


class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels in 10 classes.

    Read from torchvision's layout (``cifar-10-batches-py/``) or from class folders
    (``{train,test}/<class>/*.png``), each in ``root`` or, the folders, in ``root/cifar10``. Labels follow the
    classes' alphabetical order in both.

    Args:
        root: the folder of the data set, or the folder above it.
        download: fetch torchvision's layout into ``root`` if no data set is there (170 MB).
        cache_dir: a folder for the decoded images of class folders, so that a later start takes one second
            instead of twenty; None keeps none. Not used with torchvision's layout, which needs no decoding.
        options: arguments of :class:`InMemoryDataModule`.

    Attributes:
        archive: torchvision's data set, which reads and fetches its own layout.
        folder: usual name of the folder that holds class folders.

    Raises:
        ValueError: if an argument is out of range; from ``setup``, if a file is not an image of 32×32 pixels.
        FileNotFoundError: from ``setup``, if the data set or a part of it is missing.
    """

    num_classes = 10
    image_size = 32
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    archive: type[datasets.CIFAR10] = datasets.CIFAR10
    folder: str = "cifar10"

    def __init__(
        self,
        root: str | Path = "data",
        *,
        download: bool = False,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = Path(root)
        self.download = download
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Download the data set if ``download`` is true and none is there yet; on one process only."""
        if self.download and not self._has_folders() and not self._archive_folder().is_dir():
            self.archive(str(self.root), download=True)

    def read(self, split: Split) -> TensorImages:
        """Read the training or test images from either layout."""
        if not self._has_folders() and self._archive_folder().is_dir():
            return self._read_archive(split)
        remedy = (
            f"Or torchvision's {self.archive.base_folder}/ in {self.root.absolute()}, which"
            f" `--data.download true` or {type(self).__name__}(download=True) fetches."
        )
        tree = find_tree(self, self.root, self.folder, ["train/", "test/"], remedy)
        classes = list_classes(tree / "train")
        if len(classes) != self.num_classes:
            raise ValueError(f"{tree / 'train'}: {len(classes)} class folders, expected {self.num_classes}.")
        return load(list_images(tree / split, classes), self.image_size, self.cache_dir)

    def _has_folders(self) -> bool:
        trees = (self.root / self.folder, self.root)
        return any((tree / "train").is_dir() and (tree / "test").is_dir() for tree in trees)

    def _archive_folder(self) -> Path:
        return self.root / self.archive.base_folder

    def _read_archive(self, split: Split) -> TensorImages:
        try:
            archive = self.archive(str(self.root), train=split == "train")
        except RuntimeError as error:
            raise ValueError(
                f"{self._archive_folder().absolute()}: incomplete or corrupted. Remove it and fetch it"
                " again with `--data.download true`."
            ) from error
        images = torch.from_numpy(archive.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, torch.tensor(archive.targets), list(archive.classes))


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 pixels in 100 classes.

    Read from torchvision's layout (``cifar-100-python/``) or from class folders
    (``{train,test}/<class>/*.png``), each in ``root`` or, the folders, in ``root/cifar100``. Arguments and
    errors are those of :class:`CIFAR10DataModule`.
    """

    num_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    archive = datasets.CIFAR100
    folder = "cifar100"
