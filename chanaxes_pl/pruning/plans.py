"""Pruned networks on disk: the tensors in ``<path>.safetensors``, the plan that made room for them in ``<path>.json``.

Nothing is ever unpickled: the network itself comes from code, and the plan says which of its units stay.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.files import replacing
from chanaxes_pl.network.groups import find_units
from chanaxes_pl.network.layers import CONVOLUTIONS, channel_count
from chanaxes_pl.network.removal import Group, remove
from chanaxes_pl.pruning.plan_json import Plan, build_from, check_kept, nearest, short, tensors_of

__all__ = ["Plan", "add_bias", "apply_plan", "load_slim", "save_slim"]

#: Of the JSON file; a reader refuses any other.
VERSION = 1


def add_bias(layer: nn.Module) -> None:
    """Give a convolution or Linear layer a bias of zeros, where it has none.

    Example:
        >>> layer = nn.Conv2d(3, 2, 1, bias=False)
        >>> add_bias(layer)
        >>> layer.bias
        Parameter containing:
        tensor([0., 0.], requires_grad=True)
    """
    if layer.bias is None:
        assert isinstance(layer.weight, Tensor)
        layer.bias = nn.Parameter(layer.weight.new_zeros(channel_count(layer)))


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Prune a freshly built dense network in place; its weights are those it was built with.

    Args:
        model: of the class and settings that the plan was made from; unchanged after an error.
        plan: from :meth:`Plan.of` or :meth:`Plan.from_json`.

    Raises:
        ValueError: if the plan contradicts itself, or is for another network.
    """
    _cut(model, _check_fit(model, plan), plan)


def _check_fit(model: nn.Module, plan: Plan) -> list[Group]:
    """The groups that a plan prunes, if it is one for this model."""
    check_kept(plan)
    kind = type(model).__name__
    tensors = {name: str(list(tensor.shape)) for name, tensor in tensors_of(model).items()}
    planned = {name: str(list(shape)) for name, shape in plan.shapes.items()}
    if difference := _difference(tensors, kind, planned, "the plan"):
        raise InputError(
            f"the plan is for another network than this {kind}: {difference}; pass a model built with the "
            "settings of the one that was pruned, before any pruning"
        )
    layers = {name for name, module in model.named_modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))}
    if unknown := [name for name in plan.biases if name not in layers]:
        raise InputError(f"biases names {unknown[0]!r}, which is no layer of {kind}; {nearest(unknown[0], layers)}")
    some = next(model.parameters(), torch.empty(0))
    groups = find_units(model, some.new_zeros(1, *plan.input_shape)).groups
    for name, size in plan.sizes.items():
        if name not in groups:
            raise InputError(f"{kind} has no group {name!r} to prune; {nearest(name, groups)}")
        if groups[name].size != size:
            raise InputError(f"sizes[{name!r}] is {size}, but {kind} has {groups[name].size} units there")
    return [groups[name] for name in plan.sizes]


