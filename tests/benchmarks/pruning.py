"""What pruning costs: a grid of budgets, one budget beside torch-pruning's own pruner, and compensation.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.pruning [--repeats 3]

At full width on 32×32 images, without evaluation. A grid is one score (L1) and one allocation (uniform) at 8 budgets:
finding units, their cost, scores, and a slim copy of the network for each budget. torch-pruning's pruner has the same
score and the same uniform ratio; it goes on by steps of half a percent of the channels, which it takes to come as near
to the MACs that it was asked for. Compensation is stated in forward passes of the dense network over the same images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from chanaxes_pl.compensation.layerwise import RIDGE, compensate
from chanaxes_pl.compensation.ridge import Ridge
from chanaxes_pl.models import build_backbone
from chanaxes_pl.pruning.allocation import GRID, fit_budget, keep_best, uniform_order
from chanaxes_pl.pruning.baselines import weight_score
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.macs import Macs, count_macs
from chanaxes_pl.units.removal import Group, remove

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
#: name: backbone, budget of a grid in seconds
MODELS = {
    "ResNet-18": ("resnet18", 10.0),
    "VGG-16": ("vgg16_bn", 10.0),
    "MobileNetV2": ("mobilenet_v2", 10.0),
    "ConvNeXt-T": ("convnext_tiny", 10.0),
}
CLASSES, IMAGES, BATCH, STEPS = 100, 500, 125, 200


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(MODELS[name][0], CLASSES).eval()


def scores_of(model: nn.Module, groups: list[Group]) -> dict[str, Tensor]:
    """Mean rank of a unit's channels within their layers by L1."""
    values = {}
    for group in groups:
        ranks = []
        for name, channels in group.producers.items():
            importance = weight_score("l1", model.get_submodule(name))
            ranks.append(importance.argsort().argsort()[channels].float().mean(1))
        values[group.name] = torch.stack(ranks).mean(0)
    return values


def pruned(model: nn.Module, budgets: tuple[float, ...]) -> list[nn.Module]:
    """Slim copies, one a budget, from nothing but the model."""
    groups = list(find_units(model, EXAMPLE).groups.values())
    cost, values, order = Macs(model, groups, EXAMPLE), scores_of(model, groups), uniform_order(groups)
    slim = []
    for budget in budgets:
        slim.append(copy.deepcopy(model))
        remove(slim[-1], groups, keep_best(groups, fit_budget(cost, order, budget), values))
    return slim


def pruned_by_library(model: nn.Module, budget: float) -> nn.Module:
    """torch-pruning's own way to a budget of MACs: uniform ratios that rise in small steps."""
    slim = copy.deepcopy(model)
    last = [m for m in slim.modules() if isinstance(m, nn.Linear)][-1]
    warnings.filterwarnings("ignore", "Unwrapped parameters detected")
    pruner = tp.pruner.MagnitudePruner(
        slim,
        EXAMPLE,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.99,
        iterative_steps=STEPS,
        ignored_layers=[last],
    )
    dense = tp.utils.count_ops_and_params(slim, EXAMPLE)[0]
    for _ in range(STEPS):
        pruner.step()
        if tp.utils.count_ops_and_params(slim, EXAMPLE)[0] <= budget * dense:
            break
    return slim


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def time_grids(repeats: int) -> None:
    print(f"\n{len(GRID)} budgets, one score, one allocation  [s]")
    for name, (_, allowed) in MODELS.items():
        model = build(name)
        spent = [seconds(lambda model=model: pruned(model, GRID))[0] for _ in range(repeats)]
        print(f"{name:12} {statistics.median(spent):6.2f} (budget {allowed:.0f})", flush=True)


def time_beside_library(repeats: int, budget: float = 0.5) -> None:
    print(f"\none budget of {budget}: seconds, and the MACs that remain")
    for name in MODELS:
        model = build(name)
        dense, spent, reached = count_macs(model, EXAMPLE), [], []
        for _ in range(repeats):
            ours, (slim,) = seconds(lambda model=model: pruned(model, (budget,)))
            theirs, other = seconds(lambda model=model: pruned_by_library(model, budget))
            spent.append((ours, theirs))
            reached = [count_macs(net, EXAMPLE) / dense for net in (slim, other)]
        ours, theirs = (statistics.median(column) for column in zip(*spent, strict=True))
        print(
            f"{name:12} ours {ours:5.2f} s, {reached[0]:.4f}; torch-pruning {theirs:6.2f} s, {reached[1]:.4f}; "
            f"{theirs / ours:.1f}× as long",
            flush=True,
        )


def time_compensation(repeats: int, name: str = "ResNet-18", budget: float = 0.5) -> None:
    model = build(name)
    batches = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(BATCH)
    groups = list(find_units(model, EXAMPLE).groups.values())
    lost = fit_budget(Macs(model, groups, EXAMPLE), uniform_order(groups), budget)
    kept = keep_best(groups, lost, scores_of(model, groups))
    print(f"\ncompensation of {name} at a budget of {budget} from {IMAGES} images")
    for strength in RIDGE:
        rows = [_one_compensation(model, groups, kept, batches, strength) for _ in range(repeats)]
        dense, slim, solves, rest = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{strength:6} {solves + rest:6.1f} s: solves {solves:.1f} s, the rest {rest:.1f} s = {rest / dense:.1f} "
            f"forward passes of the dense network, {rest / (dense + slim):.1f} of both ({dense:.1f} + {slim:.1f} s)",
            flush=True,
        )


def _one_compensation(
    model: nn.Module, groups: list[Group], kept: dict[str, Tensor], batches: tuple[Tensor, ...], strength: str
) -> tuple[float, float, float, float]:
    """Seconds: a dense and a slim pass over the images, the solves, all else."""
    slim = copy.deepcopy(model)
    remove(slim, groups, kept)
    solving, original = 0.0, Ridge.solve

    def timed(*args: Any) -> Any:
        nonlocal solving
        spent, result = seconds(lambda: original(*args))
        solving += spent
        return result

    with torch.no_grad():
        passes = [seconds(lambda net=net: [net(images) for images in batches])[0] for net in (model, slim)]
    Ridge.solve = timed
    try:
        whole, _ = seconds(lambda: compensate(slim, model, groups, kept, batches, strength))
    finally:
        Ridge.solve = original
    return passes[0], passes[1], solving, whole - solving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, torch-pruning {tp.__version__}, {torch.get_num_threads()} thread(s)")
    time_grids(args.repeats)
    time_beside_library(args.repeats)
    time_compensation(args.repeats)


if __name__ == "__main__":
    main()
