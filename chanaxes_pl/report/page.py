"""Page of a report: one HTML file that opens offline, and the figures as files beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from chanaxes_pl.analysis.runs import Runs
from chanaxes_pl.core.files import replacing
from chanaxes_pl.plots.style import words
from chanaxes_pl.report.blocks import Picture, Section
from chanaxes_pl.report.findings import findings
from chanaxes_pl.report.terms import TERMS

# Text stays text in PDF, and becomes outlines in the page, so that no font is needed. Equal runs give equal bytes.
_LOOK: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "chanaxes", "savefig.dpi": 200}

_VERSIONS = ("chanaxes_pl", "torch", "lightning", "numpy", "scipy", "matplotlib")


def write_page(folder: Path, runs: Runs, sections: Sequence[Section]) -> Path:
    """Write the page, the figures as PDF and their numbers as CSV.

    Args:
        folder: existing folder to write into.
        runs: runs for the heading and the findings.
        sections: sections in order.

    Returns:
        Path of the page, ``<folder>/index.html``. If writing fails, an older page stays as it was.

    Raises:
        OSError: if the folder cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["embed"] = lambda picture: _embed(picture, folder)
    environment.globals["kind"] = lambda block: type(block).__name__
    template = environment.from_string((files("chanaxes_pl.report") / "page.html").read_text("utf-8"))
    page = folder / "index.html"
    text = template.render(
        runs=runs,
        findings=findings(runs),
        anchors={section.title: section.anchor for section in sections},
        sections=[section for section in sections if not section.empty],
        missing=[section for section in sections if section.empty],
        terms=TERMS,
        versions=", ".join(f"{name} {version(name)}" for name in _VERSIONS),
    )
    with replacing(page) as draft:
        draft.write_text(text, "utf-8")
    return page


def _embed(picture: Picture, folder: Path) -> dict[str, Any]:
    """Write a figure's files, and return what the page needs to show it."""
    svg = io.BytesIO()
    with mpl.rc_context(_LOOK):
        picture.figure.savefig(folder / f"{picture.name}.pdf", metadata={"CreationDate": None})
        picture.figure.savefig(svg, format="svg", metadata={"Date": None})
    with replacing(folder / f"{picture.name}.csv") as draft:
        picture.numbers.to_csv(draft, index=False, float_format="%.6g")
    width, height = picture.figure.get_size_inches()
    return {
        "source": "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode(),
        "width": round(96 * width),
        "height": round(96 * height),
        "rows": len(picture.numbers),
        "points": json.dumps(_hover(picture.figure, picture.points)) if picture.points else "",
    }


def _hover(figure: Figure, panels: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """Locate the points of each scatter plot, as shares of the figure's width and height, and describe them."""
    scatters = [(axes, dots) for axes in figure.axes for dots in axes.collections if isinstance(dots, PathCollection)]
    drawn = []
    for (axes, dots), points in zip(scatters, panels, strict=True):
        pixels = axes.transData.transform(np.ma.filled(dots.get_offsets(), np.nan))
        places = figure.transFigure.inverted().transform(pixels)
        fields = [str(column) for column in points if column not in ("run", "layer", "channel")]
        names = {key: list(dict.fromkeys(points[key])) for key in ("layer", "run")}
        columns = [places[:, 0].round(4), (1 - places[:, 1]).round(4)]
        columns += [pd.Categorical(points["layer"], names["layer"]).codes, points["channel"]]
        columns += [pd.Categorical(points["run"], names["run"]).codes]
        columns += [points[field].map("{:.3g}".format) for field in fields]
        rows = [list(row) for row in zip(*(np.asarray(column).tolist() for column in columns), strict=True)]
        seen = [row for row in rows if row[0] == row[0] and row[1] == row[1]]
        named = {"layers": names["layer"], "runs": names["run"], "fields": [words(field) for field in fields]}
        drawn.append(named | {"points": seen})
    return drawn
