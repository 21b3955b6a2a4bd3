"""Run folders with damaged files: one line for each such file, and the page for the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chanaxes_pl.cli.report import report
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.run_folder import checkpoint_path
from tests.analysis.test_runs import write_run
from tests.cli.test_report_text import write_grid

Change = Callable[[pd.DataFrame], pd.DataFrame]


def without(*columns: str) -> Change:
    return lambda table: table.drop(columns=list(columns))


def with_(**columns) -> Change:
    return lambda table: table.assign(**columns)


def nested(column: str) -> Change:
    return lambda table: table.assign(**{column: [[1.0, 2.0]] * len(table)})


TABLES: dict[str, Change] = {
    "of compute_axes": without("run", "epoch", "step"),
    "no layer": without("layer"),
    "no channel": without("channel"),
    "no input_capture": without("input_capture"),
    "no halves": without("input_capture_even", "task_information_odd"),
    "no null": without("task_information_null"),
    "no dead": without("dead"),
    "text for numbers": with_(task_information="high"),
    "text for steps": with_(step="4"),
    "text for epochs": with_(epoch="first"),
    "text for dead": with_(dead="no"),
    "numbers for layers": with_(layer=3),
    "no layer's name": with_(layer=None),
    "categories": lambda table: table.assign(layer=table["layer"].astype("category")),
    "broken channels": with_(channel=0.5),
    "negative channels": with_(channel=-1),
    "undefined steps": with_(step=np.nan),
    "undefined epochs": with_(epoch=np.nan),
    "nested": nested("peer_r2"),
    "complex numbers as text": with_(peer_overlap=str(1 + 2j)),
    "no rows": lambda table: table.iloc[:0],
    "channels twice": lambda table: pd.concat([table, table.iloc[:2]]),
    "one channel missing": lambda table: table.iloc[1:],
    "another layer": lambda table: table.replace({"layer": {"net.b": "net.c"}}),
    "a step twice": with_(step=0),
}
LESIONS: dict[str, Change] = {
    "no layer": without("layer"),
    "no channel": without("channel"),
    "no input_capture": without("input_capture"),
    "no peer_r2": without("peer_r2"),
    "no damage": without("zero_loss", "peer_loss"),
    "text for damage": with_(zero_loss="much"),
    "text for a metric": with_(task_information="much"),
    "text for a score": with_(score_l1="much"),
    "numbers for layers": with_(layer=1),
    "broken channels": with_(channel=1.5),
    "nested": nested("zero_loss"),
    "no rows": lambda table: table.iloc[:0],
}
GRIDS: dict[str, Change] = {
    "no score": without("score"),
    "no budget": without("budget"),
    "no MACs": without("macs_share"),
    "no accuracy": without("accuracy"),
    "no family": without("family"),
    "no dense network": lambda grid: grid[grid["score"] != "dense"],
    "text for accuracy": with_(accuracy="good"),
    "text for the budget": with_(budget="half"),
    "undefined MACs": with_(macs_share=np.nan),
    "numbers for scores": with_(score=1),
    "nested": nested("accuracy"),
    "no rows": lambda grid: grid.iloc[:0],
}
CONFIGS = {
    "nested in brackets": b"a: " + b"[" * 3000 + b"]" * 3000,
    "nested by indent": "\n".join(" " * depth + "a:" for depth in range(1500)).encode(),
    "cut": b"a: [1, 2",
    "a list": b"- 1\n- 2\n",
    "text": b"just a sentence",
    "not text": b"\xff\xfe\x00\x81" * 20,
    "an object": b"a: !!python/object/apply:os.getcwd []",
    "no timestamp": b"a: !!timestamp soon",
    "no number": b"a: !!int ''",
    "no date": b"a: 2020-13-45",
    "a mapping as key": b"? {a: 1}\n: 2",
}
SCALARS = {
    "text": b"the loss went down nicely\nand then up again\n",
    "empty": b"",
    "not text": b"\xff\xfe\x00\x81" * 20,
    "no steps": b"epoch,train/top1\n0,0.5\n",
    "no epochs": b"step,train/top1\n0,0.5\n",
    "text for steps": b"epoch,step,train/top1\n0,first,0.5\n",
    "text for accuracy": b"epoch,step,train/top1\n0,1,good\n",
    "ragged": b"epoch,step\n0,1\n0,1,2,3\n",
}
HARMLESS = {
    "axis/about.json": [b"{}", b'{"versions": 3, "seed": [1], "data": null}'],
    "config.yaml": [b"", b"1: 2\nnull: 3\n", b"a: &a [*a]", b"trainer: 3\nmodel: [1]\ndata: {class_path: 4}\n"],
    "metrics.csv": [
        b"epoch,step,train/top1\n",
        b"epoch,step,axis/seconds\n0,0,1.5\n",
        b"epoch,step,train/top1\n,,\n0,4,0.5\n",
        b"epoch,step,val/top1\n0,,0.5\n",
    ],
}


def lesions(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"layer": ["net.a"] * 12 + ["net.b"] * 9, "channel": [*range(12), *range(9)]})
    names = [*METRICS, "peer_r2", "zero_loss", "peer_loss", "score_l1"]
    return frame.assign(**{name: rng.random(len(frame)) for name in names})


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    # Figures are made; drawing them takes nine tenths of the time, and test_report does it.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: None)
    folder = write_run(tmp_path / "run", steps=(0, 4))
    lesions().to_parquet(folder / "lesions.parquet")
    write_grid(folder / "pruning.parquet")
    return folder


def notes(run: Path, capsys) -> list[str]:
    """What is printed about the run's files while its page is made."""
    report(str(run), out=str(run.parent / "page"), resamples=3)
    said = capsys.readouterr().out
    assert (run.parent / "page" / "index.html").read_text().endswith("</html>")
    return [line for line in said.splitlines() if line.startswith("note:")]


