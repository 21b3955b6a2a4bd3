"""How much faster a network is at half its multiply–accumulates, and at half its latency.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.speedup [--networks ResNet-18 …] [--compiled no yes] [--batches 1 64]

torchvision's networks at 224×224 with random weights, which suffice for timing, uniform allocation, no compensation.
One thread; every number is the dense network's processor time over the slim one's, the median of rounds in which both
run in turns. Batches of 64 have a third of the rounds. The latency budget is that of batch 1, contiguous, uncompiled.
Compilation is ``torch.compile`` with its defaults for each batch size, which needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models import mobilenet_v2, resnet18

from chanaxes_pl.pruning.allocation import fit_budget, uniform_order
from chanaxes_pl.pruning.costs import without
from chanaxes_pl.pruning.pruner import BudgetOf, Pruner

NETWORKS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2}
#: what the budget is a share of, and round_to
VARIANTS: tuple[tuple[BudgetOf, int], ...] = (("macs", 1), ("macs", 8), ("latency", 1), ("latency", 8))
BUDGET, FORMATS = 0.5, (torch.contiguous_format, torch.channels_last)


def slim_networks(model: nn.Module) -> dict[tuple[BudgetOf, int], nn.Module]:
    slims, image = {}, TensorDataset(torch.randn(1, 3, 224, 224), torch.zeros(1).long())
    for budget_of, round_to in VARIANTS:
        pruner = Pruner(model, image, budget_of=budget_of, round_to=round_to)
        lost = fit_budget(pruner.cost, uniform_order(pruner.groups), BUDGET, round_to)
        slims[budget_of, round_to] = without(model, pruner.groups, lost)
        shares = (pruner.macs.of(lost) / pruner.macs.dense, pruner.cost.of(lost) / pruner.cost.dense)
        print(
            f"  {budget_of} {BUDGET}, round_to={round_to}: {shares[0]:.3f} of the MACs, {shares[1]:.3f} of the budget"
        )
    return slims


def seconds(model: nn.Module, images: Tensor) -> float:
    begin = time.process_time()
    model(images)
    return time.process_time() - begin


@torch.inference_mode()
def ratios(dense: nn.Module, slims: list[nn.Module], images: Tensor, rounds: int) -> tuple[float, list[float]]:
    """The dense network's seconds, and how many times as fast each slim one is."""
    for network in (dense, *slims):
        seconds(network, images)  # compiles, and warms up
    times = [[seconds(network, images) for network in (dense, *slims)] for _ in range(rounds)]
    return statistics.median(row[0] for row in times), [
        statistics.median(row[0] / row[place] for row in times) for place in range(1, len(slims) + 1)
    ]


def laid_out(model: nn.Module, layout: torch.memory_format, compiled: bool) -> nn.Module:
    model = copy.deepcopy(model).to(memory_format=layout)
    return torch.compile(model, dynamic=False) if compiled else model


def report(name: str, repeats: int, compilations: list[str], batches: list[int]) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    print(name, flush=True)
    slims = slim_networks(model)
    print(f"  {'batch':>5} {'layout':13} {'compiled':8} {'dense':>9}   ", "   ".join(f"{of} {q}" for of, q in VARIANTS))
    for compiled, layout, batch in product(compilations, FORMATS, batches):
        torch.compiler.reset()
        images = torch.randn(batch, 3, 224, 224).to(memory_format=layout)
        dense, *others = (laid_out(network, layout, compiled == "yes") for network in (model, *slims.values()))
        took, faster = ratios(dense, others, images, repeats if batch == 1 else max(3, repeats // 3))
        shown = "   ".join(
            f"{ratio:{len(f'{of} {q}') - 1}.2f}×" for ratio, (of, q) in zip(faster, VARIANTS, strict=True)
        )
        nhwc = "channels last" if layout == torch.channels_last else "contiguous"
        print(f"  {batch:5} {nhwc:13} {compiled:8} {1e3 * took:6.0f} ms   ", shown, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compiled", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")
    for chosen in arguments.networks:
        report(chosen, arguments.repeats, arguments.compiled, arguments.batches)
