"""Scores of channels and units: each against a slow, obvious computation, in the direction "low = remove"."""

import re

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import compute_axes
from chanaxes_pl.analysis.scores import OWN_SCORES, SCORES, own_scores, score_family
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.models.backbones import BACKBONES, build_backbone
from chanaxes_pl.pruning.baselines import weight_score
from chanaxes_pl.pruning.scores import channel_scores, default_scores, unit_ranks, unit_values
from chanaxes_pl.units.groups import Units, find_units
from chanaxes_pl.units.removal import Group
from tests.helpers import cases as zoo
from tests.helpers import training as small
from tests.helpers.networks import Net
from tests.test_axes import assert_untouched, snapshot


class Residual(nn.Module):
    """A stem and a block that share channels, a depthwise layer, and a head behind a flattened 2 × 2 map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.outer, self.outer_norm = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)
        self.depthwise, self.depthwise_norm = nn.Conv2d(6, 6, 3, stride=3, groups=6, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(24, zoo.CLASSES)
        self.drop = nn.Dropout(0.5)
        for norm in (self.norm, self.inner_norm, self.outer_norm, self.depthwise_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer_norm(self.outer(self.inner_norm(self.inner(x)).relu()))
        return self.head(self.drop(self.depthwise_norm(self.depthwise(x.relu())).relu().flatten(1)))


def residual() -> tuple[nn.Module, DataLoader, Units]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Residual()
    return model, zoo.loader_of(zoo.images_2d(40)), find_units(model, zoo.images_2d(2))


def grouped() -> tuple[nn.Module, DataLoader, Units]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), *zoo.head(4)]
        model = nn.Sequential(*layers)
    return model, zoo.loader_of(zoo.images_2d(40)), find_units(model, zoo.images_2d(2))


def scored(case: tuple[nn.Module, DataLoader, Units], *scores: str, **options) -> dict[str, dict[str, Tensor]]:
    return channel_scores(*case, scores, **options)


# ---------------------------------------------------------------- weights and gradients


def formulas(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the filters ``[C, …]`` of a layer, one filter at a time."""
    filters = [w.ravel().astype(np.float64) for w in weight]
    squares = [float(np.sum(w * w)) for w in filters]
    return {
        "l1": np.array([np.abs(w).sum() for w in filters]),
        "l2": np.array(squares),
        "lamp": np.array([own / sum(other for other in squares if other >= own) for own in squares]),
        "fpgm": np.array([sum(np.linalg.norm(own - other) for other in filters) for own in filters]),
    }


@pytest.mark.parametrize("case", [residual, grouped])
def test_scores_of_weights_are_their_formulas(case):
    values = scored(case(), "l1", "l2", "lamp", "fpgm")
    model, _, units = case()
    for group in units.groups.values():
        for layer in group.producers:
            for score, expected in formulas(model.get_submodule(layer).weight.detach().numpy()).items():
                np.testing.assert_allclose(values[score][layer], expected, rtol=1e-5)


def test_fpgm_measures_distances_between_weights_not_their_squares():
    """Filters 1 and −1 have equal squares, and are the two that lie farthest apart."""
    layer = nn.Conv2d(1, 3, 1, bias=False)
    layer.weight.data[:, 0, 0, 0] = torch.tensor([1.0, -1.0, 0.25])
    assert weight_score("fpgm", layer).tolist() == [2.75, 3.25, 2.0]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_scores_of_wide_layers_and_of_equal_filters(kind):
    """More than 25 rows, where torch takes distances by products, and ties."""
    layer = nn.Linear(40, 64).to(kind)
    layer.weight.data[7] = layer.weight.data[3]
    wanted = formulas(layer.weight.detach().float().numpy())
    for score in ("l1", "l2", "fpgm"):
        found = weight_score(score, layer)
        np.testing.assert_allclose(found.float(), wanted[score], rtol=1e-5 if kind == torch.float32 else 0.02)
        assert float(found[3]) == pytest.approx(float(found[7]))
    assert not weight_score("l1", layer).requires_grad


def test_bn_scale_is_that_of_the_norm_right_behind():
    case = model, *_ = residual()
    values = scored(case, "bn_scale")["bn_scale"]
    norms = {"stem": "norm", "inner": "inner_norm", "outer": "outer_norm", "depthwise": "depthwise_norm"}
    assert set(values) == set(norms)
    for layer, norm in norms.items():
        assert torch.equal(values[layer], model.get_submodule(norm).weight.detach().abs().double())


