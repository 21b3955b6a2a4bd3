"""Tiny-ImageNet in its official layout."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from chanaxes_pl.data.base import InMemoryDataModule, Split
from chanaxes_pl.data.files import FileImages, TensorImages, find_tree, link_target, list_images, load

LAYOUT = ["wnids.txt", "train/", "val/images/", "val/val_annotations.txt"]
SOURCE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


class TinyImageNetDataModule(InMemoryDataModule):
    """Tiny-ImageNet: 64×64 pixels, 500 training images in each of 200 classes; official val set for testing.

    Any subset of the classes works: the classes in ``wnids.txt``, sorted, are the labels, and ``num_classes`` is
    their number (200 while there is no such file).

    Args:
        root: the folder ``tiny-imagenet-200``, or the folder above it.
        cache_dir: a folder for the decoded images, so that a later start skips decoding; None keeps none.
        options: arguments of :class:`InMemoryDataModule`.

    Raises:
        ValueError: if an argument is out of range; from ``setup``, if a file is not an image of 64×64 pixels
            or the annotations cannot be read.
        FileNotFoundError: from ``setup``, if the data set or a part of it is missing.
    """

    image_size = 64
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)

    def __init__(self, root: str | Path = "data", *, cache_dir: str | Path | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root)
        self.cache_dir = cache_dir
        lists = [tree / "wnids.txt" for tree in (self.root / "tiny-imagenet-200", self.root)]
        self.num_classes = next((len(_read_wnids(path)) for path in lists if path.exists()), 200)

    def read(self, split: Split) -> TensorImages:
        """Read the training images, or the official validation images as the test set."""
        remedy = f"Fetch {SOURCE} and unpack it there."
        tree = find_tree(self, self.root, "tiny-imagenet-200", LAYOUT, remedy)
        wnids = _read_wnids(tree / "wnids.txt")
        files = list_images(tree / "train", wnids, "images") if split == "train" else _list_val(tree, wnids)
        images = load(files, self.image_size, self.cache_dir)
        self.num_classes = len(wnids)
        return TensorImages(images.images, images.labels, _read_names(tree, wnids))


def _read_wnids(path: Path) -> list[str]:
    try:
        wnids = sorted(path.read_text("utf-8-sig").split())  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}).") from error
    if not wnids:
        raise ValueError(f"{path}: lists no class.")
    if twice := next((wnid for wnid, after in pairwise(wnids) if wnid == after), ""):
        raise ValueError(f"{path}: lists the class {twice} twice, expected each once.")
    return wnids


def _read_names(tree: Path, wnids: list[str]) -> list[str]:
    """The first name of each class in ``words.txt``; the class's id where it has none."""
    path = tree / "words.txt"
    lines = path.read_text("utf-8-sig").splitlines() if path.exists() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return [words.get(wnid, wnid).split(",")[0] for wnid in wnids]


def _list_val(tree: Path, wnids: list[str]) -> FileImages:
    """The validation images of the listed classes, in the order of the annotations."""
    annotations = tree / "val" / "val_annotations.txt"
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    paths: list[Path] = []
    targets: list[int] = []
    for number, line in enumerate(annotations.read_text("utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        match line.split("\t"):
            case [name, wnid, *_]:
                if wnid in labels:
                    paths.append(tree / "val" / "images" / name)
                    targets.append(labels[wnid])
            case _:
                raise ValueError(f"{annotations}, line {number}: expected file, tab, class id, got {line!r}.")
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise FileNotFoundError(f"{missing}: no such image, but {annotations} names it{link_target(missing)}.")
    if not paths:
        raise ValueError(f"{annotations}: no image of the {len(wnids)} classes that wnids.txt lists.")
    return FileImages(paths, torch.tensor(targets), wnids)
