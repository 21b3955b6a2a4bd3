"""Dependency groups: which channels can only be removed together.

A *unit* is a set of coupled channels: a channel of a layer, of the norm behind it and of every layer that a residual
sum couples to it, with the inputs that read it. A :class:`Group` holds all units of a set of coupled layers.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, InputError, naming, nearest, short
from chanaxes_pl.core.moments import accumulation_device
from chanaxes_pl.core.targets import describe
from chanaxes_pl.network.batches import FAILURES, logits_of
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import calls, check_network, entered, isolated_rng, undisturbed
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED
from chanaxes_pl.units.flow import LAYER_NORMS, LAYERS, Flow, goes_by_groups
from chanaxes_pl.units.plain import plain
from chanaxes_pl.units.removal import Cut, Group, disagreement, remove

# A trial removal keeps these shares of each group's units, because some errors show only if few units stay.
_KEPT = (1 / 2, 1 / 12)
# Its logits must agree to this share of the largest one, by the precision that the network computes in.
_AGREE = {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False)
class Units:
    """All units of a network.

    Attributes:
        groups: name → group of units that can be removed, in the order of execution.
        fixed: name of any other layer → why its channels stay.
    """

    groups: dict[str, Group]
    fixed: dict[str, str]

    def protect(self, patterns: str | Sequence[str]) -> Units:
        """Return the units without the groups that have a producer whose name matches one of some globs.

        Raises:
            TypeError: if a pattern is no text.
            ValueError: if one matches no layer.
        """
        patterns = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ArgumentTypeError(
                f"protect={short(patterns)}", "expected a glob over layer names, or several, such as ['layer4.*']"
            )
        names = [name for group in self.groups.values() for name in group.producers] + list(self.fixed)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ArgumentError(f"protect={pattern!r}", f"matches no layer; {nearest(pattern, names)}")
        kept, hit = {}, []
        for name, group in self.groups.items():
            if any(fnmatchcase(producer, pattern) for producer in group.producers for pattern in patterns):
                hit += list(group.producers)
            else:
                kept[name] = group
        return replace(self, groups=kept, fixed=self.fixed | dict.fromkeys(hit, "protected by name"))


def find_units(model: nn.Module, example: Tensor) -> Units:
    """Find the units of a model by one forward pass, and try their removal on a copy.

    Layers have their names in the model with plain weights, see :func:`plain`; those of an attention are ``in_proj``,
    for queries, keys and values together, and ``out_proj``.

    Args:
        model: model to search; it does not change. Of what it gives, only the logits count, see :func:`logits_of`; what
            only other outputs depend on stays whole.
        example: ``[B, …]``, an input of the model, on its device.

    Raises:
        ValueError: if the model does not run on the example, or has no channels that can be removed.
    """
    with naming("find_units"), undisturbed(model), isolated_rng():  # what runs in training alone may draw
        check_network(model, inside=True)
        check_example(example, "example")
        copied = clone(plain(model)).eval()
        flow, order, several = _followed(copied, example)
        groups, fixed = _groups(flow, copied, order)
        if any(len(heads.labels) > 1 for heads in flow.heads):
            found, _ = _groups(_followed(copied, example, widths=True)[0], copied, order)
            seen = {unit for group in groups.values() for unit in _members(group)}
            for group in found.values():
                if not seen.issuperset(_members(group)):
                    name = _unused(group.layer, groups)
                    groups[name] = replace(group, name=name)
        groups = {group.name: group for group in sorted(groups.values(), key=lambda group: order[group.layer])}
        beside = _beside(copied, example) if several else set()
        others = [g for g in groups.values() if beside.issuperset(f"{name}.weight" for name in g.producers)]
        fixed |= {name: "only other outputs than the logits depend on it" for g in others for name in g.producers}
        groups = {name: group for name, group in groups.items() if group not in others}
        groups, refused = _tried(copied, example, groups)
        removable = {name for group in groups.values() for name in group.producers}
        fixed = {name: why for name, why in (fixed | refused).items() if name not in removable}
        if not groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(fixed.items())[:3])
            raise InputError(f"{type(model).__name__} has no channels that can be removed ({why or 'no layers'})")
        return Units(groups, fixed)


def check_example(example: object, name: str) -> None:
    """Check an argument that holds images as a model takes them.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it holds no image.
    """
    if not isinstance(example, Tensor):
        raise ArgumentTypeError(f"{name}={describe(example)}", "expected images as the model takes them, one tensor")
    if not example.ndim or not len(example):
        raise ArgumentError(f"{name}={describe(example)}", "expected images as the model takes them, one at least")


def _followed(model: nn.Module, example: Tensor, widths: bool = False) -> tuple[Flow, dict[str, int], bool]:
    """Return the flow of a forward pass, and of training where that runs other layers; layer → place of its run; and
    whether the forward pass gives several tensors."""
    flow = Flow(model, widths)
    with flow.following():
        given = _run(model, example)
        output = logits_of(given)
    several = len(tree_leaves(given)) > 1
    if not isinstance(output, Tensor):
        raise InputError(
            f"{type(model).__name__}(images) gave {type(output).__name__}: expected logits, as a tensor, first in a "
            "tuple or list, or as logits or out of a mapping or an object; wrap a network that gives others"
        )
    flow.fix([output], "its channels are the network's output")
    order = {name: place for place, name in enumerate(executed_layers(model, example))}
    if any(isinstance(module, LAYERS) and name not in order for name, module in model.named_modules()):
        _follow_training(flow, model, example)
    return flow, order, several


def _beside(model: nn.Module, example: Tensor) -> set[str]:
    """Return the names of the parameters that outputs depend on, and the logits do not.

    Args:
        model: copy of the model; all of its parameters will require gradients.
        example: ``[B, …]``, an input of the model.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    for value in parameters.values():
        value.requires_grad_(True)
    output = _run(model, example)
    logits = logits_of(output)
    others = [value for value in tree_leaves(output) if isinstance(value, Tensor) and value is not logits]
    others = [value for value in others if value.grad_fn is not None]
    if not others or logits.grad_fn is None:
        return set()
    values = list(parameters.values())
    main, rest = (
        torch.autograd.grad([part.sum() for part in parts], values, retain_graph=True, allow_unused=True)
        for parts in ([logits], others)
    )
    return {name for name, one, other in zip(parameters, main, rest, strict=True) if one is None and other is not None}


