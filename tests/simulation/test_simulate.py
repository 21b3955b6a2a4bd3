"""Simulated Gaussian channels: exact solutions, slow references, and what may and may not be coupled."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import spearmanr
from torch import Tensor

from chanaxes_pl import compute_axes
from chanaxes_pl.cli import main as cli
from chanaxes_pl.plots import plot_alignment, plot_simulation
from chanaxes_pl.plots.alignment import PUBLISHED
from chanaxes_pl.simulation import FLOWS, Problem, flows, half_times, initial_coupling, simulate
from chanaxes_pl.simulation.flows import COLUMNS, trajectory
from tests.helpers import cases as zoo

SMALL = Problem(inputs=8, channels=40, seeds=2)
WEIGHTS = {"capture": 0.0, "mixture": 0.5, "task": 1.0}
TIMES = [0.0, 0.1, 0.3, 1.0, 3.0]


def informations(weights: Tensor, draw) -> tuple[Tensor, Tensor]:
    """I_X and I_T ``[S, C]`` of weights ``[S, C, F]``, as they are defined."""
    power = torch.einsum("scf,fg,scg->sc", weights, draw.covariance, weights)
    known = torch.einsum("scf,sf->sc", weights, draw.cross).square() / power
    return torch.log(1 + power / draw.noise[:, None]) / 2, -torch.log(1 - known) / 2


# ---------------------------------------------------------------- the start


def test_the_start_is_what_was_asked_for():
    problem = Problem(spectrum=[1.0, 8.0, 2.0, 5.0], leading=2, share=0.7, explained=0.3, channels=50, seeds=3)
    draw = problem.draw()
    assert_allclose(problem.eigenvalues, [2.0, 1.25, 0.5, 0.25])
    assert_allclose(draw.covariance, np.diag(problem.eigenvalues))
    assert draw.weights.shape == (3, 50, 4)
    assert draw.weights.dtype == draw.cross.dtype == torch.float64
    assert_allclose(draw.weights.norm(dim=-1), 1.0)
    squares = draw.cross.square()
    assert_allclose(squares[:, :2].sum(1) / squares.sum(1), 0.7)
    assert_allclose((squares / problem.eigenvalues).sum(1), 0.3)  # cᵀΣ⁻¹c, where Var T = 1
    assert_allclose(draw.noise, np.median((draw.weights.square() @ problem.eigenvalues).numpy(), axis=1))


def test_a_power_law_has_its_exponent():
    eigenvalues = Problem(spectrum=1.5, inputs=6).eigenvalues
    assert_allclose(eigenvalues / eigenvalues[0], np.arange(1, 7) ** -1.5)
    assert_allclose(eigenvalues.mean(), 1)


def test_a_run_is_the_same_whatever_runs_beside_it():
    """Seed k draws run k: neither more seeds nor another share or spectrum change its weights."""
    one, more = SMALL.draw(), replace(SMALL, seeds=4, share=0.2).draw()
    assert torch.equal(one.weights, more.weights[:2])
    assert torch.equal(one.weights, replace(SMALL, spectrum=2.0).draw().weights)
    assert not torch.equal(one.weights[0], one.weights[1])
    assert_allclose(one.cross[:, 1:] / one.cross[:, 1:2], more.cross[:2, 1:] / more.cross[:2, 1:2])


@pytest.mark.parametrize("spectrum", [0.5, 1.0, 2.0])
def test_channels_start_coupled_where_the_task_is_in_the_leading_eigenvector_and_only_there(spectrum):
    problem = Problem(spectrum=spectrum, seeds=20)
    rho = initial_coupling(problem, [0.0, 0.5, 1.0]).groupby("share")["rho"].mean()
    assert rho[1.0] > 0.4
    assert rho[0.0] < 0.05
    assert rho.is_monotonic_increasing


def test_what_is_recorded_is_what_it_says():
    """Every column of a later moment against NumPy and SciPy, one run at a time."""
    frame = simulate(SMALL, "mixture", duration=2.0, records=3)
    assert tuple(frame) == COLUMNS
    draw, times = SMALL.draw(), [0.0, *np.geomspace(2e-3, 2, 3)]
    eigenvalues = SMALL.eigenvalues.numpy()
    for time, weights in trajectory(draw, 0.5, times, 1e-8):
        for run in range(2):
            w, c, noise = weights[run].numpy(), draw.cross[run].numpy(), float(draw.noise[run])
            row = frame[(frame["run"] == run) & np.isclose(frame["time"], time)].squeeze()
            power, shared = (w**2 * eigenvalues).sum(1), w @ c
            capture, task = np.log(1 + power / noise) / 2, -np.log(1 - shared**2 / power) / 2
            left = c - (shared / power)[:, None] * w * eigenvalues
            cosines = (w * eigenvalues * left).sum(1) / np.linalg.norm(w * eigenvalues, axis=1)
            expected = {
                "rho": spearmanr(capture, task).statistic,
                "alignment": np.abs(cosines / np.linalg.norm(left, axis=1)).mean(),
                "input_capture": capture.mean(),
                "task_information": task.mean(),
                "capture_spread": capture.std(ddof=1),
                "task_spread": task.std(ddof=1),
                "on_leading": (w[:, 0] ** 2).mean(),
            }
            assert_allclose(row[list(expected)].astype(float), list(expected.values()), 1e-7)
    assert frame["reason"].eq("").all()


# ---------------------------------------------------------------- the flow


def test_the_flow_on_input_capture_has_its_exact_solution():
    """With two inputs, u = (w₂/w₁)² obeys (σ₀² + λ₁) ln u − (λ₁ − λ₂) ln(1 + u) + 2 (λ₁ − λ₂) t = constant."""
    problem = Problem(spectrum=[1.5, 0.5], channels=30, seeds=3)
    draw, kept = problem.draw(), []
    first, second = problem.eigenvalues
    for time, weights in trajectory(draw, 0.0, TIMES, 1e-9):
        u = (weights[..., 1] / weights[..., 0]).square()
        gap = first - second
        kept.append((draw.noise[:, None] + first) * u.log() - gap * torch.log1p(u) + 2 * gap * time)
    for later in kept[1:]:
        assert_allclose(later, kept[0], 1e-6, 1e-6)
    assert (kept[-1] - 2 * (first - second) * TIMES[-1] - kept[0]).abs().min() > 0.1  # the channels did move


@pytest.mark.parametrize("flow", FLOWS)
def test_the_flow_is_the_limit_of_small_ascent_steps(flow):
    """Plain ascent by autograd, renormalised after every step, extrapolated from two learning rates to 0."""
    draw = replace(SMALL, channels=5).draw()

    def ascended(rate: float) -> Tensor:
        weights = draw.weights
        for _ in range(round(0.5 / rate)):
            weights = weights.detach().requires_grad_()
            capture, task = informations(weights, draw)
            objective = (1 - WEIGHTS[flow]) * capture + WEIGHTS[flow] * task
            (gradient,) = torch.autograd.grad(objective.sum(), weights)
            weights = weights + rate * gradient
            weights = weights / weights.norm(dim=-1, keepdim=True)
        return weights.detach()

    *_, (_, found) = trajectory(draw, WEIGHTS[flow], [0.0, 0.5], 1e-9)
    coarse, fine = ascended(2e-3), ascended(1e-3)
    assert_allclose(2 * fine - coarse, found, atol=2e-6)
    assert (fine - found).abs().max() > 2e-5  # without extrapolation it would show


@pytest.mark.parametrize("flow", FLOWS)
def test_norms_stay_and_the_objective_grows(flow):
    draw, weight = SMALL.draw(), WEIGHTS[flow]
    path = [weights for _, weights in trajectory(draw, weight, TIMES, 1e-8)]
    objective = []
    for weights in path:
        assert_allclose(weights.norm(dim=-1), 1.0, 1e-6)
        capture, task = informations(weights, draw)
        objective.append((1 - weight) * capture + weight * task)
    gains = torch.stack(objective).diff(dim=0)
    assert (gains > -1e-9).all()
    assert gains.mean() > 1e-3


def test_task_information_grows_at_the_cost_of_input_capture():
    """A channel's other information need not grow: the objective is what a flow ascends, not both."""
    draw = SMALL.draw()
    captures = torch.stack([informations(weights, draw)[0] for _, weights in trajectory(draw, 1.0, TIMES, 1e-8)])
    assert (captures.diff(dim=0) < -1e-3).any()


