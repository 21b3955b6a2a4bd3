"""Run folders, read back and set side by side."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from chanaxes_pl.analysis.correlations import NETWORK, axis_correlations, main_correlation
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.run_folder import RunFolder, checkpoint_path
from chanaxes_pl.tables import write_parquet
from tests.helpers import cases as zoo

STEPS = (0, 4, 8)


def write_run(
    folder: Path, seed: int = 0, steps: tuple[int, ...] = STEPS, width: int = 9, tracker: str = "axis"
) -> Path:
    """A run folder with made-up checkpoints whose coupling falls from 0.9 to 0.1."""
    for place, step in enumerate(steps):
        coupling = np.linspace(0.9, 0.1, len(steps))[place]
        layers = [zoo.synthetic_layer(100 * seed + place, 12, "net.a", 0.1, coupling)]
        layers += [zoo.synthetic_layer(100 * seed + place + 50, width, "net.b", 0.1, coupling)]
        table = pd.concat(map(pd.DataFrame, layers), ignore_index=True)
        keys = pd.DataFrame({"run": "version_0", "epoch": step / 4, "step": step}, index=table.index)
        write_parquet(pd.concat([keys, table], axis=1), checkpoint_path(folder / tracker, step))
    return folder


@pytest.fixture
def seeds(tmp_path) -> list[Path]:
    return [write_run(tmp_path / "runs" / f"version_{seed}", seed) for seed in range(3)]


def test_runs_are_one_table_told_apart_by_the_ends_of_their_paths(seeds):
    runs = read_runs(seeds)
    assert [run.name for run in runs.each] == ["runs/version_0", "runs/version_1", "runs/version_2"]
    assert runs.table["run"].unique().tolist() == [run.name for run in runs.each]
    assert len(runs.table) == 3 * len(STEPS) * (12 + 9)
    assert runs.each[0].widths == {"net.a": 12, "net.b": 9}
    assert not any(run.notes for run in runs.each)


def test_runs_of_other_tasks_are_pooled_with_a_note(seeds):
    for number, run in enumerate(seeds):
        data = "PhotosDataModule" if number == 1 else "DigitsDataModule"
        (run / "axis" / "about.json").write_text(json.dumps({"data": data}))
    notes = [run.notes for run in read_runs(seeds).each]
    assert notes[0] == notes[2] == ()
    assert notes[1] == (
        "runs/version_1 is pooled with runs/version_0, whose data set is another one: DigitsDataModule, and not "
        "PhotosDataModule",
    )


@pytest.mark.parametrize("resamples", [0, -5])
def test_as_many_resamples_as_none_are_refused(seeds, resamples):
    with pytest.raises(ValueError, match=rf"resamples={resamples}: expected a whole number from 1 on, such as 1000"):
        read_runs(seeds, resamples)


def test_runs_of_one_name_are_told_apart_by_what_is_above_them(tmp_path):
    folders = [write_run(tmp_path / name / "net" / "version_0") for name in ("first", "second")]
    assert [run.name for run in read_runs(folders).each] == ["first/net/version_0", "second/net/version_0"]


def test_a_run_is_named_by_its_folder_or_by_its_trackers(seeds):
    whole, inner = read_runs([seeds[0]]), read_runs([seeds[0] / "axis"])
    assert whole.each[0].folder == inner.each[0].folder == seeds[0]
    pd.testing.assert_frame_equal(whole.table, inner.table)


def test_a_tracker_of_another_name_is_found_and_one_of_several_has_to_be_named(tmp_path):
    run = write_run(tmp_path / "run", tracker="label")
    assert len(read_runs([run]).steps) == len(STEPS)
    write_run(run, tracker="margin")
    with pytest.raises(FileNotFoundError, match=r"several trackers: choose one, .*run/label or .*run/margin"):
        read_runs([run])
    write_run(run, tracker="axis", steps=(0,))
    assert read_runs([run]).steps == [0]


def test_mean_and_interval_are_over_runs(seeds):
    runs = read_runs(seeds, resamples=400)
    each = np.array([main_correlation(axis_correlations(read_runs([seed]).table))["rho"] for seed in seeds])
    means = runs.mean()
    rows = means[(means["layer"] == NETWORK) & (means["target"] == "task_information")]
    rows = rows[rows["local"] == "input_capture"].set_index("step")
    assert_allclose(rows["mean"], each.mean(0))
    assert_allclose(rows["std"], each.std(0, ddof=1))
    assert (rows["low"] < rows["mean"]).all()
    assert (rows["mean"] < rows["high"]).all()
    assert (rows["runs"] == 3).all()


def test_changes_are_paired_run_by_run(seeds):
    """The interval of a difference within runs is no wider than the runs' differences: not that of two samples."""
    runs = read_runs(seeds, resamples=400)
    change = (
        runs.change(0, 8).set_index(["layer", "local", "target"]).loc[(NETWORK, "input_capture", "task_information")]
    )
    rho = [main_correlation(axis_correlations(read_runs([seed]).table)).set_index("step")["rho"] for seed in seeds]
    differences = [rows[8] - rows[0] for rows in rho]
    assert_allclose(change["mean"], np.mean(differences))
    assert_allclose(change["std"], np.std(differences, ddof=1))
    assert min(differences) <= change["low"] <= change["high"] <= max(differences)
    assert change["mean"] < -0.3  # the coupling fell


