"""When the axes have come apart."""

import numpy as np
import pandas as pd
import pytest

from chanaxes_pl.analysis.correlations import separation


def trajectory(run: str, rho: list[float]) -> pd.DataFrame:
    steps = [0, 1, 2, 4, 8, 10, 20][: len(rho)]
    return pd.DataFrame({"run": run, "step": steps, "epoch": [step / 10 for step in steps], "rho": rho})


def test_runs_are_told_apart_and_the_fall_is_looked_for_after_the_highest():
    rows = pd.concat([trajectory("a", [0.2, 0.8, 0.5, 0.39, 0.6, 0.1]), trajectory("b", [0.6, 0.5, 0.31, 0.3, 0.0])])
    found = separation(rows.sample(frac=1, random_state=0)).set_index("run").loc[["a", "b"]]
    assert found["first"].tolist() == [0.2, 0.6]  # below half of the highest, but before it
    assert found["step_highest"].tolist() == [1, 0]
    assert found["step"].tolist() == [4, 4]
    assert found["epoch"].tolist() == [0.4, 0.4]
    assert found["last"].tolist() == [0.1, 0.0]


@pytest.mark.parametrize("rho", [[0.5, 0.6, 0.4], [-0.4, -0.1, -0.3], [0.7]])
def test_what_never_fell_or_was_never_coupled_has_no_step(rho):
    assert separation(trajectory("a", rho))[["step", "epoch"]].isna().all(axis=None)


def test_undefined_correlations_are_passed_over():
    found = separation(trajectory("a", [np.nan, 0.8, np.nan, 0.3])).iloc[0]
    assert (found["highest"], found["step"]) == (0.8, 4)
    assert np.isnan(found["first"])


def test_the_share_decides():
    rows = trajectory("a", [1.0, 0.7, 0.4, 0.2])
    assert [separation(rows, share)["step"].item() for share in (0.75, 0.5, 0.25)] == [1, 2, 4]
