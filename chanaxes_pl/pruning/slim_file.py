"""Pruned networks on disk: one safetensors file holds the tensors, and its metadata holds the plan.

The network itself comes from code: one of this package's backbones, or a class of the user's. It is built dense, and
then takes on the shapes of the tensors in the file. Nothing is unpickled, and nothing in the file is trusted. The plan
is checked against the shapes in the file's header before anything is built. The network is built on PyTorch's meta
device, so the only memory it takes is that of the tensors in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from chanaxes_pl.core.errors import InputError, naming, nearest, short
from chanaxes_pl.core.files import replacing
from chanaxes_pl.units.flow import LAYERS, NORMS, width
from chanaxes_pl.units.plain import plain, unwrapped
from chanaxes_pl.units.removal import Group, avoid_crash, memory_format, resize

#: Version of the plan; a reader refuses any other.
VERSION = 2
#: Key of the plan in a ``PruneModule``'s checkpoints.
CHECKPOINT_PLAN = "chanaxes_plan"
#: Largest header of a file, in bytes; ResNet-18's takes 40 kB with its plan.
HEADER = 2**24


_Shapes = Mapping[str, Sequence[int]]
# Errors from building a network with arguments of the wrong kind or size.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# The note of buffers that have lost channels and are in no state dict.
_UNSAVED = "buffers without persistent=True"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Record of how a dense network was pruned.

    Attributes:
        kept: group name → the units that stay, ascending; groups that stay whole may be left out.
        sizes: group name → U, the number of units before pruning.
        input_shape: ``[C, H, W]`` of one image.
        shapes: name → shape of the dense network's parameters and buffers.
        norms: name of a norm without weights → its features after pruning, which no tensor shows.
        attributes: name of an integer attribute → its value after pruning, such as an attention's number of heads.
        backbone: arguments of ``build_backbone`` or ``Classifier``; ``None`` if neither built the dense network.
        macs: multiply–accumulates (MACs) of one image after pruning.
        dense_macs: MACs of one image before pruning.
        notes: anything that JSON can hold, such as budget, score and allocation.
    """

    kept: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    input_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    norms: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    backbone: dict[str, Any] | None = None
    macs: int
    dense_macs: int
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        dense: nn.Module,
        slim: nn.Module,
        groups: Iterable[Group],
        kept: Mapping[str, Tensor],
        *,
        input_shape: Sequence[int],
        macs: int,
        dense_macs: int,
        notes: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Record how :func:`remove` pruned a network.

        Args:
            dense: network before pruning; the plan holds its ``backbone_arguments`` if they still build it.
            slim: network after pruning.
            groups: the dense network's groups.
            kept: group name → ``[r]``, the units that stay.
            input_shape: ``[C, H, W]`` of one image.
            macs: MACs of one image after pruning.
            dense_macs: MACs of one image before pruning.
            notes: anything that JSON can hold.
        """
        groups = list(groups)
        counts = {path: path.rpartition(".")[::2] for group in groups for path in group.attributes}
        shapes, notes = _shapes(_tensors(dense)), dict(notes or {})
        cut = (cut.path for group in groups if group.name in kept for cut in group.cuts if cut.dimension is not None)
        if unsaved := sorted({path for path in cut if path not in shapes}):
            notes[_UNSAVED] = unsaved
        return cls(
            kept={name: tuple(sorted(units.tolist())) for name, units in kept.items()},
            sizes={group.name: group.size for group in groups},
            input_shape=tuple(input_shape),
            shapes=shapes,
            norms={name: width(module) for name, module in slim.named_modules() if _is_bare_norm(module)},
            attributes={path: getattr(slim.get_submodule(home), leaf) for path, (home, leaf) in counts.items()},
            backbone=_backbone_of(dense),
            macs=macs,
            dense_macs=dense_macs,
            notes=notes,
        )

    def to_json(self) -> str:
        """Return the plan as JSON text.

        Raises:
            ValueError: if ``notes`` or ``backbone`` hold something that JSON cannot.
        """
        try:
            return _text({"version": VERSION, **asdict(self)})
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the plan holds something that JSON cannot ({error}); see its notes") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from the text that :meth:`to_json` returned; tuples in ``notes`` become lists.

        Args:
            text: JSON text.

        Raises:
            ValueError: if :meth:`to_json` does not write such text: it is not JSON, an entry is missing or of another
                kind, or units are out of range, repeated, not ascending or missing.
        """
        try:
            values = json.loads(text)
            # Repeated keys, NaN and numbers beyond a float's range change when they are written again.
            as_written = _text(values) == text
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the plan is not JSON ({_line(error)}); {_ADVICE}") from error
        if not isinstance(values, dict) or "version" not in values:
            raise InputError(f"the plan is {short(values)}: expected version, {', '.join(_KINDS)}; {_ADVICE}")
        version = values.pop("version")
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"the plan has version {short(version)}, but this release of chanaxes_pl reads version "
                f"{VERSION}; load it with the release that wrote it"
            )
        if odd := sorted({*values} ^ {*_KINDS}):
            verb = "lacks" if odd[0] in _KINDS else "has an unknown entry"
            raise InputError(f"the plan {verb} {short(odd[0])}; {_ADVICE}")
        for name, (fits, kind) in _KINDS.items():
            if not fits(values[name]):
                raise InputError(f"{name} is {short(values[name])}: expected {kind}; {_ADVICE}")
        if not as_written:
            raise InputError(f"the plan is not laid out as save_slim writes it; {_ADVICE}")
        tuples = {name: {key: tuple(held) for key, held in values[name].items()} for name in ("kept", "shapes")}
        arguments: dict[str, Any] = {**values, **tuples, "input_shape": tuple(values["input_shape"])}
        plan = cls(**arguments)
        _check_kept(plan)
        return plan


