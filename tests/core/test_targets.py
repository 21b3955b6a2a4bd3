"""Task variables against NumPy, which one ``"auto"`` chooses, and what is refused."""

import re

import numpy as np
import pytest
import torch

from chanaxes_pl.core.targets import (
    Target,
    check_classes,
    describe,
    doubt,
    image_scores,
    infer_target,
    logit_margin,
    null_target,
)
from tests.helpers import reference

B, K = 12, 4


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CLASSES = torch.arange(B) * 3 % K
BITS = torch.arange(B) % 2
MAP = torch.arange(B * 6).reshape(B, 2, 3) * 5 % K


def margin(outputs, labels):
    return reference.margins(outputs, labels)


def log_probability(outputs, labels):
    return np.array([z[y] - np.log(np.exp(z).sum()) for z, y in zip(outputs, labels, strict=True)])


def signed(outputs, labels):
    return np.array([z if y else -z for z, y in zip(outputs.reshape(-1), labels.reshape(-1), strict=True)])


def log_likelihood(outputs, labels):
    chance = 1 / (1 + np.exp(-outputs))
    return np.log(np.where(labels == 1, chance, 1 - chance)).sum(1)


def one_hot(outputs, labels):
    return np.eye(outputs.shape[1])[labels][:, :-1]


def as_it_is(outputs, labels):
    return labels.reshape(len(labels), -1)


def over_map(function):
    """Of a map: the mean over labelled positions, position by position."""

    def mean(outputs, labels):
        labels, found = labels.reshape(len(outputs), -1), []
        for logits, its in zip(outputs.reshape(*outputs.shape[:2], -1), labels, strict=True):
            places = [p for p in range(len(its)) if its[p] >= 0 and its[p] != 255]
            found.append(np.mean([function(logits[None, :, p], its[None, p])[0] for p in places]))
        return np.array(found)

    return mean


def with_gaps(labels: torch.Tensor, *ignored: int) -> torch.Tensor:
    labels = labels.clone()
    for number, value in enumerate(ignored):
        labels[number::3, ..., number] = value
    return labels


TASKS = {
    "classes": ("logit_margin", drawn(B, K), CLASSES, margin),
    "classes, uint8": ("logit_margin", drawn(B, K), CLASSES.to(torch.uint8), margin),
    "two classes": ("logit_margin", drawn(B, 2), BITS, margin),
    "map": ("logit_margin", drawn(B, K, 2, 3), MAP, over_map(margin)),
    "map, −100 and 255": ("logit_margin", drawn(B, K, 2, 3), with_gaps(MAP, -100, 255), over_map(margin)),
    "map of bytes, 255": ("logit_margin", drawn(B, K, 2, 3), with_gaps(MAP, 255).to(torch.uint8), over_map(margin)),
    "sequence": ("logit_margin", drawn(B, K, 5), torch.arange(5 * B).reshape(B, 5) % K, over_map(margin)),
    "one logit": ("signed_logit", drawn(B, 1), BITS, signed),
    "one logit, no dimension": ("signed_logit", drawn(B), BITS.float(), signed),
    "one logit, labels with a dimension": ("signed_logit", drawn(B), BITS[:, None], signed),
    "one logit, both with a dimension": ("signed_logit", drawn(B, 1), BITS[:, None].float(), signed),
    "one logit, bool": ("signed_logit", drawn(B, 1), BITS.bool(), signed),
    "map of one logit": ("signed_logit", drawn(B, 1, 2, 3), MAP % 2, over_map(lambda z, y: signed(z, y))),
    "map of one logit, same shape": ("signed_logit", drawn(B, 1, 2, 3), (MAP % 2).float()[:, None], over_map(signed)),
    "map of one logit, gaps": ("signed_logit", drawn(B, 1, 2, 3), with_gaps(MAP % 2, -1, 255), over_map(signed)),
    "several bits": ("log_likelihood", drawn(B, K), (drawn(B, K) > 0).float(), log_likelihood),
    "several bits, whole": ("log_likelihood", drawn(B, K), (drawn(B, K) > 0).long(), log_likelihood),
    "several bits, bool": ("log_likelihood", drawn(B, K), drawn(B, K) > 0, log_likelihood),
    "regression": ("label", drawn(B, 1), drawn(B), as_it_is),
    "regression, labels with a dimension": ("label", drawn(B), drawn(B, 1), as_it_is),
    "regression of several numbers": ("label", drawn(B, 3), drawn(B, 3), as_it_is),
    "regression of whole numbers": ("label", drawn(B, 1), torch.arange(B) - 3, as_it_is),
}
NAMED = {
    "log-probability": ("log_probability", drawn(B, K), CLASSES, log_probability),
    "one-hot": ("label", drawn(B, K), CLASSES, one_hot),
    "label beside other outputs": ("label", {"boxes": [0]}, drawn(B, 2, 2), as_it_is),
    "label beside features": ("label", drawn(B, K), drawn(B), as_it_is),
    "label beside a map": ("label", drawn(B, K, 2, 3), drawn(B), as_it_is),
}


