"""Simulated channels at initialisation and under gradient flows."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots.style import COLOURS, GREY, RHO, banded, canvas, horizontal

_FLOWS = {
    "capture": ("input capture", COLOURS["input_capture"]),
    "mixture": ("mixture of both", COLOURS["both"]),
    "task": ("task information", COLOURS["task_information"]),
}
_BAND = 0.25


def plot_simulation(start: pd.DataFrame, flows: pd.DataFrame, title: str = "") -> Figure:
    """Plot the correlation of both information terms at initialisation, and correlation and angle under each flow.

    Bands are 95 % intervals over seeds.

    Args:
        start: the table of ``initial_coupling``, over several shares.
        flows: the table of ``simulate``, of one flow or several of one share.
        title: text above the figure.
    """
    with canvas(1, 3, (11, 4), title) as (figure, ((initial, coupling, angle),)):
        means = mean_over_runs(start, by=["share"])
        banded(initial, means["share"], means["mean"], means["low"], means["high"], "black", _BAND)
        share = flows["share"].iloc[0]
        initial.axvline(share, color=GREY, linestyle=":")
        horizontal(initial)
        initial.set(xlabel="share of ‖c‖² in the leading eigenvectors", ylabel=RHO, title="at initialisation")
        for name, path in flows[flows["time"] > 0].groupby("flow", sort=False):
            label, colour = _FLOWS[str(name)]
            for axes, value in ((coupling, "rho"), (angle, "alignment")):
                means = mean_over_runs(path, value, by=["time"])
                banded(axes, means["time"], means["mean"], means["low"], means["high"], colour, _BAND, label=label)
                axes.set(xscale="log", xlabel="time (learning rate × steps)")
        horizontal(coupling)
        coupling.set(ylim=(-1.05, 1.05), ylabel=RHO, title=f"gradient flow, share {share:g}")
        angle.set(ylim=(0, None), ylabel="mean |cos(Σw, g)|", title="angle between both gradients")
        lines = coupling.get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower right", ncols=3, title="flow ascends")
    return figure
