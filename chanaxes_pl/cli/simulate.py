"""``chanaxes simulate``: Gaussian channels at initialisation and under three gradient flows, as text and a figure."""

from __future__ import annotations

from pathlib import Path

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
    spectrum: float | list[float] = 1.0,
    inputs: int = 32,
    leading: int = 1,
    share: float = 0.9,
    explained: float = 0.5,
    mixture: float = 0.5,
    channels: int = 128,
    seeds: int = 10,
    duration: float = 10.0,
    records: int = 50,
    tolerance: float = 1e-8,
) -> None:
    """Simulate channels y = wᵀx of a Gaussian input and task that ascend input capture, task information, or both.

    Weights start at random and stay on the unit sphere, as under normalisation; otherwise input capture would grow
    without bound.

    Args:
        out: path of the figure; the table goes beside it, as .parquet.
        spectrum: exponent a of the input covariance's eigenvalues ∝ k^−a, or the eigenvalues themselves.
        inputs: number of eigenvalues of the power law.
        leading: number of eigenvectors that count as leading.
        share: share of the task covariance ‖c‖² in the leading eigenvectors during the flows.
        explained: R² of the target on the whole input.
        mixture: weight of task information in the flow on both.
        channels: number of channels in a run.
        seeds: number of runs, each with its own weights and task.
        duration: duration of the flows, in learning rate × steps.
        records: number of times at which a flow is recorded.
        tolerance: error tolerance of an integration step.
    """
    path = Path(out)
    problem = Problem(spectrum, inputs, leading, share, explained, channels, seeds)
    check_flow(FLOWS[0], mixture, duration, records, tolerance)
    _check_out(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = initial_coupling(problem)
    print(describe_start(start, problem))
    try:
        flows = pd.concat([simulate(problem, flow, mixture, duration, records, tolerance) for flow in FLOWS])
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
    """Describe the coupling at initialisation as text, one line per share."""
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
    """Describe the effect of each flow on coupling and alignment as text, one line per flow."""
    end, halves = flows["time"].max(), half_times(flows)
    lines = [
        f"gradient flows from a share of {flows['share'].iloc[0]:g}, weights of norm 1, to time {end:g} "
        "(learning rate × steps);",
        "mean [95 % over runs], ± over channels; half of ρ at: median time [95 %] of its loss, and coupled runs",
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
    """State whether coupling at initialisation and its loss occur, from the half times under the task flow."""
    runs, coupled, lost = len(times), times.notna().sum(), np.isfinite(times).sum()
    reproduced = "reproduced" if 2 * lost > runs else "not reproduced"
    return (
        f"of {_runs(runs)}, {coupled} start coupled beyond chance, and {lost} of these lose half of it as task "
        f"information grows:\ncoupling at initialisation and its loss are {reproduced}"
    )


def _state(rows: pd.DataFrame) -> str:
    """Format one moment of a flow; ``rows`` has one row per run."""
    rho, angle = (_cell(mean_over_runs(rows, value, by=["flow"]).iloc[0]) for value in ("rho", "alignment"))
    spreads = {"input_capture": "capture_spread", "task_information": "task_spread"}
    known = (f"{rows[value].mean():.3f} ± {rows[spread].mean():.3f}" for value, spread in spreads.items())
    return f"{rho:>21}{angle:>19}" + "".join(f"{cell:>17}" for cell in known)


def _half_time(times: np.ndarray, end: float) -> str:
    """Format the median over runs with its 95 % bootstrap interval; a run that keeps half of ρ counts as later."""
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
