"""The demo: what it prints and writes, on a few synthetic photographs, and what its sentences say."""

import logging
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from chanaxes_pl.cli import demo
from chanaxes_pl.cli import main as cli
from chanaxes_pl.data import PhotosDataModule
from chanaxes_pl.data.photos import PHOTOS
from tests.helpers.training import QUIET

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["chanaxes", "demo", *flags])
    cli.main()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of a colour of its own for each class, in place of the photographs, and a few crops of it."""
    files = []
    for number, name in enumerate(PHOTOS):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randint(0, 16 * (number + 1), (3, 128, 128), dtype=torch.uint8, generator=generator)
        files.append(tmp_path / f"{name}.png")
        to_pil_image(noise).save(files[-1])
    monkeypatch.setattr("chanaxes_pl.data.photos.photo_files", lambda: files)
    few = partial(PhotosDataModule, crops=9)
    monkeypatch.setattr("chanaxes_pl.cli.demo.PhotosDataModule", lambda **options: few(**options | {"test_crops": 2}))


def test_a_short_demo_tells_the_story_and_writes_the_page(photos, tmp_path, monkeypatch, capfd):
    run(monkeypatch, "--epochs", "1", "--out", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "demo" / "version_0"
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if line]
    assert captured.err == ""
    assert len(lines) <= 17
    assert "nan" not in captured.out
    for words in ("learned in 2 steps", "Before training", "After training", "Removing one channel", "Refitting"):
        assert sum(words in line for line in lines) == 1
    assert "\r" not in captured.out  # no progress bar where nobody watches
    assert f"page:    {folder / 'report' / 'index.html'}" in lines
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"metrics.csv", "lesions.parquet", "pruning.parquet", "report/index.html"} <= found
    assert logging.getLogger("lightning.pytorch").level != logging.ERROR  # as it was


def test_without_the_photographs_it_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("chanaxes_pl.data.photos.find_spec", lambda package: None)
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "--out", str(tmp_path / "runs"))
    assert error.value.code == 2
    assert 'pip install "scikit-image' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def correlations(*rho: float) -> pd.DataFrame:
    rows = pd.DataFrame({"step": [0, 8, 280][: len(rho)], "rho": rho})
    return rows.assign(low=rows["rho"] - 0.1, high=rows["rho"] + 0.1)


def test_the_story_of_the_axes_says_what_happened():
    text = demo.tell_axes(correlations(0.3, 0.5, 0.0))
    assert "Before training the two are coupled: ρ = 0.30, 95 % interval 0.20 to 0.40." in text
    assert "highest, after step 8, they are coupled: ρ = 0.50, 95 % interval 0.40 to 0.60." in text
    assert "After training the two have come apart: ρ = 0.00, 95 % interval -0.10 to 0.10." in text


@pytest.mark.parametrize(
    ("rho", "said"),
    [
        ((0.3, 0.5, 0.4), "After training the two are coupled: "),
        ((0.05, 0.1, 0.0), "At their highest, after step 8, they are not coupled: "),
        ((0.05, 0.1, 0.0), "After training the two are not coupled: "),
        ((0.4, 0.1, 0.0), "After training the two have come apart: "),
    ],
)
def test_the_story_of_the_axes_claims_no_more_than_was_seen(rho, said):
    assert said in demo.tell_axes(correlations(*rho))


def test_the_story_of_the_axes_leaves_out_what_is_undefined():
    assert "highest, after step 280, they are coupled: ρ = 0.40" in demo.tell_axes(correlations(0.3, float("nan"), 0.4))


def test_the_story_of_the_axes_names_no_peak_where_they_start_there():
    assert "highest" not in demo.tell_axes(correlations(0.4, 0.1, 0.0))


def test_the_story_of_lesions_gives_means():
    table = pd.DataFrame({"zero_loss": [0.1, 0.3], "mean_loss": [0.05, 0.05], "peer_loss": [0.0, -0.02]})
    text = demo.tell_lesions(table)
    assert "+0.2000 nats, averaged over 2 channels" in text
    assert "mean instead changes it by +0.0500" in text
    assert "changes it by -0.0100" in text


def test_the_story_of_pruning_reads_the_half():
    rows = [("dense", "", 1.0, 0.8), ("input_capture", "none", 0.25, 0.1), ("input_capture", "none", 0.5, 0.4)]
    rows += [("input_capture", "refit", 0.5, 0.7), ("random", "none", 0.5, 0.2), ("random", "refit", 0.5, 0.6)]
    rows += [("reconstruction", "refit", 0.25, 0.65), ("random", "refit", 0.25, 0.55)]
    text = demo.tell_pruning(pd.DataFrame(rows, columns=["score", "compensate", "budget", "accuracy"]))
    assert "from 80.0% to 40.0% (random channels: 20.0%)" in text
    assert "brings it to 70.0% (random channels: 60.0%)" in text
    assert "rebuild leaves 65.0% after a refit (random channels: 55.0%)" in text
