"""A tracker with default settings in every kind of training: it runs, its numbers are right, training is the same.

One row of :data:`SETUPS` is one way to train. What its table should hold is worked out here once more: by plain forward
hooks on the trained network, and the task variable T in NumPy.
"""

import json
import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from chanaxes_pl import AxisTracker, read_run
from chanaxes_pl.analysis.correlations import main_correlation
from tests.helpers import reference
from tests.helpers.training import QUIET, trainer

averages = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # of Lightning 2.6
pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.*barebones"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo reads it
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
]
BATCH = 8


# --- images and labels ----------------------------------------------------------------------------------------------


def pictures(count: int, seed: int) -> Tensor:
    """``[count, 3, 8, 8]``, brighter from class to class."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise + classes(count)[:, None, None, None] / 3 + bits(count)[:, None, None, None] / 4


def classes(count: int) -> Tensor:
    return torch.arange(count) * 7 % 3


def bits(count: int) -> Tensor:
    return torch.arange(count) // 2 % 2


def several_bits(count: int) -> Tensor:
    return torch.stack([bits(count), classes(count) == 0, classes(count) == 2], 1).float()


def numbers(*shape: int) -> Callable[[int], Tensor]:
    """Real numbers, ``[count, *shape]``."""
    return lambda count: torch.randn(count, *shape, generator=torch.Generator().manual_seed(9))


def maps(kinds: int, ignored: int | None, dtype: torch.dtype = torch.int64) -> Callable[[int], Tensor]:
    """``[count, 8, 8]`` labels of positions, some of which are not labelled."""

    def labels(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        drawn = torch.randint(kinds, (count, 8, 8), generator=generator)
        if ignored is not None:
            drawn[torch.rand(count, 8, 8, generator=generator) < 0.3] = ignored
        return drawn.to(dtype)

    return labels


TRAIN, VAL = pictures(16, 1), pictures(20, 2)


def data(images: Tensor, labels: Callable[[int], Tensor] = classes) -> TensorDataset:
    return TensorDataset(images, labels(len(images)))


# --- networks -------------------------------------------------------------------------------------------------------


def of_tuple(function: Callable[..., Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss of ``(images, labels)``."""
    return lambda module, batch: function(module(batch[0]), batch[1])


def of_keys(image: str, label: str) -> Callable[[nn.Module, Any], Tensor]:
    """A loss of a mapping."""
    return lambda module, batch: F.cross_entropy(module(batch[image]), batch[label])


def of_names(image: str, label: str) -> Callable[[nn.Module, Any], Tensor]:
    """A loss of an object."""
    return lambda module, batch: F.cross_entropy(module(getattr(batch, image)), getattr(batch, label))


class Net(L.LightningModule):
    """Two convolutions with BatchNorm and dropout; the first has 9 positions, so that all of them are sampled."""

    def __init__(self, outputs: int = 3, loss: Callable[[nn.Module, Any], Tensor] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2)
        self.body = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(5, 6, 2), nn.ReLU())
        self.head = nn.Linear(6, outputs)
        self.loss = loss or of_tuple(F.cross_entropy)
        self.lr = 0.02

    def forward(self, images: Tensor) -> Any:
        return self.head(self.body(self.conv(images)).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Shaped(Net):
    """Gives its logits in some other shape or object."""

    def __init__(self, shape: Callable[[Tensor], Any], loss: Callable, outputs: int = 3) -> None:
        super().__init__(outputs, loss)
        self.shape = shape

    def forward(self, images: Tensor) -> Any:
        return self.shape(super().forward(images))


class Recomputing(Net):
    """Keeps no activations for the backward pass."""

    def forward(self, images: Tensor) -> Tensor:
        seen = checkpoint(lambda images: self.body(self.conv(images)), images, use_reentrant=False)
        return self.head(seen.mean((2, 3)))


class Dense(Net):
    """Gives a map of logits, ``[B, K, 8, 8]``."""

    def forward(self, images: Tensor) -> Tensor:
        small = self.body(self.conv(images))
        return F.interpolate(self.head(small.movedim(1, -1)).movedim(-1, 1), size=(8, 8), mode="bilinear")


class Siamese(Net):
    """Tells whether two images are of one class, by one network that runs twice."""

    def __init__(self) -> None:
        super().__init__(4, lambda module, batch: bce(module(batch[0]), batch[1].float()))

    def forward(self, pair: Any) -> Tensor:
        one, other = (super(Siamese, self).forward(images) for images in pair)
        return 1 - (one - other).square().sum(1)


class TwoViews(Net):
    """Self-supervised: what two views of an image give should be alike."""

    def __init__(self, views: Callable[[Any], Any]) -> None:
        super().__init__(4)
        self.views = views

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = (self(view) for view in self.views(batch))
        return (one - other).square().mean() - 0.1 * one.std()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


class Gan(L.LightningModule):
    """A generator and a discriminator that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(45, 1))
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 192), nn.Unflatten(1, (3, 8, 8)))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimiser, real in zip(self.optimizers(), (False, True), strict=True):
            made = self.discriminator(self(torch.randn(len(batch[0]), 4)))
            loss = bce(made, torch.full_like(made, float(real)))
            if not real:
                loss = loss + bce(self.discriminator(batch[0]), torch.ones_like(made))
            optimiser.zero_grad()
            self.manual_backward(loss)
            optimiser.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.discriminator(batch[0])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.discriminator, self.generator)]


class Detector(L.LightningModule):
    """Boxes, by the smallest detector of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=3,
            min_size=32,
            max_size=32,
            box_score_thresh=0.0,
            box_detections_per_img=3,
        )
        norms = [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d)]
        for momentum in (1.0, 0.01):  # statistics as of a pretrained backbone: without any, all signal would fade
            for norm in norms:
                norm.momentum = momentum
            self.net.backbone(VAL.repeat(1, 1, 4, 4))

    def forward(self, images: Any, boxes: Any = None) -> Any:
        return self.net(images, boxes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self(*batch).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels)


