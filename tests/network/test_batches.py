"""Where images, labels and logits are found, what is refused, and how batches reach the model."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chanaxes_pl.network.batches import IMAGE_KEYS, LABEL_KEYS, Placement, default_step, logits_of, split_batch

IMAGES, LABELS = torch.randn(4, 3, 2, 2), torch.arange(4)
NET = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@dataclass
class Batch:
    pixel_values: torch.Tensor
    labels: torch.Tensor
    index: int = 0


Pair = namedtuple("Pair", "label img")
Plain = namedtuple("Plain", "first second")


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES, LABELS, "paths", 3),
        {"image": IMAGES, "label": LABELS, "path": "a"},
        Batch(IMAGES, LABELS),
        Pair(LABELS, IMAGES),
        Plain(IMAGES, LABELS),
        *({image: IMAGES, label: LABELS} for image, label in zip(IMAGE_KEYS, LABEL_KEYS, strict=False)),
    ],
)
def test_images_and_labels_are_found(batch):
    images, labels = split_batch(batch)
    assert images is IMAGES
    assert labels is LABELS


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), [IMAGES], {"x": IMAGES}])
def test_a_batch_may_have_no_labels(batch):
    images, labels = split_batch(batch)
    assert images is IMAGES
    assert labels is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"image": IMAGES, "label": LABELS, "class": LABELS},
            r"the keys image, label, class: 1 for the images and 2 for the labels\. Expected one of image, images, .*"
            r"pass step=lambda module, batch: \(module\(batch\['image'\]\), batch\['label'\]\)",
        ),
        ({"picture": IMAGES, "y": LABELS}, "the keys picture, y: 0 for the images and 1 for the labels"),
        (SimpleNamespace(image=IMAGES), "of type SimpleNamespace: expected .images, labels., or a mapping"),
        ((), "an empty tuple: expected"),
    ],
)
def test_other_batches_are_refused_with_the_step_that_would_do(batch, message):
    with pytest.raises(ValueError, match=message):
        split_batch(batch)


@pytest.mark.parametrize(
    "output",
    [
        IMAGES,
        {"logits": IMAGES, "out": LABELS},
        OrderedDict(out=IMAGES, aux=LABELS),
        SimpleNamespace(logits=IMAGES, loss=None),
        (IMAGES, "features"),
    ],
)
def test_logits_are_found(output):
    assert logits_of(output) is IMAGES


@pytest.mark.parametrize("output", [{"boxes": IMAGES}, [{"boxes": IMAGES}], None])
def test_an_output_without_logits_stays_for_a_target_function(output):
    assert logits_of(output) is output


def test_a_forward_pass_that_fails_is_told_with_the_images_and_the_step():
    message = (
        r"Sequential\.forward was called with the images of a batch, a tensor of shape \(4, 2, 2, 2\), and failed: "
        r"RuntimeError: mat1 and mat2 .*pass step=lambda module, batch: \(outputs, labels\)"
    )
    with pytest.raises(ValueError, match=message) as error:
        default_step(NET, (IMAGES[:, :2], LABELS))
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_images_take_the_precision_of_the_model_and_labels_stay_whole(kind):
    model = nn.Linear(2, 2).to(kind)
    images, labels = Placement.of(model).to_device((IMAGES, LABELS))
    assert images.dtype == kind
    assert labels.dtype == torch.int64
    images, _ = Placement.of(nn.Linear(2, 2)).to_device((IMAGES.double(), LABELS))
    assert images.dtype == torch.float64