_ADVICE = "the file was changed after it was saved: save the network again"


def _text(values: Any) -> str:
    return json.dumps(values, allow_nan=False)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is not a count


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_dict(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


#: Entry of a plan in JSON → its check, and its form in words.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kept": (lambda value: _is_dict(value, _are_counts), "{group: [unit, …]}"),
    "sizes": (lambda value: _is_dict(value, _is_count), "{group: units}"),
    "input_shape": (lambda value: _are_counts(value) and 0 not in value, "[C, H, W]"),
    "shapes": (lambda value: _is_dict(value, _are_counts), "{tensor: [size, …]}"),
    "norms": (lambda value: _is_dict(value, _is_count), "{norm: features}"),
    "attributes": (lambda value: _is_dict(value, _is_count), "{attribute: value}"),
    "backbone": (lambda value: value is None or isinstance(value, dict), "{argument: value} or null"),
    "macs": (_is_count, "a count"),
    "dense_macs": (_is_count, "a count"),
    "notes": (lambda value: isinstance(value, dict), "{…}"),
}


def _check_kept(plan: Plan) -> None:
    """Raise ValueError if a plan contradicts itself."""
    for name, units in plan.kept.items():
        if name not in plan.sizes:
            raise InputError(f"kept names {short(name)}, which is not in sizes; {nearest(name, plan.sizes)}")
        kept, last = f"kept[{short(name)}]", plan.sizes[name] - 1
        if not units:
            raise InputError(f"{kept} is empty: expected at least one unit of 0 to {short(last)}")
        if not 0 <= min(units) <= max(units) <= last:
            odd = next(unit for unit in units if not 0 <= unit <= last)
            raise InputError(f"{kept} holds unit {short(odd)}: expected units from 0 to {short(last)}")
        for before, after in pairwise(units):
            if before >= after:
                raise InputError(f"{kept} holds {before} before {after}: expected ascending units, each once")


