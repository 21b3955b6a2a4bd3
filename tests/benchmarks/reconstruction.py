"""All-peer reconstruction of a 512-channel layer beside one ridge solve per channel.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.reconstruction

Both run in turn in one process, from the same correlation matrix, and must agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from chanaxes_pl.core.moments import Moments
from chanaxes_pl.core.peers import RIDGE, peer_r2

CHANNELS, REPEATS, BUDGET = 512, 3, 100


def one_by_one(rho: Tensor) -> Tensor:
    """``[C]`` R² of every channel by a Cholesky solve of its own."""
    values = []
    for channel in range(len(rho)):
        peers = torch.arange(len(rho)) != channel
        among, toward = rho[peers][:, peers], rho[peers, channel]
        factor = torch.linalg.cholesky(among + RIDGE * torch.eye(len(toward), dtype=rho.dtype))
        beta = torch.cholesky_solve(toward[:, None], factor)[:, 0]
        values.append(2 * beta @ toward - beta @ among @ beta)
    return torch.stack(values)


def seconds(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    moments = Moments.of(torch.randn(20_000, CHANNELS, generator=generator) @ mixing)
    rho = moments.correlation
    peer_r2(moments)
    ratios, times = [], []
    for _ in range(REPEATS):
        fast, at_once = seconds(lambda: peer_r2(moments))
        slow, singly = seconds(lambda: one_by_one(rho))
        torch.testing.assert_close(at_once, singly, rtol=1e-9, atol=1e-9)
        ratios.append(slow / fast)
        times.append((fast, slow))
    fast, slow = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"all-peer reconstruction, {CHANNELS} channels: {statistics.median(ratios):.0f}× faster "
        f"({min(ratios):.0f}–{max(ratios):.0f}; budget {BUDGET}×): {fast * 1e3:.0f} ms against {slow:.1f} s one by one"
    )


if __name__ == "__main__":
    main()
