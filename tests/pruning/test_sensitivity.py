"""Sensitivity: each cut is the one that pruning would make; widths are those that cost the outputs least."""

import copy
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import PruningExperiment, prune, pruning_grid, sensitivity
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.plots import plot_sensitivity
from chanaxes_pl.pruning import sensitivity as home
from chanaxes_pl.pruning.allocation import fit_budget, uniform_order
from chanaxes_pl.pruning.pruner import divergence_of
from chanaxes_pl.pruning.readers import Reader, Sampling
from chanaxes_pl.pruning.readers import measured as measured_readers
from chanaxes_pl.pruning.scores import channel_scores, default_scores, unit_ranks, unit_values
from chanaxes_pl.pruning.sensitivity import divergences, mean_divergence, measure_sensitivity, sensitivity_order
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.removal import Group, remove
from tests.helpers.networks import NETS, ONE, build

IMAGES = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(3))
BATCHES = IMAGES.split(20)


def of_size(name: str, size: int) -> Group:
    return Group(name, size, {}, {}, {}, ())


def ranks_of(groups: Sequence[Group]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}


def over_images(model: nn.Module) -> None:
    for images in BATCHES:
        model(images)


def measured(model: nn.Module, **options: object) -> tuple[list[Group], pd.DataFrame]:
    groups = list(find_units(model, ONE).groups.values())
    return groups, measure_sensitivity(model, groups, ranks_of(groups), BATCHES, len(IMAGES), levels=4, **options)


@pytest.mark.parametrize("name", NETS)
def test_a_table_has_every_group_at_every_level_and_leaves_the_network_as_it_was(name):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    groups, table = measured(model)
    assert list(table["group"].unique()) == [group.name for group in groups]
    for group in groups:
        rows = table[table["group"] == group.name]
        assert (rows["units"] == group.size).all()
        assert rows["removed"].tolist() == sorted({*np.linspace(0, group.size, 5).round()[:-1], group.size - 1})
        assert rows["divergence"].iloc[0] == 0
        assert (rows["divergence"].iloc[1:] >= 0).all()
    assert table["divergence"].isna().sum() == 0
    assert table["divergence"].max() > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["concatenating", "grouped", "flattening", "resnet18"])
@torch.no_grad()
def test_refits_are_ridge_regressions_on_what_stays(monkeypatch, name):
    """Against the normal equations of each reader, from all samples at once."""
    samples: dict[Reader, list[Tensor]] = {}
    add = Reader._add
    monkeypatch.setattr(Reader, "_add", lambda self, x: (samples.setdefault(self, []).append(x), add(self, x)))
    model, ridge = build(name), 0.02
    groups = list(find_units(model, ONE).groups.values())
    ranks, checked = ranks_of(groups), 0
    with observed(model):
        for group, found in measured_readers(
            model, groups, Sampling(math.inf, None), 1.0, 1.0, lambda: over_images(model)
        ):
            order, count = ranks[group.name].argsort(), group.size // 2
            for reader in found:
                ((weight, shift),) = reader.refits(group, order, [count], ridge)
                x = torch.cat(samples[reader]).double()  # [n, G, F]
                rows = reader._rows().double()
                columns = reader._columns(group).unflatten(1, (group.size, -1))
                expected = torch.zeros_like(rows)
                for block in range(len(rows)):
                    centred = x[:, block] - x[:, block].mean(0)
                    among = centred.mT @ centred / len(centred)
                    among += ridge * among.diagonal().mean() * torch.eye(len(among))
                    gone = columns[block, order[:count]].flatten().tolist()
                    kept = [column for column in range(len(among)) if column not in gone]
                    expected[block][:, kept] = rows[block] @ among[:, kept] @ torch.linalg.inv(among[kept][:, kept])
                torch.testing.assert_close(weight, reader._placed(expected), rtol=2e-3, atol=2e-4)
                moved = torch.einsum("gof,gf->go", rows - expected, x.mean(0))
                if reader.whole:
                    torch.testing.assert_close(shift.double(), moved.flatten(), rtol=1e-2, atol=1e-4)
                checked += 1
    assert checked >= len(groups)


