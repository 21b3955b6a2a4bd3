"""``chanaxes summary``: a run's axis correlations as a short table and a figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.analysis.runs import read_runs
from chanaxes_pl.plots import plot_correlations

# What to call a run's landmarks.
_WHEN = ["at initialisation", "at its highest", "at the end"]


def summary(run: str, figure: str | None = None, all_checkpoints: bool = False, resamples: int = 1000) -> None:
    """Print a run's axis correlations and draw them over epochs.

    Args:
        run: a run folder, or that of one tracker in it, ``<run folder>/axis``.
        figure: where to draw; default ``correlations.png`` beside the tracker's tables.
        all_checkpoints: print every checkpoint, not just initialisation, the highest correlation and the end.
        resamples: bootstrap resamples over channels for the intervals.

    Raises:
        SystemExit: if it is no run, or nothing of it can be read.
    """
    try:
        runs = read_runs([run], resamples)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    (only,) = runs.each
    folder = only.folder / only.tracker
    rows = main_correlation(runs.correlations)
    if not all_checkpoints:
        rows = rows.set_index("step").loc[list(runs.landmarks.values())].reset_index().assign(when=_WHEN)
    print(describe(rows))
    path = Path(figure) if figure else folder / "correlations.png"
    plot_correlations(runs.correlations, title=only.name).savefig(path, dpi=150)
    print(f"\nfigure: {path}\ntables: {folder}/step-*.parquet")
    for note in only.notes:
        print(f"note:   {note}")


def separation(rows: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """How fast the axes come apart: when each run's correlation has fallen to a share of its highest.

    Args:
        rows: of :func:`main_correlation`, of one run or several told apart by ``run``.
        share: of the highest correlation.

    Returns:
        One row a run: ``run, first, highest, last`` (ρ at the first checkpoint, at its highest and at the last),
        ``step_highest, epoch_highest``, and ``step, epoch`` of the first checkpoint after the highest at or below the
        share; NaN where there is none, or the highest is not above 0.

    Example:
        >>> rows = pd.DataFrame({"run": "a", "epoch": [0, 0.1, 0.2, 1], "step": [0, 1, 2, 9]})
        >>> rows = rows.assign(rho=[0.5, 0.6, 0.4, 0.3])
        >>> separation(rows)[["first", "highest", "last", "step"]].values.tolist()
        [[0.5, 0.6, 0.3, 9.0]]
    """
    found = []
    for run, each in rows.groupby("run", sort=False):
        each = each.sort_values("step").reset_index(drop=True)
        peak = int(each["rho"].fillna(-2).argmax())
        highest = float(each["rho"].iloc[peak])
        after = each.iloc[peak + 1 :]
        below = after[after["rho"] <= share * highest] if highest > 0 else after.iloc[:0]
        step, epoch = (float(below[name].iloc[0]) if len(below) else float("nan") for name in ("step", "epoch"))
        row = {"run": run, "first": each["rho"].iloc[0], "highest": highest, "last": each["rho"].iloc[-1]}
        row |= {"step_highest": each["step"].iloc[peak], "epoch_highest": each["epoch"].iloc[peak]}
        found.append(row | {"step": step, "epoch": epoch})
    return pd.DataFrame(found)


def describe(rows: pd.DataFrame) -> str:
    """The headline correlation of some checkpoints as text, a line each."""
    lines = ["ρ(input capture, task information), mean over layers; 95 % interval over channels"]
    lines.append(f"{'':18}{'epoch':>8}{'step':>8}{'ρ':>8}{'interval':>17}{'ceiling':>9}{'corrected':>11}{'null':>8}")
    for _, row in rows.iterrows():
        ceiling = (row["reliability_local"] * row["reliability_target"]) ** 0.5
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            f"{row.get('when', ''):18}{row['epoch']:8.3g}{row['step']:8}{row['rho']:8.2f}{interval:>17}"
            f"{ceiling:9.2f}{row['disattenuated']:11.2f}{row['null']:8.2f}"
        )
    lines.append("ceiling: the highest ρ that the metrics' reliabilities allow; corrected: ρ / ceiling")
    return "\n".join(lines)