def _backbone_of(dense: nn.Module) -> dict[str, Any] | None:
    """Return the arguments that build a network, if they still do: its head or activations may have been replaced."""
    arguments = getattr(dense, "backbone_arguments", None)
    if arguments is None:
        return None
    fresh = _build(arguments)
    same = (
        type(fresh) is type(dense)
        and repr(fresh) == repr(dense)
        and _shapes(fresh.state_dict()) == _shapes(dense.state_dict())
    )
    return dict(arguments) if same else None


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a backbone or Classifier without memory for its tensors."""
    from chanaxes_pl.models import Classifier, build_backbone  # loads torchvision and Lightning

    with torch.device("meta"):
        return (Classifier if "backbone" in arguments else build_backbone)(**arguments)


def save_slim(path: str | Path, model: nn.Module, plan: Plan) -> None:
    """Save a pruned network and its plan in one file; the file appears whole or not at all.

    A tensor with several names is written under each of them.

    Args:
        path: path of the file, with or without ``.safetensors``; a missing folder is made.
        model: network after pruning; it does not change.
        plan: plan of this network.

    Raises:
        ValueError: if the plan is not this model's, or one of them holds something that the file cannot.
        OSError: if the file cannot be written.
    """
    with naming(f"save_slim({str(path)!r})"):
        found = _tensors(model)
        _check_kept(plan)
        _check_shapes(plan, _shapes(found), type(model).__name__)
        if unsaved := plan.notes.get(_UNSAVED):
            raise InputError(
                f"the buffers {', '.join(unsaved)} of {type(model).__name__} have lost channels, but its state dict "
                "leaves them out: register them with persistent=True, and prune again"
            )
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()
        }
        text = plan.to_json()
        try:
            data = safetensors.torch.save(tensors, {"plan": text, "sha256": _digest(text, tensors)})
        except KeyError as error:
            raise InputError(f"safetensors cannot hold tensors of {error}; convert them first") from error
        if (header := int.from_bytes(data[:8], "little")) > HEADER:
            raise InputError(f"the plan and the names take {header} bytes: expected at most {HEADER}; shorten notes")
        with replacing(_file(path)) as draft:
            draft.write_bytes(data)


def _file(path: str | Path) -> Path:
    path = Path(path)
    if not path.name:
        raise InputError("expected the path of a file, such as 'half'")
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers themselves, by name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = model.state_dict(keep_vars=True)
    for name, value in tensors.items():
        home, _, leaf = name.rpartition(".")
        if not isinstance(value, Tensor) or getattr(modules.get(home), leaf, None) is not value:
            raise InputError(
                f"{type(model).__name__}'s state dict holds {name!r}, which is no parameter or buffer; a "
                "pruned network is saved as tensors only: keep other state in attributes that the constructor sets"
            )
    return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of a plan and of the names, dtypes, shapes and bits of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bits(tensor).numpy().data)
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().flatten().view(torch.uint8)


def _check_shapes(plan: Plan, shapes: _Shapes, there: str) -> None:
    """Raise ValueError if a plan cannot have produced tensors of these shapes."""
    for name in {**plan.shapes, **shapes}:
        dense, slim = plan.shapes.get(name), shapes.get(name)
        if not _is_part(slim, dense) and not (dense is None and _is_bias(name, shapes)):
            raise InputError(
                f"{short(name)} is {_size(slim)} in {there}, and {_size(dense)} in the plan's dense network: "
                "expected the plan and the pruned network of one prune"
            )
    for name, size in plan.sizes.items():
        layer, _, number = name.partition("#")  # a further group of the same layer has a number
        weight = f"{layer}.weight"
        if not plan.shapes.get(weight) or not (number.isdecimal() or number == ""):
            layers = [other.removesuffix(".weight") for other in plan.shapes if other.endswith(".weight")]
            raise InputError(f"sizes names {short(name)}, which is no layer; {nearest(name, layers)}")
        removed = size - len(plan.kept[name]) if name in plan.kept else 0
        # A transposed convolution has its outputs second.
        sides = list(zip(plan.shapes[weight][:2], shapes[weight][:2], strict=True))
        fits = [(channels, left) for channels, left in sides if size <= channels and removed <= channels - left]
        channels, left = (fits or sides)[0]
        if not fits or not size:
            raise InputError(
                f"the plan removes {short(removed)} of {short(size)} units of {name!r}, but {weight} has "
                f"{left} of {short(channels)} channels left in {there}; pass the pruned model with its own plan"
            )


def _is_part(slim: Sequence[int] | None, dense: Sequence[int] | None) -> bool:
    if slim is None or dense is None or len(slim) != len(dense):
        return False
    return all(0 < part <= whole or part == whole for part, whole in zip(slim, dense, strict=True))


def _is_bias(name: str, shapes: _Shapes) -> bool:
    """Return whether a tensor that the dense network lacks may be a bias that compensation added."""
    weight = shapes.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
    return bool(weight) and [*shapes[name]] == [*weight[:1]]


def _size(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else short(list(shape))


def load_slim(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a pruned network in eval mode, with exactly the tensors and dtypes that were saved.

    Args:
        path: path of the file, with or without ``.safetensors``; or a Trainer's checkpoint, ``….ckpt``, of a
            ``PruneModule`` that fine-tuned a pruned network, or of a pruned LightningModule that was trained itself.
        model: new dense network of the same class and settings, on any device. It takes on the file's tensors, keeps
            its device and memory format, and is returned, or a copy of it where :func:`plain` makes one; after an
            error it is unchanged. Tensors that it shares stay
            shared if they were saved alike. By default, the network is built on the CPU by :func:`build_backbone` or
            as a ``Classifier``, if it came from there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or changed, or does not fit the model.

    Example:
        >>> import tempfile
        >>> from chanaxes_pl import prune
        >>> _ = torch.manual_seed(0)
        >>> def network():
        ...     return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 6), nn.Flatten(), nn.Linear(8, 4))
        >>> slim = prune(network(), [torch.randn(64, 3, 8, 8)], budget=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     slim.save(f"{folder}/half")
        ...     torch.save({"state_dict": slim.model.state_dict()}, f"{folder}/last.ckpt")  # as a Trainer does
        ...     loaded = load_slim(f"{folder}/half", network()), load_slim(f"{folder}/last.ckpt", network())
        >>> [model[0].weight.equal(slim.model[0].weight) for model in loaded]
        [True, True]
    """
    if model is not None and not isinstance(model, nn.Module):
        made = f", such as {model.__name__}(…)" if isinstance(model, type) else ""
        raise TypeError(f"load_slim(…, {short(model)}): expected a new dense network{made}")
    if Path(path).suffix == ".ckpt":
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"load_slim({str(path)!r}): there is no such checkpoint; that of a training is "
                "trainer.checkpoint_callback.best_model_path"
            )
        with naming(str(path)):
            return _of_checkpoint(Path(path), model)
    with naming(f"load_slim({str(path)!r})"):
        file = _file(path)
    with naming(str(file)):
        if not file.is_file():
            raise FileNotFoundError(f"load_slim({str(path)!r}): there is no {file}; expected a file of slim.save")
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        try:
            if header > HEADER:
                raise SafetensorError(f"its header has {header} bytes: expected at most {HEADER}")
            content = safe_open(file, "pt")
        except SafetensorError as error:
            raise InputError(
                f"not a whole safetensors file ({_line(error)}); it was cut off or is of another kind. Pickles, "
                "such as those of torch.save, are never opened here"
            ) from error
        with content:
            metadata = content.metadata() or {}
            if not {"plan", "sha256"} <= {*metadata}:
                raise InputError("its metadata holds no plan; expected a file of slim.save")
            plan = Plan.from_json(metadata["plan"])
            shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
            _check_shapes(plan, shapes, file.name)
            dense = _built(plan) if model is None else plain(unwrapped(model))
            _check_model(dense, plan, shapes)
            tensors = {name: content.get_tensor(name) for name in shapes}
            if _digest(metadata["plan"], tensors) != metadata["sha256"]:
                raise InputError(f"its tensors or its plan do not match its sha256; {_ADVICE}")
            fill(dense, plan, tensors)
        if model is None:
            _take_memory(dense)
        return dense.eval()


