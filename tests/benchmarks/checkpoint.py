"""What a tracker checkpoint costs beside a bare forward pass, in time and in memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.checkpoint [MODEL ...] [--device cuda] [--precision bf16]
    OMP_NUM_THREADS=1 python -m tests.benchmarks.checkpoint --training   # what the tracker adds to training
    OMP_NUM_THREADS=1 python -m tests.benchmarks.checkpoint --final      # the part beyond forward passes

Bare and tracked batches run in turn in one process. Time ratios are for a whole checkpoint of 5,000
images: 40 batches at the median of the measured ones, plus the median of the final computation (metrics,
reliabilities, null, correlations). With ``--training``, the seconds of a checkpoint by those of an epoch: with default
settings there is one an epoch, and one before the first. Data loading counts on neither side. Memory is the peak of
one process each, tracked less bare.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torchvision.models import get_model

from chanaxes_pl.analysis.correlations import axis_correlations
from chanaxes_pl.core.targets import Target
from chanaxes_pl.models import build_backbone
from chanaxes_pl.models.backbones import Backbone
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import channel_count, select_layers
from chanaxes_pl.network.recording import Recorder
from chanaxes_pl.tables import axes_table
from chanaxes_pl.tracking.logging import checkpoint_scalars

IMAGES, BATCH = 5000, 125
# As many images as leave no layer without independent samples.
FINAL_BATCHES = 20
#: name: backbone, width, image size, budget of the time ratio
MODELS = {
    "ResNet-18": ("resnet18", 1.0, 32, 1.10),
    "ResNet-18, quarter width": ("resnet18", 0.25, 32, 1.25),
    "VGG-16": ("vgg16_bn", 1.0, 32, 1.25),
    "MobileNetV2": ("mobilenet_v2", 1.0, 32, 1.25),
    "ConvNeXt-T": ("convnext_tiny", 1.0, 64, 1.25),
}
#: name: backbone, width, image size, images an epoch, images a batch
TRAININGS = {
    "ResNet-18 on CIFAR": ("resnet18", 1.0, 32, 50_000, 125),
    "ResNet-18, quarter width, on CIFAR": ("resnet18", 0.25, 32, 50_000, 125),
    "ResNet-50 on ImageNet": ("resnet50", 1.0, 224, 1_281_167, 25),
}
#: name: backbone, image size; the final computation depends on the widths alone.
FINALS = {
    "ResNet-50": ("resnet50", 64),
    "EfficientNet-B0": ("efficientnet_b0", 64),
    "RegNetY-400MF": ("regnet_y_400mf", 64),
}


class Bench:
    """One model with one batch of its probe."""

    def __init__(
        self,
        model: tuple[str, float, int],
        device: str,
        precision: str,
        compiled: bool,
        channels_last: bool,
        alignment: bool = False,
        batch: int = BATCH,
    ) -> None:
        backbone, width, size = model
        self.batch = batch
        torch.manual_seed(0)
        ours = backbone in get_args(Backbone)
        network = build_backbone(backbone, 100, width, size) if ours else get_model(backbone, num_classes=100)  # type: ignore[arg-type]
        self.model = network.to(device).eval()
        self.images = torch.randn(batch, 3, size, size, device=device)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.labels = torch.arange(batch, device=device) % 100
        self.layers = select_layers(self.model, "conv")
        self.recorder = Recorder(self.layers, Target("logit_margin"), alignment=alignment)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimiser = torch.optim.SGD(self.model.parameters(), 1e-9, momentum=0.9)
        self.device = device
        self.context: Callable[[], Any] = (
            nullcontext if precision == "float32" else lambda: torch.autocast(device, torch.bfloat16)
        )

    def bare(self, number: int) -> None:
        with torch.no_grad(), self.context():
            self.forward(self.images)

    def tracked(self, number: int) -> None:
        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            with self.context():
                return self.model(self.images), self.labels

        with observed(self.model), self.recorder.attached():
            self.recorder.record(np.arange(number * self.batch, (number + 1) * self.batch), forward)

    def training(self, number: int) -> None:
        self.model.train()
        with self.context():
            loss = torch.nn.functional.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.model.eval()

    def final(self, number: int) -> None:
        table = axes_table(self.recorder.moments(), {n: channel_count(m) for n, m in self.layers.items()})
        checkpoint_scalars(table, axis_correlations(table))

    def seconds(
        self, part: Callable[[int], None], number: int, clock: Callable[[], float] = time.perf_counter
    ) -> float:
        self._wait()
        begin = clock()
        part(number)
        self._wait()
        return clock() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def added_to_training(bench: Bench, epoch: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of an epoch, of a bare pass over the probe and of a checkpoint."""
    parts = (bench.training, bench.bare, bench.tracked)
    for part in parts:
        part(0)
    rounds = [[bench.seconds(part, number) for part in parts] for number in range(1, repeats + 1)]
    training, bare, tracked = (statistics.median(times) / bench.batch for times in zip(*rounds, strict=True))
    final = statistics.median(bench.seconds(bench.final, 0) for _ in range(3))
    return epoch * training, IMAGES * bare, IMAGES * tracked + final