def as_numpy(value):
    if not isinstance(value, torch.Tensor):
        return value
    return (value.double() if value.is_floating_point() else value.long()).numpy()


@pytest.mark.parametrize("case", TASKS | NAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_target_is_what_numpy_gives(case, dtype):
    name, outputs, labels, function = (TASKS | NAMED)[case]
    outputs = outputs.to(dtype) if isinstance(outputs, torch.Tensor) else outputs
    found = Target(name)(outputs, labels)
    wanted = function(as_numpy(outputs), as_numpy(labels))
    assert found.dtype == torch.float64
    assert found.shape == wanted.reshape(B, -1).shape
    np.testing.assert_allclose(found.numpy(), wanted.reshape(B, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", TASKS)
def test_auto_chooses_the_target_of_the_task(case):
    name, outputs, labels, _ = TASKS[case]
    assert infer_target(outputs, labels) == name
    target = Target("auto")
    assert target.name == "auto"
    assert torch.equal(target(outputs, labels), Target(name)(outputs, labels))
    assert target.name == name


def soft(rows):
    return drawn(rows, K).softmax(1)


DOUBTED = {
    "one-hot": ("log_likelihood", torch.eye(K).repeat(4, 1), "every row of labels sums to 1.*labels.argmax"),
    "mixed classes": ("label", soft(32), r"sums to 1.*taken for real numbers.*target='label'"),
    "±1": ("label", drawn(32).sign(), r"labels of -1, 1 alone are taken for real numbers \(regression\)"),
    "-1 as missing": ("label", (drawn(32, K) * 2).round().clamp(-1, 1), "labels of -1, 0, 1 alone.*0 and 1"),
}


@pytest.mark.parametrize("case", DOUBTED)
def test_labels_that_look_like_another_task_are_doubted(case):
    name, labels, told = DOUBTED[case]
    outputs = torch.zeros(len(labels), *labels.shape[1:])
    assert infer_target(outputs[:, None] if labels.ndim == 1 else outputs, labels) == name
    assert re.search(told, doubt(name, labels))


def test_labels_of_the_task_are_not_doubted():
    for name, _, labels, _ in (TASKS | NAMED).values():
        assert not doubt(name, labels.repeat(4, *[1] * (labels.ndim - 1)))
    assert not doubt("log_likelihood", torch.eye(4))  # four rows may be so by chance


def test_low_precision_is_lifted_before_anything_is_computed():
    for dtype in (torch.float16, torch.bfloat16):
        outputs = drawn(B, K).to(dtype)
        assert torch.equal(Target("logit_margin")(outputs, CLASSES), Target("logit_margin")(outputs.double(), CLASSES))


def test_what_auto_chose_holds_for_later_batches():
    target = Target("auto")
    target(drawn(B, 1), BITS)
    with pytest.raises(ValueError, match=r"label 0\.5 after labels of 0 and 1.*for regression pass target='label'"):
        target(drawn(B, 1), BITS * 0.5)
    target = Target()
    target.settle("label")
    target.settle("signed_logit")
    assert torch.equal(target(drawn(B, 1), BITS)[:, 0], BITS.double())


def test_a_map_without_a_labelled_position_is_nan_and_alone():
    labels = MAP.clone()
    labels[3] = 255
    assert Target()(drawn(B, K, 2, 3), labels).isnan().flatten().nonzero().flatten().tolist() == [3]


# --- functions ------------------------------------------------------------------------------------------------------


def double(outputs, labels):
    return 2 * outputs[:, 0] + labels


def test_a_function_gives_one_number_or_several_and_lends_its_name():
    target = Target(double)
    found = target(drawn(B, K).half(), CLASSES.to(torch.uint8))
    assert target.name == "double"
    assert torch.equal(found, (2 * drawn(B, K).half().double()[:, 0] + CLASSES)[:, None])
    assert Target(lambda outputs, labels: outputs.float())(drawn(B, K), None).shape == (B, K)

    class Scores:
        def __call__(self, outputs, labels):
            return torch.stack([one["score"] for one in outputs])

    target = Target(Scores())
    assert (target.name, target([{"score": drawn(1)[0]}] * 3, None).shape) == ("Scores", (3, 1))


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (1.0, "an object of type float"),
        (None, "nothing"),
        (torch.zeros(()), r"a tensor of shape \(\)"),
        (torch.zeros(2, 3, 4), r"a tensor of shape \(2, 3, 4\)"),
        ([torch.zeros(2)], "a list of 1: a tensor of shape"),
    ],
)
def test_a_function_that_gives_something_else_is_refused(gives, said):
    def wrong(outputs, labels):
        return gives

    with pytest.raises(ValueError, match=f"the target function wrong gave {said}.*one row an image"):
        Target(wrong)(drawn(2, 3), None)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_name_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"target='margin': expected 'auto', 'logit_margin'.*or a function"):
        Target("margin")
    with pytest.raises(ValueError, match=r"target='cross_entropy': expected 'log_probability', which is minus"):
        Target("cross_entropy")


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (drawn(B, K), None),
        (None, CLASSES),
        ({"boxes": 0}, CLASSES),
        (drawn(B, K), drawn(B, 3)),
        (drawn(B, K), CLASSES[:-1]),
        (drawn(B, K, 2, 3), MAP.float()),
        (drawn(B, K, 2, 3), MAP[:, :1]),
        (drawn(B, 1, 2, 3), drawn(B, 2, 3)),
        (torch.tensor(1.0), torch.tensor(1)),
        (drawn(0, K), CLASSES[:0]),
        (drawn(B, 0), CLASSES),
    ],
)
def test_a_task_that_is_not_known_is_described_with_a_target_that_would_do(outputs, labels):
    text = f"outputs: {describe(outputs)}, labels: {describe(labels)}"
    with pytest.raises(ValueError, match=r"For another task pass target=a function") as told:
        infer_target(outputs, labels)
    assert text in str(told.value)
    assert "lambda outputs, labels: outputs.norm(dim=1)" in str(told.value)


