"""The sentences at the top of the page."""

from types import SimpleNamespace

import pandas as pd
import pytest

from chanaxes_pl.analysis.runs import Damage, Runs
from chanaxes_pl.report.findings import _chance, _coupled, _coupling, _damage, _judged, _pruning, _separation


@pytest.mark.parametrize(
    ("mean", "low", "high", "null", "said"),
    [
        (0.3, 0.2, 0.4, 0.35, ", no further from 0 than with a random target (0.35)"),
        (-0.45, -0.6, -0.3, -0.46, ", no further from 0 than with a random target (−0.46)"),
        (0.3, 0.2, 0.4, 0.1, ""),
        (0.3, 0.2, 0.4, -0.5, ""),
        (0.1, -0.1, 0.3, 0.2, ""),  # not coupled: nothing to take back
        (0.3, 0.2, 0.4, float("nan"), ""),
    ],
)
def test_a_coupling_that_a_random_target_shows_too_is_called_so(mean, low, high, null, said):
    row = pd.Series({"mean": mean, "low": low, "high": high, "null": null})
    assert _chance(row) == said
    assert _chance(row.drop("null")) == ""


@pytest.mark.parametrize(("mean", "verb"), [(0.2, "rises"), (-0.2, "falls")])
def test_damage_is_told_with_its_sign(mean, verb):
    tables = pd.DataFrame({"run": ["a", "b"], "zero_loss": [mean - 0.1, mean + 0.1], "place": ".", "counts": True})
    damage = Damage("zero_loss", tables, pd.DataFrame(), pd.DataFrame({"score": [], "mean": []}))
    (text,) = _damage(SimpleNamespace(damage=damage))
    said = f"With one channel removed, the test loss {verb} by 0.2000 [0.1000, 0.3000] nats on average."
    assert text.split() == said.split()


@pytest.mark.parametrize(
    ("mean", "std", "runs", "said"),
    [
        (0.28, 0.03, 2, "coupled"),  # 12.7 standard errors for two runs
        (0.28, 0.05, 2, "not coupled"),
        (0.49, 0.09, 3, "coupled"),
        (-0.3, 0.1, 3, "inversely coupled"),
        (
            0.2,
            0.1,
            3,
            "not coupled",
        ),  # though the bootstrap's interval, which is little more than the range, may not hold 0
    ],
)
def test_few_runs_are_judged_by_students_interval(mean, std, runs, said):
    row = pd.Series({"mean": mean, "std": std, "runs": runs, "low": mean - std, "high": mean + std})
    assert _coupled(_judged(row)) == said


def test_a_training_that_diverged_is_told_so(tmp_path):
    steps, reason = [0, 5], "output not finite"
    rows = [
        {"step": step, "layer": "a", "channel": c, "epoch": step / 5, "reason": ""} for step in steps for c in range(4)
    ]
    table = pd.DataFrame(rows)
    table.loc[table["step"] == 5, "reason"] = [reason] * 3 + [""]
    rho = pd.DataFrame(
        {"run": "r", "step": steps, "epoch": [0.0, 1.0], "layer": "network", "local": "input_capture"}
        | {"target": "task_information", "rho": [0.6, float("nan")], "low": [0.5, float("nan")]}
        | {"high": [0.7, float("nan")], "null": 0.0}
    )
    runs = SimpleNamespace(each=[SimpleNamespace(steps=steps)], steps=steps, table=table, correlations=rho)
    (text,) = _coupling(runs)
    assert text.endswith("; at the last checkpoint ρ is undefined (output not finite: 3 of 4 channels).")
    (text,) = _separation(runs)
    assert text == "The correlation is highest at initialisation, where ρ is 0.60."


def _grid(**accuracies: float) -> pd.DataFrame:
    """A grid of one run: the accuracies of the kinds of compensation, of two scores, the second 1 point below."""
    rows = [{"score": "dense", "allocation": "", "compensate": "", "budget": 1.0, "accuracy": 0.7}]
    for score, less in (("reconstruction", 0.0), ("l1", 0.01)):
        for kind, accuracy in accuracies.items():
            row = {"score": score, "allocation": "uniform", "compensate": kind, "budget": 0.5}
            rows.append(row | {"accuracy": accuracy - less})
    return pd.DataFrame(rows).assign(run="a", budget_of="macs")


