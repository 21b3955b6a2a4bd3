"""The pruning grid: every row is what ``prune`` and ``evaluate`` give by themselves."""

from __future__ import annotations

import io
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from chanaxes_pl.analysis.grids import area_under_curve, paired_difference, score_differences
from chanaxes_pl.analysis.text import describe_pruning
from chanaxes_pl.compensation.polish import polish
from chanaxes_pl.lesions.damage_table import join_shares
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.plots import plot_lesions, plot_pruning
from chanaxes_pl.pruning import grid as protocol
from chanaxes_pl.pruning.grid import PruningExperiment, evaluate, pruning_grid
from chanaxes_pl.pruning.latency import milliseconds
from chanaxes_pl.pruning.pruner import prune
from chanaxes_pl.tables import VARIANT
from chanaxes_pl.units.macs import count_macs
from tests.helpers.training import CLASSES, images

PROBE, TEST = images(32, 1), DataLoader(images(24, 3), batch_size=10)
SCORES, BUDGETS = ("l1", "taylor", "random_2"), (0.8, 0.5)
same = partial(lambda batch: batch)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    ).eval()  # fmt: skip


def grid(place: Placement | None = None, unfinished: Path | None = None, **options) -> pd.DataFrame:
    experiment = PruningExperiment(**{"budgets": BUDGETS, "scores": SCORES} | options)
    return pruning_grid(network(), PROBE, TEST, experiment, progress=False, place=place, unfinished=unfinished)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return grid()


def test_evaluate_is_a_plain_loop():
    model, rows = network().train(), []
    for pictures, labels in zip(*images(24, 3)[:], strict=True):
        with torch.no_grad():
            out = model.eval()(pictures[None])[0].double()
        own, rest = out[labels], out[torch.arange(CLASSES) != labels]
        rows.append([float(out.logsumexp(0) - own), float(out.argmax() == labels), float(own - rest.max())])
    model.train()
    found = evaluate(model, TEST, Placement(same))
    assert list(found) == ["loss", "accuracy", "margin"]
    np.testing.assert_allclose(list(found.values()), np.mean(rows, 0), rtol=1e-5)
    assert model.training


def test_one_row_a_variant_and_one_for_the_dense_network(table):
    keys = table[list(VARIANT)]
    assert len(table) == 1 + len(SCORES) * 3 * 2 * len(BUDGETS)
    assert not keys.duplicated().any()
    dense = table.iloc[0]
    assert (dense["score"], dense["family"], dense["budget"], dense["macs_share"]) == ("dense", "dense", 1.0, 1.0)
    assert dense["macs"] == count_macs(network(), PROBE[0][0][None])
    assert dense[["loss", "accuracy", "margin"]].to_dict() == evaluate(network(), TEST, Placement(same))
    assert set(table["compensate"]) == {"", "none", "refit"}
    assert not table.isna().any().any()


@pytest.mark.parametrize("allocation", ["uniform", "shared", "own"])
@pytest.mark.parametrize("compensate", [False, "refit"])
def test_rows_are_what_prune_makes(table, allocation, compensate):
    for score in SCORES:
        for budget in BUDGETS:
            settings = {"score": score, "allocation": allocation, "compensate": compensate, "budget": budget}
            slim = prune(network(), PROBE, **settings)
            row = table.query(
                "score == @score and allocation == @allocation and budget == @budget and compensate == @kind",
                local_dict=settings | {"kind": compensate or "none"},
            ).iloc[0]
            assert row["macs"] == slim.macs
            assert row["macs_share"] == slim.macs / slim.dense_macs
            assert row["parameters"] == sum(p.numel() for p in slim.model.parameters())
            assert row[["loss", "accuracy", "margin"]].to_dict() == evaluate(slim.model, TEST, Placement(same))


def test_shared_allocation_imposes_taylors_widths(table):
    taylor = table[(table["score"] == "taylor") & (table["allocation"] == "own")].set_index(["compensate", "budget"])
    shared = table[table["allocation"] == "shared"]
    for row in shared.to_dict("records"):
        assert row["macs"] == taylor.loc[(row["compensate"], row["budget"]), "macs"]
    widths = [prune(network(), PROBE, budget=0.5, score=s, allocation=a).model[0].out_channels
              for s, a in [("taylor", "own"), ("l1", "shared"), ("random_2", "shared")]]  # fmt: skip
    assert len(set(widths)) == 1


