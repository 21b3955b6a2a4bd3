"""What compensation costs on a network of ImageNet's size: peak memory beyond the networks, and seconds.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.real_size --network resnet50 --images 1000 [--memory 2] \
        [--kinds refit fold] [--results FILE]

One network a process, with random weights and norms that have seen images, cut to half its MACs by L1; random images at
224×224, made anew whenever they are read. Prints a line for each kind. With ``--results`` the lines are kept in a file,
and a run that is found there is not repeated. Finding the units is timed apart. Memory is the peak of resident memory
during compensation over that before it. Seconds are of the process; a pass is a forward pass of the dense and the slim
network over all images.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from chanaxes_pl.compensation.layerwise import RIDGE, compensate
from chanaxes_pl.network.batches import Placement
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.probe import ImageBatches
from chanaxes_pl.pruning.allocation import fit_budget, keep_best, uniform_order
from chanaxes_pl.units.groups import find_units
from chanaxes_pl.units.macs import Macs
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import remove
from tests.benchmarks.pruning import scores_of

SIDE, BATCH, TESTED = 224, 64, 16


class Noise(Dataset):
    """Images of coloured noise with their number as label."""

    def __init__(self, images: int, first: int = 0) -> None:
        self._images, self._first = images, first

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self._first + index)
        blurred = torch.randn(1, 3, SIDE // 8, SIDE // 8, generator=generator)
        coarse = nn.functional.interpolate(blurred, scale_factor=8, mode="bilinear")[0]
        return coarse + 0.3 * torch.randn(3, SIDE, SIDE, generator=generator), index


def resident(field: str) -> float:
    """Gigabytes of this process: ``"VmRSS"`` now, ``"VmHWM"`` at their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def begin_peak() -> float:
    """Give freed memory back and let the peak of memory begin anew; gigabytes that are resident then."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(torch.stack([image for image, _ in (Noise(8, 10**6)[i] for i in range(8))]))
    return plain(model.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, help="name in torchvision.models")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--memory", type=float, default=2.0)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--kinds", nargs="+", choices=RIDGE, default=["refit", "fold"])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    done = args.results.read_text() if args.results and args.results.exists() else ""
    keys = {kind: f"{args.network} {kind}, {args.images} images, memory={args.memory:g}:" for kind in args.kinds}
    if all(key in done for key in keys.values()):
        return
    model, example = build(args.network), Noise(1)[0][0][None]
    begin = time.process_time()
    groups = list(find_units(model, example).groups.values())
    found = time.process_time() - begin
    kept = keep_best(
        groups, fit_budget(Macs(model, groups, example), uniform_order(groups), args.budget), scores_of(model, groups)
    )
    batches = ImageBatches(DataLoader(Noise(args.images), BATCH), args.images, Placement.of(model))
    tested = torch.stack([image for image, _ in (Noise(TESTED, 2 * 10**6)[i] for i in range(TESTED))])
    for kind, key in keys.items():
        if key in done:
            continue
        slim = clone(model).eval()
        remove(slim, groups, kept)
        listed = batches.within(args.memory / 4 * 1e9)
        images = 0.0 if isinstance(listed, ImageBatches) else sum(part.nbytes for part in listed) / 1e9
        before, begin = begin_peak(), time.process_time()
        report = compensate(slim, model, groups, kept, listed, kind, memory=args.memory)
        spent, peak = time.process_time() - begin, resident("VmHWM") - before + images
        with torch.no_grad():
            begin = time.process_time()
            _ = model(tested), slim(tested)
            one_pass = (time.process_time() - begin) / TESTED * args.images
        fitted = f"{(report.reason == '').sum()} of {len(report)} layers fitted"
        line = (
            f"{key} peak {peak:.2f} GB ({images:.2f} of it images) over {before:.2f} GB, {spent:.0f} s = "
            f"{spent / one_pass:.1f} passes; {fitted}; units found in {found:.0f} s"
        )
        print(line, flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
