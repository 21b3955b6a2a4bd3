"""What W&B gets: offline runs read back with W&B's own reader, and the workspace that shows them."""

import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pandas as pd
import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from chanaxes_pl import AxisTracker, read_run
from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.data import DigitsDataModule
from chanaxes_pl.models import Classifier
from chanaxes_pl.tracking.logging import BINS, TABLE_COLUMNS, checkpoint_media, spread
from chanaxes_pl.tracking.workspace import dashboard
from tests.helpers.training import QUIET, build, loaders, trainer
from tests.tracking.test_tracker import NETWORK_KEYS
from tests.tracking.test_tracker_invariants import differences, trained

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning"),  # when wandb_workspaces is imported
]
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def quiet_wandb(tmp_path_factory):
    """No login, no message, nothing left in the home folder; WANDB_MODE, which WandbLogger writes, is put back."""
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(variable, home)
        patch.setenv("NETRC", f"{home}/netrc")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_API_KEY", raising=False)
        yield
        wandb.teardown()


def read_back(root: Path, number: int = 0) -> list[dict]:
    """The records of one run below ``root``, as W&B's reader prints them."""
    wandb.finish()
    wandb.teardown()
    file = sorted(root.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)[number]
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    return [json.loads(line) for line in subprocess.check_output(inspect, text=True).splitlines()]


def rows_of(records: list[dict], name: str = "axis") -> list[dict]:
    """The rows of a run's history that a tracker logged."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [row for row in rows if f"{name}/rho" in row]


def promised(tracker: AxisTracker) -> tuple[set[str], set[str]]:
    """Keys that every checkpoint logs: the scalars, and the histograms."""
    kinds = ["rho", "rho_axes", "dead", *(["alignment"] if tracker.settings.alignment else [])]
    scalars = NETWORK_KEYS | {f"layer/{layer}/{kind}" for layer in tracker.table["layer"].unique() for kind in kinds}
    scalars |= {"alignment"} if tracker.settings.alignment else set()
    return {f"{tracker.name}/{key}" for key in scalars}, {f"{tracker.name}/hist/{metric}" for metric in METRICS}


def problems(records: list[dict], tracker: AxisTracker) -> list[str]:
    """What a run lacks of what its tracker promises, and what it holds too much."""
    name, (scalars, histograms) = tracker.name, promised(tracker)
    at = [(epoch, step) for epoch, step in tracker.correlations[["epoch", "step"]].drop_duplicates().to_numpy()]
    tables = [f"{name}/table/step-{int(step):09d}" for _, step in at]
    found, rows = [], rows_of(records, name)
    if [(row.get("epoch"), row["trainer/global_step"]) for row in rows] != at:
        found.append("epochs and steps")
    for row, table in zip(rows, tables, strict=False):
        # A histogram or table stands in a row as KEY._type, KEY.bins, …
        there = {re.sub(r"(/(hist|table)/[^.]+)\..*", r"\1", key) for key in row if key.startswith(f"{name}/")}
        found += [f"no {key}" for key in (scalars | histograms | {table}) - there]
        found += [f"unexpected {key}" for key in there - scalars - histograms - {table}]
        found += [f"{key} is no histogram" for key in histograms if row.get(f"{key}._type") != "histogram"]
        found += [f"{table} is no table"] if row.get(f"{table}._type") != "table-file" else []
    over_epochs = {m["name"] for r in records if (m := r.get("metric", {})).get("step_metric") == "epoch"}
    over_epochs = {key for key in over_epochs if key.startswith(f"{name}/")}
    return found + [f"{key} over steps" for key in over_epochs ^ (scalars | histograms | set(tables))]


# --- a real training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A narrow ResNet-18 on the digits for two epochs, followed by two trackers; and the records of its run."""
    root = tmp_path_factory.mktemp("digits")
    L.seed_everything(0, verbose=False)
    trackers = AxisTracker(probe_size=200, alignment=True), AxisTracker(probe_size=100, name="even", schedule=2)
    logger = WandbLogger(project="digits", save_dir=root, offline=True)
    model = Classifier("resnet18", num_classes=10, width=0.125, image_size=16, channels_last=True)
    fitter = trainer(root, *trackers, logger=logger, limit_train_batches=STEPS, limit_val_batches=1)
    fitter.fit(model, DigitsDataModule(image_size=16, batch_size=64))
    return root, read_back(root), trackers


def test_an_offline_run_holds_every_key_step_table_and_histogram_of_both_trackers(digits):
    _, records, trackers = digits
    assert [problems(records, tracker) for tracker in trackers] == [[], []]
    for tracker in trackers:
        rhos = main_correlation(tracker.correlations)["rho"].tolist()
        assert [row[f"{tracker.name}/rho"] for row in rows_of(records, tracker.name)] == pytest.approx(rhos)
    assert trackers[0].folder == digits[0] / "digits" / trackers[0].folder.parent.name / "axis"