def test_classes_as_real_numbers_are_told():
    with pytest.raises(ValueError, match=r"Labels of type torch\.float32 are no class indices, expected whole numbers"):
        infer_target(drawn(B, K), CLASSES.float())


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "said"),
    [
        ("logit_margin", drawn(B, K), CLASSES + 1, r"label 4, but the logits have 4 classes.*0 to 3$"),
        ("logit_margin", drawn(B, K), CLASSES - 1, r"label -1, but.*from 0 to 3$"),
        ("logit_margin", drawn(B, K, 2, 3), MAP + 1, r"label 4, but.*or a negative number or 255 where"),
        ("logit_margin", drawn(B, K), CLASSES.float(), r"labels of type torch\.float32: expected whole numbers"),
        ("logit_margin", drawn(B, 1), BITS, r"Expected \[B, K\] with K ≥ 2 classes and \[B\]"),
        ("logit_margin", drawn(B, K), None, r"labels: nothing.*pass step="),
        ("log_probability", drawn(B, K, 2, 3), MAP, r"Expected \[B, K\] with K ≥ 2 classes and \[B\]"),
        ("log_probability", drawn(B, K), CLASSES + 1, "label 4, but"),
        ("signed_logit", drawn(B, 1), CLASSES, r"label [23] after labels of 0 and 1"),
        ("signed_logit", drawn(B, K), BITS, "Expected one label of 0 or 1 for each output"),
        ("signed_logit", [drawn(B, 1)], BITS, r"outputs: a list of 1.*Expected one label of 0 or 1"),
        ("log_likelihood", drawn(B, K), drawn(B, K), r"label -?\d.* after labels of 0 and 1"),
        ("log_likelihood", drawn(B, K), BITS, "Expected one label of 0 or 1 for each output"),
        ("label", drawn(B, K), None, r"labels: nothing\. target='label' expects a tensor"),
        ("label", drawn(B, K), torch.tensor(1.0), r"target='label' expects a tensor \[B\] or \[B, D\]"),
        ("label", drawn(B, K), CLASSES + 1, "label 4, but"),
    ],
)
def test_what_does_not_fit_a_target_is_refused(name, outputs, labels, said):
    with pytest.raises(ValueError, match=said):
        Target(name)(outputs, labels)


