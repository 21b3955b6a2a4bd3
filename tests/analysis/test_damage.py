"""Damage against metrics: synthetic tables whose answer is known, and statistics by their slow definitions."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.analysis.damage import (
    CALIPER,
    damage_reliability,
    join_axes,
    matched_comparison,
    rank_regression,
    score_damage_correlation,
)


def synthetic(support=0.0, channels=64, layers=4, seed=0) -> pd.DataFrame:
    """A joined table in which damage follows both base metrics, and falls with peer R² by ``support``."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(layers):
        metrics = rng.normal(size=(channels, 3))
        metrics[:, 2] += 0.5 * metrics[:, 1]  # support goes along with task information
        damage = metrics[:, 0] + metrics[:, 1] - support * metrics[:, 2] + rng.normal(size=channels)
        columns = dict(zip(("input_capture", "task_information", "peer_r2"), metrics.T, strict=True))
        names = {"layer": f"layer{number}", "channel": np.arange(channels)}
        frames.append(pd.DataFrame({**names, **columns, "zero_loss": 10.0**number * damage, "reason": ""}))
    return pd.concat(frames, ignore_index=True)


def slow_regression(table, columns):
    """Adjusted R² and the last slope by least squares on centred ranks, layer by layer ranked."""
    ranked = []
    for _, frame in table.groupby("layer"):
        ranks = np.column_stack([stats.rankdata(frame[column]) / len(frame) for column in columns])
        ranked.append(ranks - ranks.mean(0))
    y, x = np.concatenate(ranked)[:, 0], np.concatenate(ranked)[:, 1:]
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    plain = 1 - ((y - x @ slopes) ** 2).sum() / (y**2).sum()
    freedom = len(y) - table["layer"].nunique()
    return 1 - (1 - plain) * freedom / (freedom - x.shape[1]), slopes[-1]


def test_regression_agrees_with_least_squares_on_ranks():
    table = synthetic(0.5)
    found = rank_regression(table, resamples=10).iloc[0]
    base, _ = slow_regression(table, ["zero_loss", "input_capture", "task_information"])
    full, slope = slow_regression(table, ["zero_loss", "input_capture", "task_information", "peer_r2"])
    assert_allclose([found.r2_base, found.r2_full, found.slope], [base, full, slope], rtol=1e-10)
    assert_allclose(found.increase, full - base, rtol=1e-9)
    assert (found.channels, found.layers) == (256, 4)


def test_regression_sees_support_that_matters():
    found = rank_regression(synthetic(1.0)).iloc[0]
    assert found.low > 0.02
    assert found.slope_high < 0
    assert found.low < found.increase < found.high


def test_regression_does_not_see_support_that_does_not_matter():
    found = pd.concat(rank_regression(synthetic(seed=seed), resamples=300) for seed in range(8))
    assert (found["low"] <= 0).sum() >= 7  # one draw in 200 says otherwise, and seed 3 is one
    assert (found["high"] > 0).all()
    assert found["increase"].abs().max() < 0.03


def test_the_adjusted_increase_is_zero_on_average_for_a_useless_metric():
    increases = [rank_regression(synthetic(seed=seed), resamples=0)["increase"][0] for seed in range(60)]
    assert abs(np.mean(increases)) < 2.5 * np.std(increases) / np.sqrt(60)
    assert min(increases) < 0


def test_matching_sees_support_that_matters():
    found = matched_comparison(synthetic(1.0)).set_index("scale").loc["rank"]
    assert found.high < 0
    assert found.difference == pytest.approx(found.much - found.little)
    assert abs(found.imbalance) < 0.02  # while the unmatched groups differ in task information


@pytest.mark.parametrize("seed", range(4))
def test_matching_does_not_see_support_that_does_not_matter(seed):
    table = synthetic(0.0, seed=seed)
    found = matched_comparison(table).set_index("scale").loc["rank"]
    assert found.low < 0 < found.high
    # Without matching it would: support goes along with what does matter.
    ranks = table.groupby("layer")[["zero_loss", "peer_r2"]].rank(pct=True)
    much = ranks["peer_r2"] > 0.5
    assert ranks["zero_loss"][much].mean() - ranks["zero_loss"][~much].mean() > found.difference + 0.04


def test_pairs_by_hand():
    table = pd.DataFrame(
        {
            "layer": "a",
            "channel": range(20),
            "peer_r2": [0.1, 0.9] * 10,
            "task_information": np.arange(20.0),
            "zero_loss": [2.0, 1.0] * 10,
        }
    )
    found = matched_comparison(table, resamples=50).set_index("scale").loc["value"]
    assert (found.pairs, found.layers, found.much, found.little) == (10, 1, 1.0, 2.0)
    assert (found.difference, found.low, found.high) == (-1.0, -1.0, -1.0)
    assert abs(found.imbalance) <= CALIPER


def test_nothing_to_match_gives_nan():
    table = pd.DataFrame({"layer": "a", "channel": range(20), "zero_loss": np.arange(20.0)})
    table["peer_r2"] = table["task_information"] = np.repeat([0.0, 1.0], 10)
    found = matched_comparison(table, resamples=5)
    assert (found["pairs"] == 0).all()
    assert found[["difference", "low", "high", "much"]].isna().all(axis=None)


def test_score_correlation_agrees_with_scipy():
    table = synthetic(0.5)
    found = score_damage_correlation(table, ["task_information", "peer_r2"], resamples=200)
    for score, rows in found.groupby("score"):
        for row in rows[rows["layer"] != NETWORK].itertuples():
            frame = table[table["layer"] == row.layer]
            assert_allclose(row.rho, stats.spearmanr(frame[score], frame["zero_loss"]).statistic, rtol=1e-12)
            assert row.low < row.rho < row.high
        network = rows[rows["layer"] == NETWORK].iloc[0]
        assert_allclose(network.rho, rows["rho"][rows["layer"] != NETWORK].mean(), rtol=1e-12)
        assert network.high - network.low < (rows["high"] - rows["low"]).max()


