"""What joint selection costs beside a dense forward pass over the probe, and what it takes of memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.joint_selection [--width 1] [--images 2000] [--memory 2]

ResNet-18 with random weights on random images at 32×32. Seconds are of the process: of a forward pass, and of the
selection without the forward passes that it makes itself. Memory is the peak of resident memory over that before.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from chanaxes_pl.models import build_backbone
from chanaxes_pl.pruning.reconstruction import reconstruction_costs
from chanaxes_pl.units.groups import find_units

BATCH, BUDGET = 125, 60


def peak() -> float:
    """Peak of this process' resident memory in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--memory", type=float, default=2.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_backbone("resnet18", 100, args.width).eval()
    pictures = torch.randn(args.images, 3, 32, 32)
    groups = find_units(model, pictures[:1]).groups.values()
    passes = 0

    def batches() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        yield from pictures.split(BATCH)

    with torch.no_grad():
        begin = time.process_time()
        for images in batches():
            model(images)
        forward = time.process_time() - begin
    passes, before, begin = 0, peak(), time.process_time()
    reconstruction_costs(model, groups, batches, model, images=args.images, memory=args.memory)
    selection = time.process_time() - begin - passes * forward
    print(
        f"joint selection, ResNet-18 at width {args.width:g}, {args.images} images: {selection:.1f} s beside {passes} "
        f"forward pass(es) of {forward:.1f} s (budget {BUDGET} s at full width); peak memory +{peak() - before:.2f} GB"
    )


if __name__ == "__main__":
    main()
