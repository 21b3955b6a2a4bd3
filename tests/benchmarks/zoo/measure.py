"""What the zoo measures of one network, column by column, in a process of its own.

    python -m tests.benchmarks.zoo.measure NETWORK [--library] [--limit SECONDS] [--memory GB]

Every line of the output is a JSON object of columns. What goes wrong is a result, too: the text of the error stands in
the column of the step that raised it. The process ends itself when it has used its time.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from chanaxes_pl import compute_axes, find_units, load_slim, prune
from chanaxes_pl.compensation.layerwise import reestimate_norms
from chanaxes_pl.network.batches import logits_of
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import calls, observed
from chanaxes_pl.network.layers import CONVOLUTIONS, channel_count
from chanaxes_pl.units.groups import Units
from chanaxes_pl.units.macs import Macs, count_macs
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import masked, remove
from tests.benchmarks.zoo.networks import CLASSES, NETWORKS, Network, batch_of, build

IMAGES = 32
#: Share of the MACs that is asked for; where it is out of reach, this much above the least that can be reached.
BUDGET, ABOVE_LEAST = 0.5, 0.05
#: Steps in which torch-pruning's pruner goes from nothing to all channels.
STEPS = 50
#: What a column holds if the step went as it should.
YES = "yes"
# How reasons begin that are of one channel, not of a layer that was left out.
_OF_A_CHANNEL = ("dead", "output not finite", "target", "no alignment")
# Agreement, as a share of the largest logit: float32 rounding, and random weights that can amplify it.
_CLOSE = 1e-3


def measured(network: Network) -> Iterator[dict[str, Any]]:
    """Yield columns as they are known; the column ``step`` names what is being done."""
    images, labels = batch_of(network, IMAGES)
    probe, one = TensorDataset(images, labels), images[:1]
    whole = _with_statistics(network, images)
    model = plain(whole)  # what is pruned
    shares, macs = _layer_shares(model, one)
    yield {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": macs,
        "layers": sum(isinstance(module, (*CONVOLUTIONS, nn.Linear)) for module in model.modules()),
        "step": "find_units",
        "outcome": "",
    }
    begin = time.process_time()
    units = yield from _told("outcome", lambda: find_units(model, one))
    if units is not None:
        yield {"find_s": _since(begin), **_of_units(units, shares), "step": "prune"}
        least = Macs(model, units.groups.values(), one)
        removed = torch.tensor([group.size - 1 for group in least.groups]).numpy()
        reach = least.of(removed) / least.dense
        budget = BUDGET if reach < BUDGET else round(min(1.0, reach + ABOVE_LEAST), 3)
        yield {"least": round(reach, 4), "budget": budget}
        begin = time.process_time()
        slim = yield from _told("outcome", lambda: prune(whole, probe, budget=budget, score="l1", allocation="uniform"))
        if slim is not None:
            yield {"prune_s": _since(begin), "memory_mb": _peak(), "reached": round(slim.macs / slim.dense_macs, 4)}
            yield {"outcome": YES, "step": "masked"}
            kept = {name: torch.tensor(stays) for name, stays in slim.plan.kept.items()}
            yield from _checked("masked", lambda: _off_masked(model, units, kept, images))
            yield {"step": "reloaded"}
            yield from _checked("reloaded", lambda: _reloaded(network, slim, images))
            yield {"step": "trains"}
            yield from _checked("trains", lambda: _trains(slim.model, images))
            yield {"step": "exported"}
            yield from _checked("exported", lambda: _exported(slim.model, images))
    yield from _of_axes(whole, images, labels)
    yield {"step": ""}


def measured_library(network: Network) -> Iterator[dict[str, Any]]:
    """Yield what torch-pruning's own pruner makes of the network; its ratio rises until half the MACs remain."""
    import torch_pruning as tp

    images, _ = batch_of(network, IMAGES)
    model = _with_statistics(network, images)
    one = images[:1]
    dense = count_macs(model, one)
    yield {"library": "", "step": "library"}
    ran = [
        call.name for call in calls(model, lambda: model(one)) if isinstance(call.module, (*CONVOLUTIONS, nn.Linear))
    ]
    heads = [name for name in ran if channel_count(model.get_submodule(name)) == CLASSES or name == ran[-1]]
    begin = time.process_time()

    def reach() -> tuple[float, nn.Module]:
        slim = clone(model)
        pruner = tp.pruner.MagnitudePruner(
            slim,
            one,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.98,
            iterative_steps=STEPS,
            ignored_layers=[slim.get_submodule(name) for name in heads],
            output_transform=logits_of,
        )
        share = 1.0
        for _ in range(STEPS):
            pruner.step()
            share = count_macs(slim, one) / dense
            if share <= BUDGET:
                break
        return share, slim

    found = yield from _told("library", reach)
    if found is not None:
        share, slim = found
        yield {"library_s": _since(begin), "library_reached": round(share, 4), "library_memory_mb": _peak()}
        with observed(slim):
            logits = yield from _told("library", lambda: logits_of(slim(images[:2])))
        if logits is not None:
            with observed(model):
                same = logits.shape == logits_of(model(images[:2])).shape
            yield {"library": YES if same else "the slim network's output has another shape"}
    yield {"step": ""}


def _with_statistics(network: Network, images: Tensor) -> nn.Module:
    """Return the network with the BatchNorm statistics of some images, so that its maps do not explode."""
    model = build(network)
    reestimate_norms(model, [images])
    return model.eval()