def dense_bce(logits: Tensor, labels: Tensor) -> Tensor:
    labelled = labels != 255
    return bce(logits[:, 0][labelled], labels[labelled].float())


# --- the task variable, in NumPy ------------------------------------------------------------------------------------


def signed(outputs, labels):
    return (2 * labels.reshape(-1) - 1) * outputs.reshape(-1)


def log_likelihood(outputs, labels):
    return np.array(
        [
            -sum(np.log1p(np.exp(-(2 * y - 1) * z)) for z, y in zip(*row, strict=True))
            for row in zip(outputs, labels, strict=True)
        ]
    )


def true_values(outputs, labels):
    return labels.reshape(len(labels), -1)


def mean_margin(outputs, labels, ignored):
    """Of a map: the mean margin of its labelled positions."""
    found = []
    for logits, its in zip(outputs, labels, strict=True):
        places = [(i, j) for i, j in product(range(8), range(8)) if its[i, j] != ignored]
        found.append(np.mean([reference.margins(logits[None, :, i, j], its[None, i, j])[0] for i, j in places]))
    return np.array(found)


def mean_signed(outputs, labels, ignored=None):
    """Of a map of one logit."""
    found = []
    for logits, its in zip(outputs[:, 0], labels.reshape(-1, 8, 8), strict=True):
        places = [(i, j) for i, j in product(range(8), range(8)) if its[i, j] != ignored]
        found.append(np.mean([(2 * its[place] - 1) * logits[place] for place in places]))
    return np.array(found)


