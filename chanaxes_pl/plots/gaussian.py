"""Gaussian linear analysis, as pictures: the angle between both gradients, and simulated flows."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.plots.style import COLOURS, GREY, RHO, canvas, short

#: Range over hidden layers of a layer's mean |cos(Σw, g)|, ResNet-18 trained on CIFAR-100 (arXiv 2605.07086).
PUBLISHED = (0.05, 0.18)
_ANGLE = "|cos(Σw, g)|"
_MOST_CHECKPOINTS = 4
_FLOWS = {
    "capture": ("input capture", COLOURS["input_capture"]),
    "mixture": ("mixture of both", COLOURS["both"]),
    "task": ("task information", COLOURS["task_information"]),
}


def plot_alignment(table: pd.DataFrame, published: bool = False, title: str = "") -> Figure:
    """The cosine between the gradients of both information terms, a box a layer, layers in order of depth.

    Args:
        table: of channels, measured with ``alignment=True``, at one checkpoint or several; channels of several runs
            are pooled. Of more than four checkpoints the first and the last are drawn.
        published: shade what was published for the hidden layers of ResNet-18 trained on CIFAR-100, a reference for
            that network only.
        title: above the figure.

    Returns:
        A figure; ``figure.savefig(path)`` writes it. Boxes are quartiles, whiskers reach from 5 to 95 % of a layer's
        channels, diamonds are means.

    Raises:
        ValueError: if the table has no angles.
    """
    if "alignment" not in table:
        raise ValueError(
            "plot_alignment: the table has no column 'alignment'; measure it with AxisTracker(alignment=True) or "
            "compute_axes(model, loader, alignment=True)"
        )
    names = list(dict.fromkeys(table["layer"]))
    rows = _at_checkpoints(table.assign(angle=table["alignment"].abs()))
    moments = list(dict.fromkeys(rows["moment"]))
    width, height = 1.2 + len(names) * (0.16 + 0.14 * len(moments)), 3.0 + 0.06 * max(map(len, names))
    with canvas(1, 1, (max(4.5, width), height), title) as (figure, grid):
        axes = grid[0, 0]
        colours = sns.light_palette(COLOURS["alignment"], len(moments) + 1)[1:]
        for place, (moment, colour) in enumerate(zip(moments, colours, strict=True)):
            by_layer = rows[rows["moment"] == moment].groupby("layer")["angle"]
            values = [by_layer.get_group(name).dropna() for name in names]
            shift = (place - (len(moments) - 1) / 2) / len(moments)
            _draw_boxes(axes, values, 0.8 * shift, 0.8 / len(moments), colour, moment)
        if published:
            label = "published: means of hidden layers, ResNet-18 on CIFAR-100"
            axes.axhspan(*PUBLISHED, color=GREY, alpha=0.25, linewidth=0, zorder=0, label=label)
        _label_layers(axes, names)
        if published or len(moments) > 1:
            handles, labels = axes.get_legend_handles_labels()
            shown = slice(None) if len(moments) > 1 else slice(-1, None)
            figure.legend(handles[shown], labels[shown], loc="outside lower center", ncols=5, frameon=False)
    return figure


def _at_checkpoints(table: pd.DataFrame) -> pd.DataFrame:
    """The rows to draw, with the name of their checkpoint in the column ``moment``."""
    if "step" not in table:
        return table.assign(moment="")
    steps = sorted(table["step"].unique())
    if len(steps) > _MOST_CHECKPOINTS:
        table = table[table["step"].isin([steps[0], steps[-1]])]
    table = table.sort_values("step", kind="stable")
    return table.assign(moment=[f"epoch {epoch:.3g}" for epoch in table["epoch"]])


def _draw_boxes(
    axes: Axes, values: list[pd.Series], shift: float, width: float, colour: tuple[float, float, float], label: str
) -> None:
    """One checkpoint's boxes, a layer each."""
    line = {"linewidth": 0.7}
    drawn = axes.boxplot(
        values,
        positions=[place + shift for place in range(len(values))],
        widths=width,
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        meanprops={"marker": "D", "markersize": 3, "markerfacecolor": "black", "markeredgecolor": "none"},
        patch_artist=True,
        boxprops={"facecolor": colour, **line},
        medianprops={"color": "black", **line},
        whiskerprops=line,
        capprops=line,
        manage_ticks=False,
    )
    drawn["boxes"][0].set_label(label)


def _label_layers(axes: Axes, names: list[str]) -> None:
    many = len(names) > 6
    labels = [short(name, names) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90 if many else 0, fontsize=7 if many else None)
    axes.set(
        xlabel="layer, in order of depth", ylabel=f"{_ANGLE} of channels", ylim=(0, 1), xlim=(-0.6, len(names) - 0.4)
    )
    sns.despine(ax=axes)


def plot_simulation(start: pd.DataFrame, flows: pd.DataFrame, title: str = "") -> Figure:
    """Coupling of simulated channels at initialisation, and coupling and alignment under gradient flows.

    Args:
        start: from ``initial_coupling``, over several shares.
        flows: from ``simulate``, one flow or several of one share.
        title: above the figure.

    Returns:
        A figure of 11 × 4 inches; ``figure.savefig(path)`` writes it. Bands are 95 % intervals over seeds.
    """
    with canvas(1, 3, (11, 4), title) as (figure, grid):
        initial, coupling, angle = grid.flat
        _draw_band(initial, mean_over_runs(start, by=["share"]), "share", "black", "")
        share = flows["share"].iloc[0]
        initial.axvline(share, color=GREY, linestyle=":")
        initial.axhline(0, color="black", linewidth=0.6)
        initial.set(xlabel="share of ‖c‖² in the leading eigenvectors", ylabel=RHO, title="at initialisation")
        for name, path in flows.groupby("flow", sort=False):
            label, colour = _FLOWS[str(name)]
            for axes, value in ((coupling, "rho"), (angle, "alignment")):
                _draw_band(axes, mean_over_runs(path[path["time"] > 0], value, by=["time"]), "time", colour, label)
        coupling.axhline(0, color="black", linewidth=0.6)
        coupling.set(ylim=(-1.05, 1.05), ylabel=RHO, title=f"gradient flow, share {share:g}")
        angle.set(ylim=(0, None), ylabel=f"mean {_ANGLE}", title="angle between both gradients")
        for axes in (coupling, angle):
            axes.set(xscale="log", xlabel="time (learning rate × steps)")
        figure.legend(
            *coupling.get_legend_handles_labels(),
            loc="outside lower right",
            ncols=3,
            frameon=False,
            title="flow ascends",
        )
        for axes in (initial, coupling, angle):
            sns.despine(ax=axes)
    return figure


def _draw_band(axes: Axes, means: pd.DataFrame, x: str, colour: str | tuple[float, float, float], label: str) -> None:
    axes.fill_between(means[x], means["low"], means["high"], color=colour, alpha=0.25, linewidth=0)
    axes.plot(means[x], means["mean"], color=colour, label=label)