def test_uniform_allocation_takes_equal_shares(table):
    uniform = table[table["allocation"] == "uniform"]
    assert (uniform.groupby("budget")["macs"].nunique() == 1).all()
    slim = prune(network(), PROBE, budget=0.5, allocation="uniform").model
    assert slim[0].out_channels / 12 == pytest.approx(slim[3].out_channels / 16, abs=1 / 12)


def test_budgets_of_parameters_in_multiples_of_four():
    found = grid(budget_of="parameters", round_to=4, scores=("l1",), allocations=("uniform",), compensate=(False,))
    dense, *pruned = found.to_dict("records")
    for row in pruned:
        slim = prune(network(), PROBE, budget=row["budget"], budget_of="parameters", round_to=4, compensate=False)
        assert (row["macs"], row["parameters"]) == (slim.macs, sum(p.numel() for p in slim.model.parameters()))
        assert row["parameters"] <= row["budget"] * dense["parameters"]
        assert not slim.model[0].out_channels % 4
    assert set(found["budget_of"]) == {"parameters"}
    assert "by the share of parameters that remains" in describe_pruning(found)
    assert "by the share of multiply–accumulates that" in describe_pruning(found.drop(columns="budget_of"))


def test_the_shares_of_two_processes_make_the_whole(table):
    shares = [grid(Placement(same, rank=rank, world=2)) for rank in (0, 1)]
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    pd.testing.assert_frame_equal(join_shares(shares), table, check_exact=True)


class Interrupted(Exception):
    """What ends a process in the middle."""


def test_an_interrupted_grid_goes_on(table, tmp_path, monkeypatch):
    rows, cuts = tmp_path / "rows.parquet", []

    def cut(pruner, kept):
        cuts.append(kept)
        if len(cuts) == 15:
            raise Interrupted
        return whole(pruner, kept)

    whole = protocol.Pruner.cut
    monkeypatch.setattr(protocol.Pruner, "cut", cut)
    with pytest.raises(Interrupted):
        grid(unfinished=rows)
    assert len(pd.read_parquet(rows)) == 15  # the dense network, and 14 others
    pd.testing.assert_frame_equal(grid(unfinished=rows), table, check_exact=True)
    assert len(cuts) == 15 + len(table) - 15
    wider = grid(unfinished=rows, budgets=(0.9, *BUDGETS))  # rows serve whatever else is asked for
    assert len(cuts) == 15 + len(wider) - 15
    kept = wider[wider["budget"] != 0.9].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, table, check_exact=True)


@pytest.mark.parametrize(
    "other",
    [
        {"options": {"seed": 1}},
        {"options": {"protect": "0"}},
        {"probe": images(32, 2)},
        {"probe": ConcatDataset([PROBE, images(8, 2)])},
        {"evaluation": DataLoader(images(24, 4), batch_size=10)},
        {"recipe": "another"},
        {"model": nn.Sequential(*network()[:-1], nn.Linear(16, CLASSES)).eval()},
    ],
    ids=["settings", "layers", "probe", "longer probe", "test images", "recipe", "network"],
)
def test_rows_of_another_grid_are_not_taken_over(tmp_path, monkeypatch, other):
    rows, settings = tmp_path / "rows.parquet", {"budgets": (0.6,), "scores": ("random",), "allocations": ("uniform",)}
    grid(unfinished=rows, **settings)
    experiment = PruningExperiment(**settings | other.get("options", {}))
    asked = other.get("model", network()), other.get("probe", PROBE), other.get("evaluation", TEST), experiment
    wanted = pruning_grid(*asked, progress=False)
    pruned: list[int] = []
    whole = protocol.Pruner.cut
    monkeypatch.setattr(protocol.Pruner, "cut", lambda *given: pruned.append(1) or whole(*given))
    found = pruning_grid(*asked, progress=False, unfinished=str(rows), recipe=other.get("recipe", ""))
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)
    assert len(pruned) == len(wanted) - 1
    assert set(pd.read_parquet(rows)["accuracy"]) == set(wanted["accuracy"])


