"""``chanaxes simulate``: Gaussian channels at initialisation and under three gradient flows, as text and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chanaxes_pl.analysis.text import interval, plain
from chanaxes_pl.core.statistics import bounds, mean_over_runs, resampled
from chanaxes_pl.plots import plot_simulation
from chanaxes_pl.plots.style import RHO
from chanaxes_pl.simulation.flows import FLOWS, check_flow, half_times, initial_coupling, simulate
from chanaxes_pl.simulation.problem import Problem
from chanaxes_pl.tables import write_parquet


def simulation(
    out: str = "simulation.png",
    mixture: float = 0.5,
    duration: float = 10.0,
    records: int = 50,
    tolerance: float = 1e-8,
    **problem: Any,
) -> None:
    """Simulate channels y = wᵀx of a Gaussian input and task that ascend input capture, task information, or both.

    Weights start at random and stay on the unit sphere, as under normalisation: input capture would grow without bound.

    Args:
        out: file name of the figure; the table is written beside it, as .parquet.
        mixture: weight of task information in the flow on both.
        duration: duration of the flows, in learning rate × steps.
        records: number of times at which a flow is recorded.
        tolerance: largest error of a step of the integration.
        problem: arguments of :class:`Problem`.
    """
    path = Path(out)
    channels = Problem(**problem)
    check_flow(FLOWS[0], mixture, duration, records, tolerance)
    _check_out(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = initial_coupling(channels)
    print(describe_start(start, channels))
    try:
        flows = pd.concat([simulate(channels, flow, mixture, duration, records, tolerance) for flow in FLOWS])
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    print(f"\n{describe_flows(flows)}")
    table = path.with_suffix(".parquet")
    plot_simulation(start, flows).savefig(path, dpi=150)
    write_parquet(pd.concat([start, flows], ignore_index=True), table)
    print(f"\nfigure: {path}\ntable:  {table}")


def _check_out(path: Path) -> None:
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"out={str(path)!r}: expected a figure's file name, one that ends in {', '.join(kinds)}")


def describe_start(start: pd.DataFrame, problem: Problem) -> str:
    """Coupling at initialisation as text: one line for each share."""
    one = problem.leading == 1
    vectors = "leading eigenvector" if one else f"{problem.leading} leading eigenvectors"
    held = problem.eigenvalues[: problem.leading].sum() / problem.eigenvalues.sum()
    rho, angle = (mean_over_runs(start, value, by=["share"]) for value in ("rho", "alignment"))
    lines = [
        f"{problem.channels} random channels of {len(problem.eigenvalues)} Gaussian inputs, {_runs(problem.seeds)}; "
        f"the {vectors} {'has' if one else 'have'} {held:.0%} of the input's variance",
        f"\nat initialisation, by the share of the task covariance in the {vectors}; mean [95 % over runs]",
        f"{'share':>7}{RHO:>42}{'|cos(Σw, g)|':>23}",
    ]
    for place, share in enumerate(rho["share"]):
        lines.append(f"{share:7.2f}{_cell(rho.iloc[place]):>42}{_cell(angle.iloc[place]):>23}")
    if problem.seeds > 1:
        above = rho[rho["low"] > 0]["share"]
        lines.append(f"interval above 0 from a share of {above.min():g} on" if len(above) else "interval never above 0")
    return "\n".join(lines)


def describe_flows(flows: pd.DataFrame) -> str:
    """Coupling and alignment at the end of each flow as text: one line for each flow."""
    end, halves = flows["time"].max(), half_times(flows)
    lines = [
        f"gradient flows from a share of {flows['share'].iloc[0]:g}, weights of norm 1, to time {end:g} "
        "(learning rate × steps);",
        "mean [95 % over runs], ± over channels; half of ρ is lost at the median [95 %] time, in so many coupled runs",
        f"{'flow':9}{'ρ':>21}{'|cos(Σw, g)|':>19}{'I_X (nats)':>17}{'I_T (nats)':>17}   half of ρ at",
        f"{'(start)':9}{_state(flows[flows['time'] == 0].drop_duplicates('run'))}",
    ]
    for flow, path in flows.groupby("flow", sort=False):
        halved = _half_time(halves[halves["flow"] == flow]["time"].dropna().to_numpy(), end)
        lines.append(f"{flow:9}{_state(path[path['time'] == end])}   {halved}")
    lines.append(_verdict(halves[halves["flow"] == "task"]["time"]))
    lines += sorted({f"ρ is NaN: {reason}" for reason in flows["reason"] if reason})
    return "\n".join(lines)


def _verdict(times: pd.Series) -> str:
    """Whether coupling at initialisation and its loss are reproduced, from the half times under the task flow."""
    runs, coupled, lost = len(times), times.notna().sum(), np.isfinite(times).sum()
    reproduced = "reproduced" if 2 * lost > runs else "not reproduced"
    return (
        f"of {_runs(runs)}, {coupled} start coupled beyond chance, and {lost} of these lose half of it as task "
        f"information grows:\ncoupling at initialisation and its loss are {reproduced}"
    )


def _state(rows: pd.DataFrame) -> str:
    """Cells for one recorded time of a flow, from its rows, one for each run."""
    rho, angle = (_cell(mean_over_runs(rows, value, by=["flow"]).iloc[0]) for value in ("rho", "alignment"))
    spreads = {"input_capture": "capture_spread", "task_information": "task_spread"}
    known = (f"{rows[value].mean():.3f} ± {rows[spread].mean():.3f}" for value, spread in spreads.items())
    return f"{rho:>21}{angle:>19}" + "".join(f"{cell:>17}" for cell in known)


def _half_time(times: np.ndarray, end: float) -> str:
    """Median over runs with its 95 % bootstrap interval; a run that never loses half of its ρ counts as later."""
    if not len(times):
        return "– (no run starts coupled)"
    ends = bounds(np.median(resampled(times, 1000, 0), axis=1), method="nearest")
    middle, low, high = (f"{value:.2f}" if value < np.inf else f"> {end:g}" for value in (np.median(times), *ends))
    interval = f" [{low}, {high}]" if len(times) > 1 else ""
    return f"{middle}{interval}, {np.isfinite(times).sum()}/{len(times)}"


def _cell(row: pd.Series) -> str:
    return plain(interval(row, spread=False))


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"