def test_pairs_are_compared_on_the_same_checkpoint(seeds):
    runs = read_runs(seeds, resamples=50)
    gaps = runs.beyond_headline(4).set_index(["local", "target"])
    rows = runs.correlations[(runs.correlations["layer"] == NETWORK) & (runs.correlations["step"] == 4)]
    by_run = rows.pivot(index="run", columns=["local", "target"], values="rho")
    for pair in by_run:
        gap = by_run[pair] - by_run["input_capture", "task_information"]
        assert_allclose(gaps.loc[pair, "mean"], gap.mean(), atol=1e-12)
    assert gaps.loc[("input_capture", "task_information"), "mean"] == 0


def test_one_run_has_a_mean_and_no_interval_over_runs(seeds):
    runs = read_runs(seeds[:1])
    assert runs.mean()["low"].isna().all()
    assert runs.change(0, 8)["std"].isna().all()
    assert runs.landmarks == {"first": 0, "highest": 0, "last": 8}


def test_only_steps_that_all_runs_share_are_compared(tmp_path):
    folders = [write_run(tmp_path / "a", 0, (0, 4, 8)), write_run(tmp_path / "b", 1, (0, 8, 12))]
    runs = read_runs(folders)
    assert runs.steps == [0, 8]
    assert set(runs.table["step"]) == {0, 8}


def test_runs_without_a_common_step_are_refused(tmp_path):
    folders = [write_run(tmp_path / "a", 0, (1, 2)), write_run(tmp_path / "b", 1, (3, 5))]
    with pytest.raises(ValueError, match=r"no step in common .*a: 1, 2 …; .*b: 3, 5 …"):
        read_runs(folders)


def test_runs_of_different_networks_are_refused_and_the_layers_named(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", width=8)]
    with pytest.raises(
        ValueError, match=r"different networks: .*a has net.b \(9 channels\); .*b has net.b \(8 channels\)"
    ):
        read_runs(folders)


def test_the_same_run_twice_is_refused(seeds):
    with pytest.raises(ValueError, match=r"version_0 is given twice"):
        read_runs([seeds[0], seeds[0] / "axis"])


def test_one_folder_needs_no_list(seeds):
    for folder in (seeds[0], str(seeds[0])):
        assert [each.name for each in read_runs(folder).each] == [each.name for each in read_runs([seeds[0]]).each]


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="no run folder given: expected one that training with AxisTracker wrote"):
        read_runs([])


def test_a_folder_that_is_no_run_says_what_it_holds_and_what_was_meant(seeds, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected one that training"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"runs is no run folder: .* did you mean .*version_0 .*version_1 "):
        read_runs([tmp_path / "runs"])
    with pytest.raises(FileNotFoundError, match=r"it holds runs; did you mean .*version_0 .*version_1 "):
        read_runs([tmp_path])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"expected axis/step-….parquet in it, .* it holds todo.txt$"):
        read_runs([tmp_path / "notes"])


def test_a_damaged_checkpoint_is_left_out_with_a_note(seeds):
    path = checkpoint_path(seeds[0] / "axis", 4)
    path.write_bytes(path.read_bytes()[:100])
    runs = read_runs([seeds[0]])
    assert runs.steps == [0, 8]
    (note,) = runs.each[0].notes
    assert "step-000000004.parquet: not a whole Parquet file" in note


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(seeds):
    for path in (seeds[0] / "axis").glob("*.parquet"):
        path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"axis: no checkpoint can be read; the first: .*step-000000000.parquet"):
        read_runs([seeds[0]])


