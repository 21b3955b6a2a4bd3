"""One LightningDataModule for each data set: images up to 64×64 pixels are held in memory, larger ones streamed."""

from chanaxes_pl.data.base import ImageDataModule, InMemoryDataModule
from chanaxes_pl.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from chanaxes_pl.data.digits import DigitsDataModule
from chanaxes_pl.data.imagenet100 import ImageNet100DataModule
from chanaxes_pl.data.photos import PhotosDataModule
from chanaxes_pl.data.tiny_imagenet import TinyImageNetDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageNet100DataModule",
    "InMemoryDataModule",
    "PhotosDataModule",
    "TinyImageNetDataModule",
]