@pytest.mark.parametrize("flow", FLOWS)
def test_a_finer_step_changes_nothing(flow):
    draw = SMALL.draw()
    paths = {
        tolerance: torch.stack([weights for _, weights in trajectory(draw, WEIGHTS[flow], TIMES, tolerance)])
        for tolerance in (1e-4, 1e-8, 1e-11)
    }
    assert_allclose(paths[1e-8], paths[1e-11], atol=2e-6)
    assert (paths[1e-4] - paths[1e-11]).abs().max() > 2e-6  # a coarse one would be noticed
    coarse, fine = (simulate(SMALL, flow, records=8, tolerance=tolerance)["rho"] for tolerance in (1e-8, 1e-11))
    assert_allclose(coarse, fine, atol=0.01)


def test_times_between_steps_do_not_steer_the_flow():
    """Recording more often changes no trajectory."""
    draw = SMALL.draw()
    *_, (_, often) = trajectory(draw, 1.0, np.linspace(0, 3, 50).tolist(), 1e-8)
    *_, (_, seldom) = trajectory(draw, 1.0, [0.0, 3.0], 1e-8)
    assert torch.equal(often, seldom)


def test_seeds_reproduce():
    settings = {"duration": 1.0, "records": 3}
    first, again = simulate(SMALL, **settings), simulate(SMALL, **settings)
    pd.testing.assert_frame_equal(first, again)
    assert first[first["run"] == 0]["rho"].iloc[-1] != first[first["run"] == 1]["rho"].iloc[-1]