def length(outputs, labels):
    return np.sqrt((outputs**2).sum(1))


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to train.

    Attributes:
        fit: arguments of ``Trainer.fit``.
        module: the network.
        probe: the ``(images, labels)`` that a measurement should see.
        task: T, from outputs and labels.
        target: name that the table should give T.
        call: what the network gives for images.
        layer: name of the layer to check.
        settings: of the tracker.
        flags: of the Trainer.
        callbacks: beside the tracker.
        watching: callbacks that need the tracker.
        context: of a forward pass.
        twin: the same network without compilation.
        tune: what is done before fitting.
        warns: what the tracker warns of.
        tolerance: relative.
    """

    fit: Callable[[], dict[str, Any]] = lambda: loaders()
    module: Callable[[], nn.Module] = Net
    probe: Callable[[], list[tuple[Any, Any]]] = lambda: batches(data(VAL))
    task: Callable[[np.ndarray, np.ndarray], np.ndarray] = reference.margins
    target: str = "logit_margin"
    call: Callable[[nn.Module, Any], Any] = lambda module, images: module(images)
    layer: str = "conv"
    settings: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[L.Callback]] = list
    watching: Callable[[], list[L.Callback]] = list
    context: Callable[[], AbstractContextManager] = nullcontext
    twin: Callable[[], nn.Module] | None = None
    tune: Callable[[L.Trainer, Any], Any] = lambda fitter, module: None
    warns: str = ""
    tolerance: float = 1e-4


def loaders(val: Any = None, labels: Callable[[int], Tensor] = classes, **options: Any) -> dict[str, Any]:
    """Shuffled training images, and a validation loader; ``options`` are those of both."""
    train = DataLoader(data(TRAIN, labels), batch_size=BATCH, shuffle=True, **options)
    default = DataLoader(data(VAL, labels), batch_size=BATCH, **options)
    return {"train_dataloaders": train, "val_dataloaders": default if val is None else val}


def batches(items: Any, indices: Any = None) -> list[tuple[Any, Any]]:
    indices = list(range(len(items)) if indices is None else indices)
    return [
        default_collate([items[index] for index in indices[start : start + BATCH]])
        for start in range(0, len(indices), BATCH)
    ]


def task(labels, outputs, loss, variable, target, network=Net, **more) -> Setup:
    """Another task than classes."""
    return Setup(
        fit=lambda: loaders(labels=labels),
        module=lambda: network(outputs, of_tuple(loss)),
        probe=lambda: batches(data(VAL, labels)),
        task=variable,
        target=target,
        **more,
    )


def flat(function):
    return lambda outputs, labels: function(outputs[:, 0], labels)


def ignoring(value):
    return partial(F.cross_entropy, ignore_index=value)


TASKS = {
    "classes": Setup(),
    "segmentation, 255 ignored": task(
        maps(3, 255), 3, ignoring(255), partial(mean_margin, ignored=255), "logit_margin", Dense
    ),
    "segmentation, −100 ignored": task(
        maps(3, -100), 3, ignoring(-100), partial(mean_margin, ignored=-100), "logit_margin", Dense
    ),
    "segmentation, uint8 labels": task(
        maps(3, None, torch.uint8),
        3,
        lambda outputs, labels: F.cross_entropy(outputs, labels.long()),
        partial(mean_margin, ignored=None),
        "logit_margin",
        Dense,
    ),
    "binary segmentation, [B, 1, H, W]": task(
        lambda count: maps(2, None)(count)[:, None].float(), 1, bce, mean_signed, "signed_logit", Dense
    ),
    "binary segmentation, [B, H, W], 255 ignored": task(
        maps(2, 255), 1, dense_bce, partial(mean_signed, ignored=255), "signed_logit", Dense
    ),
    "multi-label": task(several_bits, 3, bce, log_likelihood, "log_likelihood"),
    "multi-label, whole numbers": task(
        lambda count: several_bits(count).long(),
        3,
        lambda outputs, labels: bce(outputs, labels.float()),
        log_likelihood,
        "log_likelihood",
    ),
    "regression, labels [B]": task(numbers(), 1, flat(F.mse_loss), true_values, "label"),
    "regression, labels [B, 1]": task(numbers(1), 1, F.mse_loss, true_values, "label"),
    "regression, 3 numbers": task(numbers(3), 3, F.mse_loss, true_values, "label"),
    "binary, logits [B, 1], float labels [B]": task(
        lambda count: bits(count).float(), 1, flat(bce), signed, "signed_logit"
    ),
    "binary, logits [B, 1], float labels [B, 1]": task(
        lambda count: bits(count).float()[:, None], 1, bce, signed, "signed_logit"
    ),
    "binary, logits [B, 1], whole labels [B, 1]": task(
        lambda count: bits(count)[:, None],
        1,
        lambda outputs, labels: bce(outputs, labels.float()),
        signed,
        "signed_logit",
    ),
    "binary, logits [B, 1], bool labels [B]": task(
        lambda count: bits(count).bool(), 1, flat(lambda z, y: bce(z, y.float())), signed, "signed_logit"
    ),
    "binary, logits [B]": task(
        lambda count: bits(count).float(),
        1,
        bce,
        signed,
        "signed_logit",
        lambda outputs, loss: Shaped(lambda logits: logits[:, 0], loss, outputs),
    ),
}


# batches and outputs of other kinds


def named(*keys: str) -> Callable[[list], dict]:
    return lambda items: dict(zip(keys, default_collate(items), strict=True))


Pair = namedtuple("Pair", ["image", "target"])
Swapped = namedtuple("Swapped", ["y", "x"])


@dataclass
class Record:
    names: list[str]
    labels: Tensor
    pixel_values: Tensor


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


def as_record(items: list) -> Record:
    images, labels = default_collate(items)
    return Record(["a"] * len(images), labels, images)


def of_kind(collate: Callable[[list], Any], loss: Callable) -> Setup:
    return Setup(fit=lambda: loaders(collate_fn=collate), module=lambda: Net(loss=loss))


def gives(shape: Callable[[Tensor], Any], logits: Callable[[Any], Tensor]) -> Setup:
    return Setup(
        module=lambda: Shaped(shape, lambda module, batch: F.cross_entropy(logits(module(batch[0])), batch[1])),
        call=lambda module, images: logits(module(images)),
    )


KEYS = [
    ("img", "label"),
    ("image", "target"),
    ("images", "class"),
    ("pixel_values", "labels"),
    ("x", "y"),
    ("inputs", "targets"),
]
BATCHES = {f"a dict of {' and '.join(pair)}": of_kind(named(*pair), of_keys(*pair)) for pair in KEYS} | {
    "a dataclass": of_kind(as_record, of_names("pixel_values", "labels")),
    "a namedtuple": of_kind(lambda items: Pair(*default_collate(items)), of_names("image", "target")),
    "a namedtuple, labels first": of_kind(lambda items: Swapped(*default_collate(items)[::-1]), of_names("x", "y")),
    "a list": of_kind(lambda items: list(default_collate(items)), of_tuple(F.cross_entropy)),
    "images, labels, names": of_kind(
        lambda items: (*default_collate(items), ["a"] * len(items)), of_tuple(F.cross_entropy)
    ),
    "a custom collate_fn": of_kind(
        lambda items: (torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])),
        of_tuple(F.cross_entropy),
    ),
    "an object with logits": gives(lambda z: SimpleNamespace(loss=None, logits=z), lambda output: output.logits),
    "a dataclass with logits": gives(lambda z: Output(None, z), lambda output: output.logits),
    "a mapping with logits": gives(lambda z: {"loss": z.mean(), "logits": z}, lambda output: output["logits"]),
    "a mapping with out": gives(lambda z: {"out": z, "aux": 2 * z}, lambda output: output["out"]),
    "a tuple of logits and others": gives(lambda z: (z, [2 * z]), lambda output: output[0]),
}


# precisions


def cast(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(images.to(dtype), labels) for images, labels in batches(data(VAL))]


PRECISIONS = {
    "bf16-mixed": Setup(flags={"precision": "bf16-mixed"}, context=lambda: torch.autocast("cpu", torch.bfloat16)),
    "bf16-true": Setup(flags={"precision": "bf16-true"}, probe=lambda: cast(torch.bfloat16)),
    "16-true": Setup(flags={"precision": "16-true"}, probe=lambda: cast(torch.float16)),
    "64-true": Setup(flags={"precision": "64-true"}, probe=lambda: cast(torch.float64), tolerance=1e-9),
}


# loaders


class Stream(IterableDataset):
    """Does not tell its length."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return (self.items[index] for index in range(len(self.items)))


