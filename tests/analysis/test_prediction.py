"""How early the axes predict the end: runs whose answer is known, and every number by its slow definition."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from chanaxes_pl import LesionExperiment
from chanaxes_pl.analysis.correlations import AXES, NETWORK
from chanaxes_pl.analysis.damage import score_damage_correlation
from chanaxes_pl.analysis.prediction import PREDICTORS, early_prediction
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.analysis.scores import SCORES
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.plots import plot_early_prediction
from chanaxes_pl.plots.style import words
from chanaxes_pl.prune_module import PruneModule
from chanaxes_pl.run_folder import checkpoint_path
from chanaxes_pl.tables import COLUMNS, HALVES, SPLIT_HALF, WITH_NULL, write_parquet
from chanaxes_pl.tracking.tracker import AxisTracker
from tests.helpers.training import QUIET, build, images, loaders, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
STEPS = (0, 1, 10, 100)
WIDTHS = {"first": 12, "second": 20, "third": 16}


def predicted(folder: Path, *given, **options) -> pd.DataFrame:
    """What is predicted of the run in a folder."""
    return early_prediction(read_runs([folder]).each[0], *given, **options)


def table(rng: np.random.Generator, drift: float, end: pd.DataFrame | None) -> pd.DataFrame:
    """A checkpoint's table: the end's plus noise of standard deviation ``drift``; without an end, noise alone."""
    frames = [pd.DataFrame({"layer": layer, "channel": np.arange(width)}) for layer, width in WIDTHS.items()]
    result = pd.concat(frames, ignore_index=True)
    halves = [f"{column}_{half}" for column in SPLIT_HALF for half in HALVES]
    for column in (*COLUMNS, *halves, *(f"{name}_null" for name in WITH_NULL)):
        noise = rng.normal(size=len(result))
        result[column] = noise if end is None else end[column] + drift * noise
    return result.assign(dead=False, at_ceiling=False, reason="")


def written(folder: Path, seed: int = 0) -> pd.DataFrame:
    """A run whose channels come ever closer to what they are at the end; returns the end."""
    rng = np.random.default_rng(seed)
    end = table(rng, 0.0, None)
    for epoch, step in enumerate(STEPS):
        frame = table(rng, 3.0 - epoch, end)
        frame.insert(0, "step", step)
        frame.insert(0, "epoch", float(epoch))
        frame.insert(0, "run", "synthetic")
        write_parquet(frame, checkpoint_path(folder / "axis", step))
    return end


def lesioned(end: pd.DataFrame) -> pd.DataFrame:
    """Two channels of three, damaged by how much input they capture; in pairs they share a unit and its damage."""
    rows = end[end["channel"] % 3 < 2].reset_index(drop=True)
    pair = rows["channel"] // 3
    unit = rows["layer"] + "[" + pair.astype(str) + "]"
    damage = rows.groupby(unit)["input_capture"].transform("mean")
    return rows[["layer", "channel"]].assign(unit=unit, zero_loss=damage, mean_loss=-damage, score_l1=-damage)


def read(folder: Path, step: int) -> pd.DataFrame:
    return pd.read_parquet(checkpoint_path(folder / "axis", step))


def network(result: pd.DataFrame, target: str) -> pd.DataFrame:
    rows = result[(result["layer"] == NETWORK) & (result["target"] == target)]
    return rows.pivot(index="step", columns="metric", values="rho")[list(PREDICTORS)]


def slow(checkpoint: pd.DataFrame, wanted: pd.Series, metric: str) -> float:
    """Mean over layers of SciPy's Spearman correlation with ``wanted``, indexed by layer and channel."""
    found = []
    for layer, frame in checkpoint.groupby("layer", sort=False):
        frame = frame.set_index("channel")
        parts = AXES.get(metric)
        values = sum((frame[p] - frame[p].mean()) / frame[p].std() for p in parts) if parts else frame[metric]
        target = wanted[layer]
        found.append(stats.spearmanr(values[target.index], target).statistic)
    return float(np.mean(found))