def test_bn_scale_is_refused_where_a_layer_has_no_norm():
    with pytest.raises(ValueError, match=r"score='bn_scale': no BatchNorm .* right after 0, 2; .*l2, taylor"):
        scored(grouped(), "bn_scale")


def test_taylor_is_weight_times_gradient_of_the_mean_cross_entropy():
    case = model, loader, units = residual()
    values = scored(case, "taylor")["taylor"]
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    loss = F.cross_entropy(model.eval()(images), labels)
    for group in units.groups.values():
        for layer in group.producers:
            weight = model.get_submodule(layer).weight
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            expected = (weight * gradient).abs().flatten(1).sum(1).detach().double()
            torch.testing.assert_close(values[layer], expected, rtol=1e-4, atol=1e-7)


def test_taylor_names_a_loss_that_is_not_finite():
    case = model, *_ = residual()
    nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(ValueError, match=r"score='taylor': the cross-entropy over the probe is nan"):
        scored(case, "taylor")


def test_all_scores_leave_the_model_and_the_random_streams_as_they_were():
    case = model, *_ = residual()
    model.stem.weight.requires_grad_(False)
    model.norm.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.weight.grad, kept = None, model.head.weight.grad
    before = snapshot(model)
    scored(case, *SCORES)
    assert_untouched(model, before)
    model.head.weight.grad = kept
    scored(case, "taylor")
    assert model.head.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))


def folded(net: Net, x: Tensor) -> Tensor:
    """Linear layers on positions in the first dimension, as attention in windows has them."""
    x = net.inner(net.stem(x).movedim(1, -1).flatten(0, 2)).relu()
    return net.head(net.outer(x).unflatten(0, (-1, 36)).mean(1))


def positions_first(net: Net, x: Tensor) -> Tensor:
    """Linear layers on ``[positions, B, C]``, of as many positions as there may be images."""
    x = net.inner(net.stem(x).flatten(2).permute(2, 0, 1)).relu()
    return net.head(net.outer(x).mean(0))


@pytest.mark.parametrize(("forward", "count"), [(folded, 2), (positions_first, 36)])
def test_scores_of_activations_apply_where_every_layer_can_be_measured(forward, count, caplog):
    layers = {"stem": nn.Conv2d(3, 6, 1), "inner": nn.Linear(6, 8), "outer": nn.Linear(8, 5), "head": nn.Linear(5, 4)}
    model, images = Net(forward, **layers), zoo.images_2d(count)
    with caplog.at_level("INFO"):
        found = default_scores(model, find_units(model, images), images)
    assert not {*OWN_SCORES, "activation_rms"} & set(found)
    assert {"reconstruction", "l1", "taylor", "random"} <= set(found)
    assert "could not be measured: 'inner' and 1 more, it gave an output of shape" in caplog.text
    assert "2 images: expected" in caplog.text
    protected = find_units(model, images).protect(["inner", "outer"])
    assert set(OWN_SCORES) <= set(default_scores(model, protected, images))


# ---------------------------------------------------------------- our own metrics


def test_metrics_are_the_columns_of_the_table_with_their_direction():
    case = model, loader, _ = residual()
    values = scored(case, *OWN_SCORES, "activation_rms")
    table = compute_axes(model, loader, layers="conv+linear", reliability=False, resamples=0).table
    outputs, *_ = zoo.captured(model, loader)
    for layer in ("stem", "inner", "outer", "depthwise"):
        rows = table[table["layer"] == layer]
        for name in ("input_capture", "task_information", "target_excess"):
            np.testing.assert_allclose(values[name][layer], rows[name], rtol=1e-9)
        for name in ("peer_overlap", "peer_r2"):
            np.testing.assert_allclose(
                values[f"minus_{name}"][layer], rows[name].max() - rows[name], rtol=1e-9, atol=1e-12
            )
        z = {name: (rows[name] - rows[name].mean()) / rows[name].std(ddof=0) for name in METRICS}
        local = (z["input_capture"] - z["peer_overlap"]) / 2
        target = (z["task_information"] + z["target_excess"]) / 2
        for name, axis in {"keep_local": local, "keep_target": target, "keep_both": (local + target) / 2}.items():
            np.testing.assert_allclose(values[name][layer], axis - axis.min(), rtol=1e-6, atol=1e-9)
            assert values[name][layer].min() == 0
    whole = scored(case, "activation_rms", positions="all")["activation_rms"]
    for layer, values_of_layer in whole.items():
        expected = np.sqrt(np.square(outputs[layer], dtype=np.float64).mean((0, 2)))
        np.testing.assert_allclose(values_of_layer, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OWN_SCORES)
