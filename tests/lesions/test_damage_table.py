"""Lesions: what they do to a model and for how long, and the table of damage against a slow loop."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import LesionExperiment
from chanaxes_pl.lesions.damage_table import join_shares, lesion_table
from chanaxes_pl.lesions.interventions import OPERATIONS
from chanaxes_pl.models import BACKBONES
from chanaxes_pl.network.batches import Placement, default_step
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import remove
from tests.helpers import cases as zoo
from tests.helpers import reference
from tests.helpers import training as small
from tests.helpers.filters import as_filter
from tests.helpers.lesions import lesion
from tests.lesions.test_replacements import assert_unchanged, loader, replacements_of, snapshot
from tests.network.test_tracing import Branching, backbone, batch, build

#: A few layers of each backbone: the first, inner ones, and such as a residual sum ties to others.
LAYERS = {
    "resnet18": ["conv1", "layer2.0.conv?", "layer2.0.downsample.0"],
    "vgg16_bn": ["features.0", "features.24"],
    "mobilenet_v2": ["features.0.0", "features.3.conv.*"],
    "convnext_tiny": ["features.0.0", "features.3.1.block.?", "features.2.1"],
}


def same(batch):
    return batch


def model() -> nn.Module:
    """Small, in training mode but for a frozen norm; its last norm is used as far as it comes."""
    return small.build(dropout=0.3).double()


def table(network=None, **options) -> pd.DataFrame:
    return lesions(network or model(), loader(seed=3), loader(), **{"positions": "all"} | options)


def lesions(network, probe, evaluation, **options) -> pd.DataFrame:
    """The table of a :class:`LesionExperiment` with those options that are its fields."""
    fields = {field.name for field in dataclasses.fields(LesionExperiment)}
    experiment = LesionExperiment(**{name: value for name, value in options.items() if name in fields})
    others = {name: value for name, value in options.items() if name not in fields}
    return lesion_table(network, probe, evaluation, experiment, **{"progress": False} | others)


def transformer() -> nn.Module:
    """Patches, and a layer of torch's transformer, whose attention is plain products only in a copy."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
            self.head = nn.Linear(8, zoo.CLASSES)

        def forward(self, images):
            return self.head(self.block(self.patches(images).flatten(2).mT).mean(1))

    torch.manual_seed(0)
    return Net().eval()


def weight_normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, zoo.CLASSES),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("make", [transformer, weight_normed])
def test_what_can_be_pruned_can_be_lesioned(make):
    """Each unit's damage is that of the network without it."""
    pictures, labels = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    network = make()
    found = lesions(network, None, [(pictures, labels)], operations=("zero",), layers="conv+linear")
    units = find_units(network, pictures[:1])
    assert set(found.loc[found["zero_loss"].isna(), "layer"]) <= {"head", "6"}
    with torch.no_grad():
        intact = F.cross_entropy(network(pictures), labels)
        for name, group in units.groups.items():
            for unit in range(group.size):
                kept = torch.tensor([other for other in range(group.size) if other != unit])
                slim = copy.deepcopy(plain(network))
                remove(slim, [group], {name: kept})
                damage = float(F.cross_entropy(slim(pictures), labels) - intact)
                told = found.loc[found["unit"] == f"{name}[{unit}]", "zero_loss"]
                assert_allclose(told, damage, atol=1e-6)


# ---------------------------------------------------------------- contexts


@pytest.mark.parametrize("operation", [*OPERATIONS, "filter"])
def test_everything_is_as_before_after_an_error(operation):
    network = backbone("convnext_tiny")
    data = loader(side=32)
    layer = "features.2.1" if operation != "filter" else "features.1.0.block.3"
    statistics = replacements_of(network, [layer], data)[layer]
    units = find_units(network, batch(1))
    before = snapshot(network)
    context = lesion(network, layer, 1, operation, statistics=statistics, units=units)
    if operation == "filter":
        context = as_filter(network.get_submodule(layer), 1, statistics)
    differs = []

    def fail():
        with context:
            differs.append(not network(batch()).allclose(whole))
            raise KeyError("on purpose")

    with observed(network):
        whole = network(batch())
        with pytest.raises(KeyError, match="on purpose"):
            fail()
    assert differs == [True]
    assert_unchanged(before, network)


