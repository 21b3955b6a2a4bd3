"""compute_axes: leaves no trace, sees the same probe whatever the loader does, and says what is wrong."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from chanaxes_pl import Axes, compute_axes
from chanaxes_pl.core.targets import TARGETS, Target
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.tables import COLUMNS
from tests.helpers import cases as zoo
from tests.helpers import reference

TARGET = ("task_information", "target_excess")


class Restless(nn.Module):
    """Dropout, a BatchNorm that trains and a frozen one, and a layer that draws random numbers even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 6, 3))
        self.frozen = nn.BatchNorm2d(6).eval()
        self.classifier = nn.Linear(6, zoo.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002  the streams that must come back
        return self.classifier(self.frozen(self.features(x)).mean((2, 3)))


def restless() -> Restless:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Restless()


def streams():
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate()


def snapshot(model: nn.Module) -> dict:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "hooks": [len(getattr(module, hook)) for module in model.modules() for hook in hooks],
        "grad mode": torch.is_grad_enabled(),
        "streams": streams(),
    }


def assert_untouched(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    del after["state"]
    assert after == before


def loader(n: int = 60, **options) -> DataLoader:
    return zoo.loader_of(zoo.images_2d(n), **options)


# ---------------------------------------------------------------- leaves no trace


def test_the_model_and_every_random_stream_are_bit_identical_afterwards():
    model = restless()
    model.features[0].weight.requires_grad_(False)
    before = snapshot(model)
    assert before["flags"].count(False) == 1
    axes = compute_axes(model, loader(), layers="conv+linear")
    assert_untouched(model, before)
    assert len(axes.table) == 8 + 6 + zoo.CLASSES


def test_a_forward_pass_in_training_mode_would_leave_a_trace():
    """Negative control."""
    model = restless()
    before = snapshot(model)
    model(zoo.images_2d())
    with pytest.raises(AssertionError):
        assert_untouched(model, before)


@pytest.mark.parametrize("at", [0, 2])
def test_the_model_is_bit_identical_also_after_an_exception(at):
    model, calls = restless(), []
    before = snapshot(model)

    def step(module, batch):
        calls.append(module.training)
        if len(calls) > at:
            raise RuntimeError("the disk is on fire")
        return module(batch[0]), batch[1]

    with pytest.raises(RuntimeError, match="the disk is on fire"):
        compute_axes(model, loader(), step=step)
    assert calls == [False] * (at + 1)
    assert_untouched(model, before)


def test_the_same_call_gives_the_same_bits():
    model = restless()
    assert compute_axes(model, loader()).table.equals(compute_axes(model, loader()).table)


def test_a_probe_in_worker_processes_draws_no_random_number():
    model = restless()
    before = snapshot(model)
    table = compute_axes(model, loader(num_workers=1)).table
    assert_untouched(model, before)
    assert table.equals(compute_axes(model, loader()).table)


# ---------------------------------------------------------------- which images


def test_a_shuffling_loader_gives_the_table_of_one_that_does_not_and_keeps_its_order():
    model, generator = restless(), torch.Generator().manual_seed(9)
    state = generator.get_state()
    shuffled = loader(shuffle=True, generator=generator)
    assert compute_axes(model, shuffled).table.equals(compute_axes(model, loader()).table)
    assert torch.equal(generator.get_state(), state)


def test_a_dataset_stands_for_a_loader_of_it():
    model = restless()
    images = zoo.images_2d()
    expected = compute_axes(model, loader(batch=128)).table
    assert compute_axes(model, TensorDataset(images, zoo.labels_of(len(images)))).table.equals(expected)


def indices_of(source, size=5000, rank=0, world=1) -> list[int]:
    """Which images a probe takes, from a data set whose images are their own indices."""
    return [int(i) for _, (images, _) in Probe(source, size).batches(rank, world) for i in images]


def numbered(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n), torch.zeros(n, dtype=torch.long))


def test_a_loader_in_order_gives_its_first_images_and_a_dataset_a_fixed_random_subset():
    assert indices_of(DataLoader(numbered(50), batch_size=8), 20) == list(range(20))
    subset = indices_of(numbered(50), 20)
    assert subset == sorted(set(subset)) == indices_of(numbered(50), 20)
    assert len(subset) == 20
    assert subset != list(range(20))
    assert indices_of(DataLoader(numbered(50), shuffle=True), 20) == subset
    assert indices_of(numbered(20), 20) == list(range(20))


