"""What an experiment found, as a few lines of text."""

from __future__ import annotations

import numpy as np
import pandas as pd

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.analysis.damage import matched_comparison, rank_regression, score_damage_correlation
from chanaxes_pl.analysis.scores import SCORE_COLUMN
from chanaxes_pl.core.metrics import METRICS
from chanaxes_pl.lesions.interventions import OPERATIONS
from chanaxes_pl.tables import DENSE

_DOES = {
    "zero": "removed",
    "mean": "set to its mean",
    "peer": "rebuilt from its peers",
    "hull": "rebuilt from its hull",
}


def describe_lesions(table: pd.DataFrame) -> str:
    """Mean damage by operation, its correlations with metrics and scores, and whether peer support explains more of it.

    Args:
        table: of :func:`join_axes`.
    """
    operations = [operation for operation in OPERATIONS if f"{operation}_loss" in table]
    means = [f"{_DOES[operation]} {table[f'{operation}_loss'].mean():+.4f}" for operation in operations]
    damage = f"{operations[0]}_loss"
    scores = [str(column) for column in table if str(column).startswith(SCORE_COLUMN)]
    correlations = score_damage_correlation(table.replace(-np.inf, np.nan), [*METRICS, "peer_r2", *scores], damage)
    lines = [
        f"{len(table)} lesioned channels; mean change of cross-entropy in nats: {', '.join(means)}",
        f"Spearman ρ with {damage} within layers, mean over layers [95 % over units]; {SCORE_COLUMN}…: low = remove",
    ]
    lines += [
        f"  {row['score']:24}{row['rho']:6.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for row in correlations[correlations["layer"] == NETWORK].to_dict("records")
    ]
    fit = rank_regression(table, damage).to_dict("records")[0]
    lines.append(
        f"ranks of {damage} on those of {fit['base']}: adjusted R² {fit['r2_base']:.3f}; with {fit['added']} "
        f"{fit['increase']:+.3f} [{fit['low']:.3f}, {fit['high']:.3f}]"
    )
    (rank,) = (row for row in matched_comparison(table, damage).to_dict("records") if row["scale"] == "rank")
    lines.append(
        f"channels of much and of little {rank['support']}, alike in {rank['matched']}: mean rank of {damage} "
        f"{rank['much']:.2f} and {rank['little']:.2f}, difference {rank['difference']:+.2f} "
        f"[{rank['low']:.2f}, {rank['high']:.2f}], {rank['pairs']} pairs"
    )
    return "\n".join(lines)


def describe_pruning(grid: pd.DataFrame) -> str:
    """Accuracy by budget, for every allocation, compensation and score.

    Args:
        grid: from :func:`pruning_grid`.
    """
    value = "tuned_accuracy" if "tuned_accuracy" in grid else "accuracy"
    pruned = grid[grid["score"] != DENSE]
    percent = (100 * pruned["budget"]).round(1).map("{:g} %".format)
    rows = pruned.assign(budget=pd.Categorical(percent, list(dict.fromkeys(percent))), percent=100 * pruned[value])
    keys = ["allocation", "compensate", "score"]
    table = rows.pivot_table(index=keys, columns="budget", values="percent", sort=False, observed=True)
    dense = 100 * grid.loc[grid["score"] == DENSE, "accuracy"].mean()
    tuned = "after fine-tuning" if value != "accuracy" else "nothing retrained"
    return (
        f"test accuracy in % with so much of the multiply–accumulates left, {tuned}; dense {dense:.1f}\n"
        f"{table.round(1).to_string()}"
    )
