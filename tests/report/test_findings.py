"""What the first finding says of chance."""

import pandas as pd
import pytest

from chanaxes_pl.report.findings import _chance


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