def _cut(model: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    remove(model, groups, {name: torch.tensor(units) for name, units in plan.kept.items()})
    for name in plan.biases:
        add_bias(model.get_submodule(name))


def _difference(found: Mapping[str, str], here: str, expected: Mapping[str, str], there: str) -> str:
    """The first few names at which two descriptions of tensors part; empty if they agree."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    parts = [
        f"{name} is {found.get(name, 'missing')} in {here} and {expected.get(name, 'missing')} in {there}"
        for name in names[:3]
    ]
    return ", ".join([*parts, f"and {len(names) - 3} more"] if len(names) > 3 else parts)


def save_slim(path: str | Path, model: nn.Module, plan: Plan) -> None:
    """Write a pruned network and its plan, each file whole or not at all.

    The tensors come first. The plan holds their digest, so that whatever happens between the two files, no plan is
    ever read with the tensors of another save. A tensor that goes by several names is written under each of them.

    Args:
        path: of both files, without a suffix or with one of theirs; its folder is made when missing.
        model: after pruning; left as it is.
        plan: by which it was pruned.

    Raises:
        ValueError: if the plan is not this model's, or holds what JSON cannot.
        OSError: if a file cannot be written.
    """
    caller = f"save_slim({str(path)!r})"
    check_kept(plan)
    tensors = tensors_of(model)
    _check_saved(model, tensors, plan)
    data = safetensors.torch.save({name: _plain(tensor) for name, tensor in tensors.items()})
    content = {"version": VERSION, "sha256": hashlib.sha256(data).hexdigest(), "plan": plan.to_json()}
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the plan holds what JSON cannot ({error}); see its notes") from error
    tensor_file, plan_file = _files(path)
    with replacing(plan_file) as plan_draft, replacing(tensor_file) as tensor_draft:
        plan_draft.write_text(text, encoding="utf-8")
        tensor_draft.write_bytes(data)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_saved(model: nn.Module, tensors: Mapping[str, Tensor], plan: Plan) -> None:
    kind = type(model).__name__
    planned = {*plan.shapes, *(f"{name}.bias" for name in plan.biases)}
    if other := sorted(planned ^ {*tensors}):
        raise InputError(
            f"the plan is for another network than this {kind}: {', '.join(other[:3])} "
            f"{'is' if len(other) == 1 else 'are'} in one of them only"
        )
    removes = any(len(units) < plan.sizes[name] for name, units in plan.kept.items())
    if removes and all(plan.shapes.get(name, tensor.shape) == tensor.shape for name, tensor in tensors.items()):
        raise InputError(
            f"this {kind} has the shapes of the dense network, but the plan removes units; pass the pruned "
            "model, or call apply_plan(model, plan) before"
        )


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.stem if path.suffix in (".safetensors", ".json") else path.name
    return path.with_name(f"{stem}.safetensors"), path.with_name(f"{stem}.json")


def load_slim(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A pruned network back from its two files, in eval mode and in the dtypes that it was saved in.

    Args:
        path: of both files, without a suffix or with one of theirs.
        model: a freshly built dense network of the same class and settings, on any device; it is pruned in place and
            returned, and is unchanged after an error. Without it the network is built by
            :func:`build_backbone` or as a ``Classifier`` on the CPU, if it came from there.

    Raises:
        FileNotFoundError: if one of the files is not there.
        ValueError: if one of them is damaged or changed, if they are of two saves, or if they do not fit the model.
    """
    caller = f"load_slim({str(path)!r})"
    tensor_file, plan_file = _files(path)
    if missing := [str(file) for file in (tensor_file, plan_file) if not file.is_file()]:
        raise FileNotFoundError(
            f"{caller}: there is no {' and no '.join(missing)}; expected the two files that save_slim writes"
        )
    digest, plan = _read_plan(plan_file)
    saved = _read_tensors(tensor_file, digest, plan_file)
    if model is None:
        model = _build(plan, plan_file)
    groups = _check_fit(model, plan)
    twin = copy.deepcopy(model)
    _cut(twin, groups, plan)
    _check_tensors(twin, saved, tensor_file)
    _cut(model, groups, plan)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.data = tensor.data.to(saved[name].dtype)
            tensor.copy_(saved[name])
    return model.eval()


def _read_plan(file: Path) -> tuple[str, Plan]:
    """The digest of the tensors that a plan was written with, and the plan."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); it was cut off, changed, or is no plan") from error
    if not isinstance(content, dict) or not {"version", "sha256", "plan"} <= {*content}:
        raise ValueError(f"{file}: holds {short(content)}: expected version, sha256 and plan, as save_slim writes them")
    if content["version"] != VERSION:
        raise ValueError(
            f"{file}: a plan of version {short(content['version'])}, but this release of chanaxes_pl reads version "
            f"{VERSION}; load it with the release that wrote it"
        )
    return str(content["sha256"]), Plan.from_json(content["plan"], str(file))


def _read_tensors(file: Path, digest: str, plan_file: Path) -> dict[str, Tensor]:
    data = file.read_bytes()
    try:
        saved = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: no whole safetensors file ({error}); it was cut off or is of another kind. Pickles, such as "
            "torch.save writes, are never opened here"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ValueError(
            f"{file}: its sha256 is {found[:12]}…, but {plan_file.name} was written with {digest[:12]}…: the two files "
            "are of different saves, or one was changed; expected both as one save_slim wrote them"
        )
    return saved


def _build(plan: Plan, plan_file: Path) -> nn.Module:
    if plan.backbone is None:
        raise InputError(
            f"{plan_file.name} does not say how to build the network, which did not come from "
            "build_backbone; pass a freshly built model: load_slim(path, MyNet())"
        )
    try:
        return build_from(plan.backbone)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{plan_file}: backbone is {short(plan.backbone)}, which cannot be built ({error})") from error


def _check_tensors(slim: nn.Module, saved: Mapping[str, Tensor], file: Path) -> None:
    """Refuse tensors other than a pruned model's."""
    own = tensors_of(slim)
    if difference := _difference(_forms(saved), file.name, _forms(own), "the pruned network"):
        raise InputError(
            f"the tensors do not fit what the plan makes of the network: {difference}; the plan was changed "
            "after it was saved, or the model is built with other settings"
        )
    first: dict[Tensor, str] = {}
    for name, tensor in own.items():
        if not torch.equal(saved[name], saved[first.setdefault(tensor, name)]):
            raise InputError(
                f"{first[tensor]} and {name} are one tensor in {type(slim).__name__}, but differ in "
                f"{file.name}; pass a model that does not share them"
            )


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: f"{'float' if tensor.is_floating_point() else 'integer'} {list(tensor.shape)}"
        for name, tensor in tensors.items()
    }