def test_every_number_agrees_with_its_definition(tmp_path):
    end = written(tmp_path)
    lesions = lesioned(end)
    result = predicted(tmp_path, lesions, order="minus_peer_overlap", resamples=20)
    damage = lesions.set_index(["layer", "channel"])["zero_loss"]
    removal = -end.set_index(["layer", "channel"])["peer_overlap"]  # much overlap goes first
    for target, wanted in (("damage", damage), ("order", removal)):
        found = network(result, target)
        assert found.index.tolist() == list(STEPS)
        for step in STEPS:
            slowly = [slow(read(tmp_path, step), wanted, metric) for metric in PREDICTORS]
            assert_allclose(found.loc[step], slowly, rtol=1e-10, atol=1e-12)
    assert network(result, "order").loc[100, "peer_overlap"] == pytest.approx(-1)
    sizes = result[result["metric"] == "peer_r2"].groupby(["target", "layer"])["n"].unique().map(list)
    assert sizes["order", "second"] == [20]
    assert sizes["damage", "second"] == [14]
    assert sizes["damage", NETWORK] == [8 + 14 + 11]
    assert (result["reason"] == "").all()


def test_a_score_does_not_share_its_name_with_a_coordinate(tmp_path):
    """keep_local takes overlap with sign −, the coordinate local_axis with sign +: neither stands for the other."""
    end = written(tmp_path)
    z = {name: end.groupby("layer")[name].transform(lambda x: (x - x.mean()) / x.std()) for name in METRICS}
    keep = (z["input_capture"] - z["peer_overlap"]).set_axis(pd.MultiIndex.from_frame(end[["layer", "channel"]]))
    found = network(predicted(tmp_path, order="keep_local", resamples=0), "order")
    assert_allclose(found.loc[100, "local_axis"], slow(read(tmp_path, 100), keep, "local_axis"), rtol=1e-10)
    assert found.loc[100, "local_axis"] < 0.9
    with pytest.raises(ValueError, match=r"order='local_axis'.*did you mean 'keep_local'"):
        predicted(tmp_path, order="local_axis")
    assert not set(SCORES) & set(AXES)
    assert not set(SCORES) & {"peer_overlap", "peer_r2"}  # their direction differs from the metrics'


def test_prediction_grows_as_the_end_comes_near_and_of_what_matters_alone(tmp_path):
    result = predicted(tmp_path, lesioned(written(tmp_path)), resamples=300)
    rows = result[(result["layer"] == NETWORK) & (result["target"] == "damage")].set_index(["metric", "step"])
    assert rows.loc["input_capture", "rho"][[1, 10, 100]].is_monotonic_increasing
    assert rows.loc["input_capture", "low"][100] > 0.5
    useless = rows.loc["target_excess"]
    assert ((useless["low"] < 0) & (useless["high"] > 0)).all()
    assert (rows["low"] < rows["high"]).all()


def test_resamples_are_the_same_for_all_checkpoints_and_hold_units_together(tmp_path):
    """What does not change between checkpoints has the same interval; a bootstrap of its own would differ."""
    end = written(tmp_path)
    copy = read(tmp_path, 100).assign(step=200, epoch=9.0)
    write_parquet(copy, checkpoint_path(tmp_path / "axis", 200))
    lesions = lesioned(end)
    result = predicted(tmp_path, lesions, resamples=200)
    late, later = (result[result["step"] == step].reset_index(drop=True) for step in (100, 200))
    pd.testing.assert_frame_equal(late[["rho", "low", "high"]], later[["rho", "low", "high"]], check_exact=True)
    joined = copy.merge(lesions, on=["layer", "channel"])
    wanted = score_damage_correlation(joined, ["peer_r2"], resamples=200)
    found = later[(later["target"] == "damage") & (later["metric"] == "peer_r2")]
    assert_allclose(found[["rho", "low", "high"]], wanted[["rho", "low", "high"]], rtol=1e-12)
    free = predicted(tmp_path, lesions.drop(columns="unit"), resamples=200)
    assert not np.allclose(free["low"][free["target"] == "damage"], result["low"][result["target"] == "damage"])
    assert predicted(tmp_path, lesions, resamples=200, seed=1)["low"].ne(result["low"]).any()


