"""``chanaxes report``: the page in a real browser, its files, and what it says where something is missing."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from playwright.sync_api import Page, sync_playwright

from chanaxes_pl import AxisTracker, LesionExperiment, PruneModule, PruningExperiment
from chanaxes_pl.analysis.text import interval, number
from chanaxes_pl.cli import main as cli
from chanaxes_pl.plots import channel_panels
from chanaxes_pl.report.sections import SECTIONS
from chanaxes_pl.run_folder import checkpoint_path
from tests.analysis.test_runs import write_run
from tests.helpers.training import QUIET, Small, loaders, trainer
from tests.test_prune_module import Data

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Logged(Small):
    """Logs an accuracy under the names that a Classifier uses."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/top1", (self(batch[0]).argmax(1) == batch[1]).float().mean(), on_epoch=True, on_step=False)
        return loss


def train(folder: Path, seed: int) -> Path:
    """A real run with everything in it: tracked, logged, lesioned, pruned."""
    torch.manual_seed(seed)
    model = Logged(dropout=0.0)
    logger = CSVLogger(folder, "small", version=seed)
    tracker = AxisTracker(schedule="log", alignment=True)
    trainer(folder, tracker, logger=logger, log_every_n_steps=1, max_epochs=3).fit(model, **loaders())
    run = Path(logger.log_dir)
    scores = ("l1", "input_capture")
    lesions = LesionExperiment(operations=("zero", "mean"), scores=scores)
    pruning = PruningExperiment(scores=scores, budgets=(0.8, 0.6), allocations=("uniform",), compensate=(False,))
    for experiment in (lesions, pruning):
        module = PruneModule(model.eval(), experiment, out=run)
        trainer(folder).test(module, datamodule=Data(), verbose=False)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [train(folder, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> dict[int, Path]:
    """The pages of one run and of two."""
    folders = {count: tmp_path_factory.mktemp("page") for count in (1, 2)}
    for count, folder in folders.items():
        make(*runs[:count], "--out", folder)
    return {count: folder / "index.html" for count, folder in folders.items()}


def make(*arguments: object) -> None:
    """Run the verb."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["chanaxes", "report", *map(str, arguments), "--resamples=50"])
        cli.main()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def opened(browser, page: Path, width: int = 1400) -> tuple[Page, list[str]]:
    """The page without a network, and what it complained of."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, offline=True)
    tab, complaints = context.new_page(), []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    return tab, complaints


#: How many different colours a figure is drawn in, by id; 1 is an empty sheet.
COLOURS = """() => Object.fromEntries([...document.querySelectorAll("figure")].map((figure) => {
  const image = figure.querySelector("img"), canvas = document.createElement("canvas");
  canvas.width = 300; canvas.height = 200;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, 300, 200);
  const pixels = new Uint32Array(pen.getImageData(0, 0, 300, 200).data.buffer);
  return [figure.id, image.complete && image.naturalWidth > 0 ? new Set(pixels).size : 0];
}))"""


@pytest.mark.parametrize("width", [1400, 700])
@pytest.mark.parametrize("count", [1, 2])
def test_the_page_opens_in_a_browser_with_data_in_every_figure(browser, pages, width, count):
    tab, complaints = opened(browser, pages[count], width)
    colours = tab.evaluate(COLOURS)
    assert complaints == []
    assert min(colours.values()) > 10
    names = {name.split("-")[0] for name in colours}
    assert {"accuracy", "correlations", "pairs", "distributions", "channels", "groupings", "peers"} <= names
    assert {"lesions", "pruning", "cost"} <= names
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for name in colours:
        numbers = pd.read_csv(pages[count].with_name(f"{name}.csv"))
        assert numbers.select_dtypes("number").notna().any().any()
        assert pages[count].with_name(f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert int(tab.locator(f"figure#{name}").get_attribute("data-rows") or 0) == len(numbers)


def test_no_table_is_cut_off_at_the_width_of_a_screen(browser, pages):
    tab, _ = opened(browser, pages[2])
    widths = tab.evaluate("[...document.querySelectorAll('.scroll')].map((s) => [s.scrollWidth, s.clientWidth])")
    assert len(widths) > 5
    assert all(needed <= given for needed, given in widths)


def test_what_all_runs_share_is_told_once_and_the_rest_run_by_run(pages):
    for count in (1, 2):
        text = pages[count].read_text()
        shared, *rest = re.findall(r"<table>.*?</table>", text[text.index("<h2>Configuration") :], re.DOTALL)
        assert ("all runs" in shared) == (count == 2)
        assert shared.count("logit_margin") == 1
        assert not any("logit_margin" in table for table in rest)


def test_damage_is_compared_with_scores_too(pages):
    for page in pages.values():
        text = page.read_text()
        lesions = text[text.index("<h2>Lesions") : text.index("<h2>Early prediction")]
        rows = re.findall(r'<th scope="row">(.*?)</th>', lesions)
        # input capture as a score is the metric once more
        assert rows == ["input capture", "peer overlap", "task information", "target excess", "peer R²", "l1"]


def test_an_empty_figure_or_a_broken_script_would_be_noticed(browser, tmp_path):
    blank = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    page = tmp_path / "bad.html"
    page.write_text(f'<figure id="blank"><img src="{blank}"></figure><script>missing()</script>')
    tab, complaints = opened(browser, page)
    assert tab.evaluate(COLOURS) == {"blank": 1}
    assert complaints == ["missing is not defined"]


def test_a_pointer_over_a_point_is_told_its_layer_channel_and_metrics(browser, pages):
    tab, complaints = opened(browser, pages[1])
    points = pd.read_csv(pages[1].with_name("channels.csv"))
    plate = tab.locator("figure#channels .plate")
    plate.scroll_into_view_if_needed()
    panels = tab.evaluate("JSON.parse(document.querySelector('figure#channels script').textContent)")
    assert [len(panel["points"]) for panel in panels] == points.groupby(["local", "when"], sort=False).size().tolist()
    x, y, *_ = panels[0]["points"][3]
    box = plate.bounding_box()
    tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    tip = tab.locator("#tip")
    assert tip.is_visible()
    first, *values = tip.inner_text().splitlines()
    assert re.fullmatch(r"net\.\d, channel \d", first)
    assert [value.split(":")[0] for value in values] == ["input capture", "task information"]
    same = [p for p in panels[0]["points"] if abs(p[0] - x) + abs(p[1] - y) < 1e-3]  # ranks of two layers may coincide
    assert first in [f"{panels[0]['layers'][p[2]]}, channel {p[3]}" for p in same]
    tab.mouse.move(2, 2)
    assert not tip.is_visible()
    assert complaints == []


def test_points_lie_where_their_ranks_are(browser, pages):
    """Of one layer with distinct values: from left to right is from the lowest to the highest."""
    tab, _ = opened(browser, pages[1])
    panels = tab.evaluate("JSON.parse(document.querySelector('figure#channels script').textContent)")
    points = pd.DataFrame(panels[0]["points"]).set_axis(
        ["x", "y", "layer", "channel", "run", "local", "target"], axis=1
    )
    points = points[points["layer"] == 1].astype(float)
    assert points.sort_values("x")["local"].is_monotonic_increasing
    assert points.sort_values("y")["target"].is_monotonic_decreasing  # from the top of the page


def test_every_section_is_there_and_in_the_list_of_contents(pages):
    text = pages[2].read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    contents = re.findall(r'<a href="#(.*?)"', text.split("</nav>")[0])
    assert titles[0] == "Findings"
    assert len(titles) - 1 == len(SECTIONS) == len(contents)
    missing = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert [line[:22] for line in missing] == ["No saved configuration"]


def test_the_page_of_one_run_lies_in_its_folder_and_is_the_same_each_time(runs, pages, capsys):
    make(runs[0])
    assert (runs[0] / "report" / "index.html").read_bytes() == pages[1].read_bytes()
    assert f"page:    {runs[0]}/report/index.html" in capsys.readouterr().out


def test_what_a_run_lacks_is_said_with_the_way_to_get_it(tmp_path):
    make(write_run(tmp_path / "bare"), "--out", tmp_path)
    text = (tmp_path / "index.html").read_text()
    missing = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert any("`chanaxes lesion --config" in line for line in missing)
    assert any("`chanaxes prune --config" in line for line in missing)
    assert any("no top1. Train a Classifier with a CSVLogger" in line for line in missing)
    assert any("only runs of `chanaxes fit` write config.yaml" in line for line in missing)
    assert any("no …/seconds. Train with a CSVLogger" in line for line in missing)


def test_a_single_checkpoint_makes_a_page_that_says_so(browser, tmp_path):
    make(write_run(tmp_path / "one", steps=(0,)), "--out", tmp_path)
    tab, complaints = opened(browser, tmp_path / "index.html")
    assert complaints == []
    assert min(tab.evaluate(COLOURS).values()) > 5
    assert "A single checkpoint shows no change over epochs" in tab.inner_text("body")


def test_a_run_cut_off_in_the_middle_makes_a_page_that_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "cut")
    path = checkpoint_path(run / "axis", 8)
    path.write_bytes(path.read_bytes()[:200])
    (run / "lesions.parquet").write_bytes(b"PAR1")
    make(run, "--out", tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "step-000000008.parquet: not a whole Parquet file" in text
    assert "note:    " in capsys.readouterr().out


def test_a_network_whose_channels_are_all_dead_makes_a_page_that_says_so(tmp_path):
    run = write_run(tmp_path / "dead", steps=(0, 4))
    for path in (run / "axis").glob("*.parquet"):
        table = pd.read_parquet(path)
        numbers = [c for c in table.select_dtypes("float") if c != "epoch"]
        table[numbers] = np.nan
        table.assign(dead=True, reason="dead: its output does not vary").to_parquet(path)
    make(run, "--out", tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "No channel is live" in text
    assert "No layer has 4 live channels" in text


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["nowhere"], r"error: .*nowhere: no such folder"),
        (["notes"], r"error: .*notes is no run folder: expected axis/step-….parquet"),
        (["a", "b"], r"error: runs of different networks: .*net.b \(9 channels\).*Make a report of each network"),
        (["a", "a"], r"error: .*a is given twice"),
    ],
)
def test_what_is_no_run_is_refused_without_a_traceback(tmp_path, capsys, folders, message):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", width=7)
    (tmp_path / "notes").mkdir()
    with pytest.raises(SystemExit) as exit:
        make(*(tmp_path / folder for folder in folders), "--out", tmp_path / "out")
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert re.search(message, said.err)
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit):
        make(write_run(tmp_path / "a"), "--out", tmp_path / "out")
    assert re.search(r"error: .*out", capsys.readouterr().err)