def _members(group: Group) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """Return what each unit of a group takes of the first tensor that it cuts."""
    cut = group.cuts[0]
    return [(cut.path, cut.dimension, tuple(sorted(held))) for held in cut.indices.tolist()]


def _unused(layer: str, groups: Container[str]) -> str:
    """Return the name of the next group of a layer."""
    name, count = layer, 1
    while name in groups:
        count += 1
        name = f"{layer}#{count}"
    return name


def _run(model: nn.Module, example: Tensor) -> Any:
    try:
        return model(example.clone())
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise InputError(
            f"{type(model).__name__} does not run on a {example.dtype} batch of shape "
            f"{tuple(example.shape)} ({error}); expected a model that treats every image by itself, be it alone in its "
            "batch, and images as the model takes them, to prune as example_input="
        ) from error


_USED = "a function outside of it uses its weight"


def executed_layers(model: nn.Module, example: Tensor) -> list[str]:
    """List the names of the convolutions and Linear layers in the order in which they run in eval mode."""
    return [call.name for call in calls(model, lambda: model(example)) if isinstance(call.module, LAYERS)]


def _follow_training(flow: Flow, model: nn.Module, example: Tensor) -> None:
    """Follow what only training runs, such as an auxiliary head, so that it is cut alike."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # its noise is no value of the network's
            module.eval()
    before = len(flow.reads)
    try:
        with flow.following(expands=False):  # no trial trains
            flow.fix(tree_leaves(model(torch.cat([example, example]))), "its channels are the network's output")
    except torch.OutOfMemoryError:
        raise
    except FAILURES:  # some networks train on other inputs than they are used on
        pass
    finally:
        model.eval()
        del flow.reads[before:]


def _groups(flow: Flow, model: nn.Module, order: dict[str, int]) -> tuple[dict[str, Group], dict[str, str]]:
    """Collect the units of a followed forward pass into groups; return them, and why other layers are fixed."""
    unit, kept, notes = flow.units()
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS):
            names[id(module.weight)].append(name)
    parameters = dict(model.named_parameters())
    layers = {path: names[id(value)] for path, value in parameters.items() if id(value) in names}
    reads = {int(label) for labels in flow.reads for label in labels.unique()}
    summed = {label for heads in flow.heads for label in heads.labels.ravel().tolist()}
    # Unit → number of a side → the indices there.
    members: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, side in enumerate(flow.sides):
        for index, u in enumerate(unit[side.start : side.start + side.size].tolist()):
            if u not in kept:
                members[u][number].append(index)
    alike: dict[tuple[tuple[int, int], ...], list[dict[int, list[int]]]] = defaultdict(list)
    for held in members.values():
        alike[tuple((number, len(indices)) for number, indices in held.items())].append(held)
    found: list[Group] = []
    for key, units in alike.items():
        if len(units) < 2:
            continue
        numbers = [number for number, _ in key]
        sums = any(flow.sides[number].start + units[0][number][0] in summed for number in numbers)
        group = _group(flow, model, layers, reads, numbers, units, order, sums)
        if group is not None:
            found.append(group)
    found.sort(key=lambda group: (order[group.name], group.producers[group.name].min().item()))
    groups: dict[str, Group] = {}
    for group in found:
        name = _unused(group.name, groups)
        groups[name] = replace(_with_heads(flow, model, unit, group), name=name)
    known = {name for group in groups.values() for name in group.producers}
    fixed = {
        name: _why_fixed(flow, unit, kept, notes, members, path, model.get_submodule(name))
        for path, same in layers.items()
        for name in same
        if name not in known and name in order
    }
    ran = {model.get_submodule(name) for name in order}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS) and module not in ran and name not in known:
            used = any(side.path == f"{name}.weight" and side.start in reads for side in flow.sides)
            fixed[name] = _USED if used else "the forward pass in eval mode does not call it"
    return groups, fixed


def _group(
    flow: Flow,
    model: nn.Module,
    layers: dict[str, list[str]],
    reads: Container[int],
    numbers: list[int],
    units: list[dict[int, list[int]]],
    order: dict[str, int],
    summed: bool,
) -> Group | None:
    """Make a group of units that have the same sides; ``None`` if no layer gives them, or nothing reads them."""
    producers: dict[str, Tensor] = {}
    consumers: dict[str, Tensor] = {}
    layer_norms: dict[str, Tensor] = {}
    cuts: list[Cut] = []
    for number in numbers:
        side = flow.sides[number]
        indices = torch.tensor([held[number] for held in units])
        read = False
        if side.path in layers:
            layer = model.get_submodule(layers[side.path][0])
            gives, takes = _channels(layer, side.dimension, indices)
            read = takes is not None
            for name in layers[side.path]:
                if gives is not None and name in order:
                    producers[name] = gives
                if takes is not None and name in order:
                    consumers[name] = takes
        elif side.dimension is not None:
            read = side.start + int(indices[0, 0]) in reads
        elif _normalises_together(module := model.get_submodule(side.path)):
            assert isinstance(module, nn.Module)
            layer_norms[side.path] = indices
        cuts.append(Cut(side.path, side.dimension, indices, read))
    if not producers or not (consumers or summed):
        return None
    first = min(producers, key=order.__getitem__)
    by_place = producers[first][:, 0].argsort()
    kinds = [
        {name: members[name][by_place] for name in sorted(members, key=lambda name: order.get(name, -1))}
        for members in (producers, consumers, layer_norms)
    ]
    return Group(first, len(units), *kinds, cuts=tuple(replace(cut, indices=cut.indices[by_place]) for cut in cuts))


def _channels(layer: nn.Module, dimension: int | None, indices: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the outputs and the inputs of a layer that go with ``[U, k]`` indices of a dimension of its weight."""
    if isinstance(layer, nn.Linear):
        return (indices, None) if dimension == 0 else (None, indices)
    assert isinstance(layer, CONVOLUTIONS + TRANSPOSED)
    groups, inputs, outputs = layer.groups, layer.in_channels, layer.out_channels
    whole = goes_by_groups(layer)
    if isinstance(layer, TRANSPOSED):
        if dimension == 0 and whole:
            first = indices[:, :: inputs // groups] // (inputs // groups)
            return _places(first * (outputs // groups), outputs // groups, 1), None
        if dimension == 0:
            return None, indices
        return (None if whole else _places(indices, groups, outputs // groups)), None
    if dimension == 0:
        return indices, None
    return None, None if whole else _places(indices, groups, inputs // groups)


def _places(indices: Tensor, times: int, step: int) -> Tensor:
    """Return ``[U, k]`` indices, each ``times`` times ``step`` apart, ascending."""
    return (indices[:, :, None] + step * torch.arange(times)).flatten(1).sort(1).values


def _normalises_together(norm: nn.Module) -> bool:
    """Return whether a norm's statistics are over its channels, so that those of a part differ."""
    return isinstance(norm, LAYER_NORMS) or (isinstance(norm, nn.GroupNorm) and norm.num_groups == 1)


def _with_heads(flow: Flow, model: nn.Module, unit: np.ndarray, group: Group) -> Group:
    """Return a group with what changes where its units are heads of attention, or channels of all heads alike."""
    sides = {(side.path, side.dimension): side for side in flow.sides}
    labels = {cut: sides[cut.path, cut.dimension].start + cut.indices.numpy() for cut in group.cuts}
    own = set(unit[labels[group.cuts[0]].ravel()].tolist())
    attributes: dict[str, None] = {}
    summed: set[int] = set()
    scaled: set[int] = set()
    for heads in flow.heads:
        found = unit[heads.labels]
        whole = bool((found == found[:, :1]).all())
        if not own.issuperset(found.flat) or not (whole or (found == found[:1]).all()):
            continue
        number = len(np.unique(found))
        channels = {indices.numel() for indices in group.consumers.values()}
        for name, value in vars(model.get_submodule(heads.module)).items():
            of_width = "dim" in name or "size" in name
            counted = "head" in name and of_width != whole and value == number
            together = any(word in name for word in ("attn", "inner", "all_head")) and value in channels
            if type(value) is int and (counted or together):
                attributes[f"{heads.module}.{name}" if heads.module else name] = None
        if not whole:
            summed |= {*heads.labels.ravel().tolist()}
            scaled |= {*heads.labels.ravel().tolist()} if heads.rescaled else set()
    # A bias has labels of its own, which go with those of its weight's rows.
    rows = {
        cut.path.rpartition(".")[0]: held
        for cut, held in labels.items()
        if cut.path.endswith(".weight")
        and cut.dimension == 0
        # (those of a transposed convolution are its inputs)
        and not isinstance(model.get_submodule(cut.path.rpartition(".")[0]), TRANSPOSED)
    }
    cuts = []
    for cut, held in labels.items():
        home, _, leaf = cut.path.rpartition(".")
        held = rows[home] if leaf == "bias" and home in rows else held
        pairs = zip(cut.indices.flatten().tolist(), held.ravel().tolist(), strict=True)
        found = tuple(index for index, label in pairs if label in scaled)
        cuts.append(replace(cut, reads=cut.reads or not summed.isdisjoint(held.ravel().tolist()), scaled=found))
    return replace(group, cuts=tuple(cuts), attributes=tuple(attributes))


def _why_fixed(
    flow: Flow,
    unit: np.ndarray,
    kept: dict[int, str],
    notes: dict[int, str],
    members: dict[int, dict[int, list[int]]],
    path: str,
    layer: nn.Module,
) -> str:
    out = 1 if isinstance(layer, TRANSPOSED) and not goes_by_groups(layer) else 0
    side = next((s for s in flow.sides if (s.path, s.dimension) == (path, out)), None)
    if side is None:
        return "it has a single unit"
    units = unit[side.start : side.start + side.size].tolist()
    reasons = Counter(kept[u] for u in units if u in kept)
    if reasons:
        return reasons.most_common(1)[0][0]
    note = notes.get(units[0])
    if len({*units}) == 1:
        return f"it has a single unit ({note})" if note else "it has a single unit"
    return "no convolution or Linear layer reads it"


def _tried(model: nn.Module, example: Tensor, groups: dict[str, Group]) -> tuple[dict[str, Group], dict[str, str]]:
    """Return the groups that can be removed without error, and why the layers of the others are fixed.

    Labels follow values. Only a trial shows whether the code around the operations depends on the number of channels.

    Args:
        model: copy of the model; its weights are overwritten.
        example: ``[B, …]``, an input of the model.
        groups: name → group.
    """
    generator = torch.Generator().manual_seed(0)
    images = _trial_images(example, generator)
    _shuffle_weights(model, generator)
    exact, reason = _exactness(model, images)
    if reason:
        return {}, {name: reason for group in groups.values() for name in group.producers}
    sound: list[Group] = []
    fixed: dict[str, str] = {}
    # Try all groups at once. If that fails, try those that touch the module that failed, or a half, and the rest.
    # What is like a group that failed, such as another block's, is tried and refused as a whole: the time is bounded.
    waiting = [(list(groups.values()), False)] if groups else []
    while waiting:
        part, alike = waiting.pop()
        if not part:
            continue
        reason, place = _misfit(model, images, [*sound, *part], exact)
        if not reason:
            sound += part
        elif len(part) == 1 or alike:
            fixed |= {name: reason for group in part for name in group.producers}
            like = [group for others, _ in waiting for group in others if _shape(group) == _shape(part[0])]
            waiting = [([group for group in others if group not in like], kind) for others, kind in waiting]
            waiting.append((like, True))
        else:
            suspects = [group for group in part if place and _touches(group, place)]
            if not 0 < len(suspects) < len(part):
                suspects = part[: len(part) // 2]
            waiting += [(suspects, False), ([group for group in part if group not in suspects], False)]
    return {group.name: group for group in sound}, fixed


def _trial_images(example: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Make a batch of noise, shaped like the example, for each trial; integers stay within the example's range."""
    home = accumulation_device(example.device)
    batches = []
    for _ in _KEPT:
        noise = torch.rand(example.shape, generator=generator, dtype=torch.float64).to(home)
        if not example.is_floating_point():
            low, high = int(example.min()), int(example.max())
            noise = (low + noise * (high - low + 1)).floor().to(example.dtype)
        batches.append(noise)
    return batches


@torch.no_grad()
def _shuffle_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Set random float64 weights, so that every path matters: new ConvNeXts scale all their blocks by 1e-6."""
    device = next(model.parameters()).device
    model.eval().to(accumulation_device(device)).double().to(memory_format=torch.contiguous_format)
    if hasattr(model, "memory_format"):  # a Classifier lays out its images by it
        model.memory_format = torch.contiguous_format  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.reset_running_stats()
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 0
        side = math.sqrt(6 / fan) if fan else 0.5  # He et al. (2015), uniform
        noise = torch.empty(parameter.shape, dtype=torch.float64).uniform_(-side, side, generator=generator)
        parameter.copy_(noise if fan else noise.add_(1.0))


class _Narrowing(TorchDispatchMode):
    """Recorder of the dtypes to which a forward pass rounds values of a wider dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        widest = max((_bits(value) for value in tree_leaves((args, kwargs))), default=0)
        self.dtypes |= {value.dtype for value in tree_leaves(output) if 0 < _bits(value) < widest}
        return output


def _bits(value: Any) -> int:
    return torch.finfo(value.dtype).bits if isinstance(value, Tensor) and value.is_floating_point() else 0


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def _exactness(model: nn.Module, images: list[Tensor]) -> tuple[float, str]:
    """Return the share of the largest logit to which a network is exact in its widest dtype, or why it cannot be tried.

    Args:
        model: model; it is converted to that dtype.
        images: batches; floating ones are converted to that dtype.
    """
    failure = ""
    for dtype in _AGREE:
        model.double() if dtype == torch.float64 else model.float()  # these leave complex weights alone
        images[:] = [batch.to(dtype) if batch.is_floating_point() else batch for batch in images]
        try:
            with _Narrowing() as narrowing:
                model(images[0].clone())
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            failure = failure or f"a removal cannot be tried, because the network does not run in float64 ({error})"
            continue
        coarse = narrowing.dtypes - _AGREE.keys()
        if coarse:
            return 0.0, f"the network rounds to {coarse.pop()} internally, which is too coarse to try a removal"
        return max(_AGREE[found] for found in (dtype, *narrowing.dtypes)), ""
    return 0.0, failure


def _misfit(model: nn.Module, images: list[Tensor], groups: list[Group], exact: float) -> tuple[str, str]:
    """Return what goes wrong when many units of some groups are removed, and the module in which an error was raised.

    Both are empty if the result equals masking.
    """
    generator = torch.Generator().manual_seed(0)
    for trial, (share, batch) in enumerate(zip(_KEPT, images, strict=True)):
        kept = {}
        for number, group in enumerate(groups):
            # An odd number, so that the units do not read the same backwards; once without the first unit, and once
            # without the last.
            # Of each group another share, for some layers run only where two groups lose alike.
            order = torch.randperm(group.size, generator=generator)
            count = max(1, (int(group.size * share) | 1) - number % 3 * max(1, group.size // 6))
            kept[group.name] = order[order != (group.size - 1) * trial][:count]
        slim = clone(model, tensors=False)  # removal makes new ones
        try:
            remove(slim, groups, kept)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            return f"some of its channels cannot be removed ({error})", ""
        with entered(slim) as within:
            reason = disagreement(model, slim, groups, kept, batch, exact)
        if reason:
            place = within[-1] if within else ""
            where = f"{place} ({type(slim.get_submodule(place)).__name__})"
            return reason.replace("the network does not run", f"{where} does not run") if place else reason, place
    return "", ""


def _shape(group: Group) -> frozenset[tuple[str, int | None, int]]:
    """Return what a unit takes, with names without their numbers, which blocks of one kind share."""
    return frozenset((re.sub(r"\d+", "", cut.path), cut.dimension, cut.indices.shape[1]) for cut in group.cuts)


def _touches(group: Group, place: str) -> bool:
    return any(cut.path.startswith(f"{place}.") for cut in group.cuts)