def test_the_finding_on_pruning_is_of_all_grids():
    polish, selection = _grid(distill=0.69), _grid(none=0.5, refit=0.66)
    for grids in ({"polish": polish, "selection": selection}, {"selection": selection, "polish": polish}):
        (text,) = _pruning(SimpleNamespace(grids=grids, resamples=10, each=[None]))
        assert text == (
            "At 50 % of the multiply–accumulates, accuracy falls from 70.0 % to 69.0 % at best of 6 ways, by "
            "reconstruction (uniform allocation, distill); without compensation 50.0 % are left at best, by "
            "reconstruction (uniform allocation)."
        )


def test_grids_on_other_images_are_judged_by_what_is_lost_on_their_own():
    easier = _grid(refit=0.75).replace({"accuracy": {0.7: 0.9}})  # loses 15 points where the other loses 4
    (text,) = _pruning(SimpleNamespace(grids={"a": easier, "b": _grid(refit=0.66)}, resamples=10, each=[None]))
    assert "falls from 70.0 % to 66.0 % at best of 2 ways" in text


def test_budgets_of_parameters_and_other_budgets_are_not_mixed_in():
    parameters, few = _grid(refit=0.69).assign(budget_of="parameters"), _grid(refit=0.69)
    few["budget"] = few["budget"].replace(0.5, 0.8)
    grids = {"a": parameters, "b": few, "c": _grid(refit=0.66)}
    (text,) = _pruning(SimpleNamespace(grids=grids, resamples=10, each=[None]))
    assert text.startswith("At 50 % of the multiply–accumulates, accuracy falls from 70.0 % to 66.0 % at best of 2")
    (text,) = _pruning(SimpleNamespace(grids={"a": parameters}, resamples=10, each=[None]))
    assert text.startswith("At 50 % of the parameters, accuracy falls from 70.0 % to 69.0 %")


def test_the_finding_on_pruning_of_polished_networks_alone():
    (text,) = _pruning(SimpleNamespace(grids={".": _grid(distill=0.69)}, resamples=10, each=[None]))
    assert text.endswith(
        "accuracy falls from 70.0 % to 69.0 % at best of 2 ways, by reconstruction (uniform allocation, distill)."
    )
    assert not list(_pruning(SimpleNamespace(grids={})))


def test_a_score_that_some_runs_have_is_compared_with_their_own_networks():
    both = pd.concat([_grid(none=0.5, refit=0.66), _grid(none=0.4).assign(run="b").replace({"accuracy": {0.7: 0.9}})])
    (text,) = _pruning(SimpleNamespace(grids={".": both}, resamples=10, each=[None, None]))
    assert (
        "falls from 80.0 % to 45.0 % at best of 2 ways, by reconstruction (uniform allocation, no" in text
    )  # both have it
    assert "refit" not in text
    (text,) = _pruning(SimpleNamespace(grids={".": _grid(none=0.5, refit=0.66)}, resamples=10, each=[None, None]))
    assert "falls from 70.0 % to 66.0 %" in text
    assert text.endswith("by reconstruction (uniform allocation) (1 of 2 runs).")


def _several(*curves: list[float], ends: list[int] | None = None) -> Runs:
    """Runs with these ρ at steps 0, 10, 20, …, of an epoch each; NaN where the output was not finite."""
    frames, each = [], []
    for number, curve in enumerate(curves):
        steps = [10 * place for place in range(len(curve))]
        frame = pd.DataFrame({"run": f"r{number}", "step": steps, "epoch": [step / 10 for step in steps], "rho": curve})
        ties = {"local": "input_capture", "target": "task_information", "low": float("nan"), "high": float("nan")}
        frames.append(frame.assign(layer="network", null=0.0, **ties))
        each.append(SimpleNamespace(steps=steps if ends is None else [*steps, *range(100, ends[number] + 1, 10)]))
    runs = Runs(tuple(each), 50)
    table = pd.DataFrame({"step": steps, "epoch": [step / 10 for step in steps], "reason": ""})
    vars(runs).update(correlations=pd.concat(frames, ignore_index=True), table=table, steps=steps)
    return runs