def test_a_grid_that_goes_on_says_so(tmp_path, caplog):
    settings = {"budgets": (0.6,), "scores": ("random",), "allocations": ("uniform",)}
    with caplog.at_level("INFO"):
        grid(unfinished=tmp_path / "rows.parquet", **settings)
        assert "of this grid" not in caplog.text
        grid(unfinished=tmp_path / "rows.parquet", **settings)
    assert "rows.parquet holds 3 of 3 networks of this grid, which goes on there." in caplog.text


def test_images_that_give_nan_are_told():
    pictures, labels = TEST.dataset[:]
    spoiled = pictures.clone()
    spoiled[5] = float("nan")
    with pytest.raises(
        ValueError, match=r"pruning_grid: Sequential has a loss of nan on the evaluation images: expected"
    ):
        pruning_grid(network(), PROBE, [(spoiled, labels)], PruningExperiment(budgets=(0.7,)), progress=False)
    found = evaluate(network(), [(torch.full_like(pictures, float("nan")), labels)], Placement(same))
    assert found["accuracy"] == 0.0  # a logit that is no number names no class
    assert math.isnan(found["loss"])


def test_other_kinds_of_experiment_are_refused():
    with pytest.raises(TypeError, match=r"pruning_grid\(experiment='prune'\): expected a PruningExperiment\(…\)"):
        pruning_grid(network(), PROBE, TEST, "prune", progress=False)


def test_a_loaders_generator_is_left_as_it_was():
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(TEST.dataset, batch_size=5, shuffle=True, generator=generator)
    before = generator.get_state()
    first, second = (evaluate(network(), data, Placement(same)) for _ in range(2))
    assert first == second
    assert torch.equal(generator.get_state(), before)


def test_a_file_of_something_else_is_no_unfinished_grid(tmp_path):
    pd.DataFrame({"layer": ["conv"]}).to_parquet(tmp_path / "axes.parquet")
    with pytest.raises(
        ValueError, match=r"axes.parquet: lacks the columns score, allocation, compensate, budget, settings"
    ):
        grid(unfinished=tmp_path / "axes.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ("l1", "chipp")}, r"PruningExperiment\(score='chipp'\): no such score; did you mean 'chip'"),
        ({"budgets": (0.8, 0.0)}, r"PruningExperiment\(budget=0.0\)"),
        ({"budgets": (0.8, 0.001)}, r"pruning_grid\(budget=0.001\): 0.\d+ of the MACs remain"),
        ({"allocations": ("uniform", "ownn")}, r"PruningExperiment\(allocation='ownn'\)"),
        ({"compensate": (False, "fould")}, r"PruningExperiment\(compensate='fould'\)"),
        ({"protect": ["9"]}, r"protect='9'\): matches no layer"),
        (
            {"budget_of": "flops"},
            r"PruningExperiment\(budget_of='flops'\): expected one of 'macs', 'parameters', 'late",
        ),
        ({"budgets": 0.5}, r"PruningExperiment\(budgets=0.5\): expected several, such as \[0.5\]"),
        ({"scores": "l1"}, r"PruningExperiment\(scores='l1'\): expected several, such as \['l1'\]"),
        ({"compensate": "refit"}, r"PruningExperiment\(compensate='refit'\): expected several"),
        ({"finetune_epochs": "a"}, r"PruningExperiment\(finetune_epochs='a'\): expected a whole number from 0 on"),
        ({"budgets": ()}, r"PruningExperiment\(budgets=\(\)\): expected one at least"),
        ({"scores": []}, r"PruningExperiment\(scores=\[\]\): expected one at least"),
        ({"round_to": 0}, r"PruningExperiment\(round_to=0\): expected a whole number of channels"),
        ({"round_to": 17}, r"pruning_grid\(round_to=17\): expected at most 16, the channels of the widest layer"),
        (
            {"budgets": (0.1,), "budget_of": "parameters", "round_to": 8},
            r"pruning_grid\(budget=0.1\): 0.\d+ of the parameters remain when every group is down to 8 channels",
        ),
    ],
)
def test_errors_come_before_the_first_network_is_pruned(monkeypatch, options, message):
    monkeypatch.setattr(protocol, "evaluate", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match=message):
        grid(**options)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False])