def test_a_subset_sampler_is_respected():
    chosen = [40, 3, 17, 8, 29]
    sampled = DataLoader(numbered(50), sampler=SubsetRandomSampler(chosen), batch_size=2)
    assert indices_of(sampled) == sorted(chosen)
    assert set(indices_of(sampled, 3)) < set(chosen)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_the_images_without_a_gap_or_a_repeat(world):
    shares = [indices_of(DataLoader(numbered(23), batch_size=4), 20, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    places = [np.concatenate([i for i, _ in Probe(numbered(20)).batches(r, world)]) for r in range(world)]
    assert sorted(np.concatenate(places)) == list(range(20))


class Stream(IterableDataset):
    def __init__(self, n: int) -> None:
        self.images, self.labels = zoo.images_2d(n), zoo.labels_of(n)

    def __iter__(self):
        return iter(zip(self.images, self.labels, strict=True))


def test_a_stream_works_in_one_process_and_says_why_not_in_two():
    model = restless()
    assert compute_axes(model, DataLoader(Stream(60), batch_size=16)).table.equals(compute_axes(model, loader()).table)
    with pytest.raises(ValueError, match="a probe that streams cannot be shared by 2 processes: pass a map-style"):
        Probe(DataLoader(Stream(60), batch_size=16)).batches(0, 2)


def test_batches_that_the_user_composes_are_taken_as_they_come():
    whole = [(zoo.images_2d()[:30], zoo.labels_of(60)[:30]), (zoo.images_2d()[30:], zoo.labels_of(60)[30:])]
    model = restless()
    found = compute_axes(model, DataLoader(whole, batch_size=None)).table
    expected = compute_axes(model, loader()).table
    assert_allclose(found["target_excess"], expected["target_excess"], 1e-5)


# ---------------------------------------------------------------- step and target


def test_step_makes_logits_and_labels_of_any_batch_and_output():
    class Named(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            return {"image": zoo.images_2d()[i], "label": zoo.labels_of(60)[i]}

    class Tupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = restless()

        def forward(self, x):
            return self.inner(x), "features"

    def step(module, batch):
        return module(batch["image"])[0], batch["label"]

    found = compute_axes(Tupled(), DataLoader(Named(), batch_size=16), step=step).table
    expected = compute_axes(restless(), loader()).table
    assert found["layer"].str.removeprefix("inner.").equals(expected["layer"])
    assert found.drop(columns="layer").equals(expected.drop(columns="layer"))


def test_a_target_function_of_one_number_or_several_is_a_regression_on_it():
    model, data = zoo.case("plain")
    outputs, logits, labels = zoo.captured(model, data)
    means = outputs["0"].mean(2)
    margin = compute_axes(model, data).table
    column = compute_axes(model, data, target=lambda z, y: TARGETS["logit_margin"](z, y)[:, None]).table
    assert_allclose(column["target_excess"], margin["target_excess"], 1e-12)
    several = compute_axes(model, data, target=lambda z, y: z[:, :2] * (1 + y[:, None])).table
    target = logits[:, :2] * (1 + labels[:, None])
    left = reference.residual(means, target)
    single = reference.task_information_from_residuals(means, left)
    excess = reference.target_excess(means, single, reference.pair_information_from_residuals(means, left))
    first = several[several["layer"] == "0"]
    assert_allclose(first["task_information"], single, 1e-9)
    assert_allclose(first["target_excess"], excess, 1e-8)


def test_a_target_function_may_have_the_name_of_a_target():
    def scores(outputs, labels):
        return outputs["scores"].gather(1, labels[:, None])[:, 0]

    def logit_margin(outputs, labels):
        return scores(outputs, labels)

    def auto(outputs, labels):
        return scores(outputs, labels)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.data = zoo.case("plain")

        def forward(self, images):
            return {"scores": self.network(images)}

    model = Named().eval()
    wanted, *others = (compute_axes(model, model.data, target=target).table for target in (scores, logit_margin, auto))
    assert [table["target"].iloc[0] for table in others] == ["logit_margin", "auto"]
    for table in others:
        pd.testing.assert_frame_equal(table.drop(columns="target"), wanted.drop(columns="target"), check_exact=True)


@pytest.mark.parametrize("case", ["plain", "dead channels", "widening 1×1", "linear"])
def test_the_local_axis_can_be_that_of_image_means(case):
    model, data = zoo.case(case)
    outputs, logits, labels = zoo.captured(model, data)
    table = compute_axes(model, data, layers="conv+linear", positions="mean").table
    for layer, rows in table.groupby("layer", sort=False):
        means = np.float64(outputs[layer]).mean(2)
        expected = reference.layer_columns(means, means, reference.margins(logits, labels))
        for column, values in expected.items():
            assert_allclose(rows[column], values, 1e-5, 1e-9, err_msg=f"{layer} {column}")


def test_an_image_without_a_labelled_position_is_left_out_of_the_target_axis_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    images, labels = torch.randn(20, 3, 5, 5), torch.randint(0, 4, (20, 5, 5))
    labels[:, 0], labels[7] = 255, -100
    found = compute_axes(model, TensorDataset(images, labels), layers="0", positions="all").table
    kept = [index for index in range(20) if index != 7]
    with torch.no_grad():
        outputs, logits = model[0](images), model(images).double()
    means = outputs.double().mean((2, 3)).numpy()
    margins = [
        np.mean(reference.margins(logits[i, :, 1:].flatten(1).T.numpy(), labels[i, 1:].flatten().numpy())) for i in kept
    ]
    wanted = [-0.5 * np.log(1 - np.corrcoef(means[kept, c], margins)[0, 1] ** 2) for c in range(6)]
    assert_allclose(found["task_information"], wanted, 1e-6)
    power = outputs.double().transpose(0, 1).flatten(1).var(1, correction=0).numpy()
    assert_allclose(found["input_capture"], 0.5 * np.log1p(power / np.median(power)), 1e-6)
    with pytest.raises(ValueError, match="alignment=True with an image that has no labelled position: expected one"):
        compute_axes(model, TensorDataset(images, labels), layers="0", alignment=True)


def test_named_targets():
    logits, labels = torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 5
    found = {name: Target(name)(logits, labels) for name in ("logit_margin", "log_probability", "label")}
    assert_allclose(found["logit_margin"][:, 0], reference.margins(logits.numpy(), labels.numpy()), 1e-12)
    cross_entropy = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert_allclose(found["log_probability"][:, 0], -cross_entropy, 1e-12)
    with pytest.raises(ValueError, match=r"target='cross_entropy': expected 'log_probability', which is minus"):
        Target("cross_entropy")
    assert torch.equal(found["label"], torch.eye(5, dtype=torch.float64)[labels][:, :4])


def test_one_hot_labels_are_measured_with_a_warning_unless_the_target_is_named():
    model, images = zoo.plain()
    data = TensorDataset(images, nn.functional.one_hot(zoo.labels_of(len(images)), zoo.CLASSES).float())
    with pytest.warns(UserWarning, match=r'target="auto": every row of labels sums to 1.*labels.argmax\(1\)'):
        found = compute_axes(model, data)
    named = compute_axes(model, data, target="log_likelihood")  # and no warning, which would be an error here
    pd.testing.assert_frame_equal(found.table, named.table)


def test_which_class_the_label_target_leaves_out_does_not_matter():
    model, data = zoo.case("plain")
    expected = compute_axes(model, data, target="label").table
    found = compute_axes(model, data, target=lambda z, y: nn.functional.one_hot(y, zoo.CLASSES)).table
    for column in TARGET:
        assert_allclose(found[column], expected[column], 1e-8)


def test_a_layer_that_is_never_reached_is_nan_with_the_reason():
    model = restless()
    model.spare = nn.Conv2d(3, 5, 1)
    axes = compute_axes(model, loader())
    spare = axes.table[axes.table["layer"] == "spare"]
    assert len(spare) == 5
    assert spare[list(COLUMNS)].isna().all(axis=None)
    assert set(spare["reason"]) == {"the forward pass did not reach this layer"}
    assert spare["dead"].all()
    rows = axes.correlations.set_index("layer")
    assert rows.loc["spare", "rho"].isna().all()
    assert np.isfinite(rows.loc["network", "rho"]).all()


class Plain(nn.Module):
    """A layer whose weight a function of a module reads, one that nothing uses, and one that runs."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.mix.weight, self.mix.bias)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixer, self.spare = nn.Conv2d(3, 6, 3), Plain.Mixer(), nn.Linear(6, 6)
        self.head = nn.Linear(6, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.spare.weight.shape  # noqa: B018  # a look is not a use
        return self.head(self.mixer(self.stem(x).relu().mean((2, 3))))


@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel])
def test_a_layer_that_a_plain_function_uses_is_said_to_be(wrap):
    model = Plain()
    model.mixer = model.mixer if wrap is nn.Identity else wrap(model.mixer)
    before = snapshot(model)
    table = compute_axes(model, loader(), layers="conv+linear").table
    assert_untouched(model, before)
    assert table.groupby("layer")["reason"].first().to_dict() == {
        "stem": "",
        "mixer.mix": "its weight is used by a plain function (linear) in mixer",
        "spare": "the forward pass did not reach this layer",
        "head": "",
    }
    pd.testing.assert_frame_equal(
        table[table.layer.isin(["stem", "head"])].reset_index(drop=True),
        compute_axes(model, loader(), layers=["stem", "head"]).table,
    )


def test_attention_of_ones_own_is_said_to_use_its_layers():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 18)

        def forward(self, x):
            return nn.functional.linear(x, weight=self.qkv.weight)[..., :6]

    model = nn.Sequential(
        nn.Flatten(2), nn.Linear(36, 6), Own(6, 2, batch_first=True), Fused(), nn.Flatten(), nn.Linear(18, zoo.CLASSES)
    )
    reasons = compute_axes(model, loader()).table.groupby("layer")["reason"].first()
    assert reasons["2.out_proj"] == "its weight is used by a plain function (multi_head_attention_forward) in 2"
    used = "its weight is used by a plain function (linear) in 3"
    assert (reasons[["3.qkv.q", "3.qkv.k", "3.qkv.v"]] == used).all()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", ["no_grad", "checkpoint"])
def test_layers_without_gradients_are_measured_like_others(kind):
    class Wrapped(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.plain, self.stem, self.head = plain, nn.Conv2d(3, 5, 3), nn.Linear(5, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            if self.plain:
                x = self.stem(x)
            elif kind == "no_grad":
                with torch.no_grad():
                    x = self.stem(x)
            else:
                x = checkpoint(self.stem, x, use_reentrant=True)
            return self.head(x.relu().mean((2, 3)))

    found, wanted = (compute_axes(Wrapped(plain), loader(), alignment=True).table for plain in (False, True))
    pd.testing.assert_frame_equal(found, wanted)


def test_a_network_that_normalises_its_images_in_place_leaves_the_probe_as_it_is():
    class Normalising(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.in_place, self.layer, self.head = in_place, nn.Conv2d(3, 5, 3), nn.Linear(5, zoo.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sub_(0.4).div_(0.3) if self.in_place else (x - 0.4) / 0.3
            return self.head(self.layer(x).relu().mean((2, 3)) + self.layer(x[..., 1:]).relu().mean((2, 3)))

    probe = [tuple(batch) for batch in loader()]
    kept = [(images.clone(), labels.clone()) for images, labels in probe]
    # The layer runs twice, so that the first batch is run again.
    found = [compute_axes(Normalising(in_place), probe).table for in_place in (True, True, False)]
    assert all(a.equal(b) for batch, old in zip(probe, kept, strict=True) for a, b in zip(batch, old, strict=True))
    pd.testing.assert_frame_equal(found[0], found[1])
    pd.testing.assert_frame_equal(found[0], found[2])


def test_options_reach_the_table():
    model = restless()
    plain = compute_axes(model, loader()).table
    assert not plain["input_capture"].equals(compute_axes(model, loader(), noise="mean").table["input_capture"])
    assert not plain["input_capture"].equals(compute_axes(model, loader(), positions=2).table["input_capture"])
    assert not plain["task_information"].equals(compute_axes(model, loader(), probe_size=30).table["task_information"])
    assert compute_axes(model, loader(), reliability=False).table["peer_r2_odd"].isna().all()
    assert isinstance(compute_axes(model, loader()), Axes)


# ---------------------------------------------------------------- what is wrong


def batches_of(*batches) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


IMAGES, LABELS = zoo.images_2d(6), zoo.labels_of(6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"x": IMAGES, "img": IMAGES, "y": LABELS},
            r"keys x, img, y: 2 for the images and 1 for the.*step=lambda",
        ),
        (
            {"image": IMAGES, "species": LABELS},
            r"keys image, species, and none .* \(module\(batch\['image'\]\), batch\['species'\]\)",
        ),
        (IMAGES, r"labels: nothing\. .*target=lambda outputs, labels: outputs.norm\(dim=1\)"),
        (
            (IMAGES, LABELS[:, None]),
            r"labels: a tensor of shape \(6, 1\)\. Expected outputs \[B, K\] with",
        ),
        ((IMAGES, LABELS.float()), r"Labels of type torch.float32 are no class indices"),
        ((IMAGES, LABELS + 1), r"label 4, but the logits have 4 classes: expected labels from 0 to 3"),
        ((IMAGES, LABELS - 1), r"label -1, but the logits have 4 classes"),
        (
            (IMAGES[:, :2], LABELS),
            r"the images of a batch, a tensor of shape \(6, 2, 6, 6\), and failed: Run",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_described(batch, message):
    model = restless()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        compute_axes(model, batches_of(batch))
    assert_untouched(model, before)


def test_labels_that_are_no_numbers_are_described():
    named = DataLoader([(image, "cat") for image in IMAGES], batch_size=6)
    with pytest.raises(ValueError, match=r"labels: a (tuple|list) of 6: .*Expected outputs"):
        compute_axes(restless(), named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "margin"}, r"compute_axes\(target='margin'\): expected 'auto', 'logit_margin', 'log_probability'"),
        ({"positions": 0}, r"compute_axes\(positions=0\): expected a whole number above 0, 'all' or 'mean'"),
        ({"positions": -3}, r"compute_axes\(positions=-3\)"),
        ({"positions": 2.5}, r"compute_axes\(positions=2.5\)"),
        ({"positions": "every"}, r"compute_axes\(positions='every'\)"),
        ({"positions": "mean", "alignment": True}, r"compute_axes\(alignment=True, positions='mean'\): expected a num"),
        ({"probe_size": 2}, r"compute_axes\(probe_size=2\): expected at least 3 images"),
        ({"noise": "bad"}, r"compute_axes\(noise='bad'\): expected 'median', 'mean'"),
        ({"noise": 0.0}, r"compute_axes\(noise=0.0\): expected"),
        ({"layers": "linear?"}, r"compute_axes\(layers='linear\?'\): no tracked module"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_the_model_runs(options, message):
    model = restless()
    model.forward = None
    with pytest.raises(ValueError, match=message):
        compute_axes(model, loader(), **options)


@pytest.mark.parametrize(("images", "count"), [(0, "0 images"), (1, "1 image"), (2, "2 images")])
def test_a_probe_of_fewer_than_three_images_is_refused(images, count):
    message = f"compute_axes: the probe holds {count}, expected at least 3"
    data = TensorDataset(zoo.images_2d(4)[:images], zoo.labels_of(4)[:images])
    with pytest.raises(ValueError, match=message):
        compute_axes(restless(), data)
    with pytest.raises(ValueError, match=message):
        compute_axes(restless(), DataLoader(Stream(images) if images else batches_of(), batch_size=1))


def test_three_images_are_enough():
    table = compute_axes(restless(), loader(3)).table
    assert np.isfinite(table["task_information"]).all()


def test_something_that_is_no_probe_is_refused_by_what_it_is():
    with pytest.raises(TypeError, match=r"compute_axes\(probe=3\): expected a Dataset, a DataLoader, or an iterable"):
        compute_axes(restless(), 3)


def test_a_model_whose_output_holds_no_logits_is_described():
    class Boxes(nn.Sequential):
        def forward(self, x):
            return {"boxes": super().forward(x)}

    model = Boxes(nn.Conv2d(3, 4, 3), *zoo.head(4))
    with pytest.raises(ValueError, match=r"outputs: a dict with keys .'boxes'.*pass target=a function"):
        compute_axes(model, loader())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda z, y: z.sum(), r"gave a tensor of shape \(\): expected a tensor of real numbers \[B\] or"),
        (lambda z, y: z[:3, 0], "has 3 rows for a batch of 16 images"),
        (lambda z, y: z[:, :, None], r"gave a tensor of shape \(16, 4, 1\): expected a tensor of real numbers"),
        (lambda z, y: 3.0, r"gave an object of type float: expected"),
    ],
)
def test_a_target_function_that_is_not_one_row_an_image_is_refused(target, said):
    with pytest.raises(ValueError, match=f"the target.* {said}"):
        compute_axes(restless(), loader(), target=target)


def test_a_step_that_loses_images_is_refused():
    def step(module, batch):
        return module(batch[0])[:5], batch[1][:5]

    with pytest.raises(
        ValueError,
        match=r"shape \(16, 4\), labels: a tensor of shape \(5,\)\. Expected",
    ):
        compute_axes(restless(), loader(), step=lambda module, batch: (module(batch[0]), batch[1][:5]))
    with pytest.raises(ValueError, match="the target has 5 rows for a batch of 16 images"):
        compute_axes(restless(), loader(), step=step)


# ---------------------------------------------------------------- where numbers cancel, and what rows are


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_a_widening_layer_that_cancels_what_its_inputs_share(noise):
    """The moments of its outputs follow from those of its inputs, and would be lost in float32 products of these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    weight = torch.randn(40, 20)
    model[0].weight.data.copy_(weight - weight.mean(1, keepdim=True))
    images = torch.randn(128, 1) + noise * torch.randn(128, 20)
    with torch.no_grad():
        variance = model[0](images).double().var(0, unbiased=False).numpy()
    found = compute_axes(model, TensorDataset(images, torch.arange(128) % 5), layers="0").table
    assert not found["dead"].any()
    assert_allclose(found["input_capture"], 0.5 * np.log1p(variance / np.median(variance)), rtol=5e-8 / noise)


class SequenceFirst(nn.Module):
    """Its middle layer reads [positions, images, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, images):
        tokens = self.embed(images.flatten(2).transpose(1, 2))
        return self.head(self.mix(tokens.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("kind", [list, lambda batch: {"image": batch[0], "label": batch[1]}])
def test_as_many_positions_as_images_are_not_taken_for_them(kind):
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 4, 4), torch.arange(32) % 5
    batches = [kind([images[:16], labels[:16]]), kind([images[16:], labels[16:]])]
    found = compute_axes(SequenceFirst(), batches, layers="*").table.groupby("layer", sort=False).first()
    assert found["reason"].to_dict() == {
        "embed": "",
        "mix": "it gave an output of shape (16, 16, 8), whose first dimension is not that of the images",
        "head": "",
    }
    other = compute_axes(SequenceFirst(), [kind([images, labels])], layers="*").table
    assert other.loc[other["layer"] == "mix", "reason"].iloc[0].startswith("it gave an output of shape (16, 32, 8)")


@pytest.mark.parametrize(("labelled", "told"), [(0, "0 of the probe's 20"), (2, "2 of the probe's 20")])
def test_too_few_images_with_a_labelled_position_are_refused(labelled, told):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    labels = torch.full((20, 5, 5), 255)
    labels[:labelled] = 1
    with pytest.raises(ValueError, match=rf"compute_axes: {told} images have a labelled position, expected at least 3"):
        compute_axes(model, TensorDataset(torch.randn(20, 3, 5, 5), labels))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda z, y: z[:, :0], r"gave a tensor of shape \(6, 0\): expected a tensor of real numbers .* D at least 1"),
        (lambda z, y: torch.complex(z, z), r"gave a tensor of shape \(6, 3\) of complex numbers: expected"),
        (lambda z, y: z[:, : len(z) - 3], r"gave 1 numbers an image after 3 in an earlier batch: expected as many"),
    ],
)
def test_what_a_target_function_must_not_give(target, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.randn(count, 3, 5, 5), torch.zeros(count).long()) for count in (6, 4)]
    with pytest.raises(ValueError, match=message):
        compute_axes(model, batches, target=target)


def test_no_convolution_is_said_plainly():
    with pytest.raises(
        ValueError, match=r"layers='conv'\): no tracked module; the model has no convolution; expected 'a"
    ):
        compute_axes(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [(torch.randn(6, 3, 2, 2), LABELS)], layers="conv")


def test_a_pair_of_tensors_is_one_batch():
    pair = (torch.randn(12, 3, 5, 5), torch.zeros(12).long())
    with pytest.raises(TypeError, match=r"probe=a tuple of 2: .*\[\(images, labels\)\], or TensorDataset"):
        compute_axes(nn.Conv2d(3, 4, 3), pair)


@pytest.mark.parametrize("name", ["alignment", "reliability"])
def test_what_is_neither_true_nor_false_is_refused(name):
    with pytest.raises(TypeError, match=rf"compute_axes\({name}='no'\): expected True or False"):
        compute_axes(nn.Conv2d(3, 4, 3), [(torch.randn(12, 3, 5, 5), torch.zeros(12).long())], **{name: "no"})
