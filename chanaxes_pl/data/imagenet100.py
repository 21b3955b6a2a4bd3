"""ImageNet-100, or any other subset of ImageNet's classes, streamed from class folders."""

from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from chanaxes_pl.data.base import ImageDataModule, Split, Transform
from chanaxes_pl.data.files import FileImages, find_tree, list_classes, list_images


class ImageNet100DataModule(ImageDataModule):
    """A subset of ImageNet's classes from ``{train,val}/<wnid>/``, read and transformed by worker processes.

    Training images are cropped at random (``RandomResizedCrop``) and mirrored; evaluation resizes the shorter
    side to 8/7 of ``image_size`` and crops the middle. The official val folder is the test set.

    Args:
        root: the folder ``imagenet100``, or the folder above it; it holds ``train/`` and ``val/``, and these one
            folder for each class.
        val_size: training images to hold out for validation, class by class: a number or a fraction below 1.
        augment: crop and mirror training images at random; otherwise they are transformed as for evaluation.
        num_workers: number of processes that read images, on each device; 0 reads in the main process.
        image_size: height and width of the network's input, in pixels.
        num_classes: number of classes.
        class_list: a text file of ``num_classes`` class ids, separated by white space, which selects class folders
            (of the full ImageNet, say); None takes all of them.
        options: arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: if an argument is out of range; from ``setup``, if there are not ``num_classes`` classes.
        FileNotFoundError: from ``setup``, if the data set or a part of it is missing.
    """

    def __init__(
        self,
        root: str | Path = "data",
        *,
        val_size: int | float = 5000,
        augment: bool = True,
        num_workers: int = 8,
        image_size: int = 224,
        num_classes: int = 100,
        class_list: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(val_size=val_size, **options)
        if num_workers < 0 or image_size < 1 or num_classes < 1:
            raise ValueError(
                f"num_workers={num_workers}, image_size={image_size}, num_classes={num_classes}: expected"
                " at least 0 workers, 1 pixel and 1 class."
            )
        self.root = Path(root)
        self.augment = augment
        self.num_workers = num_workers
        self.image_size = image_size
        self.num_classes = num_classes
        self.class_list = None if class_list is None else Path(class_list)
        # the statistics that pretrained ImageNet networks use
        normalise = [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
        crop = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        centre = [v2.Resize(round(image_size * 8 / 7), antialias=True), v2.CenterCrop(image_size)]
        self.evaluation_transform = v2.Compose([*centre, *normalise])
        self._training_transform = v2.Compose([*crop, *normalise]) if augment else self.evaluation_transform

    def loader_transform(self, training: bool) -> Transform:
        """The transform of one uint8 image ``[3, H, W]`` to normalised float32."""
        return self._training_transform if training else self.evaluation_transform

    def read(self, split: Split) -> FileImages:
        """List the training images, or the official validation images as the test set."""
        remedy = "Request ImageNet at https://image-net.org; it is not downloaded here."
        tree = find_tree(self, self.root, "imagenet100", ["train/", "val/"], remedy)
        return list_images(tree / ("train" if split == "train" else "val"), self._classes(tree / "train"))

    def _classes(self, folder: Path) -> list[str]:
        if self.class_list is None:
            classes, source = list_classes(folder), folder
        else:
            classes, source = sorted(set(self.class_list.read_text("utf-8-sig").split())), self.class_list
        if len(classes) != self.num_classes:
            raise ValueError(
                f"{source}: {len(classes)} classes, expected num_classes={self.num_classes}. A class_list"
                " file selects classes from a larger set."
            )
        return classes
