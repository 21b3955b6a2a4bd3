"""Graphs, triplets and propagation: slow references, answers known beforehand, and controls that have to fail."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import compute_axes
from chanaxes_pl.analysis.structure import (
    GRAPHS,
    _graph,
    _propagation,
    choose_triplets,
    communities,
    joint_information,
    layer_structure,
    pair_excess,
    triplet_excess,
)
from chanaxes_pl.analysis.upstream import Upstream, direct_producers, find_upstream, input_spread
from chanaxes_pl.core.gaussian import CEILING, MAX_CORRELATION, Association
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.core.moments import Moments
from chanaxes_pl.plots import plot_structure
from tests.helpers.networks import CLASSES, IMAGES, Net, block, build, head, pooled


def samples(channels=6, targets=1, n=300, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated channels, and targets that depend on several of them."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(n, channels)) @ rng.normal(size=(channels, channels))
    return y, y @ rng.normal(size=(channels, targets)) + 3 * rng.normal(size=(n, targets))


def association(y: np.ndarray, t: np.ndarray) -> Association:
    joint = torch.from_numpy(np.column_stack([y, t]))
    return Association.of(Moments.of(joint), y.shape[1], slice(y.shape[1], joint.shape[1]))


def slow_information(y: np.ndarray, t: np.ndarray) -> float:
    """½ ln(det Σ_y det Σ_t / det Σ_yt) of jointly Gaussian variables."""
    logs = [np.linalg.slogdet(np.atleast_2d(np.cov(x.T)))[1] for x in (y, t, np.column_stack([y, t]))]
    return (logs[0] + logs[1] - logs[2]) / 2


# ---------------------------------------------------------------- sets of channels


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sets_agree_with_log_determinants(targets, size):
    y, t = samples(targets=targets)
    sets = torch.combinations(torch.arange(6), size)
    wanted = [slow_information(y[:, list(chosen)], t) for chosen in sets.tolist()]
    assert_allclose(association(y, t).with_sets(sets), wanted, rtol=1e-9, atol=1e-14)


def test_pairs_are_sets_of_two():
    found = association(*samples(8))
    joint = joint_information(found)
    pairs = torch.combinations(torch.arange(8), 2)
    assert_allclose(joint[pairs[:, 0], pairs[:, 1]], found.with_sets(pairs), rtol=1e-10)
    assert_allclose(joint, joint.T, rtol=1e-10)
    assert_allclose(joint.diagonal(), found.single)


def test_excess_agrees_with_its_definition():
    y, t = samples(5, seed=3)
    found = association(y, t)
    triplets = choose_triplets(5, np.random.default_rng(0))
    for triplet, value in zip(triplets.tolist(), triplet_excess(found, triplets).tolist(), strict=True):
        best = max(slow_information(y[:, list(pair)], t) for pair in itertools.combinations(triplet, 2))
        assert_allclose(value, max(0.0, slow_information(y[:, triplet], t) - best), rtol=1e-8, atol=1e-13)
    for i, j in itertools.combinations(range(5), 2):
        best = max(slow_information(y[:, [k]], t) for k in (i, j))
        assert_allclose(pair_excess(found)[i, j], slow_information(y[:, [i, j]], t) - best, rtol=1e-8, atol=1e-13)


@given(st.integers(0, 10_000), st.integers(3, 7))
@settings(max_examples=30, deadline=None)
def test_more_channels_never_say_less_and_order_does_not_matter(seed, channels):
    found = association(*samples(channels, n=60, seed=seed))
    triplets = choose_triplets(channels, np.random.default_rng(0))
    # Of sets that nearly determine each other so little is believed that a little may be lost.
    spectrum = torch.linalg.eigvalsh(found.correlation[triplets[:, :, None], triplets[:, None, :]])
    triplets = triplets[spectrum[:, 0] > 1 - MAX_CORRELATION]
    whole = found.with_sets(triplets)
    for keep in ([0, 1], [0, 2], [1, 2]):
        assert (found.with_sets(triplets[:, keep]) <= whole + 1e-12).all()
    assert_allclose(triplet_excess(found, triplets.flip(1)), triplet_excess(found, triplets), rtol=1e-9, atol=1e-12)


def test_what_three_know_only_together_is_seen_and_what_is_repeated_is_not():
    rng = np.random.default_rng(1)
    y, noise = rng.normal(size=(4000, 3)), rng.normal(size=4000)
    triplet = torch.tensor([[0, 1, 2]])
    together = triplet_excess(association(y, y.sum(1) + noise), triplet)
    assert float(together) == pytest.approx(0.5 * math.log(4) - 0.5 * math.log(2), abs=0.03)  # 1 − R² is 1/4, and 1/2
    copies = np.column_stack([y[:, 0], y[:, 0], y[:, 0] + 1e-9 * y[:, 1]])
    found = association(copies, y.sum(1) + noise)
    assert triplet_excess(found, triplet).item() == pytest.approx(0, abs=1e-3)
    assert found.with_sets(triplet).item() == pytest.approx(found.single[0].item(), rel=2e-3)
    assert pair_excess(found).abs().max() < 1e-3


def test_the_ceiling_holds_for_sets():
    y, _ = samples(3)
    found = association(np.column_stack([y, y[:, 0] + y[:, 1]]), y.sum(1))  # dependent, and they say all there is
    values = found.with_sets(choose_triplets(4, np.random.default_rng(0)))
    assert values.isfinite().all()
    assert values.max() == pytest.approx(CEILING)


def test_triplets_are_all_there_are_or_fixed_draws_of_them():
    everyone = choose_triplets(7, np.random.default_rng(0))
    assert sorted(map(tuple, everyone.tolist())) == list(itertools.combinations(range(7), 3))
    drawn = choose_triplets(9, np.random.default_rng(0), most=80)
    assert drawn.shape == (80, 3)
    assert torch.equal(drawn, choose_triplets(9, np.random.default_rng(0), most=80))
    many = choose_triplets(6, np.random.default_rng(0), most=19).sort(1).values
    assert (many.diff(dim=1) > 0).all()  # three different ones
    rng = np.random.default_rng(0)
    lots = np.concatenate([choose_triplets(6, rng, most=19).sort(1).values.numpy() for _ in range(600)])
    _, counts = np.unique(lots, axis=0, return_counts=True)
    assert len(counts) == 20
    assert stats.chisquare(counts).pvalue > 0.01  # each as often as any other


# ---------------------------------------------------------------- graphs


def planted(size=24, groups=3, noise=0.3, seed=0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % groups)
    weights = (labels[:, None] == labels) + noise * rng.random((size, size))
    return labels, (weights + weights.T) / 2


def slow_modularity(weights: np.ndarray, labels: np.ndarray) -> float:
    """Σ over pairs in one community of w_ij − s_i s_j / 2m, over 2m."""
    weights = weights - np.diag(np.diag(weights))
    strength, total = weights.sum(1), weights.sum()
    same = labels[:, None] == labels
    return float(((weights - np.outer(strength, strength) / total) * same).sum() / total)


def test_planted_communities_are_found():
    labels, weights = planted()
    found, modularity = communities(weights)
    assert adjusted_rand_score(found, labels) == 1.0
    assert_allclose(modularity, slow_modularity(weights, labels), rtol=1e-12)
    partition, values = _graph(weights, 10, np.random.default_rng(0))
    assert values["communities"] == 3
    assert values["modularity"] > values["null"] + 10 * values["null_sd"]
    assert adjusted_rand_score(partition, labels) == 1.0


def test_shuffled_weights_have_the_modularity_of_their_null():
    _, weights = planted()
    pairs = np.triu_indices(len(weights), 1)
    for seed in range(5):
        shuffled = np.zeros_like(weights)
        shuffled[pairs] = np.random.default_rng(seed + 100).permutation(weights[pairs])
        _, values = _graph(shuffled + shuffled.T, 20, np.random.default_rng(0))
        assert abs(values["modularity"] - values["null"]) < 3.5 * values["null_sd"]


def test_a_graph_without_weight_has_no_modularity():
    labels, modularity = communities(np.eye(4))
    assert math.isnan(modularity)
    assert labels.tolist() == [0, 1, 2, 3]


def test_networkx_is_imported_when_it_is_used():
    code = "import sys, chanaxes_pl.analysis.structure; sys.exit('networkx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- upstream


#: Networks in which a channel stays itself between two layers: no LayerNorm in between.
PLAIN = ("resnet18", "grouped", "concatenating", "flattening", "squeezing", "inverted")


def routes_of(net: nn.Module, kinds=(nn.Conv2d, nn.Linear)) -> tuple[dict[str, Upstream], dict[str, nn.Module]]:
    layers = {name: module for name, module in net.named_modules() if isinstance(module, kinds)}
    with torch.no_grad(), input_spread(layers) as spread:
        net(IMAGES)
    return find_upstream(net, layers, spread, IMAGES[:1]), layers


@torch.no_grad()
def inputs_changed(net: nn.Module, layers: dict[str, nn.Module], reader: str, giver: str, channel: int) -> list[int]:
    """Inputs of ``reader`` that change with one channel of ``giver``, while all other layers give what they gave."""
    given, read = {}, {}
    hooks = [m.register_forward_hook(lambda *a, n=n: given.__setitem__(n, a[2].clone())) for n, m in layers.items()]
    hooks.append(layers[reader].register_forward_pre_hook(lambda _, x: read.setdefault("before", x[0].clone())))
    net(IMAGES)
    for hook in hooks:
        hook.remove()
    given[giver] = given[giver].clone()
    given[giver].select(1, channel).add_(3.0)
    hooks = [m.register_forward_hook(lambda *a, n=n: given[n].clone()) for n, m in layers.items()]
    hooks.append(layers[reader].register_forward_pre_hook(lambda _, x: read.setdefault("after", x[0].clone())))
    net(IMAGES)
    for hook in hooks:
        hook.remove()
    gap = (read["after"] - read["before"]).abs().transpose(0, 1).flatten(1).amax(1)
    return gap.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", PLAIN)
def test_inputs_read_the_channels_that_change_them(name):
    net = build(name)
    upstream, layers = routes_of(net)
    followed = 0
    for reader, route in upstream.items():
        for giver, channels in route.channels.items():
            for channel in {0, int(channels.max())}:
                wanted = np.flatnonzero(channels == channel).tolist()
                assert inputs_changed(net, layers, reader, giver, channel) == wanted, (reader, giver, channel)
                followed += 1
    assert followed >= 6


def test_producers_are_those_with_nothing_between():
    found = direct_producers(build("inverted"), IMAGES[:1])
    assert found == {
        "stem.0": [],
        "expand.0": ["stem.0"],
        "deep.0": ["expand.0"],
        "project.0": ["deep.0"],
        "head": ["stem.0", "project.0"],  # their maps are summed
    }
    assert direct_producers(build("concatenating"), IMAGES[:1])["third.0"] == ["stem.0", "first.0", "second.0"]


def test_what_cannot_be_routed_says_why():
    upstream, _ = routes_of(build("inverted"))
    assert upstream["stem.0"].reason == "it reads the images"
    assert upstream["deep.0"].reason.startswith("depthwise: each channel reads one input alone")
    assert upstream["project.0"].reason == ""
    upstream, _ = routes_of(build("flattening"), nn.Linear)
    assert upstream["hidden"].reason == "it reads 'body.2.0', which is not among the layers"
    whole = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Softmax(1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten())
    net = nn.Sequential(*whole, nn.Linear(4 * 28 * 28, CLASSES))
    upstream, _ = routes_of(net, nn.Conv2d)
    lost = (
        "6 of its 6 inputs cannot be followed to a channel: it has a single unit (_softmax in 1 (Softmax) mixes them)"
    )
    assert upstream["3"].reason == lost
    upstream, _ = routes_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pooling()))
    assert "has no channels that can be removed" in upstream["0"].reason


def pooling() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_routed_agrees_with_a_loop():
    net = build("grouped")
    upstream, layers = routes_of(net)
    rng = np.random.default_rng(0)
    for name in ("mix.0", "up.0", "head"):
        route = upstream[name]
        given = {giver: rng.normal(size=layers[giver].out_channels) for giver in route.channels}
        weight = layers[name].weight.detach().double()
        weight = weight.reshape(*weight.shape[:2], -1)
        groups = getattr(layers[name], "groups", 1)
        wanted = []
        for i, row in enumerate(weight):
            first = i // (len(weight) // groups) * weight.shape[1]
            total = worth = 0.0
            for k, taps in enumerate(row):
                j = first + k
                scores = [stats.zscore(given[g])[of[j]] for g, of in route.channels.items()]
                share = float(taps.norm()) * route.spread[j]
                total, worth = total + share, worth + share * np.mean(scores)
            wanted.append(worth / total)
        assert_allclose(route.from_upstream(given), wanted, rtol=1e-5)
    assert len(upstream["head"].channels) == 2  # the head reads a sum
    assert upstream["mix.0"].norms.shape == (12, 4)


def test_undefined_givers_are_left_out():
    route = Upstream("b", {"a": np.arange(3)}, np.ones((2, 3)), np.ones(3), "")
    assert_allclose(route.from_upstream({"a": np.array([1.0, np.nan, 3.0])}), [0.0, 0.0])
    assert np.isnan(route.from_upstream({"a": np.full(3, np.nan)})).all()
    silent = Upstream("b", {"a": np.arange(3)}, np.array([[0.0, 0, 0], [0, 0, 2]]), np.ones(3), "")
    assert_allclose(silent.from_upstream({"a": np.array([1.0, 2.0, 3.0])}), [np.nan, math.sqrt(1.5)])


def test_input_spread_is_the_standard_deviation_of_all_batches():
    layer, linear = nn.Conv2d(4, 2, 3), nn.Linear(5, 2)
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(30, 4, 6, 5, generator=rng) * torch.tensor([0.01, 1.0, 0.0, 3.0])[:, None, None] + 100
    tokens = torch.randn(30, 7, 5, generator=rng)
    with torch.no_grad(), input_spread({"conv": layer, "linear": linear, "idle": nn.Conv2d(1, 1, 1)}) as spread:
        for part in (slice(0, 11), slice(11, 30)):
            layer(maps[part])
            linear(tokens[part])
    assert set(spread) == {"conv", "linear"}
    assert_allclose(spread["conv"], maps.double().std((0, 2, 3), correction=0), rtol=1e-4, atol=1e-12)
    assert_allclose(spread["linear"], tokens.double().std((0, 1), correction=0), rtol=1e-6)


# ---------------------------------------------------------------- end to end


def carrying() -> nn.Module:
    """Two convolutions, of which the second passes on what each channel of the first gives."""
    torch.manual_seed(0)
    net = Net(
        lambda net, x: net.head(pooled(net.second(net.first(x)).relu())),
        first=nn.Conv2d(3, 32, 3, bias=False),
        second=nn.Conv2d(32, 32, 1, bias=False),
        head=head(32),
    )
    with torch.no_grad():
        net.first.weight.mul_(torch.logspace(-0.5, 0.5, 32)[torch.randperm(32)][:, None, None, None])
        net.second.weight.copy_(torch.eye(32)[:, :, None, None] + 0.02 * torch.randn(32, 32, 1, 1))
    return net.eval()


def probe(count=160) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 3, 12, 12, generator=generator), torch.arange(count) % CLASSES)


def test_metrics_propagate_where_weights_pass_channels_on():
    table = layer_structure(carrying(), probe(), nulls=20).set_index("layer")
    row = table.loc["second"]
    assert row["producers"] == "first"
    for metric in ("input_capture", "task_information"):
        assert row[f"routed_{metric}"] > 0.8
        assert row[f"routed_{metric}"] > row[f"routed_{metric}_null"] + 3 * row[f"routed_{metric}_null_sd"]
    assert table.loc["first", "routed_reason"] == "it reads the images"
    assert table.loc["first", [f"routed_{metric}" for metric in METRICS]].isna().all()


def test_metrics_that_have_nothing_to_do_with_weights_scatter_as_their_null_says():
    rng = np.random.default_rng(0)
    gaps, spreads = [], []
    for _ in range(25):
        route = Upstream("b", {"a": np.arange(40)}, rng.random((40, 40)) ** 4, rng.random(40), "")
        row = _propagation(route, {name: {m: rng.normal(size=40) for m in METRICS} for name in "ab"}, 40, rng)
        for metric in METRICS:
            spreads.append(row[f"routed_{metric}_null_sd"])
            gaps.append((row[f"routed_{metric}"] - row[f"routed_{metric}_null"]) / spreads[-1])
    assert abs(np.mean(gaps)) < 0.3
    assert np.std(gaps) == pytest.approx(1, abs=0.25)
    assert np.mean(spreads) == pytest.approx(1 / math.sqrt(39), rel=0.1)


def test_the_table_agrees_with_its_parts():
    net, data = build("resnet18"), probe(60)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    table = layer_structure(net, data, layers=["layer1.*", "layer2.*"], nulls=2)
    again = layer_structure(net, DataLoader(data, batch_size=17), layers=["layer1.*", "layer2.*"], nulls=2)
    pd.testing.assert_frame_equal(table, again, rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    axes = compute_axes(net, data, layers=["layer1.*", "layer2.*"]).table
    assert table["layer"].tolist() == list(dict.fromkeys(axes["layer"]))
    assert (table["channels"].to_numpy() == axes.groupby("layer", sort=False).size().to_numpy()).all()
    assert (table["reason"] == "").all()
    assert table["triplets"].unique().tolist() == [math.comb(16, 3), math.comb(32, 3)]
    for graph in GRAPHS:
        assert table[f"{graph}_modularity"].between(-0.5, 1).all()
        assert (table[f"{graph}_null_sd"] > 0).all()
    assert table["agreement"].between(-1, 1).all()
    row = table.set_index("layer").loc["layer1.1.conv1"]
    assert row["routed_reason"] == "it reads 'conv1', which is not among the layers"
    row = table.set_index("layer").loc["layer2.1.conv1"]
    assert row["producers"] == "layer2.0.conv2, layer2.0.downsample.0"
    assert np.isfinite(row["routed_peer_overlap"])


def test_what_is_undefined_says_why():
    net = Net(
        lambda net, x: net.head(pooled(net.wide(net.narrow(net.stem(x))))),
        stem=block(3, 6),
        narrow=block(6, 2),
        wide=block(2, 8),
        idle=nn.Conv2d(3, 4, 3),
        head=head(8),
    ).eval()
    table = layer_structure(net, probe(40), nulls=2).set_index("layer")
    assert table.loc["narrow.0", "reason"] == "2 live channels, expected at least 3"
    assert table.loc["idle", "reason"] == "the forward pass did not reach this layer"
    assert table.loc["idle", "routed_reason"] == "the forward pass did not reach it"
    assert (
        table.loc["narrow.0", "routed_reason"] == "fewer than 3 channels have both metrics, or one is the same for all"
    )
    values = [column for column in table if column.startswith(("overlap", "excess", "pair", "triplet_", "agree"))]
    assert table.loc[["narrow.0", "idle"], values].isna().all(axis=None)
    flat = layer_structure(net, probe(40), nulls=2, target=lambda logits, labels: 0 * labels).set_index("layer")
    assert flat.loc["stem.0", "reason"] == "target does not vary, or is not finite"
    narrow = layer_structure(net, probe(40), nulls=2, widest=7).set_index("layer")
    assert narrow.loc["wide.0", "reason"] == "8 live channels, graphs are left out above widest=7"
    assert np.isfinite(narrow.loc["wide.0", "triplet_excess"])
    assert np.isfinite(narrow.loc["stem.0", "overlap_modularity"])
    with pytest.raises(ValueError, match=r"layer_structure\(nulls=1\): expected at least 2"):
        layer_structure(net, probe(40), nulls=1)
    with pytest.raises(ValueError, match=r"layer_structure\(layers='covn'\): no tracked module"):
        layer_structure(net, probe(40), layers="covn")


def test_the_figure_shows_every_layer():
    table = layer_structure(carrying(), probe(60), nulls=3)
    figure = plot_structure(table, "two layers")
    modularity, excess, routed = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in (*modularity.lines, *excess.lines, *routed.lines)}
    assert_allclose(lines["overlap graph"], table["overlap_modularity"])
    assert_allclose(lines["triplets"], table["triplet_excess"])
    assert_allclose(lines["target excess"], table["routed_target_excess"])
    assert [label.get_text() for label in routed.get_xticklabels()] == ["first", "second"]


def test_a_regression_and_batches_of_the_users_own_need_no_more_than_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(6, 1))
    batches = [{"picture": torch.randn(30, 3, 8, 8), "age": torch.rand(30, 1)}]
    table = layer_structure(model, batches, step=lambda net, batch: (net(batch["picture"]), batch["age"]), nulls=2)
    assert (table["reason"] == "").all()
    assert table["routed_reason"].tolist() == ["it reads the images", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_input": "x"}, r"layer_structure\(example_input=an object of type str\): expected images"),
        ({"widest": "x"}, r"layer_structure\(widest='x'\): expected a number of channels, 0 for no graphs"),
        (
            {"step": lambda net, batch: (net[0](batch[0]).mean((2, 3)), batch[1])},
            "does not call the model with a tensor",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(arguments, message):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=message):
        layer_structure(model, [(torch.randn(12, 3, 8, 8), torch.arange(12) % 3)], **arguments)