def time_ratio(bench: Bench, repeats: int) -> tuple[float, float, float, float, float, float]:
    """Ratio, its smallest and largest over the measured pairs, and seconds: bare pass, tracked pass, final."""
    for part in (bench.bare, bench.tracked):
        part(0)
    pairs = [(bench.seconds(bench.bare, k), bench.seconds(bench.tracked, k)) for k in range(1, repeats + 1)]
    final = statistics.median(bench.seconds(bench.final, 0) for _ in range(3))
    batches = IMAGES // BATCH
    bare, tracked = (batches * statistics.median(times) for times in zip(*pairs, strict=True))
    each = [(t + final / batches) / b for b, t in pairs]
    return (tracked + final) / bare, min(each), max(each), bare, tracked, final


def peak_megabytes(name: str, tracked: bool, batches: int) -> float:
    """Peak resident memory of a process that makes one pass."""
    call = [sys.executable, "-m", __spec__.name, name, "--peak", "tracked" if tracked else "bare", str(batches)]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], default=[], metavar="MODEL")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="compile the bare pass")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--alignment", action="store_true", help="with the gradients' alignment")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--training", action="store_true", help="what the tracker adds to training, and nothing else")
    parser.add_argument("--final", action="store_true", help="the part beyond forward passes, and nothing else")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = (args.device, args.precision, args.compiled, args.channels_last, args.alignment)
    if args.peak:
        bench = Bench(MODELS[args.models[0]][:3], *options)
        for number in range(int(args.peak[1])):
            (bench.tracked if args.peak[0] == "tracked" else bench.bare)(number)
        if args.peak[0] == "tracked":
            bench.final(0)
        # Not ru_maxrss: a child begins with its parent's.
        print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)  # type: ignore[index]
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.device}, {args.precision}")
    if args.training:
        print(f"{'training':36} {'epoch':>10} {'bare pass':>10} {'checkpoint':>10}  [s]  added to an epoch")
        for name, (*model, epoch, batch) in TRAININGS.items():
            bench = Bench(tuple(model), *options, batch)  # type: ignore[arg-type]
            whole, bare, checkpoint = added_to_training(bench, epoch, args.repeats)
            print(f"{name:36} {whole:10.0f} {bare:10.1f} {checkpoint:10.1f}  {checkpoint / whole:.2%}", flush=True)
        return
    if args.final:
        for name, (backbone, size) in FINALS.items():
            bench = Bench((backbone, 1.0, size), *options)
            for number in range(FINAL_BATCHES):
                bench.images = torch.randn_like(bench.images) + torch.randn_like(bench.images[:, :, :1, :1])
                bench.tracked(number)
            seconds = statistics.median(bench.seconds(bench.final, 0, time.process_time) for _ in range(args.repeats))
            print(f"final part of {name:16} {len(bench.layers):3} layers {seconds:6.2f} s of one core", flush=True)
        return
    print(f"{'model':26} {'ratio':>6} {'(min–max)':>12} {'budget':>7} {'bare':>8} {'tracked':>8} {'final':>6}  [s]")
    for name in args.models or MODELS:
        bench = Bench(MODELS[name][:3], *options)
        ratio, low, high, bare, tracked, final = time_ratio(bench, args.repeats)
        spread = f"({low:.2f}–{high:.2f})"
        print(
            f"{name:26} {ratio:6.3f} {spread:>12} {MODELS[name][3]:7.2f} {bare:8.1f} {tracked:8.1f} {final:6.2f}",
            flush=True,
        )
    if not args.no_memory and args.device == "cpu":
        for batches in (2, 8):
            added = peak_megabytes("ResNet-18", True, batches) - peak_megabytes("ResNet-18", False, batches)
            print(
                f"memory added, ResNet-18, probe of {batches * BATCH:5} images: {added:.0f} MB (budget 150)", flush=True
            )


if __name__ == "__main__":
    main()
