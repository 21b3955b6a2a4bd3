"""The cosine between both gradients, in real layers: against NumPy on unfolded patches, with the laws of its parts."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from pandas.testing import assert_frame_equal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from chanaxes_pl import compute_axes
from chanaxes_pl.core.moments import CrossMoments
from chanaxes_pl.network.layers import CONVOLUTIONS, select_layers
from chanaxes_pl.network.moments_metric import MomentsMetric
from chanaxes_pl.network.patches import PatchRecorder
from chanaxes_pl.tables import ALIGNMENT
from tests.helpers import cases as zoo
from tests.helpers.networks import SameConv

CASES = [name for name in zoo.ZOO if name not in ("Conv3d",)]
RTOL = 1e-7


def unfolded(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``[N, P, groups, F]``: every patch that a layer reads."""
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
    inputs, kernel, stride, padding = (
        (inputs, layer.kernel_size, layer.stride, layer.padding)
        if inputs.ndim == 4
        else (inputs[:, :, None], (1, *layer.kernel_size), (1, *layer.stride), (0, *layer.padding))
    )
    columns = F.unfold(inputs, kernel, padding=padding, stride=stride)
    return columns.mT.reshape(len(columns), columns.shape[2], layer.groups, -1)


def reference(model: nn.Module, loader) -> dict[str, dict[str, np.ndarray]]:
    """Every column of the option, in NumPy, one channel at a time."""
    read: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args[0].clone()))
        for name, layer in select_layers(model, "conv+linear").items()
    ]
    outputs, logits, labels = zoo.captured(model, loader)
    for handle in handles:
        handle.remove()
    margin = np.array([z[y] - np.delete(z, y).max() for z, y in zip(logits, labels, strict=True)])
    columns = {}
    for name, layer in select_layers(model, "conv+linear").items():
        patches = unfolded(layer, torch.cat(read[name])).numpy()
        images, positions, groups, _ = patches.shape
        target = np.repeat(margin, positions)
        rows = []
        for channel in range(outputs[name].shape[1]):
            x = patches[:, :, channel * groups // outputs[name].shape[1]].reshape(images * positions, -1)
            y = outputs[name][:, channel].reshape(-1)
            x, y, t = x - x.mean(0), y - y.mean(), target - target.mean()
            sigma_w, cross, power, shared = x.T @ y / len(y), x.T @ t / len(y), y @ y / len(y), y @ t / len(y)
            residual = cross - shared / power * sigma_w
            norms = [np.sqrt(vector @ vector) for vector in (sigma_w, cross, residual)]
            angle = np.sign(shared) * (sigma_w @ residual) / norms[0] / norms[2]
            angle = angle if norms[2] > 1e-9 * norms[1] else np.nan
            rows.append([angle, power, shared, *norms])
        columns[name] = dict(zip(ALIGNMENT, np.array(rows).T, strict=True))
    return columns


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_ingredient_is_that_of_unfolded_patches(name):
    model, loader = zoo.case(name)
    table = compute_axes(model, loader, layers="conv+linear", positions="all", alignment=True).table
    for layer, expected in reference(model, loader).items():
        rows = table[table["layer"] == layer]
        live = ~rows["dead"].to_numpy()
        for column in ALIGNMENT:
            scale = np.nanmax(np.abs(expected[column][live]), initial=0)
            if column == "residual_norm":
                scale = max(scale, np.max(expected["task_norm"][live], initial=0))
            assert_allclose(rows[column][live], expected[column][live], RTOL, RTOL * scale, err_msg=f"{layer} {column}")
        assert rows[list(ALIGNMENT)][~live].isna().all(axis=None)


@torch.no_grad()
def test_a_conv_3d_reads_what_its_weights_say():
    """Σw, measured as Cov(x, y), gives D = wᵀΣw, and c gives b = wᵀc, whatever the dimensions."""
    model, loader = zoo.case("Conv3d")
    layer, images = model[0], loader.dataset.tensors[0]
    recorder, output = PatchRecorder(layer), layer(images)
    seen = output.flatten(2)
    target = seen.mean((1, 2))[:, None]
    recorder.read(images, output, seen, None, "0")
    recorder.learn(target)
    weights, moments = layer.weight.flatten(1), recorder.moments
    power = seen.transpose(0, 1).flatten(1).var(1, correction=0)
    assert_allclose((weights * moments.outputs).sum(1), power, 1e-10)
    means = seen.mean(2)
    shared = ((means - means.mean(0)) * (target - target.mean())).mean(0)
    assert_allclose((weights * moments.target).sum(1), shared, 1e-10)


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "widening 1×1", "linear on [B, H, W, C]"])
def test_sampled_positions_keep_the_laws(name):
    """wᵀΣw is the measured power and wᵀg = 0 also where c comes from all positions and Σw from some."""
    model, loader = zoo.case(name)
    parts = zoo.recorded(model, loader, positions=3, alignment=True)
    for layer, moments in parts.items():
        weights = dict(model.named_modules())[layer].weight.flatten(1)
        local, joint = moments.local[0].merge(moments.local[1]), moments.joint[0].merge(moments.joint[1])
        assert_allclose((weights * moments.patches.outputs).sum(1).detach(), local.variance, 1e-7)
        shared = joint.covariance[: moments.channels, moments.channels]
        assert_allclose((weights * moments.patches.target).sum(1).detach(), shared, 1e-6, 1e-8)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batch_size_does_not_matter(batch):
    model, loader = zoo.case("plain")
    options = {"layers": "conv+linear", "positions": 5, "alignment": True}
    other = zoo.loader_of(loader.dataset.tensors[0], batch)
    found, expected = (compute_axes(model, data, **options).table for data in (other, loader))
    assert_allclose(found[list(ALIGNMENT)], expected[list(ALIGNMENT)], 1e-7, 1e-10)


