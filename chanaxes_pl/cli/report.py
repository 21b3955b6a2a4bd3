"""``chanaxes report``: report on one run, or several of the same network, as a page or as text."""

from __future__ import annotations

from pathlib import Path

from chanaxes_pl.analysis.correlations import highest, main_correlation
from chanaxes_pl.analysis.runs import Runs, read_runs
from chanaxes_pl.analysis.scores import score_family
from chanaxes_pl.analysis.text import describe_correlations, describe_grids
from chanaxes_pl.core.progress import bar
from chanaxes_pl.report.page import write_page
from chanaxes_pl.report.sections import make_sections

_LANDMARKS = {"first": "at initialisation", "highest": "at its highest", "last": "at the end"}


def report(
    runs: list[str] | str,
    out: str | None = None,
    text: bool = False,
    against: str = "l1",
    value: str = "accuracy",
    all_checkpoints: bool = False,
    resamples: int = 1000,
) -> None:
    """Write a page about one run, or about several of the same network: one HTML file that opens offline.

    Args:
        runs: run folders, such as runs/NAME/version_0 runs/NAME/version_1.
        out: folder for index.html, and for each figure as PDF with its numbers as CSV; default "report" in the run
            folder, or in the working directory for several runs.
        text: print the axis correlations, and the pruning curves with paired differences, instead of making a page.
        against: pruning score that every other score is compared with on the same runs.
        value: column of the pruning grids that the text shows, such as accuracy, loss, margin or tuned_accuracy.
        all_checkpoints: print the correlations of every checkpoint, not just the first, the highest and the last.
        resamples: number of resamples of the bootstraps over channels and over runs.

    Raises:
        FileNotFoundError: if a folder is not a run folder.
        ValueError: if nothing of a run can be read, the runs are of different networks, or a score or column does not
            exist.
        OSError: if the page cannot be written.
    """
    score_family(against)
    found = read_runs([runs] if isinstance(runs, str) else runs, resamples)
    if text:
        print(describe(found, value, against, all_checkpoints))
    else:
        folder = Path(out) if out else (found.each[0].folder if len(found.each) == 1 else Path()) / "report"
        folder.mkdir(parents=True, exist_ok=True)
        sections = list(bar(make_sections(found, against), "report", "section"))
        page = write_page(folder, found, sections)
        print(f"page:    {page}\nfigures: {folder}/*.pdf, their numbers: {folder}/*.csv")
    for note in (note for run in found.each for note in run.notes):
        print(f"note:    {note}")


def describe(runs: Runs, value: str = "accuracy", against: str = "l1", all_checkpoints: bool = False) -> str:
    """Describe the axis correlations of each run, and the pruning grids of all runs, as text.

    Args:
        runs: runs of one network.
        value: column of the pruning grids.
        against: score that the others are compared with.
        all_checkpoints: whether to show every checkpoint.

    Raises:
        ValueError: if the grids have no such column.
    """
    parts = []
    for run in runs.each:
        rows = main_correlation(runs.correlations)
        rows = rows[rows["run"] == run.name]
        # its own epochs: the table of all runs holds their median
        own = run.table.drop_duplicates("step").set_index("step")["epoch"]
        rows = rows.assign(epoch=rows["step"].map(own))
        if not all_checkpoints:
            top = int(rows["step"].iloc[highest(rows["rho"])])
            landmarks = {"first": runs.steps[0], "highest": top, "last": runs.steps[-1]}
            landmarks = landmarks if len(runs.steps) > 1 else {"first": runs.steps[0]}  # told once
            when = [_LANDMARKS[name] if name != "first" or not step else "at first" for name, step in landmarks.items()]
            rows = rows.set_index("step").loc[list(landmarks.values())].reset_index().assign(when=when)
        parts.append((f"{run.name}: " if len(runs.each) > 1 else "") + describe_correlations(rows))
    for place, grid in runs.grids.items():
        parts.append(("" if place == "." else f"{place}: ") + describe_grids(grid, value, against))
    return "\n\n".join(parts)
