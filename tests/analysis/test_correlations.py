"""From the table of channels to axis correlations: against SciPy and scikit-learn, and by construction."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from chanaxes_pl import compute_axes
from chanaxes_pl.analysis.correlations import (
    NETWORK,
    PAIRS,
    axis_correlations,
    main_correlation,
    reliabilities,
    task_masses,
)
from chanaxes_pl.analysis.groupings import groupings
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.core.statistics import mean_over_runs, spearman, spearman_brown
from chanaxes_pl.tables import HALVES, SPLIT_HALF
from chanaxes_pl.tracking.logging import MAX_LAYERS, checkpoint_scalars
from tests.helpers import cases as zoo


def table_of(*layers: dict) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(layer) for layer in layers], ignore_index=True)


def two_layers() -> pd.DataFrame:
    return table_of(zoo.synthetic_layer(0, 20, "a"), zoo.synthetic_layer(1, 11, "b", coupling=0.8))


def row(correlations: pd.DataFrame, layer: str, local="input_capture", target="task_information") -> pd.Series:
    return correlations.set_index(["layer", "local", "target"]).loc[(layer, local, target)]


def z(values):
    return (values - values.mean()) / values.std()


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_spearman_is_scipys_also_with_ties(pairs):
    x, y = np.array(pairs, float).T
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(spearman(x, y))
    else:
        assert_allclose(spearman(x, y), stats.spearmanr(x, y).statistic, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1, 2], [1, 2]), ([1, 2, 3], [1, np.nan, 3]), ([1, 2, 3], [1, 2, np.inf]), ([1, 1, 1], [1, 2, 3])],
)
def test_spearman_is_nan_where_it_is_not_defined(x, y):
    assert np.isnan(spearman(np.array(x, float), np.array(y, float)))


def test_every_pair_of_a_layer_and_the_network_as_the_mean_of_its_layers():
    table = two_layers()
    found = axis_correlations(table)
    assert len(found) == 3 * len(PAIRS)
    for local, target in PAIRS:
        rhos = []
        for layer, frame in table.groupby("layer"):
            columns = dict(frame.items())
            columns["local_axis"] = (z(frame["input_capture"]) + z(frame["peer_overlap"])) / 2
            columns["target_axis"] = (z(frame["task_information"]) + z(frame["target_excess"])) / 2
            rhos.append(stats.spearmanr(columns[local], columns[target]).statistic)
            assert_allclose(row(found, layer, local, target)["rho"], rhos[-1], rtol=1e-12)
            assert row(found, layer, local, target)["n"] == len(frame)
        assert_allclose(row(found, NETWORK, local, target)["rho"], np.mean(rhos), rtol=1e-12)
    assert found["low"].isna().all()


def test_null_is_the_correlation_with_the_null_columns():
    table = two_layers()
    frame = table[table["layer"] == "a"]
    expected = stats.spearmanr(frame["peer_overlap"], frame["target_excess_null"]).statistic
    assert_allclose(row(axis_correlations(table), "a", "peer_overlap", "target_excess")["null"], expected)


def test_dead_channels_are_left_out():
    table = two_layers()
    table.loc[[2, 5], "dead"] = True
    table.loc[[2, 5], list(METRICS)] = np.nan
    kept = table.drop([2, 5])
    assert_allclose(row(axis_correlations(table), "a")["rho"], row(axis_correlations(kept), "a")["rho"])
    assert row(axis_correlations(table), "a")["n"] == 18


def test_fewer_than_three_live_channels_are_nan_with_the_reason_and_do_not_count_in_the_mean():
    table = table_of(zoo.synthetic_layer(0, 20, "a"), zoo.synthetic_layer(1, 5, "b"), zoo.synthetic_layer(2, 1, "c"))
    table.loc[(table["layer"] == "b") & (table["channel"] > 1), "dead"] = True
    found = axis_correlations(table, resamples=20)
    for layer, reason in (("b", "2 live channels, expected at least 3"), ("c", "1 live channel, expected at least 3")):
        rows = found[found["layer"] == layer]
        assert rows[["rho", "low", "high", "null", "disattenuated"]].isna().all(axis=None)
        assert set(rows["reason"]) == {reason}
    assert_allclose(row(found, NETWORK)["rho"], row(found, "a")["rho"])
    alone = axis_correlations(table[table["layer"] != "a"], resamples=20)
    assert row(alone, NETWORK)[["rho", "low", "high"]].isna().all()
    assert row(alone, NETWORK)["reason"] == "no layer has one"
    assert not (found[["rho", "low", "high"]] == 0).any(axis=None)


def test_reason_names_the_side_that_is_not_defined_and_the_constant():
    table = two_layers()
    table.loc[table["layer"] == "a", "target_excess"] = np.nan
    table.loc[table["layer"] == "b", "input_capture"] = 0.5
    found = axis_correlations(table)
    assert row(found, "a", "input_capture", "target_excess")["reason"] == "the target metric is not defined"
    assert row(found, "b")["reason"] == "a metric is the same for all channels"
    assert row(found, "a")["reason"] == ""


@pytest.mark.parametrize("ties", [False, True])
def test_bootstrap_is_scipys_spearman_over_the_same_resamples(ties):
    table = two_layers()
    if ties:
        table[list(METRICS)] = table[list(METRICS)].round()
    found = axis_correlations(table, resamples=200, seed=5)
    draws = []
    for number, layer in enumerate("ab"):
        frame = table[table["layer"] == layer]
        n = len(frame)
        counts = np.random.default_rng([5, number]).multinomial(n, np.full(n, 1 / n), 200)
        x, y = frame["input_capture"].to_numpy(), frame["task_information"].to_numpy()
        drawn = np.array([slow_spearman(np.repeat(x, count), np.repeat(y, count)) for count in counts])
        expected = np.nanquantile(drawn, [0.025, 0.975])
        assert_allclose(row(found, layer)[["low", "high"]].astype(float), expected, rtol=1e-10, atol=1e-12)
        draws.append(drawn)
    expected = np.nanquantile(np.nanmean(draws, 0), [0.025, 0.975])
    assert_allclose(row(found, NETWORK)[["low", "high"]].astype(float), expected, rtol=1e-10, atol=1e-12)


def slow_spearman(x, y):
    x, y = stats.rankdata(x), stats.rankdata(y)
    return np.corrcoef(x, y)[0, 1] if np.ptp(x) and np.ptp(y) else np.nan


def test_an_interval_covers_its_correlation_and_narrows_with_channels():
    widths = []
    for channels in (20, 500):
        found = axis_correlations(table_of(zoo.synthetic_layer(3, channels)), resamples=300)
        low, rho, high = row(found, "a")[["low", "rho", "high"]]
        assert low < rho < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_intervals_repeat_with_the_seed_and_only_with_it():
    table = two_layers()
    first = axis_correlations(table, 100, seed=1)
    assert first.equals(axis_correlations(table, 100, seed=1))
    assert not first["low"].equals(axis_correlations(table, 100, seed=2)["low"])


def test_spearman_brown():
    assert_allclose([spearman_brown(r) for r in (0.0, 1 / 3, 0.5, 1.0)], [0.0, 0.5, 2 / 3, 1.0])
    assert spearman_brown(-1.0) == spearman_brown(-0.2) == 0.0
    assert np.isnan(spearman_brown(np.nan))


def test_reliability_of_a_known_share_of_noise():
    """Halves with as much noise as signal correlate 0.5, the whole is reliable to 2/3; for ranks a little less."""
    found = reliabilities(table_of(zoo.synthetic_layer(0, 40_000, noise=1.0, coupling=0.0)))
    by_metric = found[found["layer"] == "a"].set_index("metric")["reliability"]
    half = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's ρ of a Gaussian pair with correlation 0.5
    assert_allclose(by_metric[list(SPLIT_HALF)], 2 * half / (1 + half), atol=0.02)
    perfect = reliabilities(table_of(zoo.synthetic_layer(0, 30)))
    assert_allclose(perfect["reliability"], 1.0)


def test_network_reliability_is_the_mean_and_halves_not_kept_are_nan():
    table = table_of(zoo.synthetic_layer(0, 30, "a", noise=0.5), zoo.synthetic_layer(1, 30, "b", noise=1.0))
    found = reliabilities(table).set_index(["layer", "metric"])["reliability"]
    for metric in (*METRICS, "peer_r2", "local_axis"):
        assert_allclose(found[NETWORK, metric], (found["a", metric] + found["b", metric]) / 2)
    halves = [f"{metric}_{half}" for metric in SPLIT_HALF for half in HALVES]
    assert reliabilities(table.assign(**dict.fromkeys(halves, np.nan)))["reliability"].isna().all()


def test_disattenuation_divides_by_the_geometric_mean_of_the_reliabilities():
    found = axis_correlations(table_of(zoo.synthetic_layer(0, 60, noise=0.4)))
    for _, entry in found[found["layer"] == "a"].iterrows():
        scale = np.sqrt(entry["reliability_local"] * entry["reliability_target"])
        assert 0 < scale < 1
        assert_allclose(entry["disattenuated"], entry["rho"] / scale)
    noise = table_of(zoo.synthetic_layer(0, 60))
    noise["input_capture_odd"] = -noise["input_capture_even"]
    assert np.isnan(row(axis_correlations(noise), "a")["disattenuated"])


def test_task_masses_split_task_information_by_peer_r2():
    table = two_layers()
    table["peer_r2"] = np.linspace(0, 1, len(table))
    masses = task_masses(table).set_index("layer")
    for layer, frame in table.groupby("layer"):
        duplicate = sum(i * r for i, r in zip(frame["task_information"], frame["peer_r2"], strict=True))
        assert_allclose(masses.loc[layer, "duplicate"], duplicate)
        assert_allclose(masses.loc[layer].sum(), frame["task_information"].sum())
    undefined = task_masses(table.assign(peer_r2=np.nan))
    assert undefined[["duplicate", "nonreplaceable"]].isna().all(axis=None)


def test_several_checkpoints_in_one_table_are_taken_one_by_one():
    first, second = two_layers(), table_of(zoo.synthetic_layer(7, 20, "a"), zoo.synthetic_layer(8, 11, "b"))
    both = pd.concat([first.assign(run="r", epoch=0, step=0), second.assign(run="r", epoch=1, step=10)])
    found = axis_correlations(both, resamples=20)
    assert list(found.columns[:3]) == ["run", "epoch", "step"]
    for step, table in ((0, first), (10, second)):
        part = found[found["step"] == step].drop(columns=["run", "epoch", "step"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(part, axis_correlations(table, resamples=20))
    main = main_correlation(found)
    assert main["step"].tolist() == [0, 10]
    assert set(main["layer"]) == {NETWORK}
    assert set(zip(main["local"], main["target"], strict=True)) == {PAIRS[0]}
    assert task_masses(both)["step"].tolist() == [0, 0, 10, 10]
    assert set(reliabilities(both)["step"]) == set(groupings(both)["step"]) == {0, 10}


def test_over_runs_is_the_mean_over_seeds_with_its_interval():
    runs = [two_layers().assign(run=f"s{k}", epoch=0, step=0) for k in range(4)]
    for k, table in enumerate(runs):
        table["task_information"] = np.random.default_rng(k).normal(size=len(table))
    frame = axis_correlations(pd.concat(runs))
    summary = row(mean_over_runs(frame), "a")
    rhos = frame[(frame["layer"] == "a") & (frame["target"] == "task_information")]
    rhos = rhos[rhos["local"] == "input_capture"]["rho"]
    assert_allclose(summary[["mean", "std"]].astype(float), [rhos.mean(), rhos.std()])
    assert summary["runs"] == 4
    assert rhos.min() <= summary["low"] < summary["mean"] < summary["high"] <= rhos.max()
    picks = np.random.default_rng(0).integers(0, 4, (1000, 4))
    expected = np.quantile([np.mean(rhos.to_numpy()[pick]) for pick in picks], [0.025, 0.975])
    assert_allclose(summary[["low", "high"]].astype(float), expected)


def test_over_one_run_there_is_a_mean_but_no_interval():
    summary = mean_over_runs(axis_correlations(two_layers().assign(run="s", epoch=0, step=0)))
    assert summary["mean"].notna().all()
    assert summary[["std", "low", "high"]].isna().all(axis=None)
    assert (summary["runs"] == 1).all()


def test_over_runs_a_run_without_a_value_does_not_count():
    runs = [two_layers().assign(run=f"s{k}", epoch=0, step=0) for k in range(2)]
    runs[1].loc[runs[1]["layer"] == "a", "dead"] = True
    summary = mean_over_runs(axis_correlations(pd.concat(runs)))
    assert row(summary, "a")["runs"] == 1
    assert row(summary, "b")["runs"] == 2


def test_over_runs_other_columns_can_say_what_belongs_together():
    frame = pd.DataFrame(
        {"run": [0, 1, 0, 1], "time": [0, 0, 1, 1], "epoch": [0, 1, 2, 3], "rho": [1.0, 3.0, 5.0, 9.0]}
    )
    summary = mean_over_runs(frame, by=["time", "absent"])
    assert summary["time"].tolist() == [0, 1]
    assert summary["mean"].tolist() == [2.0, 7.0]
    assert summary["runs"].tolist() == [2, 2]
    assert len(mean_over_runs(frame)) == 4  # by epoch


def test_over_runs_several_columns_are_each_summarised():
    frame = pd.DataFrame({"run": [0, 1], "epoch": 0, "rho": [1.0, 3.0], "null": [0.0, 0.5]})
    both = mean_over_runs(frame, ["rho", "null"])
    for value in ("rho", "null"):
        alone = both[both["value"] == value].drop(columns="value").reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, mean_over_runs(frame, value))


# ---------------------------------------------------------------- groupings


def test_groupings_are_adjusted_rand_indices_of_k_means_partitions():
    table = table_of(zoo.synthetic_layer(0, 60, noise=0.2))
    found = groupings(table).iloc[0]

    def parts(first: str, second: str, half: str = ""):
        points = np.stack([z(table[first + half]), z(table[second + half])], 1)
        return KMeans(4, n_init=10, random_state=0).fit(points).labels_

    local, target = ("input_capture", "peer_overlap"), ("task_information", "target_excess")
    assert_allclose(found["ari"], adjusted_rand_score(parts(*local), parts(*target)))
    for name, axis in (("ceiling_local", local), ("ceiling_target", target)):
        assert_allclose(found[name], adjusted_rand_score(parts(*axis, "_even"), parts(*axis, "_odd")))
    assert found["n"] == 60


def test_axes_that_agree_group_alike_and_unrelated_ones_by_chance():
    table = table_of(zoo.synthetic_layer(0, 200, coupling=0.0))
    assert abs(groupings(table)["ari"].item()) < 0.1
    table["task_information"], table["target_excess"] = 2 * table["input_capture"] + 1, 5 * table["peer_overlap"]
    assert groupings(table)["ari"].item() == pytest.approx(1.0)
    assert groupings(table)["ceiling_local"].item() == pytest.approx(1.0)


def test_groupings_of_too_few_channels_or_without_halves_are_nan():
    table = table_of(zoo.synthetic_layer(0, 3, "a"), zoo.synthetic_layer(0, 30, "b"))
    halves = [f"{metric}_{half}" for metric in SPLIT_HALF for half in HALVES]
    found = groupings(table.assign(**dict.fromkeys(halves, np.nan))).set_index("layer")
    assert found.loc["a", ["ari", "ceiling_local", "ceiling_target"]].isna().all()
    assert found.loc["b", ["ceiling_local", "ceiling_target"]].isna().all()
    assert np.isfinite(found.loc["b", "ari"])


def test_channels_that_are_all_alike_are_one_group_without_a_warning():
    table = table_of(zoo.synthetic_layer(0, 10))
    table[list(METRICS)] = 1.0
    assert groupings(table)["n"].item() == 10


# ---------------------------------------------------------------- scalars


def test_scalars_are_the_tables_numbers():
    table = two_layers()
    table.loc[3, "dead"] = True
    correlations = axis_correlations(table)
    scalars = checkpoint_scalars(table, correlations, "axis")
    assert scalars["axis/rho"] == row(correlations, NETWORK)["rho"]
    assert scalars["axis/rho_null"] == row(correlations, NETWORK)["null"]
    assert scalars["axis/rho_pairs/peer_overlap-target_excess"] == row(correlations, NETWORK, *PAIRS[3])["rho"]
    assert scalars["axis/layer/a/rho"] == row(correlations, "a")["rho"]
    assert scalars["axis/layer/b/rho_axes"] == row(correlations, "b", *PAIRS[4])["rho"]
    assert scalars["axis/dead"] == scalars["axis/layer/a/dead"] == 1
    assert scalars["axis/reliability/input_capture"] == pytest.approx(1.0)
    assert all(type(value) is float for value in scalars.values())


def test_scalars_are_bounded_however_many_layers_there_are():
    few = table_of(*(zoo.synthetic_layer(k, 4, f"l{k}") for k in range(2)))
    many = table_of(*(zoo.synthetic_layer(k, 4, f"l{k}") for k in range(MAX_LAYERS + 5)))
    fixed = len(checkpoint_scalars(few, axis_correlations(few))) - 2 * 3
    assert len(checkpoint_scalars(many, axis_correlations(many))) == fixed + 3 * MAX_LAYERS
    assert fixed < 30


def test_scalars_of_layers_without_a_correlation_are_nan_never_zero():
    table = table_of(zoo.synthetic_layer(0, 2, "a"))
    scalars = checkpoint_scalars(table, axis_correlations(table))
    assert np.isnan([scalars["axis/rho"], scalars["axis/layer/a/rho"], scalars["axis/rho_disattenuated"]]).all()


def test_axes_carry_the_results_of_their_table():
    axes = compute_axes(*zoo.case("plain"), resamples=50)
    pd.testing.assert_frame_equal(axes.correlations, axis_correlations(axes.table, 50))
    pd.testing.assert_frame_equal(axes.reliabilities, reliabilities(axes.table))
    pd.testing.assert_frame_equal(axes.groupings, groupings(axes.table))


def test_alignment_becomes_scalars_where_the_table_has_it():
    table = pd.DataFrame(zoo.synthetic_layer(0, 4)).assign(alignment=[0.5, -0.1, np.nan, 0.3])
    scalars = checkpoint_scalars(table, axis_correlations(table))
    assert scalars["axis/alignment"] == scalars["axis/layer/a/alignment"] == pytest.approx(0.3)
    plain = table.drop(columns="alignment")
    assert not any("alignment" in key for key in checkpoint_scalars(plain, axis_correlations(plain)))


def test_columns_of_text_are_no_metrics():
    table = compute_axes(*zoo.case("plain"), resamples=0).table
    pd.testing.assert_frame_equal(axis_correlations(table.assign(unit="g[0]"), 0), axis_correlations(table, 0))