def test_the_run_names_the_task_variable_of_each_tracker_in_its_config(digits):
    _, records, trackers = digits
    config = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
    assert [config[f"{tracker.name}/target"] for tracker in trackers] == ["logit_margin", "logit_margin"]


def without(key):
    """Damage: a key that is missing in the last row."""

    def damage(records, row):
        row.pop(key)

    return damage


def as_number(records, row):
    row["axis/hist/peer_overlap._type"] = "number"


def no_epoch(records, row):
    row["epoch"] = 1


def over_steps(records, row):
    next(r for r in records if r.get("metric", {}).get("name") == "axis/rho")["metric"]["step_metric"] = "_step"


def same_table_key(records, row):
    row["axis/table/step-000000003._type"] = row.pop(f"axis/table/step-{2 * STEPS:09d}._type")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (without("axis/rho"), "epochs and steps"),
        (without("axis/time_share"), "no axis/time_share"),
        (without("axis/layer/network.conv1/dead"), "no axis/layer/network.conv1/dead"),
        (as_number, "axis/hist/peer_overlap is no histogram"),
        (no_epoch, "epochs and steps"),
        (over_steps, "axis/rho over steps"),
        (same_table_key, f"axis/table/step-{2 * STEPS:09d} is no table"),
    ],
)
def test_what_a_run_lacks_would_be_noticed(digits, damage, found):
    records = json.loads(json.dumps(digits[1]))
    damage(records, rows_of(records)[-1])
    assert found in problems(records, digits[2][0])


def test_tables_are_those_of_the_run_folder_and_artifacts_of_their_own(digits):
    root, records, trackers = digits
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "run_table"]
    assert len({artifact["name"] for artifact in artifacts}) == 3 + 2
    for tracker in trackers:
        for row, (step, whole) in zip(
            rows_of(records, tracker.name), read_run(tracker.folder).groupby("step"), strict=True
        ):
            entry = row[f"{tracker.name}/table/step-{step:09d}.path"]
            (file,) = root.glob(f"wandb/offline-run-*/files/{entry}")
            read = json.loads(file.read_text())
            shown = pd.DataFrame(read["data"], columns=read["columns"])
            columns = [column for column in TABLE_COLUMNS if column in whole]
            assert list(shown) == columns
            assert ("alignment" in shown) == tracker.settings.alignment
            expected = whole[columns].reset_index(drop=True)
            pd.testing.assert_frame_equal(shown.astype(expected.dtypes), expected, check_exact=True)


def test_histograms_count_the_finite_values(digits):
    row, table = rows_of(digits[1])[-1], digits[2][0].table
    for metric in METRICS:
        bins, counts = row[f"axis/hist/{metric}.bins"], row[f"axis/hist/{metric}.values"]
        values = [float(np.float32(value)) for value in table[metric] if np.isfinite(value)]
        assert (len(counts), bins[0], bins[-1]) == (BINS, min(values), max(values))
        for low, high, count in zip(bins[:-1], bins[1:], counts, strict=True):
            assert count == sum(low <= value < high or value == high == bins[-1] for value in values)


def test_a_checkpoint_is_small(digits):
    root, records, _ = digits
    media = sum(file.stat().st_size for file in root.glob("wandb/offline-run-*/files/media/**/*.json"))
    history = sum(len(json.dumps(record)) for record in records if record["type"] in ("history", "summary"))
    assert (2 * media + history) / (3 + 2) < 300_000  # a table goes as a file and as an artifact


# --- histograms and tables ------------------------------------------------------------------------------------------


