"""Joint selection against brute force: every removal's cost by a least-squares solution from scratch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanaxes_pl import PruningExperiment, prune, pruning_grid
from chanaxes_pl.pruning.reconstruction import Elimination, eliminate, reconstruction_costs
from chanaxes_pl.pruning.scores import channel_scores, unit_ranks, unit_values
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import Group
from tests.helpers import cases as zoo
from tests.helpers.networks import build
from tests.pruning.any_network.test_patterns import IMAGES as PICTURES
from tests.pruning.any_network.test_patterns import NETWORKS, FusedAttention, SamePadding, Transformer
from tests.pruning.test_scores import residual

RIDGE = 1e-2


# ---------------------------------------------------------------- references


def objective(weight: Tensor, h: Tensor, gone: list[int]) -> tuple[float, Tensor]:
    """The least tr((W − W′) H (W − W′)ᵀ) over W′ that are 0 at some columns, by least squares, and that W′."""
    left = [column for column in range(len(h)) if column not in gone]
    root = np.linalg.cholesky(h.numpy()).T
    wanted = root @ weight.numpy().T
    solution = np.linalg.lstsq(root[:, left], wanted, rcond=None)[0]
    rest = wanted - root[:, left] @ solution
    best = torch.zeros_like(weight)
    best[:, left] = torch.from_numpy(solution.T)
    return float(np.square(rest).sum()), best


def by_brute_force(parts: list[tuple[Tensor, Tensor, list[list[int]]]]) -> dict[int, float]:
    """Unit → the cost at which it goes, in order; parts are W, H and the columns of each unit."""
    size, spent = len(parts[0][2]), 0.0
    costs: dict[int, float] = {}
    while len(costs) < size:
        totals = {}
        for unit in set(range(size)) - costs.keys():
            gone = [*costs, unit]
            totals[unit] = sum(objective(w, h, [c for u in gone for c in columns[u]])[0] for w, h, columns in parts)
        best = min(totals, key=totals.__getitem__)
        costs[best], spent = totals[best] - spent, totals[best]
    return costs


def rising(costs: dict[int, float]) -> list[float]:
    """Costs by unit, none below those of units that went before."""
    highest = dict(zip(costs, np.maximum.accumulate(list(costs.values())), strict=True))
    return [highest[unit] for unit in range(len(costs))]


def read(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a layer reads."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model.eval()(images.clone())
    handle.remove()
    return seen[0]


def unfolded(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``[n, F]``, everything that a layer reads at once, at all of its positions."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    columns = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def consumer(
    model: nn.Module, name: str, group: Group, images: Tensor, ridge: float = RIDGE
) -> list[tuple[Tensor, Tensor, list[list[int]]]]:
    """W, H and the columns of each unit, for each block of a consumer; in shares of its output's variance."""
    layer = model.get_submodule(name)
    rows = unfolded(layer, read(model, name, images)).double()
    weight = layer.weight.detach().double().flatten(1)
    blocks = getattr(layer, "groups", 1)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    k, width = rows.shape[1] // channels, rows.shape[1] // blocks
    covariances = [torch.cov(rows[:, b * width : (b + 1) * width].T, correction=0) for b in range(blocks)]
    weights = weight.chunk(blocks)
    total = torch.stack([(w @ cov @ w.T).trace() for w, cov in zip(weights, covariances, strict=True)]).sum()
    parts = []
    for block, (cov, w) in enumerate(zip(covariances, weights, strict=True)):
        columns = [
            [c * k + j - block * width for c in unit for j in range(k) if c * k // width == block]
            for unit in group.consumers[name].tolist()
        ]
        parts.append((w / total.sqrt(), cov + ridge * cov.diagonal().mean() * torch.eye(width), columns))
    return parts


def costs_of(
    model: nn.Module, pictures: Tensor, batch: int = 7, **options: Any
) -> tuple[dict[str, Group], dict[str, Tensor]]:
    groups = find_units(model, pictures[:2]).groups
    options = {"positions": "all"} | options
    return groups, reconstruction_costs(model, groups.values(), lambda: iter(pictures.split(batch)), model, **options)


def check(model: nn.Module, images: Tensor, **options) -> dict[str, Group]:
    """Every group's costs against brute force."""
    groups, found = costs_of(model, images, **options)
    assert found.keys() == groups.keys()
    for name, group in groups.items():
        wanted = by_brute_force([part for c in group.consumers for part in consumer(model, c, group, images)])
        np.testing.assert_allclose(found[name], rising(wanted), rtol=2e-4, atol=1e-7, err_msg=name)
        assert found[name].argsort().tolist() == list(wanted), name
    return groups


# ---------------------------------------------------------------- the elimination


def problem(seed: int, units: int, width: int, outputs: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Correlated inputs, among them a pair of copies, and weights."""
    generator = torch.Generator().manual_seed(seed)
    features = units * width
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    if units > 1:
        mixing[width : 2 * width] = mixing[:width] + 1e-3 * mixing[width : 2 * width]
    h = mixing @ mixing.T / features + RIDGE * torch.eye(features)
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    return weight, h, [list(range(unit * width, (unit + 1) * width)) for unit in range(units)]


@pytest.mark.parametrize(("units", "width", "outputs"), [(6, 1, 4), (6, 3, 2), (5, 4, 30), (1, 2, 3)])
def test_six_channels_against_least_squares_from_scratch(units, width, outputs):
    parts = [problem(seed, units, width, outputs) for seed in range(3)]
    wanted = by_brute_force(parts)
    order, costs = eliminate([Elimination(h.inverse()[None], w[None].clone(), units) for w, h, _ in parts])
    assert order == list(wanted)
    np.testing.assert_allclose(costs, list(wanted.values()), rtol=1e-9)


@pytest.mark.parametrize("panel", [1, 8, 256])
def test_costs_add_up_to_what_the_ridge_regression_on_the_rest_leaves(monkeypatch, panel):
    """At every step, whatever number of removals wait for an update; costs are not negative."""
    monkeypatch.setattr("chanaxes_pl.pruning.reconstruction._PANEL", panel)
    weight, h, columns = problem(7, 12, 3, 8)
    system, gone, total = Elimination(h.inverse()[None], weight[None].clone(), 12), [], 0.0
    for unit in [4, 0, 11, 1, 7, 2, 9, 3, 5, 8]:
        costs = system.costs()
        assert costs.isinf().sum() == len(gone)
        assert (costs >= 0).all()
        system.remove(unit)
        gone.append(unit)
        total += float(costs[unit])
        least, _ = objective(weight, h, [c for u in gone for c in columns[u]])
        assert total == pytest.approx(least, rel=1e-9)


def test_blocks_add_up():
    parts = [problem(seed, 6, 2, 3) for seed in range(2)]
    together = Elimination(torch.stack([h.inverse() for _, h, _ in parts]), torch.stack([w for w, *_ in parts]), 6)
    apart = [Elimination(h.inverse()[None], w[None].clone(), 6) for w, h, _ in parts]
    (order, costs), (wanted, expected) = eliminate([together]), eliminate(apart)
    assert order == wanted
    np.testing.assert_allclose(costs, expected, rtol=1e-10)


# ---------------------------------------------------------------- networks


def chain(*layers: nn.Module, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return nn.Sequential(*layers).eval()


def test_a_convolution_and_the_head_behind_it():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, padding=1), *zoo.head(5))
    assert set(check(model, zoo.images_2d(40))) == {"0", "2"}


def test_a_residual_with_a_depthwise_layer_and_a_flattened_map():
    model, _, _ = residual()
    groups = check(model, zoo.images_2d(40))
    assert groups["stem"].consumers.keys() == {"inner", "head"}
    assert groups["stem"].consumers["head"].shape == (6, 4)


def test_a_convolution_of_groups_loses_a_place_in_each():
    model = chain(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), *zoo.head(8))
    assert check(model, zoo.images_2d(40))["0"].consumers["2"].shape == (6, 2)


@pytest.mark.parametrize("name", ["grouped", "concatenating", "flattening", "inverted"])
def test_other_kinds_of_groups(name):
    model = build(name)
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    groups, found = costs_of(model, images)
    for group in groups.values():
        parts = [part for c in group.consumers for part in consumer(model, c, group, images)]
        order = found[group.name].argsort().tolist()
        for count in (1, group.size // 2, group.size):  # brute force would take long
            least = [objective(w, h, [c for u in order[:count] for c in columns[u]])[0] for w, h, columns in parts]
            spent = found[group.name].sort().values[:count].sum()
            assert float(spent) >= sum(least) * (1 - 1e-3)  # costs that fell count as those before them
        first = [sum(objective(w, h, columns[unit])[0] for w, h, columns in parts) for unit in range(group.size)]
        assert order[0] == int(np.argmin(first))
        assert float(found[group.name].min()) == pytest.approx(min(first), rel=1e-3)


def test_heads_of_an_attention():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(lambda: FusedAttention(24, 6)).eval()
    groups, found = costs_of(model, PICTURES)
    name, group = next((name, group) for name, group in groups.items() if "attention" in name)
    (reader,) = group.consumers
    assert group.consumers[reader].shape == (6, 4)
    wanted = by_brute_force(consumer(model, reader, group, PICTURES))
    np.testing.assert_allclose(found[name], rising(wanted), rtol=2e-4)


def test_a_copy_costs_nothing_and_its_twin_does_not():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), *zoo.head(5))
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[4] = parameter[1]
    costs = costs_of(model.double(), zoo.images_2d(40).double(), ridge=1e-9)[1]["0"]
    order = costs.argsort().tolist()
    twins = {1, 4}
    assert order[0] in twins
    assert float(costs[order[0]]) < 1e-6
    other = (twins - {order[0]}).pop()
    assert float(costs[other]) > 0.01
    l1 = model[0].weight.detach().abs().flatten(1).sum(1)
    assert l1[1] == l1[4]  # whereas by itself one is worth as much as the other


def test_a_channel_that_nobody_listens_to_goes_first():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), *zoo.head(5))
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
        model[0].weight[5], model[0].bias[5] = 0.0, 2.0  # a constant, which the bias makes up for
    found = costs_of(model, zoo.images_2d(40))[1]["0"]
    assert set(found.argsort()[:2].tolist()) == {3, 5}
    assert found[[3, 5]].max() < 0.05 * found.sort().values[2]


def test_a_consumer_whose_inputs_never_vary_costs_nothing():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), *zoo.head(5))
    nn.init.zeros_(model[0].weight)
    found = costs_of(model, zoo.images_2d(20))[1]["0"]
    assert found.argsort().tolist() == list(range(6))
    assert found.max() < 1e-9


# ---------------------------------------------------------------- place by place


def place_by_place(model: nn.Module, name: str, rows: Tensor, weight: Tensor, group: Group) -> dict[int, float]:
    """Costs by brute force, from ``[n, C]`` values of the channels and ``[R, C]`` weights."""
    cov = torch.cov(rows.double().T, correction=0)
    weight = weight.detach().double()
    weight = weight / (weight @ cov @ weight.T).trace().sqrt()
    h = cov + RIDGE * cov.diagonal().mean() * torch.eye(len(cov))
    return by_brute_force([(weight, h, group.consumers[name].tolist())])


def test_a_transposed_convolution_counts_place_by_place():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3, stride=2), *zoo.head(5))
    groups, found = costs_of(model, zoo.images_2d(20))
    rows = read(model, "2", zoo.images_2d(20)).movedim(1, -1).flatten(0, 2)
    wanted = place_by_place(model, "2", rows, model[2].weight.transpose(0, 1).movedim(1, -1).flatten(0, 2), groups["0"])
    np.testing.assert_allclose(found["0"], rising(wanted), rtol=2e-4)


def test_a_transposed_convolution_of_groups():
    model = chain(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, groups=2), *zoo.head(8))
    groups, found = costs_of(model, zoo.images_2d(20))
    assert groups["0"].consumers["2"].shape == (6, 2)
    assert found["0"].isfinite().all()
    assert len(found["0"].unique()) == 6


def test_a_convolution_with_a_forward_of_its_own_counts_place_by_place():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), SamePadding(6, 5, 3, stride=2), *zoo.head(5))
    groups, found = costs_of(model, zoo.images_2d(20))
    rows = read(model, "2", zoo.images_2d(20)).movedim(1, -1).flatten(0, 2)
    wanted = place_by_place(model, "2", rows, model[2].weight.movedim(1, -1).flatten(0, 2), groups["0"])
    np.testing.assert_allclose(found["0"], rising(wanted), rtol=2e-4)


def test_little_memory_takes_more_passes_and_gives_the_same():
    model, _, _ = residual()
    images, runs = zoo.images_2d(40), []
    groups = find_units(model, images[:2]).groups

    def batches():
        runs.append(1)
        return iter(images.split(10))

    once, again = (
        reconstruction_costs(model, groups.values(), batches, model, memory=memory) for memory in (2.0, 1.258e-4)
    )
    assert len(runs) == 1 + 2
    assert all(torch.equal(once[name], again[name]) for name in groups)


def test_a_flattened_map_too_wide_for_memory_counts_place_by_place():
    model = chain(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4))
    images = zoo.images_2d(40)
    check(model, images)
    groups, found = costs_of(model, images, memory=5e-5)
    rows, weight = (
        x.unflatten(1, (5, 9)).movedim(1, 2).flatten(0, 1) for x in (read(model, "3", images), model[3].weight)
    )
    units = Group("0", 5, {}, {"3": torch.arange(5)[:, None]}, {}, ())
    wanted = place_by_place(model, "3", rows, weight, units)
    np.testing.assert_allclose(found["0"], rising(wanted), rtol=2e-4)
    assert groups["0"].size == 5


def test_too_little_memory_is_an_error_that_names_the_group():
    with pytest.raises(ValueError, match=r"memory=1e-06: expected at least .* GB for the moments of what reads .*"):
        costs_of(residual()[0], zoo.images_2d(20), memory=1e-6)


def test_values_that_are_not_finite_are_an_error_that_names_the_consumer():
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), zoo.Apply(lambda x: x.nan_to_num()), *zoo.head(5))
    groups = find_units(model, zoo.images_2d(2)).groups
    nn.init.constant_(model[0].bias, torch.inf)
    with pytest.raises(ValueError, match=r"layer '2' reads NaN or infinity on this probe: expected finite values"):
        reconstruction_costs(model, groups.values(), lambda: iter([zoo.images_2d(8)]), model)


@pytest.mark.parametrize("name", NETWORKS)
def test_patterns_of_real_networks(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain(NETWORKS[name]().eval())
    groups, found = costs_of(model, PICTURES.to(next(model.parameters()).dtype), 48, positions=8)
    for group, costs in found.items():
        assert costs.isfinite().all()
        assert len(costs.unique()) == groups[group].size
    assert found.keys() == groups.keys()


# ---------------------------------------------------------------- as a score


def test_every_allocation_takes_units_in_the_order_of_the_elimination():
    model, loader, units = residual()
    values = channel_scores(model, loader, units, ["reconstruction"], positions="all")["reconstruction"]
    found = costs_of(model, torch.cat([images for images, _ in loader]), images=40)[1]
    for name, group in units.groups.items():
        order = found[name].argsort().tolist()
        assert (found[name] > 0).all()
        for layer, indices in group.producers.items():
            torch.testing.assert_close(
                values[layer][indices], found[name][:, None].expand(indices.shape), rtol=1e-6, atol=0
            )
        assert unit_ranks(group, values).argsort().tolist() == order
        assert unit_values(group, values).argsort().tolist() == order
        assert len(unit_values(group, values).unique()) == group.size


@pytest.mark.parametrize("positions", [5, 30])  # of 36; of 30 a layer takes in 8 images at once, and here then one
def test_positions_are_sampled_alike_whatever_the_batches(positions):
    model, _, _ = residual()
    one, other = (costs_of(model, zoo.images_2d(40), batch, positions=positions)[1] for batch in (40, 9))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-9)


def test_no_more_positions_are_taken_than_are_of_use():
    model, _, _ = residual()
    images = zoo.images_2d(40)
    every, enough = costs_of(model, images, 40)[1], costs_of(model, images, 40, images=40)[1]
    assert all(torch.equal(every[name], enough[name]) for name in every)  # 36 positions of 40 images are few
    fewer, third = costs_of(model, images, images=834)[1], costs_of(model, images, positions=12)[1]
    assert all(torch.equal(fewer[name], third[name]) for name in every)  # 12 of them make 10,000
    assert not torch.equal(fewer["stem"], every["stem"])


@pytest.mark.parametrize("allocation", ["uniform", "shared", "own"])
def test_the_same_network_every_time(allocation):
    model, loader, _ = residual()
    slim = [prune(model, loader, budget=0.6, score="reconstruction", allocation=allocation).model for _ in range(2)]
    pairs = zip(slim[0].state_dict().values(), slim[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_grid_has_it():
    model, loader, _ = residual()
    experiment = PruningExperiment(budgets=(0.7,), scores=("reconstruction",), compensate=("refit",))
    table = pruning_grid(model, loader, loader, experiment, progress=False)
    assert table["family"].tolist() == ["dense", *["joint"] * 3]
    assert np.isfinite(table["loss"]).all()