def test_channels_without_a_finite_score_are_left_out():
    """Dead channels have a score of −∞, which says nothing about their order."""
    table = synthetic(0.5)
    free = table["channel"] < 20
    found = score_damage_correlation(
        table.assign(peer_r2=table["peer_r2"].mask(free, -np.inf)), ["peer_r2"], resamples=50
    )
    wanted = score_damage_correlation(table[~free], ["peer_r2"], resamples=0)
    assert_allclose(found["rho"], wanted["rho"])
    assert found["n"].tolist() == wanted["n"].tolist()


def test_a_constant_score_has_no_correlation():
    found = score_damage_correlation(synthetic().assign(flat=1.0), ["flat"], resamples=20)
    assert found[["rho", "low", "high"]].isna().all(axis=None)


def test_channels_of_one_unit_are_drawn_together():
    """A copy of a layer, in the same units, adds rows but nothing to know: the interval does not narrow."""
    one = synthetic(0.3, layers=1).assign(unit=[f"layer0[{k}]" for k in range(64)])
    twice = pd.concat([one, one.assign(layer="copy")], ignore_index=True)
    single, tied = (rank_regression(table, resamples=400).iloc[0] for table in (one, twice))
    assert_allclose([tied.slope, tied.slope_low, tied.slope_high], [single.slope, single.slope_low, single.slope_high])
    free = rank_regression(twice.drop(columns="unit"), resamples=400).iloc[0]
    assert free.slope_high - free.slope_low < 0.85 * (tied.slope_high - tied.slope_low)


def test_undefined_rows_and_small_layers_are_left_out():
    table = synthetic(0.5)
    spoiled = pd.concat(
        [table, table.iloc[:2].assign(layer="small"), table.iloc[:9].assign(layer="b", zero_loss=np.nan)]
    )
    for function in (rank_regression, matched_comparison):
        pd.testing.assert_frame_equal(function(spoiled, resamples=20), function(table, resamples=20))


def test_join_keeps_lesioned_channels_and_both_reasons():
    table = synthetic(layers=1)
    axes = table.drop(columns="zero_loss").assign(reason="dead")
    lesions = table[["layer", "channel", "zero_loss"]].assign(reason="")[5:8]
    joined = join_axes(axes, lesions)
    assert joined["channel"].tolist() == [5, 6, 7]
    assert joined["reason"].tolist() == ["dead"] * 3
    assert joined["lesion_reason"].tolist() == [""] * 3
    with pytest.raises(ValueError, match=r"axes.: channel 0 of 'layer0' occurs twice"):
        join_axes(pd.concat([axes, axes]), lesions)
    with pytest.raises(ValueError, match="no channel in common; axes have the layers layer0, lesions other"):
        join_axes(axes, lesions.assign(layer="other"))


@pytest.mark.parametrize("function", [rank_regression, matched_comparison])
def test_columns_that_are_missing_or_undefined_are_named(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: no column 'one_loss'; there are layer, channel, input"):
        function(synthetic(), damage="one_loss")
    with pytest.raises(ValueError, match=r"no layer has 3 channels for which zero_loss, .* are defined"):
        function(synthetic().assign(zero_loss=np.nan))


def test_a_table_of_lesions_that_was_a_csv_file_gives_the_same_intervals(tmp_path):
    table = synthetic(0.4, layers=2).assign(layer=lambda rows: rows["layer"].str[-1])  # named 0 and 1
    table["unit"] = [f"g[{k % 60}]" if k % 3 else "" for k in range(len(table))]
    for units in (table["unit"], ""):
        table.assign(unit=units).to_csv(tmp_path / "lesions.csv", index=False)
        found = score_damage_correlation(pd.read_csv(tmp_path / "lesions.csv"), ["input_capture"], resamples=50)
        wanted = score_damage_correlation(table.assign(unit=units), ["input_capture"], resamples=50)
        assert_allclose(found[["rho", "low", "high"]], wanted[["rho", "low", "high"]])


def test_a_process_without_lesions_joins_none():
    table = synthetic(layers=1)
    assert join_axes(table.drop(columns="zero_loss"), table[["layer", "channel", "zero_loss"]][:0]).empty


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1.0), (1.0, 0.5), (3.0, 0.1)])
def test_the_reliable_share_of_damage_is_that_of_its_true_variance(noise, expected):
    rng = np.random.default_rng(0)
    layers = np.repeat([f"layer{number}" for number in range(40)], 60)
    scale = np.repeat(10.0 ** rng.integers(-4, 2, 40), 60)  # layers differ a lot in how much damage they do
    damage = scale * (rng.normal(size=layers.size) + noise * rng.normal(size=layers.size))
    table = pd.DataFrame({"layer": layers, "zero_loss": damage, "zero_loss_se": noise * scale})
    assert damage_reliability(table) == pytest.approx(expected, abs=0.03)


def test_damage_that_is_nothing_but_noise_has_no_reliable_share():
    table = pd.DataFrame({"layer": ["a"] * 3, "zero_loss": [0.0, 0.1, 0.2], "zero_loss_se": [1.0] * 3})
    assert damage_reliability(table) == 0.0  # and not below
    assert np.isnan(damage_reliability(table.assign(zero_loss_se=np.nan)))  # a single image has no standard error
    with pytest.raises(ValueError, match=r"damage_reliability: no column 'mean_loss', 'mean_loss_se'; there are"):
        damage_reliability(table, "mean_loss")