def _layer_shares(model: nn.Module, one: Tensor) -> tuple[dict[str, float], int]:
    """Return each convolution's and Linear layer's share of the MACs, and the MACs."""
    total, shares = count_macs(model, one), Counter[str]()
    for call in calls(model, lambda: model(one)):
        if isinstance(call.module, (*CONVOLUTIONS, nn.Linear)):
            positions = math.prod(call.output_shape) // channel_count(call.module)
            shares[call.name] += positions * call.module.weight.numel() / total
    return dict(shares), total


def _of_units(units: Units, shares: dict[str, float]) -> dict[str, Any]:
    groups = units.groups.values()
    touched = {name for group in groups for name in (*group.producers, *group.consumers)}
    lost = Counter[str]()  # reason → share of the MACs in layers that no unit is part of
    lost["neither a convolution nor a Linear layer"] = 1 - sum(shares.values())
    for name, share in shares.items():
        if name not in touched:
            lost[_general(units.fixed.get(name, "not listed"))] += share
    return {
        "prunable": len({name for group in groups for name in group.producers}),
        "groups": len(groups),
        "units": sum(group.size for group in groups),
        "share_prunable": round(sum(shares.get(name, 0.0) for name in touched), 4),
        "fixed": len(units.fixed),
        "main_reason": max(lost, key=lost.__getitem__, default=""),
        "fixed_reasons": _counted(_general(reason) for reason in units.fixed.values()),
    }


def _of_axes(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[dict[str, Any]]:
    before, probe = images.clone(), TensorDataset(images, labels)
    target = _closeness if labels.is_floating_point() else "auto"
    settings: dict[str, Any] = {"layers": "conv+linear", "positions": 4, "reliability": False, "target": target}
    yield {"step": "axes"}
    begin = time.process_time()
    axes = yield from _told("axes", lambda: compute_axes(model, probe, alignment=True, **settings))
    if axes is not None:
        reasons = axes.table.groupby("layer").reason.first()
        left = [reason for reason in reasons if reason and not reason.startswith(_OF_A_CHANNEL)]
        yield {
            "axes": YES if images.equal(before) else "changes the probe's images",
            "axes_s": _since(begin),
            "tracked": len(reasons) - len(left),
            "left_out": len(left),
            "left_out_reasons": _counted(map(_general, left)),
        }


def _off_masked(model: nn.Module, units: Units, kept: dict[str, Tensor], images: Tensor) -> str:
    groups, slim = list(units.groups.values()), clone(model).eval()
    remove(slim, groups, kept)
    with observed(model), observed(slim):
        found = logits_of(slim(images))
        with masked(model, groups, kept):
            wanted = logits_of(model(images))
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return YES if off <= _CLOSE else f"off by {off:.1g}"


def _reloaded(network: Network, slim: Any, images: Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder:
        slim.save(Path(folder) / "slim")
        loaded = load_slim(Path(folder) / "slim", build(network, seed=2))
    with observed(loaded), observed(slim.model):
        same = logits_of(loaded(images)).equal(logits_of(slim.model(images)))
    return YES if same else "other logits"


def _trains(model: nn.Module, images: Tensor) -> str:
    """Return whether a step of training runs, auxiliary heads included."""
    copied = clone(model).train().requires_grad_(True)
    output = copied(images)
    tensors = [value for value in torch.utils._pytree.tree_leaves(output) if isinstance(value, Tensor)]
    sum(tensor.float().mean() for tensor in tensors).backward()  # type: ignore[union-attr]
    return YES


def _exported(model: nn.Module, images: Tensor) -> str:
    with torch.no_grad():
        program = torch.export.export(clone(model).eval(), (images[:2],)).module()
        found, wanted = logits_of(program(images[:2])), logits_of(model(images[:2]))
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return YES if off <= _CLOSE else f"off by {off:.1g}"


def _closeness(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the task variable ``[B]`` of networks from images to images."""
    return -(outputs - labels).square().flatten(1).mean(1)


def _told(column: str, run: Any) -> Iterator[dict[str, Any]]:
    """Yield the error of a step, if there is one, into a column; return what the step gives, or ``None``."""
    try:
        return run()
    except Exception as error:  # whatever it raises is the result
        text = " ".join(str(error).split())[:400]
        kind = "refused" if type(error).__module__.startswith("chanaxes_pl") else f"failed: {type(error).__name__}"
        yield {column: f"{kind}: {text}"}
    return None


def _checked(column: str, run: Any) -> Iterator[dict[str, Any]]:
    answer = yield from _told(column, run)
    if answer is not None:
        yield {column: answer}


def _counted(reasons: Any) -> str:
    return "; ".join(f"{count}× {reason}" for reason, count in Counter(reasons).most_common())


def _general(reason: str) -> str:
    """Return a reason without the numbers and names of one layer, so that like reasons are counted together."""
    text = reason.split(" (")[0] if reason.startswith(("some of its", "the network does not")) else reason
    return re.sub(r"\b\w+(\.\w+)+\b|\b\d[\d.e+-]*\b", "…", text)


def _since(begin: float) -> float:
    return round(time.process_time() - begin, 2)


def _peak() -> int:
    """Return the largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS, metavar="NETWORK")
    parser.add_argument("--library", action="store_true", help="torch-pruning's own pruner instead")
    parser.add_argument("--limit", type=int, default=180, help="seconds of processor time")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that the process may allocate")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory * 1e9),) * 2)
    warnings.simplefilter("ignore")
    steps = measured_library if args.library else measured
    for columns in steps(NETWORKS[args.network]):
        print(json.dumps(columns), flush=True)


if __name__ == "__main__":
    main()
