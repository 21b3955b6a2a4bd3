"""Gradient flows of channels on the unit sphere, and what both information terms do on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.integrate import DOP853
from torch import Tensor
from torch.func import vmap

from chanaxes_pl.core.gaussian import information
from chanaxes_pl.core.gradients import alignment, capture_gradient, task_gradient
from chanaxes_pl.core.metrics import captured
from chanaxes_pl.core.statistics import spearman
from chanaxes_pl.simulation.problem import Draw, Problem

#: What a flow ascends: input capture, task information, or a weighted mean of both.
FLOWS = ("capture", "mixture", "task")
#: Channels whose information terms spread less than this, in nats, are the same up to the error of integration.
RESOLUTION = 1e-6
COLUMNS = (
    *("flow", "share", "channels", "run", "time", "rho", "alignment", "input_capture", "task_information"),
    *("capture_spread", "task_spread", "on_leading", "reason"),
)
_MAX_STEPS = 5_000  # a hundred are usual
_FIRST_RECORD = 1e-3  # of the duration


def simulate(
    problem: Problem,
    flow: str = "task",
    mixture: float = 0.5,
    duration: float = 10.0,
    records: int = 50,
    tolerance: float = 1e-8,
) -> pd.DataFrame:
    """Follow a gradient flow from random initialisation and record how both information terms go together.

    Every channel ascends on its own, ẇ = (1 − wwᵀ) ∇_w [(1 − μ) I_X + μ I_T], on the unit sphere: I_X would grow
    without bound under a free flow, while I_T does not depend on the norm and its free flow conserves it. The metric is
    the Euclidean one of plain gradient descent, whose learning rate times steps is the time here. It is integrated in
    float64 by the Runge–Kutta method of Dormand and Prince (order 8), all channels and seeds with one step, chosen such
    that the root mean square over weights of error / (1 + |weight|) in a step stays below ``tolerance``.

    Args:
        problem: spectrum, target, channels and seeds.
        flow: ``"capture"`` (μ = 0), ``"task"`` (μ = 1) or ``"mixture"``.
        mixture: μ of the flow ``"mixture"``, between 0 and 1.
        duration: the time at which the flow ends.
        records: how many times are recorded after the start, evenly spaced on a logarithmic scale.
        tolerance: of the integration.

    Returns:
        A row a run (seed) and recorded time: ``flow, share, channels`` (of the problem), ``run, time, rho`` (Spearman
        of input capture and task information over channels), ``alignment`` (mean |cos(Σw, g)|), ``input_capture``,
        ``task_information`` (means over channels, nats), ``capture_spread``, ``task_spread`` (standard deviations over
        channels, nats), ``on_leading`` (mean share of ‖w‖² in the leading eigenvectors) and ``reason``, which says
        why ``rho`` is NaN.

    Raises:
        ValueError: for a value that is out of range, quoting it, before anything is computed.
        RuntimeError: if the flow is so stiff that the steps become too many.

    Example:
        >>> frame = simulate(Problem(inputs=8, channels=50, seeds=2), "task", duration=5.0, records=4)
        >>> frame[frame["run"] == 0]["rho"].round(2).tolist()
        [0.56, 0.56, 0.56, 0.5, -0.93]
    """
    check_flow(flow, mixture, duration, records, tolerance)
    draw, times = problem.draw(), [0.0, *np.geomspace(_FIRST_RECORD * duration, duration, records).tolist()]
    path = trajectory(draw, {"capture": 0.0, "task": 1.0}.get(flow, mixture), times, tolerance)
    rows = [_observed(weights, draw, problem.leading).assign(time=time) for time, weights in path]
    return _framed(rows, flow, problem)


def check_flow(flow: str, mixture: float, duration: float, records: int, tolerance: float) -> None:
    """Raise ValueError for settings that :func:`simulate` cannot follow."""
    if flow not in FLOWS:
        raise ValueError(f"flow={flow!r}: expected one of {', '.join(FLOWS)}")
    for name, value, good, expected in (
        ("mixture", mixture, 0 <= mixture <= 1, "the weight of task information, between 0 and 1"),
        ("duration", duration, 0 < duration < np.inf, "a time above 0"),
        ("records", records, records >= 2, "at least 2 times"),
        ("tolerance", tolerance, 1e-13 <= tolerance <= 1e-3, "1e-13 to 1e-3"),
    ):
        if not good:
            raise ValueError(f"{name}={value!r}: expected {expected}")


def initial_coupling(problem: Problem, shares: Sequence[float] = tuple(np.linspace(0, 1, 11))) -> pd.DataFrame:
    """Both information terms at random initialisation, over the share of c in the leading eigenvectors.

    Args:
        problem: its own ``share`` does not matter; weights and the directions of both parts of c are the same for all.
        shares: of ‖c‖².

    Returns:
        A row a run and share, with the columns of :func:`simulate`, at time 0 of the flow ``"none"``.
    """
    problems = [replace(problem, share=float(share)) for share in shares]
    frames = []
    for at in problems:
        draw = at.draw()
        frames.append(_framed([_observed(draw.weights, draw, at.leading).assign(time=0.0)], "none", at))
    return pd.concat(frames, ignore_index=True)


def half_times(frame: pd.DataFrame) -> pd.DataFrame:
    """When each run's ρ has fallen to half of what it was at the start.

    Args:
        frame: from :func:`simulate`, of one flow or several.

    Returns:
        A row a run: ``flow, share, run, initial`` (ρ at the start), ``time`` (interpolated between records; infinite
        where it does not happen; NaN where ``initial`` is no higher than chance would have it in one of 40 runs) and
        ``reason``, why ``time`` is NaN.
    """
    rows = []
    for (flow, share, run), path in frame.groupby(["flow", "share", "run"], sort=False):
        initial, chance = path["rho"].iloc[0], 1.96 / np.sqrt(path["channels"].iloc[0] - 1)
        coupled = initial > chance
        time = _first_below(path["time"].to_numpy(), path["rho"].to_numpy(), initial / 2) if coupled else np.nan
        reason = "" if coupled else f"not coupled at the start: {initial:.2f} is within chance, {chance:.2f}"
        rows.append({"flow": flow, "share": share, "run": run, "initial": initial, "time": time, "reason": reason})
    return pd.DataFrame(rows)


def trajectory(draw: Draw, weight: float, times: Sequence[float], tolerance: float) -> Iterator[tuple[float, Tensor]]:
    """Times and weights ``[S, C, F]`` of the flow on (1 − weight) I_X + weight I_T, as :func:`simulate` follows it.

    Args:
        draw: the start.
        weight: μ, of task information.
        times: ascending, the first is 0.
        tolerance: of the integration, relative and absolute.

    Raises:
        RuntimeError: if the steps become too many or too small.
    """
    shape, velocity = draw.weights.shape, _velocity(draw, weight)

    def derivative(_time: float, flat: np.ndarray) -> np.ndarray:
        return velocity(torch.from_numpy(flat).view(shape)).flatten().numpy()

    solver = DOP853(derivative, 0.0, draw.weights.flatten().numpy(), times[-1], rtol=tolerance, atol=tolerance)
    yield times[0], draw.weights
    due = list(times[:0:-1])
    for _ in range(_MAX_STEPS):
        message = solver.step()
        if solver.status == "failed":
            raise RuntimeError(f"the flow stopped at time {solver.t:.3g}: {message}")
        between = solver.dense_output() if due[-1] <= solver.t else None
        while between and due and due[-1] <= solver.t:
            yield due[-1], torch.from_numpy(between(due[-1])).view(shape)
            due.pop()
        if not due:
            return
    raise RuntimeError(
        f"the flow got to time {solver.t:.3g} of {times[-1]:.3g} in {_MAX_STEPS} steps: it is stiff, as when channels "
        "settle where the input hardly varies; choose a flatter spectrum or a shorter duration"
    )


def _first_below(times: np.ndarray, values: np.ndarray, level: float) -> float:
    """When values first fall below a level that they start above, linear between records; infinite where never."""
    below = np.flatnonzero(values < level)
    if not len(below):
        return np.inf
    after = below[0]
    return float(np.interp(level, values[[after, after - 1]], times[[after, after - 1]]))


def _velocity(draw: Draw, weight: float) -> Callable[[Tensor], Tensor]:
    """The gradient ``[S, C, F]`` along the sphere, from weights ``[S, C, F]``."""

    def velocity(weights: Tensor) -> Tensor:
        gradient = torch.zeros_like(weights)
        if weight < 1:
            gradient += (1 - weight) * vmap(capture_gradient, (0, None, 0))(weights, draw.covariance, draw.noise)
        if weight > 0:
            gradient += weight * vmap(task_gradient, (0, None, 0, None))(weights, draw.covariance, draw.cross, 1.0)
        radial = (gradient * weights).sum(-1, keepdim=True) / weights.square().sum(-1, keepdim=True)
        return gradient - radial * weights

    return velocity


def _observed(weights: Tensor, draw: Draw, leading: int) -> pd.DataFrame:
    """A row a seed: what :func:`simulate` records of weights ``[S, C, F]``."""
    sigma_w, cross = weights @ draw.covariance, draw.cross.unsqueeze(1)
    power, shared = (weights * sigma_w).sum(-1), (weights * cross).sum(-1)
    known = shared.square() / power
    capture, task = captured(power, draw.noise.unsqueeze(-1)), information(known)
    angles = vmap(alignment)(sigma_w, power, cross.expand_as(weights), shared)["alignment"]
    spreads = {"capture_spread": capture.std(1), "task_spread": task.std(1)}
    collapsed = (torch.stack(list(spreads.values())) < RESOLUTION).any(0)
    rho = [spearman(*both) for both in zip(power.numpy(), known.numpy(), strict=True)]  # ranks need no logarithm
    columns = {
        "rho": torch.tensor(rho, dtype=torch.float64).where(~collapsed, torch.nan),
        "alignment": angles.abs().nanmean(1),
        "input_capture": capture.mean(1),
        "task_information": task.mean(1),
        **spreads,
        "on_leading": weights[..., :leading].square().sum(-1).mean(1),
    }
    rows = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    return rows.assign(run=range(len(rows)), reason=np.where(collapsed, "all channels have become the same", ""))


def _framed(rows: list[pd.DataFrame], flow: str, problem: Problem) -> pd.DataFrame:
    frame = pd.concat(rows, ignore_index=True).assign(flow=flow, share=problem.share, channels=problem.channels)
    return frame.sort_values(["run", "time"], kind="stable", ignore_index=True)[list(COLUMNS)]
