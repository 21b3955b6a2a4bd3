"""Gradient flows of channels on the unit sphere, and both information terms along the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from numbers import Real
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.func import vmap

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, is_whole, naming, short
from chanaxes_pl.core.gaussian import information
from chanaxes_pl.core.gradients import alignment, capture_gradient, task_gradient
from chanaxes_pl.core.metrics import captured
from chanaxes_pl.core.statistics import spearman
from chanaxes_pl.simulation.problem import Draw, Problem

Flow = Literal["capture", "mixture", "task"]
#: What a flow ascends: input capture, a weighted mean of both information terms, or task information.
FLOWS: tuple[Flow, ...] = get_args(Flow)
#: Channels whose information terms differ by less than this standard deviation, in nats, differ by numerical error.
RESOLUTION = 1e-6
COLUMNS = (
    *("flow", "share", "channels", "run", "time", "rho", "alignment", "input_capture", "task_information"),
    *("capture_spread", "task_spread", "on_leading", "reason"),
)
_MAX_STEPS = 5_000  # a hundred are usual
_FIRST_RECORD = 1e-3  # of the duration


def simulate(
    problem: Problem,
    flow: Flow = "task",
    mixture: float = 0.5,
    duration: float = 10.0,
    records: int = 50,
    tolerance: float = 1e-8,
) -> pd.DataFrame:
    """Follow a gradient flow from random initialisation and record how both information terms correlate.

    Every channel ascends by itself, ẇ = (1 − wwᵀ) ∇_w [(1 − μ) I_X + μ I_T], on the unit sphere. A free flow would let
    I_X grow without bound, while I_T does not depend on the norm and its free flow conserves it. The metric is the
    Euclidean one of plain gradient descent, so time is learning rate × steps. The flow is integrated in float64 by the
    Runge–Kutta method of Dormand and Prince (order 8). All channels and seeds share one step size, chosen such that the
    root mean square over weights of error / (1 + |weight|) stays below ``tolerance`` in every step.

    Args:
        problem: spectrum, target, channels and seeds, a :class:`chanaxes_pl.Problem`.
        flow: ``"capture"`` (μ = 0), ``"task"`` (μ = 1) or ``"mixture"``.
        mixture: μ of the flow ``"mixture"``, between 0 and 1.
        duration: the time at which the flow ends.
        records: the number of recorded times after the start, evenly spaced on a logarithmic scale.
        tolerance: largest error of a step of the integration.

    Returns:
        One row for each run (seed) and recorded time: ``flow, share, channels`` (of the problem), ``run, time, rho``
        (Spearman correlation of input capture and task information over channels), ``alignment`` (mean |cos(Σw, g)|),
        ``input_capture``, ``task_information`` (means over channels, nats), ``capture_spread``, ``task_spread``
        (standard deviations over channels, nats), ``on_leading`` (mean share of ‖w‖² in the leading eigenvectors) and
        ``reason``, which says why ``rho`` is NaN.

    Raises:
        ValueError: for a value that is out of range, quoting it, before anything is computed.
        RuntimeError: if the flow is so stiff that the steps become too many.

    Example:
        >>> frame = simulate(Problem(inputs=8, channels=50, seeds=2), "task", duration=5.0, records=4)
        >>> frame[frame["run"] == 0]["rho"].round(2).tolist()
        [0.56, 0.56, 0.56, 0.5, -0.93]
    """
    with naming("simulate"):
        if not isinstance(problem, Problem):
            raise ArgumentTypeError(f"problem={short(problem)}", "expected a chanaxes_pl.Problem(…)")
        check_flow(flow, mixture, duration, records, tolerance)
    draw, times = problem.draw(), [0.0, *np.geomspace(_FIRST_RECORD * duration, duration, records).tolist()]
    weight = {"capture": 0.0, "mixture": mixture, "task": 1.0}[flow]
    path = trajectory(draw, weight, times, tolerance)
    rows = [_observed(weights, draw, problem.leading).assign(time=time) for time, weights in path]
    return _framed(rows, flow, problem)


def check_flow(flow: str, mixture: float, duration: float, records: int, tolerance: float) -> None:
    """Raise ValueError for settings that :func:`simulate` cannot follow."""
    if flow not in FLOWS:
        raise ArgumentError(f"flow={short(flow)}", f"expected one of {', '.join(FLOWS)}")
    for name, value, lowest, highest, expected in (
        ("mixture", mixture, 0, 1, "the weight of task information, between 0 and 1"),
        ("duration", duration, np.nextafter(0, 1), np.finfo(float).max, "a time above 0"),
        ("tolerance", tolerance, 1e-13, 1e-3, "1e-13 to 1e-3"),
    ):
        if not isinstance(value, Real) or not lowest <= value <= highest:
            raise ArgumentError(f"{name}={short(value)}", f"expected {expected}")
    if not is_whole(records, 2):
        raise ArgumentError(f"records={short(records)}", "expected at least 2 times")


def initial_coupling(problem: Problem, shares: Sequence[float] = tuple(np.linspace(0, 1, 11))) -> pd.DataFrame:
    """Both information terms at random initialisation, over the share of c in the leading eigenvectors.

    Args:
        problem: spectrum, target, channels and seeds; its own ``share`` is not used. Weights, and the directions of
            both parts of c, are the same for all shares.
        shares: the shares of ‖c‖² to compare, 0 to 1.

    Returns:
        One row for each run and share, with the columns of :func:`simulate`, at time 0 of the flow ``"none"``.
    """
    problems = [replace(problem, share=float(share)) for share in shares]
    frames = []
    for at in problems:
        draw = at.draw()
        frames.append(_framed([_observed(draw.weights, draw, at.leading).assign(time=0.0)], "none", at))
    return pd.concat(frames, ignore_index=True)


def half_times(frame: pd.DataFrame) -> pd.DataFrame:
    """The time at which each run's ρ has fallen to half of its value at the start.

    Args:
        frame: the table of :func:`simulate`, of one flow or several.

    Returns:
        One row for each run: ``flow, share, run, initial`` (ρ at the start), ``time`` (interpolated between records;
        infinite if ρ never falls so far; NaN if chance alone gives a ρ as high as ``initial`` in one of 40 runs) and
        ``reason``, which says why ``time`` is NaN.
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
        weight: μ, the weight of task information.
        times: ascending times, of which the first is 0.
        tolerance: relative and absolute tolerance of the integration.

    Raises:
        RuntimeError: if the steps become too many or too small.
    """
    shape, velocity, steps = draw.weights.shape, _velocity(draw, weight), count()

    def derivative(_time: float, flat: np.ndarray) -> np.ndarray:
        return velocity(torch.from_numpy(flat).view(shape)).flatten().numpy()

    def limited(time: float, _flat: np.ndarray) -> float:
        """Stop a flow of too many steps: the solver evaluates its events once at the start and after every step."""
        if next(steps) >= _MAX_STEPS and time < times[-1]:
            raise RuntimeError(
                f"the flow got to time {time:.3g} of {times[-1]:.3g} in {_MAX_STEPS} steps: it is stiff, as when "
                "channels settle where the input hardly varies; choose a flatter spectrum or a shorter duration"
            )
        return 1.0

    start = draw.weights.flatten().numpy()
    options = {"t_eval": times, "events": limited, "rtol": tolerance, "atol": tolerance}
    path = solve_ivp(derivative, (0.0, times[-1]), start, method="DOP853", **options)
    if not path.success:
        raise RuntimeError(f"the flow stopped after time {path.t[-1]:.3g}: {path.message}")
    return zip(times, torch.from_numpy(path.y.T.copy()).view(-1, *shape), strict=True)


def _first_below(times: np.ndarray, values: np.ndarray, level: float) -> float:
    """When values first fall below ``level``, above which they start, linear between records; infinite if never."""
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
    """What :func:`simulate` records of weights ``[S, C, F]``: one row for each seed."""
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