def _of_checkpoint(path: Path, model: nn.Module | None) -> nn.Module:
    """Return the pruned network in a checkpoint of a PruneModule, or of the pruned network as a LightningModule."""
    from chanaxes_pl.models.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(path)
    tensors = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    model = None if model is None else plain(unwrapped(model))
    if CHECKPOINT_PLAN in checkpoint:
        plan = Plan.from_json(checkpoint[CHECKPOINT_PLAN])
        start = "network."
        tensors = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
    elif model is None:
        raise InputError("the checkpoint holds no plan, so pass a newly built dense network: load_slim(path, MyNet())")
    else:
        sizes = _shapes(_tensors(model))
        tensors = _without_prefix(tensors, sizes)
        if untold := _untold(model, sizes, _shapes(tensors)):
            raise InputError(
                f"the checkpoint holds no plan, which would tell {untold}: fine-tune with PruneModule(slim), or load "
                "slim.save's file and then the checkpoint's state_dict"
            )
        plan = Plan(kept={}, sizes={}, input_shape=(), shapes=sizes, macs=0, dense_macs=0)
    dense = _built(plan) if model is None else model
    fill(dense, plan, tensors)
    if model is None:
        _take_memory(dense)
    return dense.eval()


def _untold(model: nn.Module, dense: _Shapes, pruned: _Shapes) -> str:
    """Return what the shapes of a pruned network do not tell, or an empty string."""
    for name, module in model.named_modules():
        if _is_bare_norm(module):
            return f"the width of {name!r}, a norm without weights"
        heads = next((key for key, value in vars(module).items() if "head" in key and type(value) is int), "")
        start = f"{name}." if name else ""
        if heads and any(of != pruned.get(tensor) for tensor, of in dense.items() if tensor.startswith(start)):
            return f"{heads} of {name or type(module).__name__!r}, some of whose weights have other shapes"
    return ""