def test_patches_that_do_not_fit_at_once_are_taken_in_turn(monkeypatch):
    model, loader = zoo.case("plain")
    whole = compute_axes(model, loader, alignment=True).table
    monkeypatch.setattr("chanaxes_pl.network.patches._NUMBERS", 1)
    assert_allclose(compute_axes(model, loader, alignment=True).table["alignment"], whole["alignment"], 1e-9)


def test_float32_keeps_six_digits_far_from_zero():
    """A mean of 100 in input and output costs no digits that matter."""
    model, loader = zoo.case("plain")
    images = loader.dataset.tensors[0] + 100
    expected = compute_axes(model, zoo.loader_of(images), positions="all", alignment=True).table["alignment"]
    found = compute_axes(model.float(), zoo.loader_of(images.float()), positions="all", alignment=True).table
    assert_allclose(found["alignment"], expected, atol=2e-4)


def test_bfloat16_keeps_what_bfloat16_has():
    model, loader = zoo.case("plain")
    expected = compute_axes(model, loader, positions="all", alignment=True).table["alignment"]
    images = loader.dataset.tensors[0].bfloat16()
    found = compute_axes(model.bfloat16(), zoo.loader_of(images), positions="all", alignment=True).table["alignment"]
    assert_allclose(found, expected, atol=0.03)


def test_the_other_columns_do_not_notice():
    model, loader = zoo.case("plain")
    plain, more = (compute_axes(model, loader, alignment=asked).table for asked in (False, True))
    assert set(more) - set(plain) == set(ALIGNMENT)
    assert plain.equals(more[list(plain)])


def test_one_input_leaves_no_direction():
    """wᵀg = 0 leaves nothing of g where w has one weight: the angle is undefined, not 0 and not ±1 from rounding."""
    model, loader = zoo.case("one channel")
    table = compute_axes(model, loader, layers="conv+linear", alignment=True).table
    of_linear = table[table["layer"] == "3"]
    assert len(of_linear) == zoo.CLASSES
    assert of_linear["alignment"].isna().all()
    assert (of_linear["task_norm"] > 0).all()
    assert table["alignment"][0] != 0