@pytest.mark.parametrize("name", BACKBONES)
def test_zero_is_what_removal_does(name):
    network, images = backbone(name), batch()
    units = find_units(network, images[:1])
    with observed(network):
        for group in list(units.groups.values())[::5]:
            layer, members = list(group.producers.items())[-1]
            unit = group.size // 2
            slim = copy.deepcopy(network)
            remove(slim, [group], {group.name: torch.tensor([u for u in range(group.size) if u != unit])})
            with lesion(network, layer, int(members[unit][0]), "zero", units=units):
                torch.testing.assert_close(network(images), slim(images), rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", BACKBONES)
def test_running_in_part_gives_the_table_of_whole_forwards(name):
    network = backbone(name)
    before = snapshot(network)
    data = loader(12, 32, 8)
    options = {"layers": LAYERS[name], "channels": 1, "positions": 4}
    fast, slow = (lesions(network, data, data, fast=fast, **options) for fast in (True, False))
    pd.testing.assert_frame_equal(fast, slow, rtol=1e-8, atol=1e-10)
    assert (fast[[f"{op}_loss" for op in OPERATIONS]].abs() > 1e-6).to_numpy().mean() > 0.9
    assert (fast["reason"] == "").all()
    assert_unchanged(before, network)


def test_a_network_without_a_graph_gives_the_same_either_way():
    options = {"layers": "conv+linear", "units": find_units(build(Branching), batch(2, 8))}
    fast, slow = (table(build(Branching), fast=fast, **options) for fast in (True, False))
    pd.testing.assert_frame_equal(fast, slow, rtol=1e-9)
    custom = table(build(Branching), step=default_step, **options)
    pd.testing.assert_frame_equal(custom, slow, rtol=1e-9)


def slow_table(network, layer, channel) -> dict[str, float]:
    """One row by explicit surgery on copies, image by image."""
    images, labels = (torch.cat(part) for part in zip(*loader(), strict=True))
    network = network.eval()
    seen = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2].detach()))
    for probed, _ in loader(seed=3):
        network(probed)
    handle.remove()
    samples = torch.cat(seen).movedim(1, -1).flatten(0, -2).numpy()
    coefficients = reference.peer_reconstruction(samples)[0] * samples.std(0)[:, None] / samples.std(0)

    def mean(output):
        return torch.full_like(output[:, 0], samples[:, channel].mean())

    def peer(output):
        shift = output - torch.from_numpy(samples.mean(0))[:, None, None]
        return mean(output) + sum(coefficients[channel, j] * shift[:, j] for j in range(output.shape[1]))

    def logits(replace):
        twin = copy.deepcopy(network)

        def hook(_module, _inputs, output):
            output = output.clone()
            output[:, channel] = replace(output)
            return output

        if replace:
            twin.get_submodule(layer).register_forward_hook(hook)
        return torch.cat([twin(image[None]) for image in images]).detach()

    def numbers(z):
        margin = reference.margins(z.numpy(), labels)
        return F.cross_entropy(z, labels, reduction="none").numpy(), (z.argmax(1) == labels).numpy() * 1.0, margin

    row, intact = {}, numbers(logits(None))
    for name, replace in (("mean", mean), ("peer", peer)):
        loss, accuracy, margin = (hurt - whole for hurt, whole in zip(numbers(logits(replace)), intact, strict=True))
        row |= {f"{name}_loss": loss.mean(), f"{name}_loss_se": loss.std(ddof=1) / np.sqrt(len(loss))}
        row |= {f"{name}_accuracy": accuracy.mean(), f"{name}_margin": margin.mean()}
    row |= dict(zip(("loss", "accuracy", "margin"), (x.mean() for x in intact), strict=True))
    return row


@pytest.mark.parametrize(("layer", "channel"), [("net.0", 4), ("net.4", 0), ("net.4", 7)])
def test_damage_agrees_with_surgery_image_by_image(layer, channel):
    found = table()
    row = found[(found["layer"] == layer) & (found["channel"] == channel)].iloc[0]
    expected = slow_table(model(), layer, channel)
    baseline = found.attrs["baseline"]
    assert baseline["images"] == 24
    assert_allclose(
        [baseline[name] for name in ("loss", "accuracy", "margin")], list(expected.values())[-3:], rtol=1e-9
    )
    for name, value in list(expected.items())[:-3]:
        assert_allclose(row[name], value, rtol=1e-7, atol=1e-12, err_msg=name)