class Backwards(Sampler):
    """The last images first."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(19, 19 - self.count, -1))

    def __len__(self) -> int:
        return self.count


class Drawn(Sampler):
    """Half of the images, in an order drawn from a generator of its own or from the global ones."""

    def __init__(self, members: list[int], own: bool) -> None:
        self.members = members
        self.generator = torch.Generator().manual_seed(3) if own else None

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.members), generator=self.generator).tolist()
        return iter([self.members[place] for place in order])

    def __len__(self) -> int:
        return len(self.members)


class Python(Drawn):
    """Draws from ``random``."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(self.members, len(self.members)))


class OneClass(Sampler):
    """Batches of one class each."""

    def __iter__(self) -> Iterator[list[int]]:
        for kind in range(3):
            yield [index for index in range(20) if classes(20)[index] == kind]

    def __len__(self) -> int:
        return 3


EVEN, FIRST = list(range(0, 20, 2)), list(range(7))


def val(**options: Any) -> DataLoader:
    return DataLoader(data(VAL), **{"batch_size": BATCH} | options)


def read_by(loader: Callable[[], Any], indices: Any = None, **more: Any) -> Setup:
    """Validation by another loader, of which these images are to be the probe."""
    return Setup(fit=lambda: loaders(loader()), probe=lambda: batches(data(VAL), indices), **more)


def fold() -> dict[str, DataLoader]:
    """One data set for both, of which each has its part."""
    everything = TensorDataset(torch.cat([VAL, TRAIN]), torch.cat([classes(20), classes(16)]))
    train, held_out = SubsetRandomSampler(range(7, 36)), SubsetRandomSampler(FIRST)
    return {
        "train_dataloaders": DataLoader(everything, BATCH, sampler=train),
        "val_dataloaders": DataLoader(everything, BATCH, sampler=held_out),
    }


def other() -> DataLoader:
    return DataLoader(data(pictures(12, 7)), batch_size=4)


def give_batches() -> Iterator[Any]:
    yield from batches(data(VAL))


def given(probe: Any, indices: Any = None) -> Setup:
    return Setup(fit=lambda: loaders(other()), settings={"probe": probe}, probe=lambda: batches(data(VAL), indices))


WEIGHTS = [1.0 if index in FIRST else 0.0 for index in range(20)]
LOADERS = {
    "a list of loaders": read_by(lambda: [val(), other()]),
    "a mapping of loaders": read_by(lambda: {"a": val(), "b": other()}),
    "a CombinedLoader": read_by(lambda: CombinedLoader({"a": val(), "b": other()}, "sequential")),
    "a CombinedLoader in a list": read_by(lambda: CombinedLoader([val(), other()], "sequential")),
    "a stream": read_by(lambda: DataLoader(Stream(data(VAL)), BATCH)),
    "a stream of batches": read_by(lambda: DataLoader(Stream(batches(data(VAL))), batch_size=None)),
    "a data set of batches": read_by(lambda: DataLoader(batches(data(VAL)), batch_size=None)),
    "the last batch dropped": read_by(lambda: val(drop_last=True), range(16)),
    "a shuffling loader": read_by(lambda: val(shuffle=True)),
    "an own sampler": read_by(lambda: val(sampler=Backwards(12)), range(19, 7, -1)),
    "an own sampler with a generator": read_by(lambda: val(sampler=Drawn(EVEN, True)), EVEN),
    "an own sampler of the global stream": read_by(lambda: val(sampler=Drawn(EVEN, False)), EVEN),
    "an own sampler by Python's random": read_by(lambda: val(sampler=Python(EVEN, False)), EVEN),
    "a list as sampler": read_by(lambda: val(sampler=[9, 4, 17, 0, 3]), [9, 4, 17, 0, 3]),
    "an own batch sampler": read_by(lambda: DataLoader(data(VAL), batch_sampler=OneClass())),
    "a list as batch sampler": read_by(
        lambda: DataLoader(data(VAL), batch_sampler=[[5, 3, 8], [1, 12]]), [5, 3, 8, 1, 12]
    ),
    "a fold": Setup(fit=fold, probe=lambda: batches(data(VAL), FIRST)),
    "weighted draws": read_by(lambda: val(sampler=WeightedRandomSampler(WEIGHTS, 20)), FIRST),
    "a probe of batches": given(batches(data(VAL))),
    "a probe of a generator function": given(give_batches),
    "a probe of a data set": given(data(VAL)),
    "a probe of a CombinedLoader": given(CombinedLoader([val(sampler=EVEN), other()], "sequential"), EVEN),
    "no validation": Setup(
        fit=lambda: {"train_dataloaders": DataLoader(data(TRAIN), BATCH, shuffle=True)},
        probe=lambda: batches(data(TRAIN)),
        warns="measured on training images",
    ),
    "no validation, a stream": Setup(
        fit=lambda: {"train_dataloaders": DataLoader(Stream(data(TRAIN)), BATCH)},
        probe=lambda: batches(data(TRAIN)),
        warns="measured on training images",
    ),
    "no validation, several training loaders": Setup(
        fit=lambda: {"train_dataloaders": {"a": DataLoader(data(TRAIN), BATCH), "b": other()}},
        module=lambda: Net(loss=lambda module, batch: of_tuple(F.cross_entropy)(module, batch["a"])),
        probe=lambda: batches(data(TRAIN)),
        warns="measured on training images",
    ),
}