def table_of(widths: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """A table of channels with made-up values."""
    generator = np.random.default_rng(seed)
    channels = [(layer, channel) for layer, width in widths.items() for channel in range(width)]
    table = pd.DataFrame(channels, columns=["layer", "channel"])
    for column in TABLE_COLUMNS[2:-1]:
        table[column] = generator.random(len(table))
    return table.assign(dead=False)


@pytest.mark.parametrize("channels", [100, 4800, 200_000])
def test_the_payload_is_bounded_whatever_the_network(channels):
    media = checkpoint_media(table_of({f"layer{i}": channels // 20 for i in range(20)}), 128)
    assert set(media) == {*(f"axis/hist/{metric}" for metric in METRICS), "axis/table/step-000000128"}
    shown = media.pop("axis/table/step-000000128")
    assert len(json.dumps([shown.columns, shown.data])) < 200_000
    assert len(json.dumps([histogram.to_json() for histogram in media.values()])) < 20_000


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(31, 400))
def test_shown_channels_are_bounded_and_spread_over_every_layer(widths, rows):
    table = table_of({f"layer{i}": width for i, width in enumerate(widths)})[["layer", "channel"]]
    shown = spread(table, rows)
    assert len(shown) <= rows
    if sum(widths) <= rows:
        assert shown is table
    assert list(shown["layer"].unique()) == list(table["layer"].unique())
    gaps = {gap for _, part in shown.groupby("layer") for gap in np.diff(part["channel"])}
    assert len(gaps) <= 1
    assert set(shown.groupby("layer")["channel"].first()) == {0}
    k = gaps.pop() if gaps else max(widths)
    assert len(shown) == sum(-(-width // k) for width in widths)


def test_more_layers_than_rows_are_cut_off():
    assert spread(table_of({f"layer{i}": 2 for i in range(50)}), 10)["layer"].tolist() == [
        f"layer{i}" for i in range(10)
    ]


def test_undefined_values_are_left_out_of_histograms_and_null_in_tables():
    table = table_of({"a": 3, "b": 2})
    table.loc[table["layer"] == "b", list(METRICS)] = np.nan
    table["peer_overlap"] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    media = checkpoint_media(table, 0, "mine")
    assert "mine/hist/peer_overlap" not in media
    assert sum(media["mine/hist/input_capture"].histogram) == 3
    assert [row[2] is None for row in media["mine/table/step-000000000"].data] == [False, False, False, True, True]
    table[list(METRICS)] = np.nan
    assert list(checkpoint_media(table, 0)) == ["axis/table/step-000000000"]


@pytest.mark.parametrize("value", [0.0, 1.0, 5e-324, 1e-30, 300.0])
def test_values_a_last_digit_apart_have_a_histogram(value):
    table = table_of({"a": 4}).assign(input_capture=[value, np.nextafter(value, 9e30), value, value])
    assert sum(checkpoint_media(table, 0)["axis/hist/input_capture"].histogram) == 4


def test_columns_keep_their_types_where_the_first_channel_is_dead():
    table = table_of({"a": 3})
    whole = checkpoint_media(table, 0)["axis/table/step-000000000"]
    table.loc[0, list(METRICS)] = np.nan
    first_dead = checkpoint_media(table, 0)["axis/table/step-000000000"]
    types = [shown._column_types.to_json() for shown in (first_dead, whole)]
    assert types[0] == types[1]
    slow = wandb.Table(dataframe=table[list(whole.columns)])  # its own guess, value by value
    assert types[1] == slow._column_types.to_json()


# --- trainings ------------------------------------------------------------------------------------------------------


def test_training_is_bit_identical_with_and_without_tables_in_wandb(tmp_path):
    logged = [WandbLogger(project="p", save_dir=tmp_path / str(i), offline=True) for i in range(2)]
    bare = trained(tmp_path / "bare", logger=logged[0])
    wandb.finish()
    assert differences(bare, trained(tmp_path / "tracked", AxisTracker(schedule="1 steps"), logger=logged[1])) == []
    assert len(rows_of(read_back(tmp_path / "1"))) == 9


def test_a_resumed_run_defines_its_axes_again_and_goes_on_with_fresh_tables(tmp_path):
    def fit(epochs, **settings):
        tracker, saver = AxisTracker(), ModelCheckpoint(tmp_path / "saved", save_last=True)
        logger = WandbLogger(project="p", save_dir=tmp_path, offline=True)
        fitter = trainer(tmp_path, tracker, saver, max_epochs=epochs, logger=logger)
        fitter.fit(build(), **loaders(), **settings)
        wandb.finish()
        return tracker

    fit(1)
    tracker = fit(2, ckpt_path=tmp_path / "saved/last.ckpt", weights_only=True)
    records = read_back(tmp_path, 1)
    tracker._history.correlations = tracker.correlations.query("step == 8")  # what the second run has to hold
    assert problems(records, tracker) == []


# --- workspace ------------------------------------------------------------------------------------------------------


def panels_of(spec: dict) -> dict[str, list[dict]]:
    return {section["name"]: section["panels"] for section in spec["section"]["panelBankConfig"]["sections"]}


def shown_by(panel: dict, keys: set[str]) -> list[set[str]]:
    """Which of a run's keys each thing that a panel refers to stands for."""
    config = panel["config"]
    if panel["viewType"] == "Run History Line Plot":
        pattern = [{key for key in keys if re.search(config["metricRegex"], key)}] if "metricRegex" in config else []
        return [*({key} & keys for key in config["metrics"]), *pattern]
    if panel["viewType"] == "Weave":
        return [{key for key in keys if json.dumps(key) in json.dumps(config)}]
    return [{"a note"}]


@pytest.mark.parametrize("tracker", [0, 1], ids=["with alignment", "another name"])
def test_the_workspace_shows_every_key_and_no_other(digits, tmp_path, monkeypatch, tracker):
    monkeypatch.chdir(tmp_path)
    tracker = digits[2][tracker]
    dashboard(name=tracker.name, alignment=tracker.settings.alignment)
    spec = json.loads(Path("dashboard.json").read_text())
    panels = panels_of(spec)
    assert list(panels) == ["correlations", "reliability", "per-layer", "distributions", "cost"]
    scalars, histograms = promised(tracker)
    tables = {key.removesuffix("._type") for key in rows_of(digits[1], tracker.name)[0] if "/table/" in key}
    shown = [
        keys for part in panels.values() for panel in part for keys in shown_by(panel, scalars | histograms | tables)
    ]
    assert all(shown)
    assert scalars | histograms <= set().union(*shown)
    lines = [p["config"] for part in panels.values() for p in part if p["viewType"] == "Run History Line Plot"]
    assert {config["xAxis"] for config in lines} == {"epoch"}
    assert spec["section"]["settings"]["xAxis"] == "epoch"


def test_a_workspace_of_another_tracker_shows_nothing(digits, tmp_path):
    dashboard(str(tmp_path / "other.json"), name="axi")
    panels = panels_of(json.loads((tmp_path / "other.json").read_text()))
    keys = set().union(*promised(digits[2][0]))
    assert not any(k for part in panels.values() for p in part for k in shown_by(p, keys) if k != {"a note"})


def test_names_are_no_patterns(tmp_path):
    dashboard(str(tmp_path / "dots.json"), name="a.b+")
    (first, *_) = panels_of(json.loads((tmp_path / "dots.json").read_text()))["per-layer"]
    assert shown_by(first, {"a.b+/layer/c/rho", "aab/layer/c/rho"}) == [{"a.b+/layer/c/rho"}]


def test_the_workspace_is_written_without_a_login_or_a_network(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("network")

    for call in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, call, refuse)
    dashboard(str(tmp_path / "new/page.json"))
    assert (tmp_path / "new/page.json").stat().st_size > 1000
    assert capsys.readouterr().out == f"workspace: {tmp_path}/new/page.json\n"


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    for module in ("wandb_workspaces", "wandb_workspaces.reports.v2", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r'needs pip install "chanaxes_pl\[dashboard\]"'):
        dashboard(str(tmp_path / "page.json"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("push", ["", "team", "team/", "/project", "a/b/c", "my team/project", "https://wandb.ai/a/b"])
def test_a_destination_that_is_none_is_quoted_and_nothing_is_written(tmp_path, push):
    with pytest.raises(ValueError, match=rf"--push {re.escape(repr(push))}: expected ENTITY/PROJECT"):
        dashboard(str(tmp_path / "page.json"), push=push)
    assert not list(tmp_path.iterdir())


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as saving a workspace needs."""

    status = 200

    def do_GET(self):
        self.answer(404, {})

    def do_POST(self):
        request = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/graphql":
            self.answer(200, {})
        elif self.status != 200:
            self.answer(self.status, {"errors": [{"message": "not you"}]})
        elif b"upsertView" in request:
            self.server.saved.append(json.loads(request)["variables"])
            self.answer(200, {"data": {"upsertView": {"view": {"id": "Vg==", "name": "nw-abc-v"}, "inserted": True}}})
        else:
            viewer = {"id": "Vg==", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}
            self.answer(200, {"data": {"viewer": viewer}})

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of one's own, logged in to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Server,), {}))
    server.saved = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    yield server
    wandb.teardown()
    server.shutdown()
    server.server_close()


def test_a_pushed_workspace_is_the_written_one(server, tmp_path, capsys):
    dashboard(str(tmp_path / "page.json"), push="team/project")
    (saved,) = server.saved
    assert json.loads(saved["spec"]) == json.loads((tmp_path / "page.json").read_text())
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("team", "project", "channel axes")
    assert f"saved: http://127.0.0.1:{server.server_port}/team/project?nw=abc\n" in capsys.readouterr().out


def refused(tmp_path, message):
    with pytest.raises(ValueError, match=rf"(?s).*page.json is written, but cannot be sent to a/b: {message}"):
        dashboard(str(tmp_path / "page.json"), push="a/b")
    assert (tmp_path / "page.json").exists()


def test_a_server_that_refuses_the_login_is_quoted(server, tmp_path):
    server.RequestHandlerClass.status = 403
    refused(tmp_path, "Failed to verify.*`wandb login` logs in; the project must exist")


def test_without_a_login_the_way_to_one_is_named(server, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    refused(tmp_path, "No API key.*`wandb login`")
    assert server.saved == []


def test_a_server_that_is_not_there_is_named_at_once(server, tmp_path):
    server.shutdown()
    server.server_close()
    refused(tmp_path, r"http://127.0.0.1:\d+ does not answer .*WANDB_BASE_URL")