def _without_prefix(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by their names in the network, where a module holds it as one attribute or more."""
    first, *others = names
    starts = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    fits = [start for start in starts if all(f"{start}{name}" in tensors for name in others)]
    if "" in fits or len(fits) != 1:
        return tensors
    start = fits[0]
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _built(plan: Plan) -> nn.Module:
    if plan.backbone is None:
        raise InputError(
            "the plan does not say how to build the network, because build_backbone did not build it; pass a "
            "newly built model: load_slim(path, MyNet())"
        )
    try:
        return _build(plan.backbone)
    except _FAILURES as error:
        raise InputError(
            f"backbone is {short(plan.backbone)}, which cannot be built ({_line(error)}); {_ADVICE}"
        ) from error


def _check_model(model: nn.Module, plan: Plan, shapes: _Shapes) -> None:
    """Raise ValueError if a model is not the dense network of a plan."""
    kind, own = type(model).__name__, _shapes(_tensors(model))
    names = [name for name in {**plan.shapes, **own} if own.get(name) != plan.shapes.get(name)]
    if names:
        parts = [
            f"{short(name)} is {_size(own.get(name))} in {kind} and {_size(plan.shapes.get(name))} in the plan"
            for name in names[:3]
        ]
        more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
        raise InputError(
            f"the plan is for another network than this {kind}: {', '.join(parts + more)}; pass a model "
            "built with the settings of the one that was pruned, before any pruning"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in shapes:
        layer = modules.get(name.removesuffix(".bias"))
        if name not in own and not (isinstance(layer, LAYERS) and layer.bias is None):
            raise InputError(f"{short(name)} is no bias that a layer of {kind} could get; {_ADVICE}")
    for path, value in plan.attributes.items():
        home, _, leaf = path.rpartition(".")
        dense = getattr(modules.get(home), leaf, None)
        if type(dense) is not int or not 0 < value <= dense:
            raise InputError(
                f"attributes gives {short(path)} the value {short(value)}; expected a whole number of {kind}, and at "
                f"most what it is there ({short(dense)}); {_ADVICE}"
            )
    for name, features in plan.norms.items():
        norm = modules.get(name)
        if norm is None or not _is_bare_norm(norm) or not 0 < features <= width(norm):
            raise InputError(
                f"norms gives {short(name)} {short(features)} features; expected a norm of {kind} without "
                f"weights, and at most as many features as it has; {_ADVICE}"
            )


def fill(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Turn a newly built dense network into a pruned one, in place.

    Args:
        model: network of the plan's class and settings; unchanged after an error.
        plan: plan of the pruned network.
        tensors: name → the pruned network's parameters and buffers; they are copied.

    Raises:
        ValueError: if the plan, the tensors and the model do not belong together.
    """
    shapes = _shapes(tensors)
    _check_shapes(plan, shapes, "the pruned network")
    _check_model(model, plan, shapes)
    own, modules = _tensors(model), dict(model.named_modules(remove_duplicate=False))
    for name, old in own.items():
        dtypes = (old.dtype, tensors[name].dtype)
        if len({*dtypes}) > 1 and not (old.is_floating_point() and tensors[name].is_floating_point()):
            raise InputError(
                f"{name!r} is {dtypes[1]}, but {dtypes[0]} in {type(model).__name__}: expected the same "
                "dtype, or another floating-point one"
            )
    first: dict[int, str] = {}  # id of a shared tensor → its first name
    for name, value in tensors.items():
        home, _, leaf = name.rpartition(".")
        old = own.get(name)
        shared = name if old is None else first.setdefault(id(old), name)
        if shared != name and _alike(tensors[shared], value):
            new = model.get_parameter(shared) if isinstance(old, nn.Parameter) else model.get_buffer(shared)
        else:
            like = own[f"{home}.weight"] if old is None else old
            new = value.detach().to("cpu" if like.is_meta else like.device, copy=True)
            new = new.contiguous(memory_format=memory_format(like) if old is not None else torch.contiguous_format)
            if old is None or isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=like.requires_grad)
        setattr(modules[home], leaf, new)
    for name, module in model.named_modules():
        resize(module, plan.norms.get(name))
    for path, value in plan.attributes.items():
        home, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(home), leaf, value)
    avoid_crash(model)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and _bits(a).equal(_bits(b))


def _is_bare_norm(module: nn.Module | None) -> bool:
    return isinstance(module, NORMS) and module.weight is None


def _take_memory(model: nn.Module) -> None:
    """Complete the state of a network that was built on the meta device and then filled."""
    from chanaxes_pl.models import Classifier, ImageClassifier

    if isinstance(model, Classifier):  # its metrics hold tensors that are not in the state dict
        fresh = ImageClassifier(nn.Identity(), model.hparams["num_classes"])
        for name in ("train_top1", "val_accuracy", "test_accuracy"):
            setattr(model, name, getattr(fresh, name))
    model.to("cpu")  # so that Lightning records the device
