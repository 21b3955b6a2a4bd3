"""Statistics against slow, obvious references; the mathematics needs neither torch nor Lightning."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from chanaxes_pl.core import statistics
from chanaxes_pl.core.statistics import (
    bounds,
    centred_midranks,
    composite,
    rank_correlations,
    resample_counts,
    z_scores,
)


def test_it_imports_without_torch_and_lightning():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, statistics.__file__], check=True)


def test_midranks_are_those_of_scipy():
    values = np.random.default_rng(0).integers(0, 5, 40).astype(float)
    assert_array_equal(centred_midranks(values), stats.rankdata(values) - 20.5)


@pytest.mark.parametrize("rerank", [True, False])
def test_rank_correlations_are_those_of_repeated_rows(rerank):
    """Each resample's rows written out, ranked anew or with their ranks among all rows; a NaN leaves its row out."""
    rng = np.random.default_rng(1)
    values, target = rng.integers(0, 9, (12, 3)).astype(float), rng.normal(size=12)
    values[4, 2] = np.nan
    counts = resample_counts(12, 20, rng).astype(float)
    found = rank_correlations(values, target, counts, rerank=rerank)
    for column, drawn in zip(values.T, found.T, strict=True):
        known = np.isfinite(column)
        x, y, times = column[known], target[known], counts[:, known].astype(int)
        if not rerank:
            x, y = stats.rankdata(x), stats.rankdata(y)
        correlate = stats.spearmanr if rerank else stats.pearsonr
        slow = [correlate(np.repeat(x, k), np.repeat(y, k)).statistic for k in times]
        assert_allclose(drawn, slow, rtol=1e-10)


@pytest.mark.parametrize("constant", [np.nan, 0.0])
def test_z_scores_of_equal_values_are_what_is_asked_for(constant):
    equal = np.full(3, 0.1)
    assert equal.std() > 0  # from rounding alone
    assert_array_equal(z_scores(equal, constant), np.full(3, constant))
    both = np.stack([equal, [1.0, 2.0, 6.0]], 1)
    assert_allclose(z_scores(both, constant)[:, 1], stats.zscore(both[:, 1]))
    assert np.isnan(z_scores(np.array([1.0, np.nan]), constant)).all()
    assert np.isnan(z_scores(np.array([1.0, np.inf]), constant)).all()
    assert z_scores(np.empty(0), constant).shape == (0,)


def test_a_composite_averages_signed_z_scores():
    a, b = np.random.default_rng(2).normal(size=(2, 9))
    assert_allclose(composite([a, b], [1, -1]), (stats.zscore(a) - stats.zscore(b)) / 2)
    assert_allclose(composite([a, np.ones(9)], [1, -1], constant=0.0), stats.zscore(a) / 2)


def test_bounds_leave_out_undefined_draws():
    draws = np.random.default_rng(3).normal(size=100)
    draws[:10] = np.nan
    assert_allclose(bounds(draws), np.quantile(draws[10:], [0.025, 0.975]))
    assert np.isnan(bounds(draws[:10])).all()
    assert np.isnan(bounds(draws[:0])).all()