def test_a_mixture_of_one_is_that_one():
    settings = {"duration": 1.0, "records": 3}
    for mixture, flow in ((0.0, "capture"), (1.0, "task")):
        mixed, pure = simulate(SMALL, "mixture", mixture, **settings), simulate(SMALL, flow, **settings)
        pd.testing.assert_frame_equal(mixed.drop(columns="flow"), pure.drop(columns="flow"))


def test_the_task_parts_what_it_found_coupled():
    """Coupled at the start; under the task's flow ρ is halved in every run, and earlier than under input capture's."""
    problem = Problem(seeds=5)
    times = {flow: half_times(simulate(problem, flow, records=25)).set_index("run") for flow in FLOWS}
    assert (times["task"]["initial"] > 0.2).all()
    assert np.isfinite(times["task"]["time"]).all()
    assert (times["task"]["time"] < times["capture"]["time"]).all()


def test_where_all_of_the_task_is_in_the_leading_eigenvector_it_parts_nothing():
    """What a channel captures most is then all there is to know: ρ ends higher than it began."""
    for flow in ("capture", "task"):
        ends = simulate(Problem(share=1.0, seeds=3), flow, records=2).groupby("time")["rho"].mean()
        assert ends.iloc[-1] > ends.iloc[0]


def test_channels_that_have_become_the_same_have_no_rank_correlation():
    frame = simulate(Problem(spectrum=2.0, inputs=4, channels=20, seeds=2), "capture", duration=60.0, records=4)
    end, start = frame[frame["time"] == 60], frame[frame["time"] == 0]
    assert end["rho"].isna().all()
    assert end["reason"].eq("all channels have become the same").all()
    assert_allclose(end["on_leading"], 1.0)
    assert start["rho"].notna().all()
    assert start["reason"].eq("").all()


