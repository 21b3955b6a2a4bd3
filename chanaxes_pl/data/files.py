"""Image files as tensors: listing class folders, decoding, and an optional cache of decoded images."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from chanaxes_pl.core.files import replacing

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True, eq=False)
class FileImages(Dataset):
    """Labelled image files, each decoded when it is read.

    Attributes:
        paths: N image files.
        labels: ``[N]`` int64, indices into ``class_names``.
        class_names: K names.
        transform: applied to each uint8 image ``[3, H, W]``; None leaves it as it is.
    """

    paths: list[Path]
    labels: Tensor
    class_names: list[str]
    transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[index])
        return image if self.transform is None else self.transform(image), int(self.labels[index])


@dataclass(frozen=True, eq=False)
class TensorImages(Dataset):
    """Labelled images in memory, sliced a whole batch at a time.

    ``__getitems__`` returns the batch itself, not a list of items: a loader over it needs a ``collate_fn``
    that returns its argument.

    Attributes:
        images: ``[N, 3, H, W]`` uint8.
        labels: ``[N]`` int64, indices into ``class_names``.
        class_names: K names.
        transform: applied to the uint8 images of a batch ``[B, 3, H, W]``; None leaves them as they are.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        return images if self.transform is None else self.transform(images), self.labels[indices]


def find_tree(owner: object, root: str | Path, name: str, parts: Sequence[str], remedy: str) -> Path:
    """The folder that holds every one of ``parts``: ``root/name`` or ``root`` itself.

    Args:
        owner: the data module, whose class the error names.
        root: the folder to look in.
        name: the data set's usual folder name.
        parts: files and folders of the layout.
        remedy: a sentence for the error, which says how to get the data set.

    Raises:
        FileNotFoundError: if neither holds all the parts; names both folders and the parts.
    """
    root = Path(root).absolute()
    for folder in (root / name, root):
        if all((folder / part).exists() for part in parts):
            return folder
    raise FileNotFoundError(
        f"{type(owner).__name__}: no data set in {root}. Expected {', '.join(parts)} in {root / name}"
        f" or in {root} itself. {remedy}"
    )


def list_classes(folder: Path) -> list[str]:
    """The names of the class folders in ``folder``, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: if a link in ``folder`` leads nowhere; names it.
    """
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    for entry in entries:
        if not os.path.exists(entry.path):
            raise FileNotFoundError(f"{entry.path}: expected a class folder{link_target(entry.path)}.")
    return sorted(entry.name for entry in entries if entry.is_dir())


def list_images(folder: Path, classes: Sequence[str], inside: str = "") -> FileImages:
    """The images of ``folder/<class>/<inside>/``, by class and name; the label is the position of the class.

    Hidden files are left out, such as the ``._…`` that macOS puts beside every file it copies.

    Raises:
        FileNotFoundError: if a class has no folder, or no PNG or JPEG in it, or a link leads nowhere; names it.
    """
    paths: list[Path] = []
    sizes: list[int] = []
    for name in classes:
        source = folder / name / inside
        if not source.is_dir():
            raise FileNotFoundError(f"{source}: no such folder, but class {name!r} needs one{link_target(source)}.")
        # scandir and splitext: Path.iterdir and .suffix take three times as long on 60,000 files
        entries = sorted((entry for entry in os.scandir(source) if _is_image(entry.name)), key=lambda entry: entry.name)
        for entry in entries:
            if not entry.is_file():
                raise FileNotFoundError(f"{entry.path}: expected an image file{link_target(entry.path)}.")
        if not entries:
            raise FileNotFoundError(f"{source}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in this class folder.")
        paths.extend(source / entry.name for entry in entries)
        sizes.append(len(entries))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return FileImages(paths, labels, list(classes))


def link_target(path: str | Path) -> str:
    """The end of an error message about a missing file: where the link at ``path`` leads; empty if it is no link."""
    return f": it is a link to {os.readlink(path)}, which is missing" if os.path.islink(path) else ""


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_image(path: Path) -> Tensor:
    """Decode one PNG or JPEG of any colour mode to ``[3, H, W]`` uint8; of 16 bits, the most significant 8 are kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be decoded; names the file.
    """
    encoded = path.read_bytes()
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # damaged, or far too many pixels
        raise ValueError(f"{path}: not a readable image ({error}).") from error


def decode(files: FileImages, size: int) -> Tensor:
    """Decode all files to ``[N, 3, size, size]`` uint8.

    In one thread: an image of 32×32 takes 0.2 ms, mostly under the interpreter's lock, and two threads on two
    cores took longer than one.

    Raises:
        ValueError: if a file is not an image of this size; names the file.
    """
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    for image, path in zip(images, files.paths, strict=True):
        decoded = read_image(path)
        if decoded.shape != image.shape:
            height, width = decoded.shape[1:]
            raise ValueError(f"{path}: {height}×{width} pixels, expected {size}×{size}.")
        image.copy_(decoded)
    return images


def load(files: FileImages, size: int, cache_dir: str | Path | None = None) -> TensorImages:
    """Decode all files, or read the images that an earlier call decoded and cached.

    The cache is one ``.npy`` file. Its name holds a digest of the path, size and modification time of every image, so a
    changed image is decoded again. The file gets this name only when it is complete.

    Args:
        files: the image files to decode.
        size: the height and width every image must have, in pixels.
        cache_dir: the cache's folder, made if missing; None keeps no cache.

    Raises:
        ValueError: if a file is not an image of this size; names the file.
    """
    if cache_dir is None:
        return TensorImages(decode(files, size), files.labels, files.class_names)
    path = Path(cache_dir) / f"{_digest(files, size)}.npy"
    images = _read_cache(path, (len(files), 3, size, size)) if path.exists() else None
    if images is None:
        images = decode(files, size)
        with replacing(path) as draft, draft.open("wb") as file:
            np.save(file, images.numpy())
    return TensorImages(images, files.labels, files.class_names)


def _digest(files: FileImages, size: int) -> str:
    digest = hashlib.sha256(f"uint8 {size}".encode())
    for path in files.paths:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _read_cache(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Map the file, copy-on-write; None, with a warning, if it is damaged."""
    try:
        images = np.lib.format.open_memmap(path, mode="c")
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except ValueError as error:  # also a damaged header, or a file shorter than its header says
        warnings.warn(f"{path}: damaged cache ({error}); decoding the images again.", stacklevel=2)
        return None
    return torch.from_numpy(images)