# batch hooks: bytes that become images on their way


def as_bytes(images: Tensor) -> Tensor:
    return (images * 40 + 128).clamp(0, 255).to(torch.uint8)


def normalised(batch: Any) -> Any:
    return (batch[0].float() - 128) / 40, batch[1]


class BeforeTransfer:
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return normalised(batch)


class Transfer:
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return normalised(super().transfer_batch_to_device(batch, device, dataloader_idx))


class AfterTransfer:
    """Also augments, in training only."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = normalised(batch)
        return (images.flip(3) if self.trainer.training else images), labels


class Bytes(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(data(as_bytes(TRAIN)), BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(data(as_bytes(VAL)), BATCH)


def hooked(hook: type, in_datamodule: bool) -> Setup:
    def fit() -> dict[str, Any]:
        if in_datamodule:
            return {"datamodule": type("Hooked", (hook, Bytes), {})()}
        return {"train_dataloaders": Bytes().train_dataloader(), "val_dataloaders": Bytes().val_dataloader()}

    return Setup(
        module=Net if in_datamodule else type("Hooked", (hook, Net), {}),
        fit=fit,
        probe=lambda: [normalised(batch) for batch in batches(data(as_bytes(VAL)))],
    )


HOOKS = {
    f"{hook.__name__} in the {'datamodule' if there else 'module'}": hooked(hook, there)
    for hook, there in product([BeforeTransfer, Transfer, AfterTransfer], [False, True])
}


# flags, callbacks, compilation


def compiled_body() -> nn.Module:
    net = Net()
    net.body = torch.compile(net.body, backend="eager")
    return net


def changed(change: Callable[[Net], Any]) -> nn.Module:
    net = Net()
    change(net)
    return net


def find_rate(fitter: L.Trainer, module: Any) -> None:
    Tuner(fitter).lr_find(module, **loaders(), num_training=4, min_lr=1e-3, max_lr=1e-2, early_stop_threshold=None)


FLAGS = {
    "barebones": Setup(flags={"barebones": True}),
    "overfit_batches": Setup(
        flags={"overfit_batches": 1},
        fit=lambda: loaders() | {"train_dataloaders": DataLoader(data(TRAIN), BATCH)},
    ),
    "accumulate_grad_batches": Setup(flags={"accumulate_grad_batches": 2}),
    "val_check_interval": Setup(flags={"val_check_interval": 0.5}),
    "gradient clipping": Setup(flags={"gradient_clip_val": 0.1}),
    "deterministic": Setup(flags={"deterministic": True}),
    "inference_mode=False": Setup(flags={"inference_mode": False}),
    "sanity checking": Setup(flags={"num_sanity_val_steps": 2}),
    "limit_val_batches": Setup(flags={"limit_val_batches": 0.5}),
    "limit_val_batches=0": Setup(
        flags={"limit_val_batches": 0}, probe=lambda: batches(data(TRAIN)), warns="measured on training images"
    ),
    "channels last": Setup(module=lambda: Net().to(memory_format=torch.channels_last)),
    "a frozen layer": Setup(module=lambda: changed(lambda net: net.conv.requires_grad_(False))),
    "a parametrized layer": Setup(module=lambda: changed(lambda net: weight_norm(net.conv))),
    "recomputed activations": Setup(module=Recomputing),
    "torch.compile of a part": Setup(module=compiled_body, twin=Net),
    "torch.compile of the whole": Setup(module=lambda: torch.compile(Net(), backend="eager"), twin=Net),
    "StochasticWeightAveraging": Setup(
        callbacks=lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)], flags={"max_epochs": 3}
    ),
    "EMAWeightAveraging": Setup(callbacks=lambda: [averages.EMAWeightAveraging(decay=0.7)]),
    "lr_find": Setup(tune=find_rate),
    "ModelCheckpoint of axis/rho": Setup(
        watching=lambda: [ModelCheckpoint(monitor="axis/rho", mode="max", save_on_train_epoch_end=True)]
    ),
    "EarlyStopping of axis/rho": Setup(
        watching=lambda: [EarlyStopping("axis/rho", mode="max", patience=9, check_on_train_epoch_end=True)]
    ),
}


# tasks without labels of images


def gan_step(module: Any, batch: Any) -> Any:
    return module.discriminator(batch[0]), None


def realness(outputs: Any, labels: Any) -> Tensor:
    return outputs[:, 0]


def norm(outputs: Any, labels: Any) -> Tensor:
    return outputs.norm(dim=1)


def scores(outputs: Any, labels: Any) -> Tensor:
    return torch.stack([found["scores"].double().sum() for found in outputs])


def two_views(items: list) -> list[Tensor]:
    images = default_collate(items)[0]
    return [images, images.flip(3)]


def views_and_labels(items: list) -> list[Any]:
    images, labels = default_collate(items)
    return [[images, images.flip(3)], labels]


def pairs(images: Tensor) -> list:
    """``((image, image), whether they are of one class)``."""
    kinds = classes(len(images))
    return [((images[i], images[i - 1 - i % 3]), int(kinds[i] == kinds[i - 1 - i % 3])) for i in range(len(images))]


def siamese(as_stream: bool) -> Setup:
    def fit() -> dict[str, Any]:
        source = Stream(pairs(VAL)) if as_stream else pairs(VAL)
        return {"train_dataloaders": DataLoader(pairs(TRAIN), BATCH), "val_dataloaders": DataLoader(source, BATCH)}

    return Setup(
        fit=fit,
        module=Siamese,
        probe=lambda: batches(pairs(VAL)),
        task=signed,
        target="signed_logit",
        settings={"positions": "all"},  # two runs have 18
    )


def boxes() -> DataLoader:
    """6 images of 32 × 32, each with a box, in tuples as torchvision's own training has them."""
    corners = torch.tensor([[4.0, 4.0, 20.0, 24.0]])
    items = [
        (F.interpolate(image[None], 32)[0].sigmoid(), {"boxes": corners, "labels": torch.tensor([1 + number % 2])})
        for number, image in enumerate(VAL[:6])
    ]
    return DataLoader(items, batch_size=2, collate_fn=lambda items: tuple(zip(*items, strict=True)))