def test_steps_that_take_long_show_progress_in_a_terminal_unless_told_not_to(monkeypatch, progress, terminal):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("chanaxes_pl.pruning.pruner.polish", partial(polish, steps=1))
    chosen = {"scores": ["reconstruction"], "allocations": ["sensitivity"], "compensate": ["distill"]}
    experiment = PruningExperiment(budgets=(0.7,), **chosen)
    pruning_grid(network(), PROBE, TEST, experiment, progress=progress)
    steps = {"reconstruction", "sensitivity", "refit", "polish", "pruning"}
    assert {step for step in steps if f"{step}: " in shown.getvalue()} == (steps if progress and terminal else set())


def test_every_network_of_the_grid_is_checked():
    class Mixes(nn.Sequential):
        def forward(self, batch):
            for layer in self:
                batch = layer(batch)
                if isinstance(layer, nn.ReLU) and len(batch) > 1:  # the trial runs one image at a time
                    batch = batch / batch.sum(1, keepdim=True).clamp_min(1e-3)
            return batch

    experiment = PruningExperiment(budgets=(0.5,), scores=("l1",))
    with pytest.raises(ValueError, match=r"pruning_grid: Mixes gives different logits after removal than with those"):
        pruning_grid(Mixes(*network()).eval(), PROBE, TEST, experiment, progress=False)


@torch.no_grad()
def silence(model: nn.Module) -> None:
    """As fine-tuning goes, the worst: all logits 0."""
    for parameter in model.parameters():
        parameter.zero_()


def test_fine_tuned_networks_are_evaluated_again(table):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experiment = PruningExperiment(
        budgets=(0.5,), scores=("l1",), allocations=("uniform",), compensate=(False,), latency=True
    )
    found = pruning_grid(model, PROBE, TEST, experiment, finetune=silence, progress=False)
    assert found["tuned_loss"].tolist()[1:] == pytest.approx([math.log(CLASSES)])
    assert np.isnan(found["tuned_loss"][0])
    wanted = table.query("score == 'l1' and allocation == 'uniform' and budget == 0.5 and compensate == 'none'")
    assert found["loss"][1] == wanted["loss"].item()
    assert (found[["latency_1", "latency_64"]] > 0).all().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [1, 5, 64])
def test_latency_is_of_a_batch_of_that_size(size):
    seen = []

    class Watches(nn.Module):
        def forward(self, batch):
            seen.append(tuple(batch.shape))
            return batch

    assert milliseconds(Watches(), torch.zeros(4, 3, 8, 8), size) > 0
    assert set(seen) == {(size, 3, 8, 8)}


def curves(**accuracy: list[float]) -> pd.DataFrame:
    """A grid at 0.5 and 0.75 of the MACs, for each score, with a dense accuracy of 1."""
    rows = [
        {"score": "dense", "family": "dense", "allocation": "", "compensate": "", "macs_share": 1.0, "accuracy": 1.0}
    ]
    for score, values in accuracy.items():
        same = {"score": score, "family": "baseline", "allocation": "uniform", "compensate": "none"}
        rows += [same | {"macs_share": x, "accuracy": y} for x, y in zip((0.75, 0.5), values, strict=True)]
    return pd.DataFrame(rows)


def test_area_by_hand():
    areas = area_under_curve(curves(a=[0.8, 0.4], b=[1.0, 1.0])).set_index("score")["area"]
    # two trapezes of width ¼ over a range of ½: (0.4 + 0.8)/2/2 + (0.8 + 1)/2/2
    assert areas.to_dict() == pytest.approx({"a": 0.75, "b": 1.0})


def test_areas_of_several_runs_use_their_own_dense_network():
    other = curves(a=[0.8, 0.4])
    other.loc[other["score"] == "dense", "accuracy"] = 0.6
    areas = area_under_curve(pd.concat([curves(a=[0.8, 0.4]).assign(run="one"), other.assign(run="two")]))
    assert areas.set_index("run")["area"].to_dict() == pytest.approx({"one": 0.75, "two": 0.65})