def test_half_times_are_read_between_records():
    def path(run: int, rho: list[float], channels: int = 128) -> pd.DataFrame:
        times = np.arange(len(rho), dtype=float)
        return pd.DataFrame({"time": times, "rho": rho}).assign(flow="task", share=0.9, run=run, channels=channels)

    paths = [path(0, [0.8, 0.6, 0.2, 0.5]), path(1, [0.8, 0.5, 0.4]), path(2, [0.1, -0.5]), path(3, [0.5, 0.3, np.nan])]
    found = half_times(pd.concat([*paths, path(4, [0.1, -0.1], channels=1000)]))
    assert_allclose(found["time"], [1.5, np.inf, np.nan, np.inf, 0.25])
    assert found["reason"].tolist() == ["", "", "not coupled at the start: 0.10 is within chance, 0.17", "", ""]
    assert_allclose(found["initial"], [0.8, 0.8, 0.1, 0.5, 0.1])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spectrum": 0.0}, r"spectrum=0.0: expected an exponent above 0, .* under a flat spectrum all channels"),
        ({"spectrum": -1}, "spectrum=-1: expected an exponent above 0"),
        ({"spectrum": float("nan")}, "spectrum=nan: expected"),
        ({"spectrum": 20.0}, r"spectrum=20.0: .* at most twelve decades apart"),
        ({"spectrum": [1.0]}, r"spectrum=\[1.0\]: expected .* two or more eigenvalues"),
        ({"spectrum": [1.0, 1.0]}, r"spectrum=\[1.0, 1.0\]: expected"),
        ({"spectrum": [1.0, -2.0]}, r"spectrum=\[1.0, -2.0\]: expected"),
        ({"inputs": 1}, "inputs=1: expected at least 2"),
        ({"leading": 0}, "leading=0: expected 1 to 31 of the 32 eigenvectors"),
        ({"leading": 3, "spectrum": [3.0, 2.0, 1.0]}, "leading=3: expected 1 to 2 of the 3 eigenvectors"),
        ({"share": 1.4}, r"share=1.4: expected a share of ‖c‖², between 0 and 1"),
        ({"explained": 1.0}, r"explained=1.0: expected an R² above 0 and up to 0.99"),
        ({"channels": 2}, "channels=2: expected at least 3"),
        ({"seeds": 0}, "seeds=0: expected at least 1"),
        ({"seeds": 2.5}, "seeds=2.5: expected at least 1"),
        ({"inputs": 2.5}, "inputs=2.5: expected at least 2"),
        ({"leading": 1.5}, "leading=1.5: expected 1 to 31"),
        ({"share": "1"}, "share='1': expected a share"),
        ({"spectrum": None}, "spectrum=None: expected an exponent above 0, or a list of eigenvalues"),
        ({"spectrum": "ab"}, "spectrum='ab': expected an exponent above 0, or a list of eigenvalues"),
    ],
)
def test_a_problem_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Problem(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flow": "tsak"}, r"simulate\(flow='tsak'\): expected one of capture, mixture, task"),
        ({"mixture": 2.0}, r"simulate\(mixture=2.0\): expected the weight of task information, between 0 and 1"),
        ({"duration": 0.0}, r"simulate\(duration=0.0\): expected a time above 0"),
        ({"duration": float("inf")}, r"simulate\(duration=inf\): expected"),
        ({"records": 1}, r"simulate\(records=1\): expected at least 2 times"),
        ({"tolerance": 0.1}, r"simulate\(tolerance=0.1\): expected 1e-13 to 1e-3"),
        ({"records": 2.5}, r"simulate\(records=2.5\): expected at least 2 times"),
        ({"duration": "1"}, r"simulate\(duration='1'\): expected a time above 0"),
        ({"problem": 0.5}, r"simulate\(problem=0.5\): expected a chanaxes_pl.Problem\(…\)"),
    ],
)
def test_a_flow_that_cannot_be_is_refused_before_it_starts(monkeypatch, settings, message):
    monkeypatch.setattr(Problem, "draw", lambda self: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=message):
        simulate(**{"problem": SMALL, **settings})


def test_a_flow_that_takes_too_long_says_how_far_it_got(monkeypatch):
    monkeypatch.setattr(flows, "_MAX_STEPS", 3)
    with pytest.raises(RuntimeError, match=r"the flow got to time 0\.\d+ of 10 in 3 steps: it is stiff"):
        simulate(SMALL)


# ---------------------------------------------------------------- figures and the verb


def test_the_figure_of_a_simulation_shows_what_was_simulated():
    start = initial_coupling(SMALL, [0.0, 0.5, 1.0])
    paths = pd.concat([simulate(SMALL, flow, duration=1.0, records=5) for flow in ("task", "capture")])
    figure = plot_simulation(start, paths, title="small")
    initial, coupling, angle = figure.axes
    assert_allclose(initial.lines[0].get_ydata(), start.groupby("share")["rho"].mean())
    assert initial.lines[1].get_xdata()[0] == SMALL.share
    for axes, value in ((coupling, "rho"), (angle, "alignment")):
        of_task = paths[(paths["flow"] == "task") & (paths["time"] > 0)]
        assert_allclose(axes.lines[0].get_ydata(), of_task.groupby("time")[value].mean())
        assert axes.get_xlabel() == "time (learning rate × steps)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["task information", "input capture"]


def alignments(**columns) -> pd.DataFrame:
    model, loader = zoo.case("plain")
    return compute_axes(model, loader, layers="conv+linear", alignment=True).table.assign(**columns)


def test_the_figure_of_angles_has_a_box_a_layer_in_order_of_depth():
    table = alignments()
    figure = plot_alignment(table)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == list(dict.fromkeys(table["layer"]))
    means = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert_allclose(means, table["alignment"].abs().groupby(table["layer"], sort=False).mean())
    assert not figure.legends
    assert len(axes.patches) == len(names)  # no reference of another network unless asked for


