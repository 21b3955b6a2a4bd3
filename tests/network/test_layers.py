"""Which layers are tracked, how their outputs become samples, and which positions are looked at."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from chanaxes_pl import AxisTracker, LesionExperiment, compute_axes
from chanaxes_pl.analysis.upstream import input_spread
from chanaxes_pl.core.errors import naming
from chanaxes_pl.core.targets import scrambled
from chanaxes_pl.models.backbones import build_backbone
from chanaxes_pl.network.hooks import same_outputs
from chanaxes_pl.network.layers import (
    affine,
    by_position,
    channel_count,
    select_layers,
    why_not_affine,
    widens_pointwise,
)
from chanaxes_pl.network.recording import Recorder, Settings
from chanaxes_pl.network.sampling import image_means, local_samples, sample_positions
from tests.helpers import cases as zoo
from tests.helpers import reference


def network() -> nn.Module:
    """Names: stem, body.0, body.2, body.3, head."""
    model = nn.Module()
    model.stem = nn.Conv2d(3, 8, 3)
    model.body = nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Conv3d(8, 4, 1), nn.Linear(4, 4))
    model.norm = nn.LayerNorm(4)
    model.head = nn.Linear(4, 2)
    return model


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("auto", ["stem", "body.0", "body.2"]),
        ("conv", ["stem", "body.0", "body.2"]),
        ("conv+linear", ["stem", "body.0", "body.2", "body.3", "head"]),
        ("body.*", ["body.0", "body.2", "body.3"]),
        ("body.[02]", ["body.0", "body.2"]),
        ("*", ["stem", "body.0", "body.2", "body.3", "head"]),
        ("head", ["head"]),
        (["head", "st*"], ["stem", "head"]),
        (("body.0",), ["body.0"]),
        (lambda name, module: isinstance(module, nn.Linear), ["body.3", "head"]),
        (lambda name, module: channel_count(module) == 4, ["body.2", "body.3"]),
    ],
)
def test_selection(layers, expected):
    model = network()
    chosen = select_layers(model, layers)
    assert list(chosen) == expected
    assert all(module is model.get_submodule(name) for name, module in chosen.items())


def test_auto_takes_linear_layers_where_they_hold_most_of_the_weights_and_leaves_out_the_head():
    head = nn.Linear(8, 2)
    conv, mixer = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
    assert list(select_layers(nn.Sequential(conv, nn.Linear(8, 3)), "auto")) == ["0"]  # 24 weights and 24
    assert list(select_layers(nn.Sequential(conv, nn.Linear(25, 1)), "auto")) == ["0"]  # the one Linear is the head
    assert list(select_layers(nn.Sequential(conv, mixer, head), "auto")) == ["0", "1"]
    assert list(select_layers(nn.Sequential(mixer, nn.ReLU(), nn.Linear(8, 8), head))) == ["0", "2"]
    assert list(select_layers(nn.Sequential(head))) == ["0"]  # or there would be none
    assert list(select_layers(nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyLinear(3)))) == ["0"]


def test_auto_is_the_default_everywhere_and_measures_an_mlp():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4))
    table = compute_axes(mlp, zoo.loader_of(zoo.images_2d())).table
    assert table["layer"].unique().tolist() == ["1", "3"]
    assert np.isfinite(table["input_capture"]).all()
    assert Settings().layers == AxisTracker().settings.layers == LesionExperiment().layers == "auto"


def test_auto_takes_the_linear_layers_of_a_convnext():
    names = list(select_layers(build_backbone("convnext_tiny", 10, 0.25)))
    assert "features.1.0.block.3" in names  # pointwise, as Linear
    assert "classifier.2" not in names


class Holder(nn.Module):
    """A user's own attribute of that name."""

    def __init__(self):
        super().__init__()
        self.module = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.module(x)


def sharded(module):
    """As FullyShardedDataParallel holds a module, and as Lightning's wrappers do."""
    outer, inner = nn.Module(), nn.Module()
    inner._fsdp_wrapped_module, outer._forward_module = module, inner
    return outer


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, AveragedModel, sharded, lambda m: torch.compile(nn.DataParallel(m), backend="eager")],
)
def test_what_wraps_a_module_does_not_show_in_its_name(wrap):
    model = nn.Sequential(Holder(), nn.Conv2d(2, 4, 1))
    assert list(select_layers(wrap(model))) == list(select_layers(model)) == ["0.module", "1"]
    model[0] = wrap(model[0])
    assert list(select_layers(model)) == ["0.module", "1"]
    model.add_module("module", wrap(nn.Conv2d(4, 4, 1)))
    assert list(select_layers(model)) == ["0.module", "1", "module"]


