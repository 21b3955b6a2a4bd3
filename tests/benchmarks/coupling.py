"""What decides how strongly the axes are coupled, at random initialisation and after training: one choice at a time.

    python -m tests.benchmarks.coupling --data DIR [--width 0.25] [--seeds 0 1 2] [--images 2000] [--out TABLE.csv]
    python -m tests.benchmarks.coupling --data DIR --trained RUN/checkpoints/last.ckpt […] [--out TABLE.csv]

ResNet-18 on CIFAR-100 with random weights of each seed, or as trained. Each row differs from the first, the study's own
measurement, in what it names, and gives ρ of input capture and task information and, beside it, the null. The noise σ₀²
of input capture is not among the choices: it changes no rank within a layer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from chanaxes_pl import compute_axes
from chanaxes_pl.analysis.correlations import main_correlation
from chanaxes_pl.compensation.layerwise import reestimate_norms
from chanaxes_pl.data import CIFAR100DataModule
from chanaxes_pl.models import Classifier, build_backbone

STUDY = "as in the study"
MARGIN = "target: how sure of its class the network is (largest logit − second)"
Choice = tuple[str, nn.Module, dict[str, Any]]


def he(width: float, seed: int) -> nn.Module:
    """As torchvision initialises it and the study trains it: He's normal weights by fan-out."""
    torch.manual_seed(seed)
    return build_backbone("resnet18", 100, width).eval()


def default(width: float, seed: int) -> nn.Module:
    """PyTorch's own initialisation of every layer: uniform, standard deviation 1/√(3 fan-in)."""
    model = he(width, seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    return model


def informed(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with norms that know the mean and variance of the images, as they do in training mode."""
    reestimate_norms(model, images.split(250))
    return model


def certainty(logits: Tensor, labels: Tensor) -> Tensor:
    first, second = logits.double().topk(2, 1).values.T
    return first - second


def measurements(model: nn.Module, probe: TensorDataset, others: dict[str, TensorDataset]) -> Iterator[Choice]:
    """The rows that differ in what is measured of one network, and on which images."""
    yield STUDY, model, {"probe": probe}
    yield "local axis: image means", model, {"probe": probe, "positions": "mean"}
    yield "local axis: one position an image", model, {"probe": probe, "positions": 1}
    yield "local axis: all positions", model, {"probe": probe, "positions": "all"}
    yield "target: log-probability of the class", model, {"probe": probe, "target": "log_probability"}
    yield "target: the class itself", model, {"probe": probe, "target": "label"}
    yield MARGIN, model, {"probe": probe, "target": certainty}
    for name, images in others.items():
        yield f"probe: {name}", model, {"probe": images}


def initialisations(probe: TensorDataset, width: float, seed: int) -> Iterator[Choice]:
    """The rows that differ in the network's random weights, and in the mode of its norms."""
    images = probe.tensors[0]
    for name, build in (("norms as in training mode", he), ("PyTorch's default weights", default)):
        for local in ({}, {"positions": "mean"}):
            model = informed(he(width, seed), images) if build is he else default(width, seed)
            yield name + (", image means" if local else ""), model, {"probe": probe, **local}
    model = informed(default(width, seed), images)
    yield "PyTorch's default weights, norms as in training mode", model, {"probe": probe}


def averages(table: pd.DataFrame) -> Iterator[tuple[str, float, float]]:
    """ρ and null of the study's measurement, averaged in other ways than over all layers alike."""
    live = table[~table["dead"]]
    columns = ["task_information", "task_information_null"]

    def correlated(rows: pd.DataFrame) -> list[float]:
        return [rows["input_capture"].corr(rows[column], method="spearman") for column in columns]

    by_layer = pd.DataFrame({layer: correlated(rows) for layer, rows in live.groupby("layer", sort=False)}).T
    sizes = live["layer"].value_counts()[by_layer.index]
    ranked = live.groupby("layer", sort=False)[["input_capture", *columns]].rank(pct=True)
    found = {
        "the median layer": by_layer.median(),
        "layers by their channels": by_layer.mul(sizes, axis=0).sum() / sizes.sum(),
        "without shortcuts": by_layer[~by_layer.index.str.contains("downsample")].mean(),
        "all channels at once, ranked by layer": correlated(ranked),
        "all channels at once, by value": correlated(live),
    }
    for name, (rho, null) in found.items():
        yield f"average: {name}", rho, null


def measured(choices: Iterator[Choice], **keys: Any) -> Iterator[dict[str, Any]]:
    """One row a choice, and those of the averages after the study's own."""
    for choice, model, arguments in choices:
        axes = compute_axes(model, resamples=0, **arguments)
        network = main_correlation(axes.correlations).iloc[0]
        rows = [(choice, network["rho"], network["null"])]
        for name, rho, null in [*rows, *(averages(axes.table) if choice == STUDY else ())]:
            print(f"{keys}: {name}: {rho:.2f} (null {null:.2f})", flush=True)
            yield {**keys, "choice": name, "rho": rho, "null": null}


def first(loader: DataLoader, count: int, transform: Callable[[Tensor], Tensor]) -> TensorDataset:
    """The first images of a loader, transformed."""
    images, labels = zip(*itertools.islice(loader, -(-count // (loader.batch_size or 1))), strict=True)
    return TensorDataset(transform(torch.cat(images)[:count]), torch.cat(labels)[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder that holds CIFAR-100")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--trained", nargs="+", default=[], help="checkpoints of the study's ResNet-18")
    parser.add_argument("--out", type=Path, help="add the rows to this CSV file")
    args = parser.parse_args()
    data = CIFAR100DataModule(root=args.data, val_size=0)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    probe = first(data.probe_dataloader(), args.images, lambda images: images)
    others = {
        f"{args.images // 4} images": TensorDataset(*(part[: args.images // 4] for part in probe.tensors)),
        "test images": first(data.test_dataloader(), args.images, data.evaluation_transform),
        "augmented images": first(data.train_dataloader(), args.images, data.training_transform),
    }
    rows: list[dict[str, Any]] = []
    for seed, path in enumerate(args.trained):
        model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        width = model.hparams["width"]
        rows += measured(measurements(model.eval(), probe, others), weights="trained", width=width, seed=seed)
    for seed in args.seeds if not args.trained else ():
        choices = itertools.chain(
            measurements(he(args.width, seed), probe, others), initialisations(probe, args.width, seed)
        )
        rows += measured(choices, weights="random", width=args.width, seed=seed)
    table = pd.DataFrame(rows)
    if args.out is not None:
        earlier = [pd.read_csv(args.out)] if args.out.exists() else []
        table = pd.concat([*earlier, table]).drop_duplicates(["weights", "width", "seed", "choice"], keep="last")
        table.to_csv(args.out, index=False, float_format="%.4f")
    summary = table.groupby(["weights", "width", "choice"], sort=False)[["rho", "null"]].agg(["mean", "min", "max"])
    print(summary.round(2).to_string())


if __name__ == "__main__":
    main()