def test_processes_that_stack_their_states_get_the_whole():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 2, 5, generator=generator), torch.randn(50, 2, 3, generator=generator) + 10
    whole = CrossMoments.of(left, right)
    one, other, stacked = (MomentsMetric(CrossMoments.empty(2, 5, 3)) for _ in range(3))
    one.update(CrossMoments.of(left[:7], right[:7]))
    other.update(CrossMoments.of(left[7:20], right[7:20]))
    other.update(CrossMoments.of(left[20:], right[20:]))
    stacked.update(CrossMoments.of(left, right))
    for name in ("count", "left", "right", "scatter"):  # what a sync without reduction leaves
        setattr(stacked, name, torch.stack([getattr(one, name), getattr(other, name)]))
    before = one.scatter.clone()
    assert_allclose(stacked.merged.covariance, whole.covariance, 1e-10, 1e-12)
    assert torch.equal(one.scatter, before)
    expected = torch.stack([torch.cov(torch.cat([left[:, g], right[:, g]], 1).T, correction=0)[:5, 5:] for g in (0, 1)])
    assert_allclose(whole.covariance, expected, 1e-4, 1e-6)
    assert_allclose(CrossMoments.empty(2, 5, 3).merge_(whole).covariance, whole.covariance)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("label", r"alignment=True with a target of \d numbers an image: expected one"),
        (lambda z, y: z[:, :2], r"alignment=True with a target of 2 numbers an image: expected one"),
    ],
)
def test_a_target_of_several_numbers_has_no_one_gradient(target, message):
    model, loader = zoo.case("plain")
    with pytest.raises(ValueError, match=message):
        compute_axes(model, loader, target=target, alignment=True)


def test_one_real_label_has_a_gradient_by_name_and_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 1))
    data = TensorDataset(torch.randn(30, 3, 6, 6), torch.randn(30, 1))
    named, chosen = (compute_axes(model, data, target=target, alignment=True).table for target in ("label", "auto"))
    assert_allclose(named["alignment"], chosen["alignment"])
    assert named["alignment"].notna().all()


def same_padded(own: bool) -> nn.Module:
    """Two convolutions, of maps 6 and 3 wide, with padding before and after in their forward, or in layers before."""
    torch.manual_seed(5)
    pads = [nn.ZeroPad2d((0, 1, 0, 1)), nn.ZeroPad2d((1, 1, 1, 1))]
    convolutions = [(SameConv if own else nn.Conv2d)(*widths, 3, stride=2) for widths in ((3, 4), (4, 5))]
    pads = [nn.Identity() if own else pad for pad in pads]
    parts = [part for pair in zip(pads, convolutions, strict=True) for part in pair]
    return nn.Sequential(*parts, *zoo.head(5)).double().eval()


@pytest.mark.parametrize("positions", ["all", 2])
def test_padding_in_a_layer_of_its_own_and_in_the_forward_are_the_same(positions):
    loader = zoo.loader_of(zoo.images_2d().double())
    options = {"layers": "conv", "positions": positions, "alignment": True}
    found, wanted = (compute_axes(same_padded(own), loader, **options).table for own in (True, False))
    assert_frame_equal(found, wanted, rtol=1e-9)
    assert found[list(ALIGNMENT)].notna().all(axis=None)


def test_padding_in_the_forward_of_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.layer = SameConv(3, 3, 3) if own else nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Sequential(*zoo.head(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).relu()))

    loader = zoo.loader_of(zoo.images_2d().double())
    options = {"layers": "conv", "positions": 3, "alignment": True}
    found, wanted = (compute_axes(Twice(own).double().eval(), loader, **options).table for own in (True, False))
    assert_frame_equal(found, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda layer, x: F.conv2d(F.conv2d(x, layer.weight, padding=1), layer.weight), "does not run one 3×3 conv"),
        (lambda layer, x: F.conv2d(x, layer.weight).roll(1, 2)[..., :-1], "gives another map than its convolution"),
    ],
)
def test_a_layer_that_reads_otherwise_is_left_out_by_name_and_the_others_stay(forward, reason):
    odd = type("Odd", (nn.Conv2d,), {"forward": forward})
    model = nn.Sequential(odd(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1), *zoo.head(4)).double().eval()
    loader = zoo.loader_of(zoo.images_2d().double())
    table = compute_axes(model, loader, layers="conv", alignment=True).table.set_index("layer")
    assert table.loc["0", "reason"].str.contains(f"the forward of Odd .*{reason}").all()
    assert table.loc["0", "input_capture"].isna().all()
    assert table.loc["2", [*ALIGNMENT, "input_capture"]].notna().all(axis=None)
    assert (compute_axes(model, loader, layers="conv").table["reason"] == "").all()
