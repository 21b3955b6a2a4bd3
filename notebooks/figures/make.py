"""Draw the README's two figures from the committed tables of the study: ``make figures``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.analysis.grids import read_grids
from chanaxes_pl.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, styled

HERE = Path(__file__).parent
STUDY = HERE.parent / "results" / "study"
QUARTER = {"resnet18": "ResNet-18, quarter", "vgg16_bn": "VGG-16, quarter", "mobilenet_v2": "MobileNetV2, quarter"}
WIDE = {"width_1/resnet18": "ResNet-18, full width"}
HALF = {"width_0.5/mobilenet_v2": "MobileNetV2, half"}
#: Optimiser steps of one epoch: 50,000 images in full batches of 128.
EPOCH = 390
#: What the default chooses by, and what follows: score, allocation, compensation.
DEFAULT = ("reconstruction", "sensitivity", "refit")
#: (score, allocation, compensation) → label and look of its curve.
CURVES = {
    ("reconstruction", "sensitivity", "distill"): ("default and polish", {"color": PURPLE, "marker": "s"}),
    DEFAULT: (
        "default: joint selection, sensitivity, refit",
        {"color": BLUE, "marker": "o"},
    ),
    ("l1", "uniform", "refit"): ("L1 norm, all layers alike, refit", {"color": GREEN, "marker": "D"}),
    ("random", "uniform", "refit"): ("random channels, all layers alike, refit", {"color": ORANGE, "marker": "^"}),
    ("l1", "uniform", "none"): (
        "L1 norm, all layers alike, no refit",
        {"color": GREY, "marker": "o", "linestyle": "--"},
    ),
}


def axes_over_training() -> Figure:
    """Rank correlation of input capture and task information over training: a panel a network, a thin line a seed."""
    with styled(), sns.plotting_context("talk", font_scale=0.85):
        shown = WIDE | QUARTER
        figure = Figure(figsize=(16, 5), layout="constrained")
        for axes, (folder, network) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
            rows = main_correlation(pd.read_csv(STUDY / folder / "correlations.csv.gz"))
            seeds, null = (rows.pivot_table(index="step", columns="run", values=name) for name in ("rho", "null"))
            # Step 0 has no place on a logarithmic scale: half a step stands for it.
            at = seeds.index.to_series().replace(0, 0.5)
            axes.plot(at, seeds, color=BLUE, linewidth=1, alpha=0.4)
            axes.plot(at, seeds.mean(axis=1), color=BLUE, marker="o", markersize=6, linewidth=3, label="mean of seeds")
            axes.plot(at, null.mean(axis=1), color=GREY, linewidth=2, label="random target")
            axes.axhline(0, color="black", linewidth=1)
            axes.axvline(EPOCH, color=GREY, linestyle="--", linewidth=1.5)
            axes.annotate("1 epoch", (EPOCH, 0.78), xytext=(-6, 0), textcoords="offset points", ha="right", color="0.4")
            axes.set_xscale("log")
            last = int(seeds.index[-1])
            axes.set_xticks([0.5, 4, 32, EPOCH, last], ["start", "4", "32", f"{EPOCH}", f"{last}"])
            axes.minorticks_off()
            axes.set(title=_titled(network, seeds.shape[1]), xlabel="training steps (log scale)", ylim=(-0.3, 0.85))
            sns.despine(ax=axes)
        figure.axes[0].set_ylabel("rank correlation of input capture\nand task information")
        figure.axes[-1].legend(loc="upper center", bbox_to_anchor=(0.45, 0.93), frameon=False, fontsize="small")
        title = "Input capture and task information come apart within two epochs"
        figure.suptitle(title, weight="bold")
    return figure


def accuracy_over_macs() -> Figure:
    """Test accuracy over remaining MACs, mean over seeds: a panel for each network with joint selection."""
    networks = WIDE | QUARTER | HALF
    shown = {folder: title for folder, title in networks.items() if (STUDY / folder / "seed_0/selection").exists()}
    with styled(), sns.plotting_context("talk", font_scale=0.85):
        figure = Figure(figsize=(16, 6.5), layout="constrained")
        panels = figure.subplots(1, len(shown))
        kept = []
        for axes, (folder, title) in zip(panels, shown.items(), strict=True):
            steps = [step for step in ("selection", "polish") if (STUDY / folder / "seed_0" / step).exists()]
            grids = [read_grids(str(STUDY / folder / f"seed_*/{step}/pruning.parquet")) for step in steps]
            grid = pd.concat(grids)
            _draw_curves(axes, grid)
            half = _chosen(grid, DEFAULT) & (grid["budget"] == 0.5)
            kept.append(100 * grid.loc[half, "accuracy"].mean() / _dense(grid))
            axes.set_title(_titled(title, grids[0]["run"].nunique()))
        panels[0].set_ylabel("test accuracy (%)")
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        share = f"{min(kept):.0f} to {max(kept):.0f} %"
        figure.suptitle(f"At half the MACs a refit keeps {share} of the accuracy, without training", weight="bold")
    return figure


def _titled(network: str, seeds: int) -> str:
    return f"{network} ({seeds} seed{'s' * (seeds > 1)})"


def _dense(grid: pd.DataFrame) -> float:
    return grid.loc[grid["score"] == "dense", "accuracy"].mean()


def _chosen(grid: pd.DataFrame, variant: tuple[str, str, str]) -> pd.Series:
    return (grid[["score", "allocation", "compensate"]] == list(variant)).all(axis=1)


def _draw_curves(axes: Axes, grid: pd.DataFrame) -> None:
    dense = 100 * _dense(grid)
    axes.axhline(dense, color="black", linewidth=1.5, label="whole network")
    for variant, (label, look) in CURVES.items():
        chosen = _chosen(grid, variant)
        if not chosen.any():
            continue
        by_budget = 100 * grid[chosen].groupby("budget")[["macs_share", "accuracy"]].mean()
        axes.plot(by_budget["macs_share"], by_budget["accuracy"], label=label, linewidth=2.5, markersize=8, **look)
    axes.set(xlabel="multiply–accumulates left (%)", xlim=(15, 75), ylim=(0, 1.1 * dense))
    sns.despine(ax=axes)


if __name__ == "__main__":
    for figure, name in ((axes_over_training(), "axes.png"), (accuracy_over_macs(), "pruning.png")):
        figure.savefig(HERE / name, dpi=100)
        print(HERE / name)
