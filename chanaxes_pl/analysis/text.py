"""Results as text: cells with numbers and intervals, and short descriptions of experiments."""

from __future__ import annotations

import numpy as np
import pandas as pd

from chanaxes_pl.analysis.correlations import NETWORK
from chanaxes_pl.analysis.damage import (
    CLEAR,
    CORRELATED,
    damage_reliability,
    matched_comparison,
    rank_regression,
    score_damage_correlation,
)
from chanaxes_pl.analysis.grids import score_differences
from chanaxes_pl.analysis.scores import SCORE_COLUMN
from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.statistics import mean_over_runs
from chanaxes_pl.tables import DENSE, TUNED, VARIANT, budget_words

#: Operation of a lesion → what is done to a channel.
LESIONED = {
    "zero": "removed",
    "mean": "set to its mean",
    "peer": "rebuilt from its peers",
    "hull": "rebuilt from its hull",
}


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """Format a number for a cell; an undefined one becomes a dash.

    Example:
        >>> number(-0.256, 1), number(0.26, 1, sign=True), number(float("nan")), number(-0.001)
        ('−0.3', '+0.3', '–', '0.00')
    """
    value = round(float(value), digits) + 0.0  # no −0.00
    return "–" if value != value else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def epoch_number(epoch: float) -> str:
    """Format an epoch, which may be a fraction, to three significant digits; from 100 on as a whole number.

    Example:
        >>> epoch_number(1 / 12), epoch_number(4.0), epoch_number(12.5), epoch_number(1500.0)
        ('0.0833', '4', '12.5', '1500')
    """
    return f"{epoch:.3g}" if epoch < 100 else f"{epoch:.0f}"


def interval(row: pd.Series, digits: int = 2, sign: bool = False, spread: bool = True, scale: float = 1.0) -> str:
    """Format a row of :func:`mean_over_runs` as ``mean ± std [low, high]``, without the parts that are undefined.

    Args:
        row: row with ``mean``, ``std``, and the ends of the interval, ``low`` and ``high``.
        digits: decimals of every number.
        sign: whether to write + before a positive mean.
        spread: whether to write the standard deviation.
        scale: factor for all numbers, such as 100 for percent.
    """
    text = number(scale * row["mean"], digits, sign)
    defined = row["std" if spread else "low"]
    if defined != defined:
        return text
    if spread:  # a narrow cell breaks before the bracket, and nowhere else
        text += f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(scale * row['std'], digits)}"
    low, high = (number(scale * row[name], digits) for name in ("low", "high"))
    return f"{text} [{low},\N{NO-BREAK SPACE}{high}]"


def plain(text: str) -> str:
    """Replace minus signs and no-break spaces by ASCII, so that numbers can be copied from a terminal."""
    return text.replace("−", "-").replace("\N{NO-BREAK SPACE}", " ")


def intervals(
    means: pd.DataFrame,
    index: str | list[str],
    columns: str,
    digits: int = 2,
    spread: bool = True,
    scale: float = 1.0,
) -> pd.DataFrame:
    """Format rows of :func:`mean_over_runs` as a table of text, in the same order.

    Args:
        means: rows to format.
        index: column, or columns, whose values name the rows of the table.
        columns: column whose values name the columns of the table.
        digits: decimals of every number.
        spread: whether to write the standard deviation.
        scale: factor for all numbers.

    Example:
        >>> means = pd.DataFrame({"layer": ["a", "b"], "step": 0, "mean": [0.5, 0.25], "std": float("nan")})
        >>> intervals(means, "layer", "step")[0].tolist()
        ['0.50', '0.25']
    """
    cells = means.assign(cell=[interval(row, digits, spread=spread, scale=scale) for _, row in means.iterrows()])
    return cells.pivot_table(index=index, columns=columns, values="cell", aggfunc="first", sort=False)


def describe_correlations(rows: pd.DataFrame) -> str:
    """Describe the headline correlation at some checkpoints, one line for each.

    Args:
        rows: rows of :func:`main_correlation`, optionally with a column ``when`` that names the checkpoints.
    """
    lines = ["ρ(input capture, task information), mean over layers; 95 % interval over channels"]
    lines.append(f"{'':18}{'epoch':>8}{'step':>8}{'ρ':>8}{'interval':>17}{'ceiling':>9}{'corrected':>11}{'null':>8}")
    for _, row in rows.iterrows():
        ceiling = (row["reliability_local"] * row["reliability_target"]) ** 0.5
        ends = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            f"{row.get('when', ''):18}{epoch_number(row['epoch']):>8}{row['step']:8}{row['rho']:8.2f}{ends:>17}"
            f"{ceiling:9.2f}{row['disattenuated']:11.2f}{row['null']:8.2f}"
        )
    lines.append("ceiling: the highest ρ that the metrics' reliabilities allow; corrected: ρ / ceiling")
    return "\n".join(lines)


