"""``chanaxes dashboard``: a W&B workspace for what an ``AxisTracker`` logs, as JSON or sent to a project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import urlopen

from chanaxes_pl.analysis.correlations import PAIRS
from chanaxes_pl.core.files import replacing
from chanaxes_pl.core.metrics import METRICS

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


#: What each section shows: titles, and keys after the tracker's name; a string is a pattern that many keys match.
SECTIONS: dict[str, dict[str, tuple[str, ...] | str]] = {
    "correlations": {
        "ρ(input capture, task information)": ("rho", "rho_null", "rho_disattenuated"),
        "ρ of every pair of metrics": ("rho", *(f"rho_pairs/{local}-{target}" for local, target in PAIRS[1:])),
    },
    "reliability": {
        "split-half reliability": tuple(f"reliability/{metric}" for metric in (*METRICS, "peer_r2")),
        "channels that are dead, or at the ceiling of a correlation": ("dead", "at_ceiling"),
    },
    "per-layer": {
        "ρ(input capture, task information)": "layer/.+/rho",
        "ρ(local axis, target axis)": "layer/.+/rho_axes",
        "dead channels": "layer/.+/dead",
    },
    "distributions": {
        **{f"{metric.replace('_', ' ')} of all channels [nats]": (f"hist/{metric}",) for metric in METRICS},
        "task information that peers duplicate, and that they do not [nats]": (
            "task_mass/duplicate",
            "task_mass/nonreplaceable",
        ),
    },
    "cost": {"seconds a checkpoint": ("seconds",), "share of the training time": ("time_share",)},
}
#: What ``AxisTracker(alignment=True)`` adds.
ALIGNMENT_SECTIONS: dict[str, dict[str, tuple[str, ...] | str]] = {
    "correlations": {"|cos| between the gradients of both information terms": ("alignment",)},
    "per-layer": {"|cos| between the gradients of both information terms": "layer/.+/alignment"},
}
_NOTE = """One table a checkpoint, `{name}/table/step-…`: that of random initialisation is shown here, any other after
changing the step in its query. Every channel and column is in the run folder, `{name}/step-….parquet`."""
# Seconds for W&B's server to answer at all; its own client takes 20 and then blames something else.
_PATIENCE = 10


def dashboard(
    out: str = "dashboard.json", push: str | None = None, name: str = "axis", alignment: bool = False
) -> None:
    """Write a W&B workspace for a tracked run, without a login or a network; or send it to a project too.

    Args:
        out: file for the workspace's JSON.
        push: ENTITY/PROJECT to save the workspace in; needs `wandb login`.
        name: the tracker's name, first part of what it logs.
        alignment: show what AxisTracker(alignment=True) adds.
    """
    entity, project = _destination(push) if push is not None else ("", "")
    page = workspace(name, alignment, entity, project)
    with replacing(Path(out)) as draft:
        # What save() sends; there is no public way to it.
        draft.write_text(page._model.spec.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n")
    print(f"workspace: {out}")
    if push is not None:
        _send(page, f"{out} is written, but cannot be sent to {push}:")


def workspace(name: str = "axis", alignment: bool = False, entity: str = "", project: str = "") -> Workspace:
    """The workspace: sections :data:`SECTIONS`, every line over ``epoch``; nothing is sent.

    Raises:
        ValueError: without ``wandb-workspaces``.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(f'{error}: chanaxes dashboard needs pip install "chanaxes_pl[dashboard]"') from error
    sections = []
    for section, panels in SECTIONS.items():
        shown: list = []
        for label, keys in (panels | (ALIGNMENT_SECTIONS.get(section, {}) if alignment else {})).items():
            if isinstance(keys, str):
                shown.append(wr.LinePlot(title=label, x="epoch", metric_regex=f"^{re.escape(name)}/{keys}$"))
            else:
                shown.append(wr.LinePlot(title=label, x="epoch", y=[f"{name}/{key}" for key in keys]))
        if section == "distributions":
            shown.append(wr.WeavePanelSummaryTable(table_name=f"{name}/table/step-000000000"))
            shown.append(wr.MarkdownPanel(markdown=_NOTE.format(name=name)))
        sections.append(ws.Section(name=section, panels=shown, is_open=True))
    settings = ws.WorkspaceSettings(x_axis="epoch")
    return ws.Workspace(entity=entity, project=project, name="channel axes", sections=sections, settings=settings)


def _destination(push: str) -> tuple[str, str]:
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", push):
        raise ValueError(f"--push {push!r}: expected ENTITY/PROJECT, such as your-team/chanaxes")
    entity, project = push.split("/")
    return entity, project


def _send(page: Workspace, problem: str) -> None:
    import wandb
    from wandb.apis.normalize import normalize_exceptions

    server = wandb.setup().settings.base_url
    try:
        urlopen(server, timeout=_PATIENCE).close()
    except HTTPError as answer:  # it is there
        answer.close()
    except OSError as error:
        raise ValueError(
            f"{problem} {server} does not answer ({error}). Try again with a network, or name another server "
            "in WANDB_BASE_URL"
        ) from error
    try:
        normalize_exceptions(page.save)()
        print(f"saved: {page.url}")
    except wandb.Error as error:
        raise ValueError(
            f"{problem} {error}\n`wandb login` logs in; the project must exist, and be one that you may write to"
        ) from error