@pytest.mark.parametrize(
    ("outputs", "labels", "said"),
    [
        (drawn(B, K, 2, 3), MAP, r"Expected \[B, K\]"),
        (drawn(B), CLASSES, r"Expected \[B, K\]"),
        (drawn(B, K), CLASSES + 1, "label 4"),
        (drawn(B, K), CLASSES.float(), "expected whole numbers"),
    ],
)
def test_experiments_take_classes_of_images_only(outputs, labels, said):
    check_classes(drawn(B, K), CLASSES)
    with pytest.raises(ValueError, match=said):
        check_classes(outputs, labels)


# --- null target, scores of images ----------------------------------------------------------------------------------


def test_the_null_target_is_a_function_of_the_index_alone_and_standard_normal():
    whole = null_target(np.arange(4000), 2)
    assert whole.shape == (4000, 2)
    np.testing.assert_array_equal(null_target(np.arange(100, 200), 2), whole[100:200])
    np.testing.assert_allclose(whole.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(whole.T), np.eye(2), atol=0.05)
    assert abs(np.corrcoef(whole[:-1, 0], whole[1:, 0])[0, 1]) < 0.05


def test_scores_of_images_are_cross_entropy_hits_and_margins():
    logits = drawn(B, K).double()
    wanted = [-log_probability(logits.numpy(), CLASSES.numpy()), logits.argmax(1).numpy() == CLASSES.numpy()]
    wanted.append(margin(logits.numpy(), CLASSES.numpy()))
    np.testing.assert_allclose(image_scores(logits, CLASSES).numpy(), np.stack(wanted, 1), rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["images", "maps"])
def test_among_more_than_255_classes_255_is_one(shape):
    logits, labels = torch.randn(6, 300, *shape).double(), torch.randint(250, 260, (6, *shape))
    labels[:2] = 255
    others = logits.masked_fill(torch.nn.functional.one_hot(labels, 300).movedim(-1, 1).bool(), -torch.inf).amax(1)
    margins = logits.gather(1, labels[:, None])[:, 0] - others
    expected = margins.flatten(1).mean(1) if shape else margins
    assert torch.allclose(logit_margin(logits, labels), expected)
    assert torch.allclose(Target("auto")(logits, labels)[:, 0], expected)


def test_the_log_likelihood_of_maps_is_the_mean_over_what_is_labelled():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 2, logits.shape, generator=generator).float()
    labels[:, 1, :2], labels[2] = 255, -1
    each = -torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    wanted = [one[(its == 0) | (its == 1)].mean() for one, its in zip(each, labels, strict=True)]
    found = Target("log_likelihood")(logits, labels)
    assert found.shape == (5, 1)
    torch.testing.assert_close(found[:, 0], torch.stack(wanted), equal_nan=True)
    assert found.isnan().flatten().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(("outputs", "labels"), [((8,), (8,)), ((8, 1), (8,)), ((8, 1), (8, 1)), ((8,), (8, 1))])
def test_one_logit_has_a_log_likelihood_in_any_shape(outputs, labels):
    logits, bits = torch.linspace(-2, 2, 8), torch.arange(8) % 2
    found = Target("log_likelihood")(logits.reshape(outputs), bits.reshape(labels))
    wanted = torch.where(bits == 1, logits, -logits).double()
    torch.testing.assert_close(found[:, 0], torch.nn.functional.logsigmoid(wanted))