def test_paired_difference_by_hand():
    runs = [curves(a=[0.8, 0.8], b=[0.6, 0.6], c=[0.4, 0.4]), curves(a=[0.9, 0.9], b=[0.5, 0.5], c=[0.5, 0.5])]
    areas = area_under_curve(pd.concat([table.assign(run=run) for run, table in enumerate(runs)]))
    (row,) = paired_difference(areas, ["a"], ["b", "c"]).to_dict("records")
    # the dense end is shared: areas differ by ¾ of what accuracies do, 0.3 and 0.4
    assert row["mean"] == pytest.approx(0.75 * 0.35)
    assert (row["low"], row["high"], row["runs"]) == pytest.approx((0.75 * 0.3, 0.75 * 0.4, 2))
    (opposite,) = paired_difference(areas, ["b", "c"], ["a"]).to_dict("records")
    assert opposite["mean"] == pytest.approx(-row["mean"])


def test_a_single_run_has_no_interval():
    (row,) = paired_difference(area_under_curve(curves(a=[0.8, 0.8], b=[0.6, 0.6])), ["a"], ["b"]).to_dict("records")
    assert row["mean"] == pytest.approx(0.15)
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
    assert row["runs"] == 1


def test_figure_of_the_grid(table, tmp_path):
    figure = plot_pruning(table, "title")
    panels = figure.axes
    assert len(panels) == 3 * 2
    assert [axes.get_xlabel() for axes in panels[-3:]] == ["MACs left (%)"] * 3
    assert [panels[0].get_ylabel(), panels[3].get_ylabel()] == ["accuracy (%)"] * 2
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"l1", "taylor", "random", "not pruned"}
    figure.savefig(tmp_path / "figure.png")
    assert len(panels[0].collections) == 3  # a band each
    crowd = pd.concat([table, *(table[table["score"] == "l1"].assign(score=f"l1_{n}") for n in range(8))])
    assert not plot_pruning(crowd).axes[0].collections


def test_figures_of_one_budget_and_of_one_layer(table, tmp_path):
    figure = plot_pruning(table[table["budget"].isin([1.0, 0.5])])
    figure.savefig(tmp_path / "one.png")
    assert len(figure.axes) == 6
    lesions = pd.DataFrame({"layer": "a", "channel": range(6), "zero_loss": np.arange(6) / 9, "l": np.arange(6.0)})
    mean = pd.DataFrame(
        [{"layer": layer, "score": "l", "rho": 1.0, "low": 0.9, "high": 1.0} for layer in ("a", "network")]
    )
    figure = plot_lesions(lesions, mean)
    figure.savefig(tmp_path / "layer.png")
    assert "damage" in figure.axes[0].get_ylabel()
    assert figure.axes[0].get_xlabel() == "rank in its layer (%)"


def test_evaluation_images_that_can_be_read_once_or_are_none_are_refused():
    experiment = PruningExperiment(budgets=BUDGETS, scores=SCORES)
    with pytest.raises(TypeError, match=r"pruning_grid\(evaluation=.*\): expected batches that can be read again"):
        pruning_grid(network(), PROBE, iter(TEST), experiment, progress=False)
    with pytest.raises(ValueError, match=r"pruning_grid\(evaluation\): it holds no images"):
        pruning_grid(network(), PROBE, [], experiment, progress=False)


def test_one_score_has_nothing_to_be_compared_with(table):
    alone = table[table["score"].isin(["dense", "l1"])].assign(run="a")
    found, none = score_differences(alone), score_differences(alone[alone["score"] == "dense"])
    assert len(found) == len(none) == 0
    assert list(found) == list(none)
    assert list(score_differences(table.assign(run="a"))) == list(found)


def test_fine_tuned_scores_are_compared_from_the_same_dense_network():
    grid = pd.concat([curves(l1=[0.2, 0.2], b=[0.1, 0.1]).assign(run=run) for run in range(2)])
    tuned = grid.assign(tuned_accuracy=(2 * grid["accuracy"]).where(grid["score"] != "dense"))
    (row,) = score_differences(tuned, "tuned_accuracy").to_dict("records")
    assert row["mean"] == pytest.approx(0.75 * -0.2)