OTHERS = {
    "a GAN": Setup(
        module=Gan,
        fit=lambda: loaders(),
        settings={"step": gan_step, "target": realness},
        call=lambda module, images: module.discriminator(images),
        task=lambda outputs, labels: outputs[:, 0],
        target="realness",
        layer="discriminator.0",
    ),
    "two views": Setup(
        module=lambda: TwoViews(lambda batch: batch),
        fit=lambda: loaders(collate_fn=two_views),
        settings={"target": norm},
        task=length,
        target="norm",
    ),
    "two views and labels": Setup(
        module=lambda: TwoViews(lambda batch: batch[0]),
        fit=lambda: loaders(collate_fn=views_and_labels),
        settings={"target": norm, "step": lambda module, batch: (module(batch[0][0]), batch[1])},
        task=length,
        target="norm",
    ),
    "a Siamese network": siamese(as_stream=False),
    "a Siamese network on a stream": siamese(as_stream=True),
    "a detector": Setup(
        module=Detector,
        fit=lambda: {"train_dataloaders": boxes(), "val_dataloaders": boxes()},
        probe=lambda: list(boxes()),
        settings={"target": scores, "positions": "all"},
        flags={"max_epochs": 1, "limit_train_batches": 1, "gradient_clip_val": 0.01},
        call=lambda module, images: torch.stack([found["scores"].double().sum() for found in module(images)]),
        task=lambda outputs, labels: outputs,
        target="scores",
        layer="net.backbone.body.0.0",
    ),
}

SETUPS: dict[str, Setup] = {
    f"{kind}: {name}": setup
    for kind, rows in {
        "task": TASKS,
        "batch": BATCHES,
        "precision": PRECISIONS,
        "loader": LOADERS,
        "hook": HOOKS,
        "flag": FLAGS,
        "other": OTHERS,
    }.items()
    for name, setup in rows.items()
}


# --- the test -------------------------------------------------------------------------------------------------------


def plain(tensor: Any) -> Any:
    """A tensor as NumPy; half precision as float64."""
    if not isinstance(tensor, Tensor):
        return tensor
    return (tensor.detach().double() if tensor.is_floating_point() else tensor.long()).numpy()


def expected(setup: Setup, module: nn.Module) -> pd.DataFrame:
    """Columns of the first layer, from plain hooks on the trained network."""
    runs: list[Tensor] = []
    local, means, task = [], [], []
    handle = module.get_submodule(setup.layer).register_forward_hook(lambda *args: runs.append(args[2].flatten(2)))
    module.eval()
    with torch.no_grad(), setup.context():
        for images, labels in setup.probe():
            runs.clear()
            outputs = setup.call(module, images)
            seen = np.concatenate([plain(run) for run in runs], 2)
            local.append(np.moveaxis(seen, 1, 2).reshape(-1, seen.shape[1]))
            means.append(seen.mean(2))
            task.append(setup.task(plain(outputs), plain(labels)))
    handle.remove()
    local, means, task = (np.concatenate(parts) for parts in (local, means, task))
    left = reference.residual(means, task)
    return pd.DataFrame(
        {
            "input_capture": reference.input_capture(local),
            "peer_overlap": reference.peer_overlap(local),
            "task_information": reference.task_information_from_residuals(means, left),
        }
    )