def test_what_ddp_wraps_keeps_its_name(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(Holder(), nn.Conv2d(2, 4, 1)))
        assert list(select_layers(wrapped)) == ["0.module", "1"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_child_keeps_its_name_and_gives_the_same_table():
    model, loader = zoo.case("plain")
    expected = compute_axes(model, loader).table
    model[2] = torch.compile(model[2], backend="eager")
    assert list(select_layers(model)) == ["0", "2"]
    with torch.no_grad():
        model(next(iter(loader))[0])  # compiled before it is hooked
    assert compute_axes(model, loader).table.equals(expected)


def test_a_whole_compiled_model_shows_its_own_names():
    model, loader = zoo.case("plain")
    expected = compute_axes(model, loader).table
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(next(iter(loader))[0])
    assert compute_axes(compiled, loader).table.equals(expected)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("covn", r"compute_axes\(layers='covn'\): no tracked module; .*names begin with stem, body.0, body.2.*'conv'"),
        ("steam", r"did you mean 'stem'"),
        (["body.9"], r"layers=\['body.9'\].*did you mean 'body\.\d'"),
        ([], r"layers=\[\].*names begin with stem"),
        ("norm", r"no tracked module"),
        (lambda name, module: False, r"no tracked module; .*names begin with stem"),
    ],
)
def test_a_selection_of_nothing_names_what_there_is(layers, message):
    with pytest.raises(ValueError, match=message), naming("compute_axes"):
        select_layers(network(), layers)


def test_a_model_without_affine_layers_says_so():
    with pytest.raises(ValueError, match="the model has no Conv1d, Conv2d, Conv3d or Linear layer"):
        select_layers(nn.Sequential(nn.ReLU()), "conv")


def test_output_as_images_channels_positions():
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)
    maps = torch.randn(2, 4, 5, 6)
    assert torch.equal(by_position(conv, maps, 2, "c"), maps.flatten(2))
    assert by_position(conv, maps, 2, "c").data_ptr() == maps.data_ptr()
    vectors = torch.randn(2, 4)
    assert torch.equal(by_position(linear, vectors, 2, "l"), vectors[:, :, None])
    tokens = torch.randn(2, 5, 6, 4)
    assert torch.equal(by_position(linear, tokens, 2, "l"), tokens.movedim(-1, 1).flatten(2))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 1), (4, 5, 5)),
        (nn.Conv1d(3, 4, 1), (4, 5)),
        (nn.Linear(3, 4), (4,)),
        (nn.Linear(3, 4), (6, 4)),
    ],
)
def test_an_output_whose_first_dimension_is_not_the_batch_is_refused(layer, shape):
    message = r"layer 'odd' gave an output of shape .* for a batch of 2 images: expected .*B = 2.*layers="
    with pytest.raises(ValueError, match=message):
        by_position(layer, torch.zeros(shape), 2, "odd")