def test_dead_channels_leave_only_the_checkpoints_where_they_are_dead(tmp_path):
    end = written(tmp_path)
    early = read(tmp_path, 1)
    early.loc[early.index[:3], ["dead", *METRICS, "peer_r2"]] = [True, *[np.nan] * 5]
    write_parquet(early, checkpoint_path(tmp_path / "axis", 1))
    result = predicted(tmp_path, resamples=10).query("target == 'order' and metric == 'local_axis'")
    assert result[result["layer"] == "first"]["n"].tolist() == [12, 9, 12, 12]
    rest = early[~early["dead"]]
    wanted = end.loc[rest.index].set_index(["layer", "channel"])["input_capture"]
    assert_allclose(result.query("step == 1 and layer == 'network'")["rho"], slow(rest, wanted, "local_axis"))
    last = read(tmp_path, 100)
    last.loc[0, "dead"] = True  # goes first, whatever its numbers were
    write_parquet(last, checkpoint_path(tmp_path / "axis", 100))
    values = last["input_capture"].where(~last["dead"], -np.inf).set_axis(pd.MultiIndex.from_frame(last.iloc[:, 3:5]))
    assert_allclose(network(predicted(tmp_path), "order").loc[0, "peer_r2"], slow(read(tmp_path, 0), values, "peer_r2"))


def test_without_lesions_the_order_is_still_predicted_and_the_rest_says_why_not(tmp_path):
    written(tmp_path)
    result = predicted(tmp_path, resamples=10)
    damage = result[result["target"] == "damage"]
    assert len(damage) == len(STEPS) * len(PREDICTORS)
    assert damage[["rho", "low", "high"]].isna().all(axis=None)
    assert damage["reason"].str.contains("no lesions.parquet in the run folder").all()
    assert network(result, "order").notna().all(axis=None)
    assert result["target"].unique().tolist() == ["damage", "order"]


def test_a_single_checkpoint_is_its_own_end(tmp_path):
    rng = np.random.default_rng(0)
    frame = table(rng, 0.0, None).assign(run="one", epoch=0.0, step=0)
    write_parquet(frame, checkpoint_path(tmp_path / "axis", 0))
    result = predicted(tmp_path, order="reverse_task_information", resamples=0)
    assert network(result, "order")["task_information"].tolist() == [pytest.approx(-1)]
    assert result["low"].isna().all()


def test_lesions_are_found_in_the_folder_and_scores_in_the_lesions(tmp_path):
    end = written(tmp_path)
    lesions = lesioned(end).merge(end[["layer", "channel", *METRICS, "peer_r2"]])
    write_parquet(lesions, tmp_path / "late" / "lesions.parquet")
    found = predicted(tmp_path, order="l1", damage="mean_loss", resamples=5)
    given = predicted(tmp_path, tmp_path / "late" / "lesions.parquet", order="l1", damage="mean_loss", resamples=5)
    pd.testing.assert_frame_equal(found, given, check_exact=True)
    # L1 and this damage are the same here, but for the units that share the latter.
    assert_allclose(network(found, "order"), network(found, "damage"), rtol=1e-12)
    write_parquet(lesions, tmp_path / "later" / "lesions.parquet")
    with pytest.raises(ValueError, match=r"holds 2 tables of lesions, in late, later; pass that of the last"):
        predicted(tmp_path)


def test_anything_but_one_run_is_refused():
    with pytest.raises(TypeError, match=r"early_prediction\(run=\['a'\]\): expected one run, .*\.each\[0\]"):
        early_prediction(["a"])