def test_the_reverse_is_the_opposite_order(name):
    values = scored(residual(), name, f"reverse_{name}")
    for layer, forth in values[name].items():
        back = values[f"reverse_{name}"][layer]
        assert torch.equal(back, forth.max() - forth)
        np.testing.assert_array_equal(rankdata(back), len(forth) + 1 - rankdata(forth))


def test_dead_channels_go_first_in_our_own_scores_and_their_reverses():
    case = model, *_ = residual()
    with torch.no_grad():
        model.inner.weight[[1, 3]] = 0.0
    names = [*OWN_SCORES, *(f"reverse_{name}" for name in OWN_SCORES)]
    for values in scored(case, *names).values():
        assert values["inner"].isinf().tolist() == [False, True, False, True, False]
        assert (values["inner"][[1, 3]] < 0).all()
        assert values["stem"].isfinite().all()


def test_live_channels_without_peers_stay_behind_the_dead():
    columns = {name: np.array([np.nan, 0.5]) for name in ("input_capture", "task_information")}
    columns |= {name: np.array([np.nan, np.nan]) for name in ("peer_overlap", "peer_r2", "target_excess")}
    for values in own_scores(columns | {"dead": np.array([True, False])}).values():
        assert values[0] == -torch.inf
        assert values[1].isfinite()
    nobody = own_scores(columns | {"dead": np.array([True, True])})
    assert all((values == -torch.inf).all() for values in nobody.values())


def test_a_target_that_does_not_vary_is_named_where_it_matters():
    case = model, *_ = residual()
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match=r"score='keep_both': undefined on this probe, target does not vary"):
        scored(case, "l1", "keep_both")
    assert scored(case, "input_capture", "activation_rms")["input_capture"]["inner"].isfinite().all()


# ---------------------------------------------------------------- random, names


def test_random_scores_are_reproducible_and_owe_nothing_to_the_global_streams():
    case = model, loader, units = residual()
    first = scored(case, "random", "random_1", "random_2")
    torch.manual_seed(99)
    again = scored(case, "random_2", "random")
    assert all(torch.equal(first[name][layer], again[name][layer]) for name in again for layer in again[name])
    assert len({tuple(first[name]["stem"].tolist()) for name in first}) == 3
    assert not torch.equal(first["random"]["stem"], first["random"]["outer"])
    assert not torch.equal(first["random"]["stem"], scored(case, "random", seed=1)["random"]["stem"])
    fewer = channel_scores(model, loader, units.protect(["stem"]), ["random"])["random"]
    assert torch.equal(fewer["inner"], first["random"]["inner"])


@pytest.mark.parametrize("name", ["l1", "random", "bn_scale", "fpgm"])
def test_scores_of_weights_read_no_probe(name):
    model, _, units = residual()
    broken = DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=4)  # no labels, and the model could not run
    if name == "bn_scale":
        with pytest.raises(ValueError, match=r"the images of a batch, a tensor of shape .*, and failed"):
            channel_scores(model, broken, units, [name])
    else:
        assert set(channel_scores(model, broken, units, [name])[name]) == {"stem", "inner", "outer", "depthwise"}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("minus_peer_overlop", "'minus_peer_overlap'"),
        ("local_axis", "did you mean 'keep_local'?"),
        ("reverse_peer_r2", "did you mean 'reverse_minus_peer_r2'?"),
        ("reverse_l1", ""),
        ("reverse_reconstruction", ""),
        ("reverse_random_2", ""),
        ("reverse_reverse_input_capture", "'reverse_input_capture'"),
        ("random_x", "'random'"),
        ("l1_2", "'l1'"),
        ("", ""),
    ],
)
def test_an_unknown_score_is_named_with_what_there_is(name, near):
    with pytest.raises(ValueError, match=re.escape(f"score={name!r}: no such score")) as caught:
        scored(residual(), "l1", name)
    assert near in str(caught.value)
    assert all(score in str(caught.value) for score in SCORES)


def test_families():
    assert {name: score_family(name) for name in SCORES} == SCORES
    assert score_family("reverse_keep_target") == "target"
    assert score_family("random_12") == "baseline"


# ---------------------------------------------------------------- units


def coupled() -> Group:
    """Three units: the second layer has them in another order, and two channels of the third belong to each."""
    producers = {"a": torch.tensor([[0], [1], [2]]), "b": torch.tensor([[2], [0], [1]])}
    return Group("a", 3, producers | {"c": torch.tensor([[0, 3], [1, 4], [2, 5]])}, {}, {}, ())