def fitted(setup: Setup, root, *callbacks: L.Callback) -> tuple[L.Trainer, nn.Module]:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    module = setup.module()
    everything = [*setup.callbacks(), *callbacks]
    if setup.flags.get("barebones"):
        fitter = L.Trainer(barebones=True, callbacks=everything, default_root_dir=root, max_epochs=2)
    else:
        fitter = trainer(root, *everything, **setup.flags)
    setup.tune(fitter, module)
    fitter.fit(module, **setup.fit())
    return fitter, module


@pytest.mark.parametrize("name", SETUPS)
def test_the_table_is_right_and_training_the_same(tmp_path, name):
    setup = SETUPS[name]
    tracker, watching = AxisTracker(**setup.settings), setup.watching()
    with pytest.warns(UserWarning, match=setup.warns) if setup.warns else nullcontext():
        fitter, module = fitted(setup, tmp_path / "tracked", tracker, *watching)
    after = torch.get_rng_state()
    assert tracker.table["step"].unique().tolist() == [fitter.global_step] != [0]
    assert tracker.table["target"].unique().tolist() == [setup.target]

    weights = module.state_dict()
    _, bare = fitted(setup, tmp_path / "bare")
    assert weights.keys() == bare.state_dict().keys()
    assert [key for key, value in bare.state_dict().items() if not torch.equal(value, weights[key])] == []
    assert torch.equal(after, torch.get_rng_state())

    if setup.twin:
        module = setup.twin()
        module.load_state_dict({key.replace("_orig_mod.", ""): value for key, value in weights.items()})
    wanted = expected(setup, module)
    found = tracker.table.query("layer == @setup.layer").reset_index(drop=True)
    pd.testing.assert_frame_equal(found[wanted.columns], wanted, rtol=setup.tolerance, atol=1e-7)
    assert wanted.notna().all(axis=None)

    rho = main_correlation(tracker.correlations)["rho"].iloc[1:].max()
    scores = [getattr(each, "best_model_score", None) or each.best_score for each in watching]
    assert [float(score) for score in scores] == pytest.approx([rho] * len(watching))


# --- training images as probe, two processes ------------------------------------------------------------------------


class Noisy(torch.utils.data.Dataset):
    """Training images whose transforms draw from all global streams."""

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(1) + np.random.rand() + random.random()  # noqa: NPY002
        return TRAIN[index] + drawn.float(), classes(16)[index]


class Remembers(Net):
    """Keeps what it is measured on."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = SimpleNamespace(seen=[])  # which a measurement does not look into, and so does not empty

    @property
    def seen(self) -> list[Tensor]:
        return self.kept.seen

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            self.seen.append(images)
        return super().forward(images)


def test_training_images_with_random_transforms_are_the_same_pixels_at_every_measurement(tmp_path):
    def noisy() -> dict[str, Any]:
        return {"train_dataloaders": DataLoader(Noisy(), BATCH, shuffle=True)}

    setup = Setup(module=Remembers, fit=noisy)
    tracker = AxisTracker()
    with pytest.warns(UserWarning, match="measured on training images") as told:
        _, module = fitted(setup, tmp_path, tracker)
    assert sum("measured on training images" in str(one.message) for one in told) == 1
    measured = [torch.cat(module.seen[start : start + 2]) for start in range(0, len(module.seen), 2)]
    assert len(measured) == len(tracker.correlations["step"].unique()) == 3
    assert all(torch.equal(pixels, measured[0]) for pixels in measured)
    drawn = measured[0] - TRAIN
    assert torch.allclose(drawn, drawn[:, :1, :1, :1].expand_as(drawn), atol=1e-5)
    assert len(drawn[:, 0, 0, 0].unique()) == 16  # every image has draws of its own
    wanted = expected(
        Setup(probe=lambda: list(zip(measured[0].split(BATCH), classes(16).split(BATCH), strict=True))), module
    )
    found = tracker.table.query("layer == 'conv'").reset_index(drop=True)
    pd.testing.assert_frame_equal(found[wanted.columns], wanted, rtol=1e-4)
    _, bare = fitted(setup, tmp_path / "bare")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), bare.parameters(), strict=True))


SHARED: dict[str, Callable[[], DataLoader]] = {
    "a fold": lambda: val(sampler=SubsetRandomSampler(range(1, 14))),
    "an own sampler": lambda: val(sampler=Backwards(13)),
    "an own sampler that draws": lambda: val(sampler=Drawn(EVEN, True)),
    "an own batch sampler": lambda: DataLoader(data(VAL), batch_sampler=OneClass()),
    "a list as sampler": lambda: val(sampler=[9, 4, 17, 0, 3]),
}


@pytest.mark.parametrize("given", [False, True], ids=["validation", "probe"])
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_give_the_table_of_one(tmp_path, name, given):
    """Validation loaders reach the tracker as Lightning has shared them out, a probe as it is."""
    tables, shares = [], name != "an own batch sampler"  # Lightning refuses to share one out
    for world, flags in {"1": {}, "2": {"devices": 2, "strategy": "ddp_fork"}}.items():
        torch.manual_seed(0)
        tracker = AxisTracker(SHARED[name]() if given else None, schedule=[])
        fitter = trainer(
            tmp_path / world, tracker, max_epochs=1, limit_train_batches=1, use_distributed_sampler=shares, **flags
        )
        fitter.fit(Net(), **loaders(None if given else SHARED[name]()))
        assert fitter.world_size == int(world)
        tables.append(read_run(tmp_path / world / "axis").drop(columns="run"))
    assert tables[0]["step"].unique().tolist() == [0]
    pd.testing.assert_frame_equal(tables[1], tables[0], rtol=1e-6, atol=1e-9)


# --- what training may not notice -----------------------------------------------------------------------------------


class OwnDraws(torch.utils.data.Dataset):
    """Images whose transforms hold generators of their own, as those of some libraries do."""

    def __init__(self) -> None:
        self.transforms = {"noise": [np.random.default_rng(1), random.Random(2)], "more": torch.Generator()}
        self.old = SimpleNamespace(state=np.random.RandomState(3))

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        numbers, other = self.transforms["noise"]
        drawn = numbers.normal() + other.random() + self.old.state.normal()
        return TRAIN[index] + drawn + torch.rand(1, generator=self.transforms["more"]), classes(16)[index]


class InBothModes(Net):
    """Keeps its norm in training mode, and counts its own runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.body[0].training = True
        return self

    def forward(self, images: Tensor) -> Tensor:
        self.runs = self.runs + 1
        return super().forward(images) * (1 + 0.01 * self.runs)