@pytest.mark.parametrize("shape", [(3, 5, 1), (2, 3, 70_000), (40, 16, 900), (1, 1, 300_000)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_image_means_are_the_means_in_double(shape, offset):
    output = offset + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = image_means(output)
    assert found.dtype == torch.float64
    assert_allclose(found, output.double().mean(-1), 1e-12, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_image_means_of_other_types(dtype):
    output = torch.randn(5, 6, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_allclose(image_means(output), output.double().mean(-1), 1e-12, 1e-14)


def test_image_means_of_channels_last_and_of_strided_outputs():
    maps = torch.randn(9, 8, 20, 20, generator=torch.Generator().manual_seed(0))
    last = by_position(nn.Conv2d(3, 8, 1), maps.to(memory_format=torch.channels_last), 9, "c")
    assert_allclose(image_means(last), maps.double().mean((2, 3)), 1e-12, 1e-14)
    tokens = maps.movedim(1, -1).contiguous()
    assert_allclose(image_means(by_position(nn.Linear(3, 8), tokens, 9, "l")), maps.double().mean((2, 3)), 1e-12, 1e-14)


def test_a_float32_mean_would_not_do():
    """Negative control of the tolerance above."""
    output = 1e4 + torch.randn(2, 3, 70_000, generator=torch.Generator().manual_seed(0))
    assert not np.allclose(output.mean(-1).double(), output.double().mean(-1), rtol=1e-12)


def test_local_samples_are_the_channels_at_the_chosen_places():
    output = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    rows = local_samples(output, torch.tensor([1, 0]), torch.tensor([[4, 0], [2, 3]]))
    expected = [output[1, :, 4], output[1, :, 0], output[0, :, 2], output[0, :, 3]]
    assert torch.equal(rows, torch.stack(expected))
    everything = local_samples(output, torch.tensor([0, 1]), None)
    assert torch.equal(everything, torch.cat([output[0].T, output[1].T]))


@pytest.mark.parametrize("total", [2, 3, 9, 16, 49, 64, 97, 1024])
@pytest.mark.parametrize("count", [1, 4, 16, 63])
def test_positions_of_an_image_are_distinct_and_inside(total, count):
    places = sample_positions(np.arange(200), total, count)
    if count >= total:
        assert places is None
        return
    assert places.shape == (200, count)
    assert places.min() >= 0
    assert places.max() < total
    assert all(len(set(row)) == count for row in places.tolist())


def test_positions_depend_on_the_index_alone():
    whole = sample_positions(np.arange(50), 64, 16)
    state = torch.get_rng_state()
    shuffled = np.random.default_rng(0).permutation(50)
    assert torch.equal(sample_positions(shuffled, 64, 16), whole[shuffled])
    assert torch.equal(sample_positions(np.array([37]), 64, 16)[0], whole[37])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("total", "count"), [(16, 4), (49, 16), (64, 1), (100, 16)])
def test_over_images_every_position_comes_up_equally_often(total, count):
    images = 20_000
    hits = np.bincount(sample_positions(np.arange(images), total, count).numpy().ravel(), minlength=total)
    expected = images * count / total
    assert_allclose(hits, expected, atol=6 * np.sqrt(expected))


def test_positions_of_one_image_lie_spread_out():
    """No gap between the 16 of 64 chosen places is more than three times the even one."""
    for row in sample_positions(np.arange(100), 64, 16).sort(1).values.tolist():
        gaps = np.diff([*row, row[0] + 64])
        assert gaps.max() <= 12


def test_the_hash_is_uniform_and_without_repeats():
    numbers = scrambled(np.arange(100_000))
    assert numbers.dtype == np.uint64
    assert len(np.unique(numbers)) == 100_000
    assert int(numbers[0]) == 0xE220A8397B1DCDAF  # SplitMix64 of seed 0, first output
    bits = np.array([((numbers >> np.uint64(k)) & np.uint64(1)).mean() for k in range(64)])
    assert_allclose(bits, 0.5, atol=0.01)


def test_which_layers_are_followed_through_their_narrower_input():
    wide = [nn.Conv2d(3, 8, 1), nn.Conv1d(3, 4, 1, bias=False), nn.Conv3d(1, 2, 1), nn.Linear(4, 9)]
    others = [
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 3, 1),
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, 1, stride=2),
        nn.Conv2d(3, 8, 1, padding=1),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(3, 8, (1, 3)),
        nn.Linear(9, 9),
    ]
    assert all(map(widens_pointwise, wide))
    assert not any(map(widens_pointwise, others))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 1), nn.Conv1d(3, 4, 1, bias=False), nn.Linear(4, 9)])
def test_the_affine_map_of_a_layer_is_what_the_layer_does(layer):
    weight, bias = affine(layer)
    x = torch.randn(5, weight.shape[1], 1, 1)
    x = x if isinstance(layer, nn.Conv2d) else x[..., 0] if isinstance(layer, nn.Conv1d) else x[..., 0, 0]
    expected = layer(x).flatten(1)
    assert_allclose(x.flatten(1) @ weight.T + bias, expected.detach(), 1e-5, 1e-6)
    assert not weight.requires_grad


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_widening_1x1_convolution_with_padding_by_name_is_measured_like_any_other(padding):
    by_name = nn.Conv2d(3, 8, 1, padding=padding).double()
    plain = nn.Conv2d(3, 8, 1).double()
    plain.load_state_dict(by_name.state_dict())
    tail = nn.Sequential(*zoo.head(8)).double()
    loader = zoo.loader_of(zoo.images_2d().double())
    tables = [compute_axes(nn.Sequential(first, tail), loader).table for first in (by_name, plain)]
    numbers = tables[0].select_dtypes("number").columns
    assert_allclose(tables[0][numbers], tables[1][numbers], 1e-8, 1e-10)


