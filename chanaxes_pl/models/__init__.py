"""Backbones, and the classifier that trains them."""

from chanaxes_pl.models.backbones import BACKBONES, build_backbone, convnext_tiny, mobilenet_v2, resnet18, vgg16_bn
from chanaxes_pl.models.classifier import Classifier, ImageClassifier, cosine_factor

__all__ = [
    "BACKBONES",
    "Classifier",
    "ImageClassifier",
    "build_backbone",
    "convnext_tiny",
    "cosine_factor",
    "mobilenet_v2",
    "resnet18",
    "vgg16_bn",
]