def test_the_published_range_is_there_when_asked_for_and_named():
    figure = plot_alignment(alignments(), published=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "published: means of hidden layers, ResNet-18 on CIFAR-100"
    ]
    *_, span = figure.axes[0].patches
    assert_allclose([span.get_y(), span.get_y() + span.get_height()], PUBLISHED)


@pytest.mark.parametrize(("count", "drawn"), [(1, []), (3, [0, 1, 2]), (6, [0, 5])])
def test_checkpoints_stand_side_by_side(count, drawn):
    table = pd.concat([alignments(run="a", epoch=float(k), step=10 * k) for k in reversed(range(count))])
    figure = plot_alignment(table)
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == [f"epoch {epoch}" for epoch in drawn]


def test_a_layer_without_angles_keeps_its_place():
    table = alignments()
    first = table["layer"].iloc[0]
    table.loc[table["layer"] == first, "alignment"] = np.nan
    (axes,) = plot_alignment(table).axes
    assert axes.get_xticklabels()[0].get_text() == first


def test_a_table_without_angles_says_how_to_get_them():
    with pytest.raises(ValueError, match=r"no column 'alignment'; measure it with AxisTracker\(alignment=True\)"):
        plot_alignment(alignments().drop(columns="alignment"))


@pytest.fixture
def verb(monkeypatch, tmp_path, capsys):
    """Run ``chanaxes simulate`` in a folder of its own; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["chanaxes", "simulate", *flags])
        cli.main()
        return capsys.readouterr().out

    return run


QUICK = ["--channels=40", "--inputs=8", "--records=10"]


def test_the_verb_prints_a_table_and_leaves_a_figure_and_its_numbers(verb, tmp_path):
    printed = verb("--out=deep/down.png", "--seeds=3", *QUICK)
    assert (tmp_path / "deep" / "down.png").read_bytes()[1:4] == b"PNG"
    table = pd.read_parquet(tmp_path / "deep" / "down.parquet")
    assert printed.endswith("figure: deep/down.png\ntable:  deep/down.parquet\n")
    assert list(dict.fromkeys(table["flow"])) == ["none", *FLOWS]
    assert table["share"].nunique() == 11
    lines = printed.splitlines()
    assert (
        lines[0]
        == "40 random channels of 8 Gaussian inputs, 3 runs; the leading eigenvector has 37% of the input's variance"
    )
    mean = table[(table["flow"] == "none") & (table["share"] == 1)]["rho"].mean()
    assert next(line for line in lines if line.startswith("   1.00")).split()[1] == f"{mean:.2f}"
    end = table[(table["flow"] == "task") & (table["time"] == 10)]["rho"].mean()
    assert next(line for line in lines if line.startswith("task ")).split()[1] == f"{end:.2f}"
    assert "of 3 runs, 3 start coupled beyond chance, and 3 of these lose half of it" in printed
    assert "coupling at initialisation and its loss are reproduced" in lines


def test_the_verb_reports_no_loss_where_there_is_none(verb):
    printed = verb("--spectrum=[4,3,1]", "--share=0", "--seeds=1", *QUICK)
    assert "of 1 run, 0 start coupled beyond chance" in printed
    assert "coupling at initialisation and its loss are not reproduced" in printed
    assert "– (no run starts coupled)" in printed
    assert "interval" not in printed  # of one run there is none
    assert ", 0.0" not in printed.split("at initialisation")[1].split("gradient")[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--share=2"], "error: share=2.0: expected a share"),
        (["--records=0"], "error: records=0: expected at least 2 times"),
        (["--out=picture"], "error: out='picture': expected a figure's file name, one that ends in .*png"),
        (["--out=table.parquet"], r"error: out='table.parquet': expected"),
    ],
)
def test_the_verb_says_what_is_wrong_and_writes_nothing(verb, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        verb(*flags)
    assert exit.value.code == 2
    assert re.match(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_verb_says_when_a_flow_takes_too_long(verb, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flows, "_MAX_STEPS", 3)
    with pytest.raises(SystemExit):
        verb(*QUICK, "--seeds=1")
    assert re.match(r"error: the flow got to time .* choose a flatter spectrum", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_eigenvalues_may_be_of_any_kind_of_list(kind):
    assert torch.equal(Problem(spectrum=kind([3.0, 2.0, 1.0])).eigenvalues, Problem(spectrum=[3, 2, 1]).eigenvalues)
    assert torch.equal(Problem(spectrum=np.float32(1.5)).eigenvalues, Problem(spectrum=1.5).eigenvalues)
