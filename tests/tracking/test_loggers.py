"""What TensorBoard and MLflow get, read back with their own readers; and keys that every store can hold."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

from chanaxes_pl import AxisTracker, read_run
from chanaxes_pl.analysis.correlations import axis_correlations, main_correlation
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.tracking.logging import checkpoint_media, checkpoint_scalars
from tests.helpers import cases as zoo
from tests.helpers.training import QUIET, STEPS, build, loaders, trainer
from tests.tracking.test_tracker import keys
from tests.tracking.test_tracker_invariants import differences, trained

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    # mlflow on SQLAlchemy 2.1, when its SQLite store starts
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]


# --- keys -----------------------------------------------------------------------------------------------------------


def folders_of(key: str) -> set[str]:
    """What has to be a folder where a key is a path."""
    parts = key.split("/")
    return {"/".join(parts[:end]) for end in range(1, len(parts))}


NAMES = st.text("ab./", min_size=1, max_size=4) | st.sampled_from(["rho", "a/rho", "a/dead", "a.b", "a/b", "/", "a//"])


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True))
@settings(max_examples=25, deadline=None)
def test_no_key_is_the_folder_of_another(layers):
    table = pd.concat([pd.DataFrame(zoo.synthetic_layer(0, 4, name)) for name in layers], ignore_index=True)
    table["alignment"] = 0.5
    table["at_ceiling"] = False
    scalars = checkpoint_scalars(table, axis_correlations(table))
    logged = {*scalars, *checkpoint_media(table, 3), "axis/seconds", "axis/time_share", "axis/correlations", "epoch"}
    assert sum(key.startswith("axis/layer/") for key in scalars) == 4 * len(layers)
    assert not {key for key in logged if any(folder in logged for folder in folders_of(key))}


def test_a_tracker_is_not_called_like_the_value_that_all_loggers_hold():
    with pytest.raises(ValueError, match=r"AxisTracker\(name='epoch'\): expected another name: loggers hold a value"):
        AxisTracker(name="epoch")


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_scalars_histograms_and_the_figure_of_the_correlations(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker, logger = AxisTracker(), TensorBoardLogger(tmp_path, name="run")
    trainer(tmp_path, tracker, logger=logger).fit(build(), **loaders())
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    assert keys() <= set(events.Tags()["scalars"])
    steps = [0, STEPS, 2 * STEPS]
    rho = events.Scalars("axis/rho")
    assert [event.step for event in rho] == steps
    expected = main_correlation(tracker.correlations)["rho"]
    assert [event.value for event in rho] == pytest.approx(expected.tolist(), rel=1e-6, nan_ok=True)
    assert events.Tags()["images"] == ["axis/correlations"]
    assert [(image.step, image.width) for image in events.Images("axis/correlations")] == [(s, 720) for s in steps]
    assert events.Tags()["histograms"] == [f"axis/hist/{metric}" for metric in METRICS]
    for metric in METRICS:
        found = events.Histograms(f"axis/hist/{metric}")
        assert [event.step for event in found] == steps
        values = tracker.table[metric].to_numpy(np.float32)
        last = found[-1].histogram_value
        assert (last.num, last.min, last.max) == pytest.approx((len(values), values.min(), values.max()))


# --- MLflow ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet_mlflow(monkeypatch):
    """Stores of files, which newer versions have to be allowed; nothing sent."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(params=["files", "sqlite"])
def store(request, tmp_path):
    """Where MLflow keeps its runs."""
    return f"file:{tmp_path}/mlruns" if request.param == "files" else f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("save", [True, False])
def test_mlflow_holds_scalars_and_tables_that_can_be_read_as_a_run(tmp_path, store, save):
    from mlflow.tracking import MlflowClient

    logger = MLFlowLogger("mine", tracking_uri=store, artifact_location=f"file:{tmp_path}/artefacts")
    tracker = AxisTracker(save=save)
    trainer(tmp_path, tracker, logger=logger).fit(build(), **loaders())
    client = MlflowClient(store)
    history = client.get_metric_history(logger.run_id, "axis/rho")
    assert [metric.step for metric in history] == [0, STEPS, 2 * STEPS]
    expected = main_correlation(tracker.correlations)["rho"].tolist()
    assert [metric.value for metric in history] == pytest.approx(expected, nan_ok=True)
    assert keys() <= set(client.get_run(logger.run_id).data.metrics)
    (tmp_path / "back").mkdir()
    folder = client.download_artifacts(logger.run_id, "axis", str(tmp_path / "back"))
    table = read_run(folder)
    pd.testing.assert_frame_equal(table.query("step == 8").reset_index(drop=True), tracker.table)
    assert table["step"].unique().tolist() == [0, STEPS, 2 * STEPS]
    files = {entry.path for entry in client.list_artifacts(logger.run_id, "axis")}
    assert ("axis/about.json" in files) == save


@pytest.mark.parametrize("make", [TensorBoardLogger, lambda root: MLFlowLogger(tracking_uri=f"file:{root}/mlruns")])
def test_training_is_bit_identical_with_what_they_get_and_without(tmp_path, make):
    loggers = [make(tmp_path / "one"), make(tmp_path / "two")]
    assert [logger.experiment is not None for logger in loggers]  # MLflow draws its number, digit by digit
    bare = trained(tmp_path / "bare", logger=loggers[0])
    tracked = trained(tmp_path / "tracked", AxisTracker(schedule="1 steps"), logger=loggers[1])
    assert differences(bare, tracked) == []


def test_none_of_them_is_needed_to_import_or_to_track():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['wandb', 'tensorboard', 'mlflow', 'torch.utils.tensorboard']); "
        "import chanaxes_pl.tracking.logging, chanaxes_pl.tracking.tracker"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
