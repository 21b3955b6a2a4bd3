"""What a lesion costs when only what lies downstream of it runs again, beside a whole forward pass.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.lesions [MODEL ...] [--device cuda]

Both kinds of ``mean`` lesion run in turn in one process on the same batch, and must give the same logits. The cost
depends on the layer alone, so one channel a layer is timed, and layers count by their channels: the ratio is that of
lesioning every channel once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from chanaxes_pl.lesions.interventions import Intervention
from chanaxes_pl.lesions.replacements import Replacement, replacement
from chanaxes_pl.models import build_backbone
from chanaxes_pl.network.hooks import observed
from chanaxes_pl.network.layers import channel_count, select_layers
from chanaxes_pl.network.tracing import PartialForward

BATCH = 50
#: name: backbone, budget of the ratio
MODELS = {"ResNet-18": ("resnet18", 2.5), "MobileNetV2": ("mobilenet_v2", None), "ConvNeXt-T": ("convnext_tiny", None)}


def seconds(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    logits = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], default=[], metavar="MODEL")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.device}, batch of {args.batch}")
    print(f"{'model':14} {'faster':>7} {'budget':>7} {'whole':>8} {'fast':>8}  [ms a lesion]")
    for name in args.models or MODELS:
        ratio, whole, fast = compare(name, args.device, args.batch, args.repeats)
        budget = MODELS[name][1]
        shown = "–" if budget is None else f"{budget}×"
        print(f"{name:14} {ratio:6.2f}× {shown:>7} {whole * 1e3:8.1f} {fast * 1e3:8.1f}", flush=True)


def compare(name: str, device: str, batch: int, repeats: int) -> tuple[float, float, float]:
    """How many times faster, and seconds a lesion, each over all channels: whole, fast."""
    torch.manual_seed(0)
    model = build_backbone(MODELS[name][0], 100, 1.0, 32).to(device)
    images = torch.randn(batch, 3, 32, 32, device=device)
    layers = select_layers(model, "conv")
    paths = {module: path for path, module in model.named_modules()}
    totals = [0.0, 0.0]
    with observed(model):
        forward = PartialForward(model)
        forward.run(images)
        assert forward.partial
        for layer in layers.values():
            width = channel_count(layer)
            nothing = torch.zeros(width, width, dtype=torch.float64)
            statistics = Replacement(nothing[0], nothing[0], nothing, nothing)
            change = Intervention({paths[layer]: replacement(layer, 0, statistics, "mean")})

            def whole(change: Intervention = change) -> Tensor:
                with change.applied(model):
                    return model(images)

            def fast(change: Intervention = change) -> Tensor:
                return change.rerun(model, forward)

            pairs = [(seconds(whole, device), seconds(fast, device)) for _ in range(repeats + 1)][1:]
            torch.testing.assert_close(pairs[0][0][1], pairs[0][1][1], rtol=1e-4, atol=1e-4)
            for kind in range(2):
                totals[kind] += width * statistics.median(pair[kind][0] for pair in pairs)
    channels = sum(map(channel_count, layers.values()))
    return totals[0] / totals[1], totals[0] / channels, totals[1] / channels


if __name__ == "__main__":
    main()
