"""What the first finding says of chance."""

from types import SimpleNamespace

import pandas as pd
import pytest

from chanaxes_pl.analysis.runs import Damage
from chanaxes_pl.report.findings import _chance, _damage


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


@pytest.mark.parametrize(("mean", "verb"), [(0.2, "raises"), (-0.2, "lowers")])
def test_damage_is_told_with_its_sign(mean, verb):
    tables = pd.DataFrame({"run": ["a", "b"], "zero_loss": [mean - 0.1, mean + 0.1]})
    damage = Damage("zero_loss", tables, pd.DataFrame(), pd.DataFrame({"score": [], "mean": []}))
    (text,) = _damage(SimpleNamespace(damage=damage))
    assert (
        text.split() == f"Removing one channel {verb} the test loss by 0.2000 [0.1000, 0.3000] nats on average.".split()
    )