def test_what_lies_beside_the_tables_is_read_or_noted(seeds):
    run = seeds[0]
    (run / "config.yaml").write_text("seed_everything: 3\n")
    (run / "metrics.csv").write_text("epoch,step,train/top1\n0,4,0.5\n")
    lesions = pd.DataFrame({"layer": ["net.a"], "channel": [0], "zero_loss": [0.2]})
    lesions = lesions.assign(**dict.fromkeys([*METRICS, "peer_r2"], 0.1))
    write_parquet(lesions, run / "later" / "lesions.parquet")
    write_parquet(lesions, run / "pruning.parquet")  # under a name that promises something else
    (read,) = read_runs([run]).each
    assert read.config == {"seed_everything": 3}
    assert read.scalars["train/top1"].tolist() == [0.5]
    assert list(read.lesions) == ["later"]
    assert read.lesions["later"]["run"].tolist() == [read.name]
    assert read.pruning == {}
    (note,) = read.notes
    assert "pruning.parquet: lacks the columns score, allocation, compensate, budget" in note


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("metrics.csv", b"", "metrics.csv cannot be read: No columns"),
        ("config.yaml", b"a: [", "config.yaml cannot be read: while parsing"),
        (
            "config.yaml",
            b"a: !!python/object/apply:os.getcwd []",
            "config.yaml cannot be read: could not determine a cons",
        ),
        ("lesions.parquet", b"PAR1", "lesions.parquet: not a whole Parquet file"),
    ],
)
def test_damaged_files_beside_the_tables_are_noted(seeds, name, content, note):
    (seeds[0] / name).write_bytes(content)
    (read,) = read_runs([seeds[0]]).each
    (said,) = read.notes
    assert note in said
    assert "\n" not in said


def write_scalars(path: Path, steps: list[int], column: str, values: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"epoch": 0, "step": steps, column: values}).to_csv(path, index=False)


def test_scalars_of_an_interrupted_run_are_whole_and_each_step_stands_there_once(tmp_path):
    run = write_run(tmp_path / "run")
    write_scalars(run / "metrics.csv", [0, 1, 2, 3], "train/loss", [4.0, 3.0, 2.0, 1.9])
    RunFolder(run).keep_scalars()
    write_scalars(run / "metrics.csv", [2, 3, 4], "train/loss", [2.5, 1.5, 1.0])  # went on after step 1
    RunFolder(run).keep_scalars()
    write_scalars(run / "metrics.csv", [4, 5], "train/loss", [0.9, 0.8])
    write_scalars(run / "test" / "metrics.csv", [6], "test/top1", [0.5])
    scalars = read_runs([run]).each[0].scalars
    assert scalars["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert scalars["train/loss"].dropna().tolist() == [4.0, 3.0, 2.5, 1.5, 0.9, 0.8]
    assert scalars["test/top1"].dropna().tolist() == [0.5]
    assert sorted(path.name for path in run.glob("*.csv")) == ["metrics-1.csv", "metrics-2.csv", "metrics.csv"]


def test_more_than_nine_parts_stay_in_order(tmp_path):
    run = write_run(tmp_path / "run")
    for step in range(11):
        write_scalars(run / "metrics.csv", [step], "train/loss", [float(step)])
        RunFolder(run).keep_scalars()
    RunFolder(run).keep_scalars()  # nothing there to keep
    assert read_runs([run]).each[0].scalars["step"].tolist() == list(range(11))


def test_steps_that_fall_into_other_epochs_are_averaged_all_the_same(seeds):
    for path in (seeds[1] / "axis").glob("*.parquet"):
        write_parquet(pd.read_parquet(path).assign(epoch=lambda rows: rows["epoch"] / 2), path)
    mean = main_correlation(read_runs(seeds).mean())
    assert mean["step"].tolist() == list(STEPS)
    assert mean["runs"].tolist() == [3] * len(STEPS)
    assert mean["epoch"].tolist() == [step / 4 for step in STEPS]


def hurt(run: Path, place: str, seed: int) -> None:
    table = pd.read_parquet(checkpoint_path(run / "axis", STEPS[-1])).drop(columns=["run", "epoch", "step"])
    table["zero_loss"] = np.random.default_rng(seed).normal(size=len(table))
    write_parquet(table, run / place / "lesions.parquet")


def test_lesions_of_one_run_count_once(seeds):
    run = write_run(seeds[0], tracker="label")
    hurt(run, ".", 0)
    once, twice = read_runs([run / "axis"]).damage, read_runs([run / "axis", run / "label"]).damage
    pd.testing.assert_frame_equal(once.over_runs.drop(columns="run"), twice.over_runs.drop(columns="run"))
    hurt(run, "later", 1)
    both = read_runs([run / "axis"]).damage.over_runs
    assert both["runs"].tolist() == [1] * len(both)
    hurt(seeds[1], ".", 2)
    rows = read_runs([run / "axis", seeds[1]]).damage
    each = rows.correlations[rows.correlations["layer"] == NETWORK].set_index(["score", "run", "place"])["rho"]
    own = each["input_capture"].xs(".", level="place")  # what is in another folder may be of other weights
    found = rows.over_runs.set_index("score").loc["input_capture"]
    assert (found["mean"], found["runs"]) == (pytest.approx(own.mean()), 2)
    assert rows.tables.groupby("place")["counts"].unique().map(list).to_dict() == {".": [True], "later": [False]}