def test_bad_input_is_named(tmp_path):
    end = written(tmp_path)
    lesions = lesioned(end)
    with pytest.raises(FileNotFoundError, match="no such file"):
        predicted(tmp_path, tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match=r"damage='peer_loss'.*there are \['zero_loss', 'mean_loss'\]"):
        predicted(tmp_path, lesions, damage="peer_loss")
    with pytest.raises(ValueError, match="no such score; did you mean"):
        predicted(tmp_path, order="input_captur")
    with pytest.raises(ValueError, match=r"no lesions have the column 'score_l2'; .*--scores"):
        predicted(tmp_path, lesions, order="l2")


def test_a_checkpoint_that_is_cut_off_is_left_out(tmp_path):
    written(tmp_path)
    path = checkpoint_path(tmp_path / "axis", 10)
    path.write_bytes(path.read_bytes()[:900])
    assert predicted(tmp_path, resamples=0)["step"].unique().tolist() == [0, 1, 100]


def test_lesions_of_another_network_are_refused(tmp_path):
    end = written(tmp_path)
    lesions = lesioned(end)
    with pytest.raises(ValueError, match="no channel in common"):
        predicted(tmp_path, lesions.assign(layer="other." + lesions["layer"]))
    wider = pd.concat([lesions, lesions.iloc[:1].assign(channel=99)])
    with pytest.raises(ValueError, match="the run has no channel 99 of 'first'"):
        predicted(tmp_path, wider)
    theirs = table(np.random.default_rng(5), 0.0, None)["input_capture"]
    with pytest.raises(
        ValueError, match=r"another network than the run's last checkpoint: .* rank correlation of .* is -?0\.\d"
    ):
        predicted(tmp_path, end[["layer", "channel"]].assign(zero_loss=1.0, input_capture=theirs))
    predicted(tmp_path, lesions.merge(end[["layer", "channel", "input_capture"]]), resamples=0)


def test_from_training_to_figure(tmp_path):
    model, fit = build(), trainer(tmp_path, AxisTracker(schedule="log"))
    fit.fit(model, **loaders())
    lesions = PruneModule(model, LesionExperiment(operations=("zero",), scores=("l1",)), probe=images(), out=tmp_path)
    trainer(tmp_path).test(lesions, loaders()["val_dataloaders"], verbose=False)
    result = predicted(tmp_path, order="l1", resamples=50)
    assert set(result["metric"]) == {*METRICS, "peer_r2", *AXES}
    assert result[result["layer"] == NETWORK]["rho"].notna().all()
    figure = plot_early_prediction(result, "small")
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["final damage (zero_loss)", "final pruning order (l1)"]
    wanted = network(result, "damage")
    lines = {line.get_label(): line.get_ydata() for line in panels[0].lines}
    for metric in PREDICTORS:
        assert_allclose(lines[words(metric)], wanted[metric])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [words(name) for name in PREDICTORS]


def test_the_figure_says_what_is_missing(tmp_path):
    written(tmp_path)
    left = plot_early_prediction(predicted(tmp_path, resamples=0)).axes[0]
    assert "run chanaxes lesion" in left.texts[0].get_text()


def test_too_few_lesions_leave_the_order_and_say_so(tmp_path):
    end = written(tmp_path)
    few = lesioned(end).groupby("layer").head(2)
    result = predicted(tmp_path, few, resamples=0)
    damage = result[result["target"] == "damage"]
    assert damage["rho"].isna().all()
    assert set(damage["reason"]) == {"no layer has 3 channels for which it is known"}
    assert network(result, "order").loc[100, "input_capture"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": None}, r"early_prediction\(order=None\): expected the name of a score"),
        ({"lesions": 3}, r"early_prediction\(lesions=3\): expected a table of lesions, or its path"),
        ({"lesions": pd.DataFrame({"layer": ["a"]})}, r"early_prediction\(lesions=…\): lacks the columns channel"),
        ({"damage": "layer"}, r"early_prediction\(damage='layer'\): no such column of lesions; there are \["),
    ],
)
def test_what_is_no_table_and_no_name_is_refused(tmp_path, arguments, message):
    end = written(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        predicted(tmp_path, **{"lesions": lesioned(end), **arguments})