def test_a_mean_over_some_of_the_runs_says_so_and_has_no_verdict():
    (text,) = _coupling(_several([0.3, 0.09], [0.4, float("nan")]))
    assert "; after training ρ is 0.09 in 1 of 2 runs, and undefined in the others" in text
    assert "after training they are" not in text


def test_the_interval_that_is_shown_is_the_one_that_decides():
    (text,) = _coupling(_several([0.10, 0.4], [0.20, 0.5], [0.35, 0.45]))
    assert text == (
        "At initialisation the two axes are not coupled: ρ(input capture, task information) is 0.22 "
        "[−0.10,\N{NO-BREAK SPACE}0.53]; after training they are coupled: ρ is 0.45 [0.33,\N{NO-BREAK SPACE}0.57] "
        "(95 % intervals by Student's t over 3 runs)."
    )


def test_where_runs_go_on_the_last_shared_step_is_named():
    (text,) = _coupling(_several([0.3, 0.1], [0.4, 0.1], ends=[10, 120]))
    assert "; at step 10, the last that all runs share, they are" in text


def test_the_highest_correlation_of_several_runs_is_that_of_their_mean():
    runs = _several([0.07, -0.1, 0.3, -0.04], [0.5, 0.09, -0.2, 0.0], [0.3, 0.02, -0.2, float("nan")])
    (text,) = _separation(runs)
    assert text == (
        "The mean correlation is highest at initialisation, where ρ is 0.29, and falls to half of that by epoch 1 "
        "(step 10)."
    )
    assert list(_separation(_several([0.2, float("nan")], [0.1, float("nan")]))) == []


def _damaged(low: float, high: float, **others: tuple[float, float, float]) -> SimpleNamespace:
    tables = pd.DataFrame({"run": "a", "place": ".", "zero_loss": [0.1, 0.3], "counts": True})
    rows = {"input_capture": (0.1, -0.2, 0.4), "peer_overlap": (0.2, low, high)} | others
    over_runs = pd.DataFrame([[name, *row] for name, row in rows.items()], columns=["score", "mean", "low", "high"])
    return SimpleNamespace(damage=SimpleNamespace(tables=tables, column="zero_loss", over_runs=over_runs))


@pytest.mark.parametrize(
    ("low", "high", "others", "told"),
    [
        (0.05, 0.35, {}, "this damage correlates most with peer overlap (ρ = 0.20 [0.05, 0.35])."),
        (
            -0.05,
            0.45,
            {},
            "this damage correlates with no metric beyond chance, most with peer overlap (ρ = 0.20 [-0.05, 0.45]).",
        ),
        (
            0.05,
            0.35,
            {"score_l1": (0.4, 0.3, 0.5), "score_taylor": (0.3, 0.2, 0.4)},
            "most with peer overlap (ρ = 0.20 [0.05, 0.35]), and of the other scores most with l1 (ρ = 0.40 [0.30, "
            "0.50]).",
        ),
        (
            0.05,
            0.35,
            {"score_l1": (0.1, -0.3, 0.5)},
            "and of the other scores with none beyond chance, most with l1 (ρ = 0.10 [-0.30, 0.50]).",
        ),
    ],
)
def test_a_correlation_with_damage_within_chance_is_called_that(low, high, others, told):
    (text,) = _damage(_damaged(low, high, **others))
    assert text.replace("−", "-").replace("\N{NO-BREAK SPACE}", " ").endswith(told)


def test_axes_that_lost_half_of_their_coupling_are_called_less_coupled():
    runs = _several([0.5, 0.3, 0.1])
    rows = runs.correlations.assign(low=[0.4, 0.2, 0.05], high=[0.6, 0.4, 0.15])
    vars(runs).update(correlations=rows)
    (text,) = _coupling(runs)
    assert "; after training they are less coupled: ρ is 0.10 [0.05,\N{NO-BREAK SPACE}0.15]" in text
    vars(runs).update(correlations=rows.assign(rho=[0.5, 0.3, 0.3], low=[0.4, 0.2, 0.2]))
    (text,) = _coupling(runs)
    assert "; after training they are coupled: ρ is 0.30" in text
