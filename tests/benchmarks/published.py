"""Pruning without labels or fine-tuning beside what others published for the same kind of network and the same budget.

    python -m tests.benchmarks.published --data DIR RUN/checkpoints/last.ckpt […] [--out TABLE.csv]

The others' numbers are for CIFAR-10, which is easier; ours are for networks that ``chanaxes fit`` trained on CIFAR-100.
So the simplest of their methods, filters of least norm and norm statistics measured anew, is also run here, at the same
budget on the same network, beside the default of ``prune``. Accuracies are of 5,000 test images, a fixed random choice.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import prune, sensitivity
from chanaxes_pl.data import CIFAR100DataModule
from chanaxes_pl.models.checkpoints import load_classifier


class Published(NamedTuple):
    """A result of others: accuracies in percent, before and after."""

    source: str
    method: str
    backbone: str  # whose networks are compared with it here
    budget_of: str
    budget: float
    dense: float
    pruned: float


PUBLISHED = (
    Published(
        "Cut Less, Fold More (arXiv 2602.18116), ResNet-18, CIFAR-10",
        "filters of least L2 norm, statistics repaired",
        "resnet18",
        "parameters",
        0.5,
        93.2,
        86.9,
    ),
    Published(
        "TensorRT Model Optimizer's FastNAS notebook, ResNet-20, CIFAR-10",
        "searched widths, before fine-tuning",
        "resnet18",
        "macs",
        0.73,
        91.0,
        60.4,
    ),
    Published(
        "Neuron Merging (arXiv 2010.13160), VGG-16, CIFAR-10",
        "filters of least L1 norm, merged into the rest",
        "vgg16_bn",
        "parameters",
        0.36,
        93.70,
        93.16,
    ),
)
#: What is run here for each of them.
RUNS: dict[str, dict[str, Any]] = {
    "least L2 norm, same share of each layer, statistics measured anew": {
        "score": "l2",
        "allocation": "uniform",
        "compensate": False,
        "reestimate": True,
    },
    "default": {},
}
IMAGES, TESTED, EVALUATED = 2000, 10_000, 5000


def first(loader: DataLoader, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a loader, and their labels."""
    images, labels = zip(*itertools.islice(loader, -(-count // (loader.batch_size or 1))), strict=True)
    return torch.cat(images)[:count], torch.cat(labels)[:count]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    right = [(model(part).argmax(1) == truth) for part, truth in zip(images.split(250), labels.split(250), strict=True)]
    return 100 * float(torch.cat(right).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", required=True, help="the folder that holds CIFAR-100")
    parser.add_argument("--out", type=Path, help="add the rows to this CSV file")
    args = parser.parse_args()
    data = CIFAR100DataModule(root=args.data, val_size=0)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    probe = TensorDataset(*first(data.probe_dataloader(), IMAGES))
    images, labels = first(data.test_dataloader(), TESTED)
    chosen = torch.randperm(TESTED, generator=torch.Generator().manual_seed(0))[:EVALUATED]
    images, labels = data.evaluation_transform(images[chosen]), labels[chosen]
    rows = []
    for path in args.checkpoints:
        classifier = load_classifier(path)
        model, settings = classifier.network.eval(), classifier.hparams
        name = {
            "backbone": settings["backbone"],
            "width": settings["width"],
            "network": "/".join(Path(path).parts[-4:-2]),
        }
        dense, table = accuracy(model, images, labels), None
        for theirs in PUBLISHED:
            if theirs.backbone != settings["backbone"]:
                continue
            for method, options in RUNS.items():
                if not options and table is None:
                    table = sensitivity(model, probe)
                measured = {} if options else {"sensitivity": table}
                slim = prune(model, probe, budget=theirs.budget, budget_of=theirs.budget_of, **options, **measured)
                top1 = accuracy(slim.model, images, labels)
                kept = {"macs": slim.macs / slim.dense_macs, "parameters": _size(slim.model) / _size(model)}
                row = name | {"beside": theirs.source, "budget_of": theirs.budget_of, "budget": theirs.budget}
                rows.append(row | {"method": method, "dense": dense, "pruned": top1} | kept)
                print(
                    ", ".join(
                        f"{key} {value:.3g}" if isinstance(value, float) else f"{value}"
                        for key, value in rows[-1].items()
                    ),
                    flush=True,
                )
    table = pd.DataFrame(rows)
    if args.out is not None:
        earlier = [pd.read_csv(args.out)] if args.out.exists() else []
        table = pd.concat([*earlier, table]).drop_duplicates(["network", "width", "beside", "method"], keep="last")
        table.to_csv(args.out, index=False, float_format="%.4f")
    print(f"{'points lost':>12}  of")
    for theirs in PUBLISHED:
        print(f"{theirs.dense - theirs.pruned:12.1f}  {theirs.dense:.1f}  {theirs.source}: {theirs.method}")
        ours = table[table["beside"] == theirs.source]
        for (backbone, width, method), part in ours.groupby(["backbone", "width", "method"], sort=False):
            lost = part["dense"] - part["pruned"]
            spread = f" ({lost.min():.1f} to {lost.max():.1f})" if len(lost) > 1 else ""
            here = f"here, {backbone} at width {width:g}: {method}{spread}"
            print(f"{lost.mean():12.1f}  {part['dense'].mean():.1f}  {here}")


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