@pytest.mark.parametrize("name", ["concatenating", "resnet18", "normed", "inverted"])
@torch.no_grad()
def test_a_cut_computes_what_the_network_without_the_units_does(name):
    model = build(name)
    groups = list(find_units(model, ONE).groups.values())
    ranks = ranks_of(groups)
    with observed(model):
        for group, found in measured_readers(
            model, groups, Sampling(16, len(IMAGES)), 1.0, 1.0, lambda: over_images(model)
        ):
            order, count = ranks[group.name].argsort(), group.size // 3
            fitted = {
                layer: next(reader.refits(group, order, [count], 1e-2))
                for layer, reader in zip(group.consumers, found, strict=True)
            }
            kept = {group.name: order[count:].sort().values}
            with home._Cut(group, kept[group.name], fitted).made(model):
                found_logits = model(IMAGES)
            slim = copy.deepcopy(model)
            for layer, (weight, shift) in fitted.items():
                whole = slim.get_submodule(layer)
                whole.weight.copy_(weight)
                bias = torch.zeros_like(shift) if whole.bias is None else whole.bias
                whole.bias = nn.Parameter(bias + shift)
            remove(slim, [group], kept)
            torch.testing.assert_close(found_logits, slim(IMAGES), rtol=1e-3, atol=1e-4)