class Normed(nn.Conv2d):
    """Weights of length 1."""

    def forward(self, x):
        return F.conv2d(x, F.normalize(self.weight.flatten(1), dim=1)[..., None, None], self.bias)


class Squashed(nn.Linear):
    def forward(self, x):
        return super().forward(x.tanh())


class Derived(nn.Conv2d):
    """Does what its class does."""


def with_hook(layer, before=False):
    if before:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))
    else:
        layer.register_forward_hook(lambda _, __, output: output.tanh())
    return layer


def replaced(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x.tanh())
    return layer


NOT_AFFINE = {
    "forward of its own": lambda: Normed(3, 8, 1),
    "forward of an instance": lambda: replaced(nn.Conv2d(3, 8, 1)),
    "parametrized": lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 1)),
    "masked": lambda: torch_prune.random_unstructured(nn.Conv2d(3, 8, 1), "weight", 0.5),
    "hook": lambda: with_hook(nn.Conv2d(3, 8, 1)),
    "pre-hook": lambda: with_hook(nn.Conv2d(3, 8, 1), before=True),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_widening_layers_that_are_not_affine_are_measured_at_their_outputs(name):
    torch.manual_seed(0)
    first = NOT_AFFINE[name]().double()
    model = nn.Sequential(first, *zoo.head(8)).double()
    loader = zoo.loader_of(zoo.images_2d().double())
    table = compute_axes(model, loader, layers=["0"], positions="all").table
    outputs, logits, labels = zoo.captured(model, loader, ["0"])
    found = outputs["0"]
    expected = reference.layer_columns(
        found.swapaxes(1, 2).reshape(-1, 8), found.mean(2), reference.margins(logits, labels)
    )
    for column in ("input_capture", "peer_overlap", "task_information"):
        assert_allclose(table[column], expected[column], 1e-8, err_msg=column)
    assert why_not_affine(first)
    assert not widens_pointwise(first)


def test_linear_layers_with_a_forward_of_their_own_are_measured_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), zoo.Apply(lambda x: x.mean((2, 3))), Squashed(4, 9)).double()
    loader = zoo.loader_of(zoo.images_2d().double())
    table = compute_axes(model, loader, layers=["2"]).table
    output = zoo.captured(model, loader, ["2"])[0]["2"][..., 0]
    assert_allclose(table["input_capture"], reference.input_capture(output), 1e-8)


def test_a_subclass_without_a_forward_of_its_own_is_what_its_class_is():
    assert why_not_affine(Derived(3, 8, 1)) == ""
    assert widens_pointwise(Derived(3, 8, 1))


def test_hooks_of_ours_only_look():
    layer = nn.Conv2d(3, 8, 1)
    with input_spread({"layer": layer}), Recorder({"layer": layer}, lambda logits, labels: logits[:, 0]).attached():
        assert widens_pointwise(layer)


def test_a_widening_layer_whose_call_gives_something_else_is_measured():
    """A hook on all modules is seen on none of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *zoo.head(8)).double()
    loader = zoo.loader_of(zoo.images_2d().double())
    squash = nn.modules.module.register_module_forward_hook(
        lambda layer, _, output: output.tanh() if isinstance(layer, nn.Conv2d) else None
    )
    try:
        table = compute_axes(model, loader, positions="all").table
        output = zoo.captured(model, loader)[0]["0"]
    finally:
        squash.remove()
    assert_allclose(table["input_capture"], reference.input_capture(output.swapaxes(1, 2).reshape(-1, 8)), 1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_same_outputs_are_the_same_at_every_scale(scale):
    wanted = scale * torch.tensor([1.0, -2.0, 0.0, math.nan])
    assert same_outputs(wanted + 1e-4 * scale, wanted, 1e-4)
    assert not same_outputs(wanted + 1e-3 * scale, wanted, 1e-4)
    assert not same_outputs(wanted.nan_to_num(0.0), wanted, 1e-4)
    assert not same_outputs(wanted[None], wanted, 1e-4)
    assert not same_outputs(None, wanted, 1e-4)