def test_recovery_is_a_share_of_clear_damage_only():
    network = model()
    network.net[9].weight.data *= 30
    images = loader().dataset.tensors[0]
    with observed(network):
        own = DataLoader(TensorDataset(images, network(images).argmax(1)), batch_size=10)
    found = lesions(network, loader(seed=3), own, channels={"net.4": range(8)})
    clear = found["mean_loss"] > 2 * found["mean_loss_se"]
    assert clear.any()
    assert not clear.all()
    for name in ("peer", "hull"):
        assert found[f"{name}_recovery"].notna().equals(clear)
        expected = 1 - found[f"{name}_loss"][clear] / found["mean_loss"][clear]
        assert_allclose(found[f"{name}_recovery"][clear], expected, rtol=1e-12)
    assert "peer_recovery" not in table(operations=["peer"], channels=1)


def test_channels_that_cannot_be_removed_say_why():
    network, images = model(), next(iter(loader()))[0]
    why = find_units(network, images).fixed["net.9"]
    found = table(network, layers="conv+linear").set_index("layer").loc["net.9"]
    assert found["zero_loss"].isna().all()
    assert found["mean_loss"].notna().all()
    assert (found["reason"] == f"cannot be removed: {why}").all()
    assert (found["unit"] == "").all()
    units = find_units(network, images)
    with pytest.raises(ValueError, match=f"cannot be removed: {why}"):
        lesion(network, "net.9", 0, "zero", units=units).__enter__()


def test_layers_that_are_not_reached_and_outputs_that_are_not_finite_say_so():
    network, data = zoo.case("dead channels")
    network.add_module("spare", nn.Identity())
    network.spare.conv = nn.Conv2d(3, 2, 3).double()
    found = lesions(network, data, data, operations=["mean"]).set_index(["layer", "channel"])
    assert (
        found["reason"]["spare.conv"].tolist()
        == ["the forward pass did not reach this layer, or not with one output an image"] * 2
    )
    assert found["reason"]["0"].tolist() == ["output not finite" if k in (6, 7) else "" for k in range(10)]
    assert found["mean_loss"].isna().equals(found["reason"] != "")
    assert_allclose(found["mean_loss"]["0"][[1, 4]], 0.0, atol=1e-12)  # dead: the mean is all there is


def test_tied_layers_share_their_units_damage_and_its_cost():
    network, data = backbone("resnet18"), loader(6, 32, 6)
    options = {"units": find_units(network, batch(1)), "operations": ["zero"]}
    calls = []
    network.fc.register_forward_hook(lambda *_: calls.append(1))
    channels = {"conv1": [3, 5], "layer1.0.conv2": [5], "layer1.1.conv2": [3, 7]}
    found = lesions(network, None, data, channels=channels, **options)
    units = found["unit"].unique()
    assert units.tolist() == ["conv1[3]", "conv1[5]", "conv1[7]"]
    assert found.groupby("unit")["zero_loss"].nunique().eq(1).all()
    intact = 2  # as a whole, and by its graph
    assert len(calls) == intact + len(units)


def test_shares_make_the_whole_table(tmp_path):
    whole = table(channels=3)
    shares = []
    for rank in range(4):
        table(channels=3, place=Placement(same, rank=rank, world=4)).to_parquet(tmp_path / f"{rank}.parquet")
        shares.append(pd.read_parquet(tmp_path / f"{rank}.parquet"))
    joined = join_shares(shares)
    pd.testing.assert_frame_equal(joined, whole, rtol=1e-12)
    assert joined.attrs == whole.attrs
    untyped = whole[:0].assign(channel=pd.Series([], dtype=float))  # of a process that had none to make
    pd.testing.assert_frame_equal(join_shares([whole[:1], untyped]), whole[:1])
    assert len(whole) == 6
    assert table(channels=3, seed=1)["channel"].tolist() != whole["channel"].tolist()


def test_the_model_and_the_random_stream_are_left_as_they_were():
    network = model()
    before, stream = snapshot(network), torch.get_rng_state()
    table(network, channels=1)
    assert_unchanged(before, network)
    assert torch.get_rng_state().equal(stream)
    assert network.training
    assert not network.frozen.training


def test_the_bar_counts_lesions_on_a_terminal_only(capsys, monkeypatch):
    table(channels=1, operations=["mean"], progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    table(channels=1, operations=["mean"], progress=True)
    assert "6/6" in capsys.readouterr().err  # two layers on three batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"operations": ["zero", "pear"]},
            r"unknown operation 'pear'; expected 'zero', .*; did you mean 'peer'",
        ),
        ({"channels": {"net.5": [0]}}, r"no layer 'net\.5'; did you mean 'net\.\d' or 'net\.\d'"),
        ({"channels": {"net.4": [0, 8]}}, r"layer 'net\.4' has no channel 8; expected 0 to 7"),
        ({"operations": []}, r"LesionExperiment\(operations=\[\]\): expected one at least"),
        ({"scores": ["l3"]}, r"LesionExperiment\(score='l3'\): no such score"),
        ({"channels": 0}, r"channels=0\): expected 'all', a number of channels per layer"),
        ({"layers": "covn"}, r"lesion_table\(layers='covn'\): no tracked module"),
        ({"step": default_step}, r"'zero' needs units=find_units\(model, example\)"),
    ],
)
def test_errors_of_the_table_quote_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        table(**options)