def test_panels_rank_within_run_and_layer():
    table = pd.DataFrame(
        {
            "run": ["a", "a", "a", "a"],
            "layer": ["x", "x", "y", "y"],
            "channel": [0, 1, 0, 1],
            "step": 0,
            "dead": [False, False, False, True],
            "input_capture": [1.0, 2.0, 9.0, 0.0],
            "task_information": [2.0, 1.0, 3.0, 0.0],
            "peer_overlap": [1.0, 2.0, np.nan, 0.0],
            "target_excess": [1.0, 2.0, 3.0, 0.0],
        }
    )
    first, second = channel_panels(table, {"now": 0})
    assert first["x"].tolist() == [50.0, 100.0, 100.0]
    assert first["y"].tolist() == [100.0, 50.0, 100.0]
    assert len(second) == 2  # without the channel whose peer overlap is not defined


def test_numbers_as_cells():
    row = pd.Series({"mean": -0.001, "std": 0.25, "low": -0.5, "high": 0.5})
    assert interval(row) == "0.00\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.25 [−0.50,\N{NO-BREAK SPACE}0.50]"
    assert interval(row.replace(0.25, np.nan)) == "0.00"
    assert [number(value, 1, sign=True) for value in (0.26, -0.26, np.nan)] == ["+0.3", "−0.3", "–"]
