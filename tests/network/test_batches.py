"""What is taken for images, labels and logits, and where and in which precision a batch goes."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.network.batches import (
    IMAGE_KEYS,
    LABEL_KEYS,
    Placement,
    default_step,
    logits_of,
    split_batch,
)

X, Y, Z = torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(2, 4)
Named = namedtuple("Named", ["meta", "label", "image"])
Unnamed = namedtuple("Unnamed", ["first", "second", "third"])
Half = namedtuple("Half", ["first", "label"])


@dataclass
class Record:
    path: list[str]
    targets: torch.Tensor
    pixel_values: torch.Tensor


@dataclass
class Bare:
    img: torch.Tensor


# --- images and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "images", "labels"),
    [
        (X, X, None),
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X,), X, None),
        ((X, Y, Z, "more"), X, Y),
        (([X, Z], Y), [X, Z], Y),
        (([X, X], [{"boxes": Z}]), [X, X], [{"boxes": Z}]),
        ({"image": X, "label": Y, "id": Z}, X, Y),
        ({"image": X}, X, None),
        (OrderedDict(y=Y, x=X), X, Y),
        (UserDict(img=X, target=Y), X, Y),
        (Record(["a"], Y, X), X, Y),
        (Bare(X), X, None),
        (Named("a", Y, X), X, Y),
        (Unnamed(X, Y, Z), X, Y),
        (Half(X, Y), X, Y),
    ],
)
def test_a_batch_is_split(batch, images, labels):
    found = split_batch(batch)
    assert found[0] is images or found[0] == images
    assert found[1] is labels or found[1] == labels


@pytest.mark.parametrize("image", IMAGE_KEYS)
@pytest.mark.parametrize("label", LABEL_KEYS)
def test_every_pair_of_keys_is_known(image, label):
    images, labels = split_batch({"other": Z, label: Y, image: X})
    assert images is X
    assert labels is Y


@pytest.mark.parametrize(
    ("batch", "found", "example"),
    [
        ({"image": X, "pixel_values": X, "label": Y}, "2 for the images and 1 for the labels", "batch['image']"),
        ({"image": X, "label": Y, "target": Y}, "1 for the images and 2 for the labels", "module(batch['image'])"),
        ({"pictures": X, "label": Y}, "0 for the images and 1 for the labels", "batch['label']"),
        ({"pictures": X}, "0 for the images and 0 for the labels", "module(batch['image']), batch['label']"),
        ({}, "0 for the images", "module(batch['image'])"),
        ({0: X, 1: Y}, "has the keys 0, 1: 0 for the images", "pass step="),
        (Unnamed(X, Y, Z)._asdict(), "keys first, second, third", "pass step="),
        (namedtuple("Two", ["x", "image"])(X, Z), "2 for the images", "module(batch.image)"),
    ],
)
def test_keys_that_leave_it_open_are_named_with_a_step_that_would_do(batch, found, example):
    with pytest.raises(InputError) as told:
        split_batch(batch)
    assert found in str(told.value)
    assert example in str(told.value)
    assert "step=lambda module, batch: (" in str(told.value)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((), "an empty tuple"),
        ([], "an empty list"),
        (3, "an object of type int"),
        (None, "nothing"),
        ("ab", "an object of type str"),
    ],
)
def test_a_batch_of_another_kind_is_described(batch, said):
    with pytest.raises(ValueError, match=rf"a batch is {said}: expected \(images, labels\)"):
        split_batch(batch)


def test_a_class_of_batches_is_no_batch():
    with pytest.raises(ValueError, match="a batch is an object of type type"):
        split_batch(Record)


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        Z,
        {"loss": X, "logits": Z},
        {"aux": X, "out": Z},
        {"out": X, "logits": Z},
        UserDict(logits=Z),
        SimpleNamespace(loss=None, logits=Z),
        SimpleNamespace(logits=None, out=Z),
        namedtuple("Output", ["loss", "logits"])(X, Z),
        (Z, X),
        [Z, [X]],
    ],
)
def test_logits_are_found(output):
    assert logits_of(output) is Z


@pytest.mark.parametrize("output", [None, [], (), {"boxes": Z}, [{"boxes": Z}], ([Z], X), 3.0])
def test_an_output_without_logits_is_left_to_the_target(output):
    assert logits_of(output) is output


# --- the default step -----------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def test_the_default_step_gives_logits_and_labels():
    logits, labels = default_step(Model(lambda images: {"logits": images + 1}), {"img": X, "y": Y})
    assert torch.equal(logits, X + 1)
    assert labels is Y
    assert default_step(Model(lambda images: images), X) == (X, None)


def test_an_ambiguous_batch_is_refused_before_the_model_runs():
    def never(images):
        raise AssertionError

    with pytest.raises(InputError, match="2 for the images"):
        default_step(Model(never), {"x": X, "image": X})


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError])
def test_a_forward_pass_that_fails_is_told_with_what_it_was_given(kind):
    def fails(images):
        raise kind("sizes")

    said = (
        rf"Model\.forward was called with the images of a batch, a list of 2: .*failed: {kind.__name__}: .*pass step="
    )
    with pytest.raises(InputError, match=said) as told:
        default_step(Model(fails), ([X, X], Y))
    assert isinstance(told.value.__cause__, kind)


@pytest.mark.parametrize("error", [InputError("ours"), torch.OutOfMemoryError("memory"), KeyboardInterrupt()])
def test_other_failures_are_passed_on_as_they_are(error):
    def fails(images):
        raise error

    with pytest.raises(type(error)) as told:
        default_step(Model(fails), (X, Y))
    assert told.value is error


# --- placement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_go_to_a_model_in_its_precision_and_labels_as_they_are(dtype):
    place = Placement.of(nn.Conv2d(3, 4, 1).to(dtype))
    images, labels = place.to_device((X, Y))
    assert (images.dtype, labels.dtype) == (dtype, torch.int64)
    assert (place.rank, place.world) == (0, 1)
    nested = place.to_device({"image": [X, X], "label": Y.bool()})
    assert ([each.dtype for each in nested["image"]], nested["label"].dtype) == ([dtype, dtype], torch.bool)


def test_a_model_of_several_precisions_or_of_none_gets_images_as_they_are():
    mixed = nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3))
    for model in (mixed, nn.ReLU()):
        assert Placement.of(model).to_device((X, Y))[0].dtype == torch.float32
        assert Placement.of(model).to_device((X.double(), Y))[0].dtype == torch.float64


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (2, 2)])
def test_a_rank_that_there_is_not_is_refused(rank, world):
    with pytest.raises(ValueError, match=rf"rank={rank}, world={world}: expected rank from 0 to world − 1"):
        Placement(lambda batch: batch, rank=rank, world=world)
