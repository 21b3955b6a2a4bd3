"""``chanaxes summary``: what it prints of a run, and of what is none."""

import pytest
from chanaxes_pl.summary import summary
from matplotlib.image import imread

from chanaxes_pl.analysis.correlations import axis_correlations, main_correlation
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.run_folder import checkpoint_path
from tests.analysis.test_runs import STEPS, write_run


@pytest.mark.parametrize("inner", ["", "axis"])
def test_start_highest_and_end_of_a_run(tmp_path, capsys, inner):
    run = write_run(tmp_path / "run")
    summary(str(run / inner), resamples=50)
    printed = capsys.readouterr().out
    rho = main_correlation(axis_correlations(read_runs([run]).table)).set_index("step")["rho"]
    lines = {line[:18].strip(): line.split() for line in printed.splitlines() if line.startswith("at ")}
    for name, step in {"at initialisation": 0, "at its highest": int(rho.idxmax()), "at the end": STEPS[-1]}.items():
        assert {f"{step / 4:.3g}", str(step), f"{rho[step]:.2f}"} <= set(lines[name])
    assert f"figure: {run}/axis/correlations.png" in printed
    assert imread(run / "axis" / "correlations.png").std() > 0.05


def test_every_checkpoint_and_a_figure_elsewhere(tmp_path, capsys):
    summary(str(write_run(tmp_path / "run")), str(tmp_path / "here.png"), all_checkpoints=True, resamples=20)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if len(row) > 5 and row[1].isdigit()] == [str(step) for step in STEPS]
    assert (tmp_path / "here.png").is_file()


def test_a_run_that_was_cut_off_is_summed_up_with_a_note(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    path = checkpoint_path(run / "axis", 8)
    path.write_bytes(path.read_bytes()[:80])
    summary(str(run), resamples=20)
    assert f"note:   {path}: not a whole Parquet file" in capsys.readouterr().out


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* is no run folder: expected axis/step-….parquet in it"):
        summary(str(tmp_path))