class Separate(nn.Module):
    """Queries, keys and values from layers of their own: no layer reads the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 12, 8, stride=8), nn.Linear(12, 7)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return self.head((x + self.out(weights @ self.v(x))).mean(1))


def test_queries_and_keys_have_nothing_to_refit_and_are_measured():
    torch.manual_seed(0)
    groups, table = measured(Separate().eval())
    (unread,) = (group for group in groups if not group.consumers)
    rows = table[table["group"] == unread.name]
    assert rows["removed"].tolist() == [0, 3, 6, 9, 11]
    assert (rows["divergence"].iloc[1:] > 0).all()


def test_queries_and_keys_are_ranked_by_their_weights():
    torch.manual_seed(0)
    model = Separate().eval()
    units = find_units(model, ONE)
    found = channel_scores(model, data(), units, ["reconstruction", "l1"])
    (unread,) = (group for group in units.groups.values() if not group.consumers)
    assert set(unread.producers) == {"q", "k"}
    assert torch.equal(
        unit_ranks(unread, found["reconstruction"]).argsort(), unit_values(unread, found["l1"]).argsort()
    )
    for score in ("hrank", "chip"):
        with pytest.raises(ValueError, match=r"the channels of '[qk]' are summed over by attention itself .* protect="):
            channel_scores(model, data(), units, [score])
    fitting = default_scores(model, units, ONE)
    assert "reconstruction" in fitting
    assert not {"hrank", "chip", "bn_scale"} & set(fitting)
    slim = prune(model, data(), budget=0.5)
    assert slim.plan.notes["score"] == "reconstruction"
    assert slim.macs / slim.dense_macs == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
def test_a_copy_of_a_channel_costs_nothing():
    model = build("concatenating")
    group = next(iter(find_units(model, ONE).groups.values()))
    for cut in group.cuts:
        if not cut.reads and cut.dimension is not None:
            tensor = model.state_dict(keep_vars=True)[cut.path].movedim(cut.dimension, 0)
            tensor[cut.indices[0]] = tensor[cut.indices[1]]
    ranks = {group.name: torch.arange(group.size).double()}
    table = measure_sensitivity(model, [group], ranks, BATCHES, len(IMAGES), levels=group.size, ridge=1e-6)
    assert table["removed"].tolist() == list(range(group.size))
    first, second = table["divergence"].iloc[1:3]
    assert first < 1e-3 * second


def test_little_memory_gives_the_same_table():
    model = build("resnet18")
    _, plenty = measured(model)
    _, little = measured(model, memory=0.1)  # four passes, with every kernel whole
    pd.testing.assert_frame_equal(plenty, little, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet18", "concatenating"])
def test_partial_and_whole_passes_agree(name, monkeypatch):
    model = build(name)
    _, partial = measured(model)
    monkeypatch.setattr("chanaxes_pl.network.tracing.Trace.of", lambda *_: None)
    _, whole = measured(model)
    pd.testing.assert_frame_equal(partial, whole, rtol=1e-4, atol=1e-9)


def test_divergences_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    dense, cut = (torch.randn(5, 4, generator=generator) for _ in range(2))

    def found(kind: home.Divergence, *outputs: Tensor) -> float:
        return mean_divergence(kind, *(part.split(2) for part in outputs))

    kl = F.kl_div(cut.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
    assert found("kl", dense, cut) == pytest.approx(float(kl), rel=1e-5)
    p, q = dense.double().sigmoid(), cut.double().sigmoid()
    bits = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / 5
    assert found("bits", dense, cut) == pytest.approx(float(bits), rel=1e-5)
    shares = (dense - cut).square().sum() / (dense.var(0, correction=0).sum() * 5)
    assert found("square", dense, cut) == pytest.approx(float(shares), rel=1e-5)
    maps = [tensor[:, :, None, None].expand(-1, -1, 2, 3) for tensor in (dense, cut)]
    assert found("kl", *maps) == pytest.approx(float(kl), rel=1e-5)  # a mean over positions


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.arange(8) % 7, "kl"),
        (torch.rand(8, 7), "square"),
        (torch.ones(8, 7).long(), "bits"),
        (torch.rand(8, 3, 2), "square"),
    ],
)
def test_labels_tell_how_outputs_are_compared(labels, expected):
    model = build("concatenating")
    data = TensorDataset(IMAGES[:8], labels)
    assert divergence_of(model, data, None, Placement.of(model)) == expected


# ---------------------------------------------------------------- widths


class Product:
    """MACs of a chain of layers as a function of the widths between them."""

    unit, exact = "MACs", True

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self.dense = self.of(np.zeros(len(groups), dtype=int))

    def freed(self, removed: np.ndarray, group: int) -> float:
        return self.of(removed) - self.of(removed + (np.arange(len(removed)) == group))

    def of(self, removed: np.ndarray) -> float:
        widths = [3.0, *(group.size - int(lost) for group, lost in zip(self.groups, removed, strict=True)), 5.0]
        return float(sum(a * b for a, b in itertools.pairwise(widths)))


def curves_as_table(groups: Sequence[Group], curves: Sequence[np.ndarray]) -> pd.DataFrame:
    rows = [
        {"group": group.name, "units": group.size, "removed": count, "divergence": value}
        for group, curve in zip(groups, curves, strict=True)
        for count, value in enumerate(curve)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(8))
def test_widths_are_close_to_the_best_of_all(seed):
    """Against exhaustive search over all widths; uniform widths are far from it."""
    random = np.random.default_rng(seed)
    groups = [of_size(name, 7) for name in "abcd"]
    curves = []
    for _ in groups:
        steps = random.exponential(size=6) ** 2 * 10 ** random.uniform(-2, 0)
        curves.append(np.concatenate([[0.0], np.cumsum(steps)]))
    cost = Product(groups)
    order = sensitivity_order(cost, curves_as_table(groups, curves))
    assert np.bincount(order, minlength=4).tolist() == [6, 6, 6, 6]
    ratios, uniform = [], []
    for budget in (0.8, 0.6, 0.4, 0.25):

        def total(removed: Sequence[int]) -> float:
            return sum(curve[lost] for curve, lost in zip(curves, removed, strict=True))

        found, even = (fit_budget(cost, by, budget, 1) for by in (order, uniform_order(groups)))
        spent = cost.of(found)
        every = (np.array(lost) for lost in itertools.product(range(7), repeat=4))
        best = min(total(lost) for lost in every if cost.of(lost) <= spent)
        ratios.append(total(found) / best)
        uniform.append(total(even) / best)
    assert max(ratios) < 1.6
    assert np.mean(ratios) < 1.2
    assert np.mean(uniform) > np.mean(ratios)


def test_curves_rise_between_levels_and_where_a_measurement_falls():
    (group,) = [of_size("a", 9)]
    table = pd.DataFrame({"group": "a", "units": 9, "removed": [0, 2, 4, 6, 8], "divergence": [0, 1.0, 0.5, 2.0, 9.0]})
    (curve,) = divergences([group], table)
    assert curve[[0, 2, 4, 6, 8]].tolist() == [0, 1, 1, 2, 9]
    assert (np.diff(curve) >= 0).all()
    assert curve[7] < 5.5


def test_a_group_whose_first_unit_costs_most_is_still_cut():
    groups = [of_size("a", 5), of_size("b", 5)]
    table = curves_as_table(groups, [np.array([0, 3.0, 3.0, 3.0, 3.0]), np.array([0, 2.0, 4.0, 6.0, 8.0])])
    order = sensitivity_order(Product(groups), table)
    assert order[:4].tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- prune()


def data(count: int = 96) -> TensorDataset:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    return TensorDataset(images, torch.arange(count) % 7)


def test_a_table_serves_for_every_budget():
    model = build("concatenating")
    table = sensitivity(model, data(), score="l2")
    for budget in (0.6, 0.3):
        first = prune(model, data(), budget=budget, score="l2", allocation="sensitivity")
        again = prune(model, data(), budget=budget, score="l2", allocation="sensitivity", sensitivity=table)
        assert abs(first.macs / first.dense_macs - budget) < 0.02
        pd.testing.assert_frame_equal(first.sensitivity, table)
        for key, value in first.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[key], value)
    assert prune(model, data(), budget=0.6, allocation="uniform").sensitivity is None


def test_widths_follow_what_was_measured():
    model = build("resnet18")
    table = sensitivity(model, data())
    name = find_units(model, ONE).groups[table["group"].iloc[-1]].name
    dear = table.assign(divergence=table["divergence"].where(table["group"] != name, 1e6 * table["removed"]))
    cheap = table.assign(divergence=table["divergence"].where(table["group"] != name, 1e-9 * table["removed"]))
    kept = [
        len(prune(model, data(), budget=0.6, allocation="sensitivity", sensitivity=given).plan.kept[name])
        for given in (dear, cheap)
    ]
    assert kept[0] == find_units(model, ONE).groups[name].size
    assert kept[1] < 0.3 * kept[0]


def test_a_network_with_one_group():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7))
    slim = prune(model, data(), budget=0.5, allocation="sensitivity")
    assert slim.model[0].out_channels == 6
    assert set(slim.sensitivity["group"]) == {"0"}


def test_a_table_of_another_network_is_refused():
    table = sensitivity(build("concatenating"), data())
    text = (
        r"sensitivity=…\): is of another network: the group '.+' of \d+ units has no row there; expected the table of"
    )
    with pytest.raises(ValueError, match=text):
        prune(build("resnet18"), data(), budget=0.5, allocation="sensitivity", sensitivity=table)
    halved = table.assign(units=table["units"] // 2)
    with pytest.raises(ValueError, match=r"of \d+ units has \d+ units there"):
        prune(build("concatenating"), data(), budget=0.5, allocation="sensitivity", sensitivity=halved)
    with pytest.raises(ValueError, match=r"expected the table that chanaxes_pl\.sensitivity\(model, probe\) returns"):
        prune(build("concatenating"), data(), budget=0.5, allocation="sensitivity", sensitivity=table[["group"]])


def test_a_table_for_another_allocation_is_refused():
    model = build("concatenating")
    table = sensitivity(model, data())
    with pytest.raises(ValueError, match=re.escape("sensitivity=…): serves allocation='sensitivity' alone, not 'own'")):
        prune(model, data(), budget=0.5, allocation="own", sensitivity=table)


@pytest.mark.parametrize("count", [3, 7])
def test_few_images_serve_for_the_refits_and_for_the_comparison(count, monkeypatch):
    seen, some = [], home.some
    monkeypatch.setattr(home, "some", lambda batches, *ends: (seen.append(ends), some(batches, *ends))[1])
    table = sensitivity(build("concatenating"), data(count))
    assert set(seen) == {(0, count)}
    assert (table.loc[table["removed"] > 0, "divergence"] > 0).all()


def test_a_budget_below_reach_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("chanaxes_pl.pruning.pruner.measure_sensitivity", None)
    with pytest.raises(ValueError, match=r"budget=0\.0001\): .* of the MACs remain when every group is down to"):
        prune(build("concatenating"), data(), budget=0.0001, allocation="sensitivity")


def test_the_figure_has_a_line_for_every_group():
    table = sensitivity(build("resnet18"), data())
    (axes,) = plot_sensitivity(table, "a network").axes
    names = list(dict.fromkeys(table["group"]))
    assert [line.get_label() for line in axes.lines] == names
    rows = table[table["group"] == names[1]]
    assert axes.lines[1].get_ydata().tolist() == rows["divergence"].tolist()
    assert axes.lines[1].get_xdata()[-1] == pytest.approx(100 * (1 - 1 / rows["units"].iloc[0]))
    plot_sensitivity(table.assign(divergence=0.0))  # nothing moved


def test_a_grid_measures_each_score_of_its_own():
    model, images = build("concatenating"), data()
    experiment = PruningExperiment(
        budgets=(0.6,), scores=("l1", "random"), allocations=("uniform", "sensitivity"), compensate=("refit",)
    )
    grid = pruning_grid(model, images, DataLoader(images, 32), experiment, progress=False)
    assert grid["allocation"].tolist() == ["", "uniform", "sensitivity", "uniform", "sensitivity"]
    assert (grid["macs_share"].iloc[1:] - 0.6).abs().max() < 0.05
    for score in ("l1", "random"):
        slim = prune(model, images, budget=0.6, score=score, allocation="sensitivity")
        row = grid[(grid["score"] == score) & (grid["allocation"] == "sensitivity")].iloc[0]
        assert row["macs"] == slim.macs


class Bare(nn.Module):
    """What a layer reads is also read by a function with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.h = nn.Linear(12, 16), nn.Parameter(torch.randn(4, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return 0.01 * self.h(x) + F.linear(x, self.w)


def test_units_that_a_function_reads_too_are_gone_from_it(monkeypatch):
    torch.manual_seed(0)
    model, data = Bare(), [torch.randn(64, 12)]
    found = sensitivity(model, data, levels=4, score="l1")
    monkeypatch.setattr("chanaxes_pl.network.tracing.Trace.of", lambda _model: None)
    whole = sensitivity(model, data, levels=4, score="l1")
    np.testing.assert_allclose(found["divergence"], whole["divergence"], rtol=1e-5, atol=1e-9)
    assert (found["divergence"].to_numpy()[1:] > 1e-3).all()


def test_a_table_read_back_from_a_file_serves_as_it_did(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, data = nn.Sequential(*layers, nn.Linear(8, 4)), [torch.randn(64, 3, 8, 8)]
    table = sensitivity(model, data, levels=4)
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert read["group"].tolist() != table["group"].tolist()
    slim, again = (prune(model, data, budget=0.5, sensitivity=given) for given in (table, read))
    assert all(torch.equal(slim.model.state_dict()[key], value) for key, value in again.model.state_dict().items())
    for spoilt in (table.iloc[1:], pd.concat([table, table]), table.assign(divergence=math.nan)):
        with pytest.raises(ValueError, match=r"sensitivity=…\): has the rows .* for the group '0'; expected one for 0"):
            prune(model, data, budget=0.5, sensitivity=spoilt)


@pytest.mark.parametrize("levels", [0, -5, 2.5, True])
def test_levels_that_are_no_number_of_levels_are_refused(levels):
    with pytest.raises(ValueError, match=rf"sensitivity\(levels={levels}\): expected a whole number from 1 on"):
        sensitivity(Bare(), [torch.randn(8, 12)], levels=levels)


def test_outputs_that_never_differ_are_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    with pytest.raises(ValueError, match="the outputs are the same for all of the last 4 images of the probe"):
        sensitivity(model, [torch.cat([torch.randn(12, 4), torch.ones(4, 4)])])


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.b(input=self.a(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("compensate", ["refit", "distill"])
def test_layers_whose_inputs_are_given_by_name_are_pruned(compensate):
    slim = prune(ByName(), [torch.randn(32, 3, 8, 8)], budget=0.5, compensate=compensate)
    assert slim.macs < 0.55 * slim.dense_macs
    assert (slim.report["reason"] == "").all()


def test_a_probe_of_no_images_is_refused():
    with pytest.raises(ValueError, match=r"prune: the probe holds no images; pass a larger probe="):
        prune(ByName(), [], budget=0.5)


@pytest.mark.parametrize("channels", [2, 3, 4, 8])
def test_the_last_level_of_any_group_leaves_one_unit(channels):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.GroupNorm(1, channels), nn.ReLU(), nn.Conv2d(channels, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    table = sensitivity(model, TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4))
    assert table.groupby("group")["removed"].max().tolist() == [channels - 1, 7]
    assert table.groupby("group")["removed"].is_monotonic_increasing.all()