def test_unit_ranks_by_hand():
    values = {"a": torch.tensor([5.0, 1.0, 9.0]), "b": torch.tensor([0.2, 0.2, 0.1])}
    values["c"] = torch.tensor([-torch.inf, 1.0, 2.0, 3.0, 4.0, 5.0])
    a, b, c = [0.5, 0.0, 1.0], [0.0, 0.75, 0.75], [(0.0, 0.6), (0.2, 0.8), (0.4, 1.0)]
    expected = [(a[u] + b[u] + sum(c[u])) / 4 for u in range(3)]
    np.testing.assert_allclose(unit_ranks(coupled(), values), expected, rtol=1e-12)
    stretched = {layer: found**3 for layer, found in values.items()}
    assert torch.equal(unit_ranks(coupled(), stretched), unit_ranks(coupled(), values))  # order is all that counts
    single = Group("a", 1, {"a": torch.tensor([[0]])}, {}, {}, ())
    assert unit_ranks(single, {"a": torch.tensor([3.0])}).tolist() == [0.0]


def test_unit_values_by_hand():
    dead = -torch.inf
    values = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([0.0, 0.0, 0.0])}
    values["c"] = torch.tensor([dead, 1.0, 2.0, 4.0, 4.0, 4.0])
    expected = [(0.5 + 1 + 0 + 4 / 3) / 4, (1 + 1 + 1 / 3 + 4 / 3) / 4, (1.5 + 1 + 2 / 3 + 4 / 3) / 4]
    np.testing.assert_allclose(unit_values(coupled(), values), expected, rtol=1e-12)
    alone = Group("a", 3, {"a": torch.tensor([[0], [1], [2]])}, {}, {}, ())
    assert unit_values(alone, {"a": torch.tensor([dead, 1.0, 3.0])}).tolist() == [dead, 0.5, 1.5]
    assert unit_values(alone, {"a": torch.full((3,), dead)}).tolist() == [dead] * 3


# ---------------------------------------------------------------- whole networks


def test_a_compiled_network_scores_like_itself():
    plain, compiled = small.build(), small.build(backend="eager")
    names = [name for name in SCORES if name != "random"]
    found = [scored((m, small.images(), find_units(m, torch.zeros(2, 3, 8, 8))), *names) for m in (plain, compiled)]
    for name in names:
        for values, same in zip(*(scores[name].values() for scores in found), strict=True):
            assert torch.equal(values, same), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_score_of_every_backbone(backbone):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_backbone(backbone, zoo.CLASSES, 0.25, 32)
    units = find_units(model, torch.zeros(2, 3, 32, 32))
    case = model, zoo.loader_of(zoo.images_2d(24, side=32), batch=12), units
    names = [*SCORES, "random_1", "reverse_keep_both"]
    if backbone == "convnext_tiny":
        names.remove("bn_scale")
        with pytest.raises(ValueError, match=r"right after features.0.0, .* and \d+ more"):
            scored(case, "bn_scale")
    values = scored(case, *names)
    widths = {name: len(model.get_submodule(name).weight) for g in units.groups.values() for name in g.producers}
    assert list(values) == names
    for score, layers in values.items():
        assert {layer: len(found) for layer, found in layers.items()} == widths
        for found in layers.values():
            assert found.dtype == torch.float64
            assert (found.isfinite() | (found == -torch.inf)).all()
        for group in units.groups.values():
            ranks, shares = unit_ranks(group, layers), unit_values(group, layers)
            assert len(ranks) == len(shares) == group.size
            assert ranks.isfinite().all(), score
            assert not shares.isnan().any(), score


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("score", ["input_capture", "activation_rms", "task_information", "hrank"])
@torch.no_grad()
def test_transposed_convolutions_are_scored_by_their_channels(score, groups):
    """As the convolution that computes the same, where there is one."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 12, 3, padding=1, groups=groups)
    same = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    blocks = up.weight.view(groups, 8 // groups, 12 // groups, 3, 3).transpose(1, 2).flatten(0, 1)
    same.weight.copy_(blocks.flip(2, 3))
    same.bias.copy_(up.bias)
    found = []
    for layer in (up, same):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, small.CLASSES),
        ).eval()  # fmt: skip
        units = find_units(net, small.images()[:1][0])
        found.append(channel_scores(net, small.images(), units, [score])[score])
    for layer in found[0].keys() & found[1].keys():
        torch.testing.assert_close(found[0][layer], found[1][layer], rtol=1e-4, atol=1e-6)
    assert "4" in found[0]
    assert groups > 1 or "2" in found[0]
