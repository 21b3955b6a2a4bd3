"""The verb: reads run folders, makes the sections, writes the page."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.report.page import write_page
from chanaxes_pl.report.sections import SECTIONS


def report(runs: list[str] | str, out: str | None = None, resamples: int = 1000) -> None:
    """Write a page about one run, or about several of the same network: one HTML file that needs no network.

    Args:
        runs: run folders, such as runs/NAME/version_0 runs/NAME/version_1.
        out: folder for index.html, and for each figure as PDF with its numbers as CSV; default "report" in the run
            folder, or in the working directory for several.
        resamples: of the bootstraps over channels and over runs.
    """
    folders = [runs] if isinstance(runs, str) else runs
    try:
        found = read_runs(folders, resamples)
        folder = Path(out) if out else (found.each[0].folder if len(folders) == 1 else Path()) / "report"
        folder.mkdir(parents=True, exist_ok=True)
        sections = [make(found) for make in tqdm(SECTIONS, desc="report", unit="section", leave=False, disable=None)]
        page = write_page(folder, found, sections)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"page:    {page}\nfigures: {folder}/*.pdf, their numbers: {folder}/*.csv")
    for note in (note for run in found.each for note in run.notes):
        print(f"note:    {note}")
