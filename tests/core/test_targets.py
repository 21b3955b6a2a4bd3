"""The task variable of every task against NumPy, how it is chosen, and what is refused."""

import numpy as np
import pytest
import torch

from chanaxes_pl.core.targets import Target, check_classes, infer_target

B, K = 12, 4
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(B, K, generator=GENERATOR)
CLASSES = torch.arange(B) % K
BITS = torch.randint(0, 2, (B, K), generator=GENERATOR)
REAL = torch.randn(B, K, generator=GENERATOR)
MAPS = torch.randn(B, K, 3, 5, generator=GENERATOR)
MAP_CLASSES = torch.randint(0, K, (B, 3, 5), generator=GENERATOR)


def found(outputs, labels, spec="auto") -> tuple[str, np.ndarray]:
    target = Target(spec)
    values = target(outputs, labels)
    assert values.dtype == torch.float64
    return target.name, values.numpy()


def margins(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    return [z[y] - max(np.delete(z, y)) for z, y in zip(logits, labels, strict=True)]


def test_classes_have_the_logit_margin():
    name, values = found(LOGITS, CLASSES)
    assert name == "logit_margin"
    np.testing.assert_allclose(values[:, 0], margins(LOGITS.double().numpy(), CLASSES.numpy()), 1e-12)


@pytest.mark.parametrize("labels", [BITS[:, 0], BITS[:, :1], BITS[:, 0].float(), BITS[:, :1].bool()])
@pytest.mark.parametrize("outputs", [LOGITS[:, 0], LOGITS[:, :1]])
def test_one_logit_and_labels_of_0_and_1_have_the_signed_logit(outputs, labels):
    name, values = found(outputs, labels)
    assert name == "signed_logit"
    np.testing.assert_allclose(values[:, 0], np.where(BITS[:, 0] == 1, 1, -1) * LOGITS[:, 0].double().numpy(), 1e-12)


def test_several_labels_of_0_and_1_have_their_log_likelihood():
    for labels in (BITS, BITS.float()):
        name, values = found(LOGITS, labels)
        assert name == "log_likelihood"
        p = 1 / (1 + np.exp(-LOGITS.double().numpy()))
        np.testing.assert_allclose(values[:, 0], np.log(np.where(BITS == 1, p, 1 - p)).sum(1), 1e-9)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [(LOGITS, REAL), (LOGITS[:, 0], REAL[:, 0]), (LOGITS[:, :1], REAL[:, 0]), (LOGITS[:, 0], REAL[:, :1])],
)
def test_real_labels_are_the_target_themselves(outputs, labels):
    name, values = found(outputs, labels)
    assert name == "label"
    np.testing.assert_array_equal(values, labels.double().reshape(B, -1))


@pytest.mark.parametrize("ignored", [255, -100, -1])
def test_maps_have_the_mean_margin_of_their_labelled_positions(ignored):
    labels = MAP_CLASSES.clone()
    labels[:, 0], labels[2] = ignored, ignored
    name, values = found(MAPS, labels)
    assert name == "logit_margin"
    flat = MAPS[:, :, 1:].double().flatten(2).transpose(1, 2).numpy()
    wanted = [np.mean(margins(z, y)) for z, y in zip(flat, MAP_CLASSES[:, 1:].flatten(1).numpy(), strict=True)]
    wanted[2] = np.nan
    np.testing.assert_allclose(values[:, 0], wanted, 1e-12)


@pytest.mark.parametrize("shape", [(B, 3, 5), (B, 1, 3, 5)])
def test_maps_of_one_logit_have_the_mean_signed_logit(shape):
    labels = (MAP_CLASSES > 1).long()
    labels[:, 0] = 255
    name, values = found(MAPS[:, :1], labels.reshape(shape))
    assert name == "signed_logit"
    signed = (2 * labels[:, 1:].double() - 1) * MAPS[:, 0, 1:].double()
    np.testing.assert_allclose(values[:, 0], signed.mean((1, 2)), 1e-12)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_the_target_is_computed_in_double_precision_whatever_the_outputs_are(kind):
    outputs = LOGITS.to(kind)
    np.testing.assert_allclose(found(outputs, CLASSES)[1], found(outputs.double(), CLASSES)[1], 0)


def test_a_function_gets_what_the_step_returned_and_no_shape_is_judged_before():
    seen = []

    def norms(outputs, labels):
        seen.append((outputs, labels))
        return outputs["boxes"].norm(dim=1)

    outputs = {"boxes": REAL}
    name, values = found(outputs, None, norms)
    assert name == "norms"
    assert seen == [(outputs, None)]
    np.testing.assert_allclose(values[:, 0], np.linalg.norm(REAL, axis=1), 1e-6)
    assert found(LOGITS[:, :1], BITS[:, :1], lambda out, y: y[:, 0])[1].tolist() == BITS[:, :1].tolist()


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (LOGITS, None, r"labels: nothing\. .*without labels for example target=lambda outputs, labels: outputs\.norm"),
        ({"boxes": 1}, CLASSES, r"outputs: a dict with keys \['boxes'\], labels: a tensor of shape \(12,\)"),
        (LOGITS, CLASSES.float(), r"Labels of type torch\.float32 are no class indices, expected whole numbers"),
        (LOGITS, CLASSES[:5], r"shape \(12, 4\), labels: a tensor of shape \(5,\)\. Expected outputs \[B, K\] with"),
        (MAPS, torch.rand(MAPS.shape), r"pass target=a function of both that gives \[B\] or \[B, D\]"),
    ],
)
def test_a_task_that_is_not_known_is_described_with_the_cure(outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        infer_target(outputs, labels)


@pytest.mark.parametrize(
    ("spec", "outputs", "labels", "message"),
    [
        ("logit_margin", LOGITS[:, :1], BITS[:, 0], r"Expected \[B, K\] with K ≥ 2 classes and \[B\]"),
        (
            "logit_margin",
            MAPS,
            MAP_CLASSES + 2,
            "label 5 in the probe.*or a negative number or 255 where",
        ),
        ("log_probability", MAPS, MAP_CLASSES, r"Expected \[B, K\] with K ≥ 2 classes and \[B\]"),
        ("signed_logit", LOGITS[:, :1], REAL[:, 0].round() + 2, "label .* after labels of 0 and 1.*target='label'"),
        ("log_likelihood", LOGITS, REAL + 3, "expected only these; for regression pass target='label'"),
        ("label", LOGITS, None, r"labels: nothing\. target='label' expects a tensor"),
        ("label", LOGITS, CLASSES + 1, "label 4 in the probe, but the logits have 4 classes"),
    ],
)
def test_labels_that_do_not_fit_a_named_target_are_refused(spec, outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        Target(spec)(outputs, labels)


def test_labels_that_turn_out_real_after_zeros_and_ones_are_refused():
    target = Target()
    target(LOGITS[:, 0], BITS[:, 0].float())
    with pytest.raises(ValueError, match=r"label 0\.5 after labels of 0 and 1: expected only these; for regression"):
        target(LOGITS[:, 0], BITS[:, 0] + 0.5)


def test_only_classes_of_images_can_be_scored():
    check_classes(LOGITS, CLASSES)
    for outputs, labels in ((MAPS, MAP_CLASSES), (LOGITS, None), (LOGITS[:, :1], CLASSES)):
        with pytest.raises(ValueError, match=r"Expected \[B, K\] with K ≥ 2 classes and \[B\]"):
            check_classes(outputs, labels)