def describe_grids(grid: pd.DataFrame, value: str = "accuracy", against: str = "l1") -> str:
    """Describe pruning grids of several runs: means by budget, and paired differences of the area under the curve.

    Args:
        grid: pruning grids with a column ``run``.
        value: column to describe, in percent for an accuracy, else in nats.
        against: score that the others are compared with.

    Raises:
        ValueError: if there is no such column.
    """
    numbers = [str(column) for column in grid.select_dtypes("number")]
    if value not in numbers:
        raise ValueError(f"no column {value!r} of numbers in the pruning grids; there are {', '.join(numbers)}")
    scale, unit = (100.0, "%") if value.endswith("accuracy") else (1.0, "nats")
    runs = grid["run"].nunique()
    dense = scale * grid[grid["score"] == DENSE][value.removeprefix(TUNED)]
    spread = f" ± {number(dense.std(), 1)}" if len(dense) > 1 else ""
    lines = [
        f"{value} in {unit}, {runs} run{'s' * (runs != 1)}, dense {number(dense.mean(), 1)}{spread}"
        + ("; mean [95 % over runs]" if runs > 1 else "")
    ]
    differences = score_differences(grid, value, against)
    for keys, part in grid[grid["score"] != DENSE].groupby(["allocation", "compensate"], sort=False):
        allocation, compensate = map(str, keys)
        means = mean_over_runs(part[["run", *VARIANT, value]], value)
        cells = intervals(means, "score", "budget", digits=1, spread=False, scale=scale).fillna("–")
        cells = cells[sorted(cells.columns, reverse=True)]
        lines += [
            "",
            variant(allocation, compensate),
            f"{'':26}" + "".join(f"{f'{100 * float(b):g} %':>19}" for b in cells.columns),
        ]
        lines += [
            f"{score:26}" + "".join(f"{cell:>19}" for cell in row)
            for score, row in zip(cells.index, cells.to_numpy(), strict=True)
        ]
        pairs = differences[(differences["allocation"] == allocation) & (differences["compensate"] == compensate)]
        if len(pairs):
            lines.append("area under the curve, difference on the same runs:")
        for _, row in pairs.iterrows():
            pair = f"{row['scores']} minus {row['against']}"
            lines.append(f"  {pair:40}{interval(row, 1, spread=False, scale=scale):>19}")
    return plain("\n".join(lines))


def variant(allocation: str, compensate: str) -> str:
    """Name an allocation with a compensation."""
    return f"{allocation}, {'no compensation' if compensate == 'none' else compensate}"


def describe_lesions(table: pd.DataFrame) -> str:
    """Describe damage: means by operation, correlations with metrics and scores, and what peer support adds.

    Args:
        table: table of :func:`join_axes`.
    """
    operations = [operation for operation in LESIONED if f"{operation}_loss" in table]
    means = [f"{LESIONED[operation]} {table[f'{operation}_loss'].mean():+.4f}" for operation in operations]
    lines = [f"{len(table)} lesioned channels; mean change of cross-entropy in nats: {', '.join(means)}"]
    damage = f"{operations[0]}_loss"
    lines += noise_of(table, damage)
    try:
        lines += _correlated(table, damage)
    except InputError as error:
        lines.append(f"no correlations with the axes: {error.text}")
    return "\n".join(lines)


def noise_of(table: pd.DataFrame, damage: str) -> list[str]:
    """Describe how much of the damage is noise of the test images; nothing for tables without standard errors.

    Args:
        table: table of :func:`lesion_table`.
        damage: column of the damage.
    """
    if f"{damage}_se" not in table or np.isnan(share := damage_reliability(table, damage)):
        return []
    clear = int((table[damage] > CLEAR * table[f"{damage}_se"]).sum())
    return [
        f"{clear} of {len(table)} channels do damage beyond {CLEAR:g} standard errors; {share:.0%} of the variance of "
        "damage within layers is not noise of the test images (use more of them if this is low)"
    ]


def _correlated(table: pd.DataFrame, damage: str) -> list[str]:
    scores = [str(column) for column in table if str(column).startswith(SCORE_COLUMN)]
    correlations = score_damage_correlation(table, [*CORRELATED, *scores], damage)
    lines = [
        f"Spearman ρ with {damage} within layers, mean over layers [95 % over units]; {SCORE_COLUMN}…: low = remove"
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
        f"channels with high and low {rank['support']}, matched in {rank['matched']}: mean rank of {damage} "
        f"{rank['much']:.2f} and {rank['little']:.2f}, difference {rank['difference']:+.2f} "
        f"[{rank['low']:.2f}, {rank['high']:.2f}], {rank['pairs']} pairs"
    )
    return lines


def describe_pruning(grid: pd.DataFrame) -> str:
    """Describe a pruning grid: accuracy by budget, for every allocation, compensation and score.

    Args:
        grid: table of :func:`pruning_grid`.
    """
    value = "tuned_accuracy" if "tuned_accuracy" in grid else "accuracy"
    pruned = grid[grid["score"] != DENSE]
    percent = (100 * pruned["budget"]).round(1).map("{:g} %".format)
    rows = pruned.assign(budget=pd.Categorical(percent, list(dict.fromkeys(percent))), percent=100 * pruned[value])
    keys = ["allocation", "compensate", "score"]
    table = rows.pivot_table(index=keys, columns="budget", values="percent", sort=False, observed=True)
    dense = 100 * grid.loc[grid["score"] == DENSE, "accuracy"].mean()
    tuned = "after fine-tuning" if value != "accuracy" else "without retraining"
    return (
        f"test accuracy in % by the share of {budget_words(grid)} that remains, {tuned}; dense {dense:.1f}\n"
        f"{table.round(1).to_string()}"
    )
