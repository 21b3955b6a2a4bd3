"""The angle between the gradients of both information terms, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from chanaxes_pl.analysis.text import epoch_number
from chanaxes_pl.plots.style import COLOURS, GREY, canvas
from chanaxes_pl.plots.ticks import layer_ticks

#: Range over hidden layers of a layer's mean |cos(Σw, g)|, ResNet-18 trained on CIFAR-100 (arXiv 2605.07086).
PUBLISHED = (0.05, 0.18)
_MOST_CHECKPOINTS = 4
_LINE = {"color": "black", "linewidth": 0.7}
_BOXES = {
    "whis": (5, 95),
    "showfliers": False,
    "showmeans": True,
    "meanprops": {"marker": "D", "markersize": 3, "markerfacecolor": "black", "markeredgecolor": "none"},
    "patch_artist": True,
    "medianprops": _LINE,
    "whiskerprops": _LINE,
    "capprops": _LINE,
    "manage_ticks": False,
}


def plot_alignment(table: pd.DataFrame, published: bool = False, title: str = "") -> Figure:
    """Plot the cosine between the gradients of both information terms: one box for each layer.

    A box spans the quartiles of a layer's channels, its whiskers reach from 5 to 95 %, and a diamond marks the mean.

    Args:
        table: channels measured with ``alignment=True``, at one checkpoint or several; channels of several runs are
            pooled. Of more than four checkpoints, the first and the last are drawn.
        published: whether to shade the published range for the hidden layers of ResNet-18 trained on CIFAR-100, which
            is a reference for that network only.
        title: text above the figure.

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
    with canvas(1, 1, (max(4.5, width), height), title) as (figure, ((axes,),)):
        colours = sns.light_palette(COLOURS["alignment"], len(moments) + 1)[1:]
        box = 0.8 / len(moments)
        for place, (moment, colour) in enumerate(zip(moments, colours, strict=True)):
            by_layer = rows[rows["moment"] == moment].groupby("layer")["angle"]
            shift = box * (place - (len(moments) - 1) / 2)
            drawn = axes.boxplot(
                [by_layer.get_group(name).dropna() for name in names],
                positions=np.arange(len(names)) + shift,
                widths=box,
                boxprops={"facecolor": colour, "linewidth": 0.7},
                **_BOXES,
            )
            if len(moments) > 1:
                drawn["boxes"][0].set_label(moment)
        if published:
            label = "published: means of hidden layers, ResNet-18 on CIFAR-100"
            axes.axhspan(*PUBLISHED, color=GREY, alpha=0.25, linewidth=0, zorder=0, label=label)
        axes.set_xticks(*layer_ticks(names, most=len(names)), rotation=90, fontsize=7)
        axes.set(xlabel="layer, in order of depth", ylabel="|cos(Σw, g)| of channels")
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 1))
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _at_checkpoints(table: pd.DataFrame) -> pd.DataFrame:
    """The rows to draw, with the name of their checkpoint in the column ``moment``."""
    if "step" not in table:
        return table.assign(moment="")
    steps = sorted(table["step"].unique())
    if len(steps) > _MOST_CHECKPOINTS:
        table = table[table["step"].isin([steps[0], steps[-1]])]
    table = table.sort_values("step", kind="stable")
    return table.assign(moment=[f"epoch {epoch_number(epoch)}" for epoch in table["epoch"]])