FILES = [
    *(("axis/step-000000004.parquet", kind, change) for kind, change in TABLES.items()),
    *(("lesions.parquet", kind, change) for kind, change in LESIONS.items()),
    *(("pruning.parquet", kind, change) for kind, change in GRIDS.items()),
]
CONTENTS = [
    *(("config.yaml", kind, content) for kind, content in CONFIGS.items()),
    *(("hparams.yaml", kind, CONFIGS[kind]) for kind in ("nested in brackets", "a list")),
    *(("axis/about.json", kind, CONFIGS[kind]) for kind in ("text", "not text", "a list")),
    ("axis/about.json", "nested", b"[" * 100_000),
    *(("metrics.csv", kind, content) for kind, content in SCALARS.items()),
    *(("metrics-1.csv", kind, SCALARS[kind]) for kind in ("text", "no steps")),
    *(("test/metrics.csv", kind, SCALARS[kind]) for kind in ("text", "no steps", "text for accuracy")),
    *(
        (name, kind, content)
        for name in ("axis/step-000000004.parquet", "lesions.parquet", "pruning.parquet")
        for kind, content in {"empty": b"", "cut": b"PAR1", "text": b"epoch,step\n0,1\n" * 9}.items()
    ),
]


@pytest.mark.parametrize(("name", "change"), [pytest.param(n, c, id=f"{n}-{kind}") for n, kind, c in FILES])
def test_a_table_that_is_not_what_it_should_be_costs_one_line(run, capsys, name, change):
    path = run / name
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    (note,) = notes(run, capsys)
    assert note.startswith(f"note:    {path}")


@pytest.mark.parametrize(("name", "content"), [pytest.param(n, c, id=f"{n}-{kind}") for n, kind, c in CONTENTS])
def test_a_file_that_holds_something_else_costs_one_line(run, capsys, name, content):
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (note,) = notes(run, capsys)
    assert note.startswith(f"note:    {path}")


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, each in HARMLESS.items() for content in each])
def test_odd_files_that_can_be_read_cost_nothing(run, capsys, name, content):
    (run / name).write_bytes(content)
    assert notes(run, capsys) == []


@pytest.mark.parametrize(
    "change",
    [with_(zero_loss=np.nan), lambda table: table.iloc[[0]], with_(zero_loss=0.0), with_(layer="net.c")],
    ids=["undefined", "one channel", "constant", "of another network"],
)
def test_lesions_that_nothing_can_be_said_about_make_a_page(run, capsys, change):
    path = run / "lesions.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    assert notes(run, capsys) == []


def test_a_folder_in_a_tables_place_costs_one_line(run, capsys):
    path = checkpoint_path(run / "axis", 8)
    path.mkdir()
    (note,) = notes(run, capsys)
    assert str(path) in note


def test_several_damaged_files_cost_a_line_each_and_the_text_says_the_same(run, capsys):
    for name in ("config.yaml", "metrics.csv", "lesions.parquet", "pruning.parquet"):
        (run / name).write_bytes(b"\xff\xfe\x00\x81" * 20)
    found = notes(run, capsys)
    assert len(found) == 4
    report(str(run), text=True, resamples=3)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")] == found