def test_evaluation_images_that_can_be_read_once_are_refused():
    """The first batch would be missing: it tells the units."""
    with pytest.raises(TypeError, match=r"lesion_table\(evaluation=.*\): expected batches that can be read again"):
        lesion_table(model(), loader(), iter(loader()), progress=False)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, tuple], ids=["torch", "NumPy", "list", "tuple"])
def test_channels_may_be_whole_numbers_of_any_kind(kind):
    wanted = table(layers=["net.0"], channels={"net.0": [1, 3]}, operations=("zero", "mean"))
    found = table(layers=["net.0"], channels={"net.0": kind([1, 3])}, operations=("zero", "mean"))
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)
    assert wanted["zero_loss"].notna().all()


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"net.0": [1.5]}, r"lesion_table\(channels=\{'net.0': \[1.5\], …\}\): expected the numbers of channels"),
        ({"net.0": 3}, r"channels=\{'net.0': 3, …\}\): expected the numbers of channels, such as \[0, 5\]"),
        ({"net.0": "all"}, r"channels=\{'net.0': 'all', …\}\): expected the numbers"),
    ],
)
def test_channels_that_are_no_numbers_are_refused(channels, message):
    with pytest.raises(TypeError, match=message):
        table(channels=channels)


@pytest.mark.parametrize("channels", [True, {}, 0])
def test_no_channels_are_refused(channels):
    with pytest.raises(ValueError, match=r"LesionExperiment\(channels=.*\): expected 'all', a number of channels"):
        LesionExperiment(channels=channels)


def test_other_kinds_of_experiment_are_refused():
    with pytest.raises(TypeError, match=r"lesion_table\(experiment='lesion'\): expected a LesionExperiment\(…\)"):
        lesion_table(model(), loader(), loader(), "lesion")
    with pytest.raises(TypeError, match=r"LesionExperiment\(operations='zero'\): expected several, such as \['zero'\]"):
        LesionExperiment(operations="zero")


def test_units_of_another_network_are_refused():
    example = next(iter(loader()))[0][:1]
    with pytest.raises(ValueError, match=r"units=…\): group '.*' has .* channels of .*, and this network has no such"):
        table(units=find_units(weight_normed(), example.float()), operations=("zero",))


def test_a_step_that_gives_no_pair_is_told():
    units = find_units(model(), next(iter(loader()))[0][:1])
    with pytest.raises(
        ValueError, match=r"lesion_table\(step=… gave a tensor of shape .*\): expected a pair \(outputs, lab"
    ):
        table(operations=("zero",), units=units, step=lambda module, batch: module(batch[0]))


def test_images_or_weights_that_give_nan_are_told():
    (images, labels), *_ = loader()
    spoiled = images.clone()
    spoiled[2] = float("nan")
    with pytest.raises(ValueError, match=rf"gives logits with NaN or infinity for 1 of {len(images)} images: expected"):
        lesions(model(), None, [(spoiled, labels)], operations=("zero",))
    broken = model()
    with torch.no_grad():
        next(broken.parameters())[1] = float("nan")
    with pytest.raises(ValueError, match=rf"with NaN or infinity for {len(images)} of {len(images)} images"):
        lesions(broken, None, [(images, labels)], operations=("zero",))


def test_a_loaders_generator_is_left_as_it_was():
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(loader().dataset, batch_size=5, shuffle=True, generator=generator)
    before = generator.get_state()
    lesions(model(), None, data, operations=("zero",), channels=1)
    assert torch.equal(generator.get_state(), before)


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank=2, world=2: expected rank from 0"):
        Placement(same, rank=2, world=2)


def test_errors_of_the_data_say_what_is_missing():
    empty = DataLoader(TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)))
    for operations in (["zero"], ["mean"]):
        with pytest.raises(ValueError, match=r"evaluation\): it holds no images"):
            lesions(model(), loader(), empty, operations=operations)
    with pytest.raises(ValueError, match="expected a probe for all operations but 'zero'"):
        lesions(model(), None, loader())