class Telling(Net):
    """Logs in its forward pass what only a training step may log."""

    def forward(self, images: Tensor) -> Tensor:
        self.log("mean", images.mean(), on_step=True)
        return super().forward(images)


class OwnProbe(L.LightningDataModule):
    """Draws its probe with the global generator."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(data(TRAIN), BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(data(VAL), BATCH)

    def probe_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.Subset(data(VAL), torch.randperm(20)[:12].tolist()), BATCH)


def split_of_one() -> dict[str, Any]:
    train, held = torch.utils.data.random_split(OwnDraws(), [10, 6], torch.Generator().manual_seed(0))
    return {"train_dataloaders": DataLoader(train, 5, shuffle=True), "val_dataloaders": DataLoader(held, 3)}


UNNOTICED = {
    "generators of the data set's own": Setup(fit=split_of_one),
    "those and no validation": Setup(fit=lambda: {"train_dataloaders": DataLoader(OwnDraws(), 5, shuffle=True)}),
    "buffers written in eval mode": Setup(module=InBothModes),
    "a forward pass that logs": Setup(module=Telling),
    "one that logs, and no validation": Setup(
        module=Telling, fit=lambda: {"train_dataloaders": DataLoader(data(TRAIN), BATCH)}
    ),
    "a probe drawn at random": Setup(fit=lambda: {"datamodule": OwnProbe()}),
}


@pytest.mark.filterwarnings("ignore:there is no validation")
@pytest.mark.parametrize("name", UNNOTICED)
def test_training_does_not_notice(tmp_path, name):
    setup = UNNOTICED[name]
    fitter, module = fitted(setup, tmp_path / "tracked", tracker := AxisTracker(schedule="1 steps"))
    after = torch.get_rng_state()
    assert tracker.correlations["step"].nunique() == fitter.global_step + 1
    fields = set(vars(module))
    _, bare = fitted(setup, tmp_path / "bare")
    assert [key for key, value in bare.state_dict().items() if not torch.equal(value, module.state_dict()[key])] == []
    assert torch.equal(after, torch.get_rng_state())
    assert fields == set(vars(bare))


def test_a_probe_with_generators_of_its_own_is_the_same_at_every_measurement(tmp_path):
    tracker, setup = AxisTracker(probe=OwnDraws()), Setup(module=Remembers)
    _, module = fitted(setup, tmp_path, tracker)
    seen = torch.cat([images for images in module.seen if len(images) == 16])
    assert len(seen) == 3 * 16
    assert torch.equal(seen[:16], seen[16:32])
    assert torch.equal(seen[:16], seen[32:])


def test_the_package_named_pytorch_lightning_is_one_more_name_of_lightning(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Twin(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(other.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(data(TRAIN), BATCH)

    tracker, average = AxisTracker(), other.callbacks.EMAWeightAveraging(decay=0.5)
    logger = other.loggers.TensorBoardLogger(tmp_path)
    fitter = other.Trainer(max_epochs=1, callbacks=[tracker, average], logger=logger, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="there is no validation"):
        fitter.fit(Twin(), datamodule=Data())
    assert fitter.callbacks.index(tracker) > fitter.callbacks.index(average)
    about = json.loads((tmp_path / "lightning_logs" / "version_0" / "axis" / "about.json").read_text())
    assert about["weights"] == "averages of EMAWeightAveraging, as in validation"
    assert tracker.correlations["step"].unique().tolist() == [0, 2]
