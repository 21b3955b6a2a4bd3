"""``chanaxes report --text``: axis correlations and pruning curves in print."""

import re

import numpy as np
import pandas as pd
import pytest

from chanaxes_pl.analysis.correlations import axis_correlations, main_correlation
from chanaxes_pl.analysis.grids import area_under_curve, paired_difference, read_grids, score_differences
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.cli.report import report
from chanaxes_pl.run_folder import checkpoint_path
from chanaxes_pl.tables import write_parquet
from tests.analysis.test_runs import STEPS, write_run


def write_grid(path, seed: int = 0) -> pd.DataFrame:
    """A made-up grid of three scores, two budgets and two compensations."""
    rng = np.random.default_rng(seed)
    families = {"l1": "baseline", "input_capture": "local", "task_information": "target"}
    rows = [
        {"score": score, "family": family, "allocation": "uniform", "compensate": kind, "budget": budget}
        | {"macs_share": budget, "accuracy": budget * (0.9 if kind == "refit" else 0.6) + 0.05 * rng.random()}
        for score, family in families.items()
        for kind in ("none", "refit")
        for budget in (0.8, 0.5)
    ]
    dense = {"score": "dense", "family": "dense", "allocation": "none", "compensate": "none", "budget": 1.0}
    grid = pd.DataFrame([dense | {"macs_share": 1.0, "accuracy": 0.93}, *rows]).assign(loss=0.5)
    write_parquet(grid, path)
    return grid


@pytest.mark.parametrize("inner", ["", "axis"])
def test_start_highest_and_end_of_a_run(tmp_path, capsys, inner):
    run = write_run(tmp_path / "run")
    report(str(run / inner), text=True, resamples=50)
    printed = capsys.readouterr().out
    rho = main_correlation(axis_correlations(read_runs([run]).table)).set_index("step")["rho"]
    lines = {line[:18].strip(): line.split() for line in printed.splitlines() if line.startswith("at ")}
    for name, step in {"at initialisation": 0, "at its highest": int(rho.idxmax()), "at the end": STEPS[-1]}.items():
        assert {f"{step / 4:.3g}", str(step), f"{rho[step]:.2f}"} <= set(lines[name])
    assert not (run / "report").exists()


def test_a_single_checkpoint_is_told_once_and_by_its_right_name(tmp_path, capsys):
    report(str(write_run(tmp_path / "run", steps=(4,))), text=True, resamples=20)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("at "))
    assert line.split()[:4] == ["at", "first", "1", "4"]


def test_of_two_checkpoints_the_last_is_told_too(tmp_path, capsys):
    report(str(write_run(tmp_path / "run", steps=(0, 4))), text=True, resamples=20)
    told = [line.split()[-8:] for line in capsys.readouterr().out.splitlines() if line.startswith("at ")]
    assert len(told) == 3
    assert [row[1] for row in told[::2]] == ["0", "4"]


def test_each_run_is_told_by_its_own_epochs(tmp_path, capsys):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for path in sorted((runs[1]).glob("axis/*.parquet")):
        table = pd.read_parquet(path)
        write_parquet(table.assign(epoch=2 * table["epoch"]), path)
    report([str(run) for run in runs], text=True, all_checkpoints=True, resamples=20)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    epochs = [row[0] for row in rows if len(row) > 5 and row[1].isdigit()]
    assert epochs == [f"{step / 4 * factor:.3g}" for factor in (1, 2) for step in STEPS]


def test_every_checkpoint(tmp_path, capsys):
    report(str(write_run(tmp_path / "run")), text=True, all_checkpoints=True, resamples=20)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if len(row) > 5 and row[1].isdigit()] == [str(step) for step in STEPS]


def test_a_run_that_was_cut_off_is_summed_up_with_a_note(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    path = checkpoint_path(run / "axis", 8)
    path.write_bytes(path.read_bytes()[:80])
    report(str(run), text=True, resamples=20)
    assert f"note:    {path}: not a whole Parquet file" in capsys.readouterr().out


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder: expected axis/step-….parquet in it"):
        report(str(tmp_path), text=True)


def test_several_runs_are_compared_in_pairs(tmp_path, capsys):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate("abc")]
    for seed, run in enumerate(runs):
        write_grid(run / "pruning.parquet", seed)
    grid = read_grids(str(tmp_path / "*" / "pruning.parquet"))
    report([*map(str, runs)], text=True, against="l1", resamples=20)
    printed = capsys.readouterr().out
    assert "accuracy in %, 3 runs, dense 93.0 ± 0.0" in printed
    differences = score_differences(grid)
    for kind, part in zip(("none", "refit"), printed.split("uniform, ")[1:], strict=True):
        areas = area_under_curve(grid).query("compensate == @kind")
        for pair in (("input_capture", "l1"), ("task_information", "l1")):
            (wanted,) = paired_difference(areas, [pair[0]], [pair[1]]).to_dict("records")
            cell = f"{100 * wanted['mean']:.1f} [{100 * wanted['low']:.1f}, {100 * wanted['high']:.1f}]"
            assert re.search(rf"{pair[0]} minus {pair[1]} +{re.escape(cell)}", part)
        rows = differences[(differences["compensate"] == kind) & (differences["scores"] == "local-axis scores")]
        (wanted,) = paired_difference(areas, ["input_capture"], ["task_information"]).to_dict("records")
        assert rows[["mean", "low", "high"]].iloc[0].tolist() == [wanted["mean"], wanted["low"], wanted["high"]]


def test_without_the_other_score_the_axes_alone_are_compared(tmp_path):
    write_grid(tmp_path / "a" / "pruning.parquet")
    found = score_differences(read_grids(str(tmp_path / "*" / "pruning.parquet")), against="taylor")
    assert found["scores"].unique().tolist() == ["local-axis scores"]


def test_bad_grids_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    write_grid(run / "pruning.parquet")
    for value in ("speed", "score"):
        said = rf"no column '{value}' of numbers in the pruning grids; there are budget, macs_share"
        with pytest.raises(ValueError, match=said):
            report(str(run), text=True, value=value, resamples=5)
    with pytest.raises(FileNotFoundError, match=r"no file matches 'nowhere/\*'; expected pruning.parquet, which"):
        read_grids("nowhere/*")
    pd.DataFrame({"score": ["l1"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet: lacks the columns allocation, compensate, budget"):
        read_grids(str(tmp_path / "other.parquet"))
