"""What each step of pruning costs beside a dense forward pass over the probe, and what it takes of memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.steps [--backbone resnet18] [--width 1] [--images 2000] [--memory 2]

A network with random weights on random images at 32×32, cut to half of its MACs. Seconds are of the process; those of
joint selection are without the forward passes that it makes itself (budget: 60 at full width). Polish is timed for 20
steps and stated for 600. Memory is the peak of resident memory over that before the step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from chanaxes_pl.compensation.polish import STEPS, polish
from chanaxes_pl.models import BACKBONES, build_backbone
from chanaxes_pl.pruning.pruner import Pruner
from chanaxes_pl.pruning.reconstruction import reconstruction_costs
from tests.benchmarks.real_size import begin_peak, resident

BATCH, POLISHED, BUDGET = 125, 20, 0.5


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a step, and gigabytes of memory that it takes."""
    before, begin = begin_peak(), time.process_time()
    step()
    return time.process_time() - begin, resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--memory", type=float, default=2.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_backbone(args.backbone, 100, args.width).eval()
    pictures = torch.randn(args.images, 3, 32, 32)
    passes = 0

    def batches() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        yield from pictures.split(BATCH)

    @torch.no_grad()
    def forward() -> None:
        for images in batches():
            model(images)

    one, _ = timed(forward)
    print(f"{args.backbone} at width {args.width:g}, {args.images} images: a dense forward pass takes {one:.1f} s")

    def tell(step: str, seconds: float, peak: float) -> None:
        print(f"  {step}: {seconds:.1f} s = {seconds / one:.1f} passes; memory +{peak:.2f} GB", flush=True)

    data = TensorDataset(pictures, torch.arange(args.images) % 100)
    pruner = Pruner(model, data, probe_size=args.images, memory=args.memory)
    passes = 0
    seconds, peak = timed(
        lambda: reconstruction_costs(model, pruner.groups, batches, model, images=args.images, memory=args.memory)
    )
    tell(f"joint selection beside {passes} passes", seconds - passes * one, peak)
    scores = pruner.scores(["l1"])
    tables = []
    tell("sensitivity", *timed(lambda: tables.append(pruner.sensitivity(scores, "l1"))))
    kept = pruner.choose(scores, "l1", "sensitivity", BUDGET, tables[0])
    slim = pruner.cut(kept)
    tell("refit", *timed(lambda: pruner.compensate(slim, kept, "refit")))

    def polished() -> None:
        polish(slim, model, pruner.groups, kept, pruner.batches, steps=POLISHED, memory=args.memory)

    seconds, peak = timed(polished)
    tell(f"polish, {STEPS} steps by {POLISHED}", seconds * STEPS / POLISHED, peak)


if __name__ == "__main__":
    main()
