"""Which modules are tracked, under what names, and what they read and gave when they ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, nearest, short
from chanaxes_pl.network.hooks import hooked

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Transposed convolutions, whose weight has its inputs first; they are pruned, and not tracked.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = {"conv": CONVOLUTIONS, "conv+linear": (*CONVOLUTIONS, nn.Linear)}
_WORDS = ("auto", *_KINDS)
#: ``"auto"``, ``"conv"``, ``"conv+linear"``, a glob or several over layer names, or ``(name, module) → bool``.
LayerSpec = str | Sequence[str] | Callable[[str, nn.Module], bool]
#: What holds a user's module as its attribute ``module``.
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
# Names that other wrappers alone give to what they hold.
_WRAPPED = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def select_layers(
    model: nn.Module, layers: LayerSpec | Mapping[str, nn.Module] = "auto", whole: bool = False
) -> dict[str, nn.Module]:
    """The tracked modules of a model, by their own names in it.

    Trackable are modules that are affine in their input: ``Conv1d/2d/3d`` of any groups, and ``Linear``. What wraps a
    module (``torch.compile``, ``DistributedDataParallel``, ``AveragedModel`` and the like) does not show in its name.

    ``"auto"`` takes the convolutions and, where these hold less than half of all trackable weights, the Linear layers
    too, but for the last one in order of definition: the classifier's head, whose outputs are the classes.

    Args:
        model: any module.
        layers: ``"auto"``, ``"conv"``, ``"conv+linear"``, a glob or a list of globs over names
            (``"layer[34].*"``), or a function ``(name, module) → bool``; or what was selected before, as it is.
        whole: leave attentions as the modules that they are. Otherwise a :class:`Projection` stands for each Linear
            map that is packed in one: ``<name>.q``, ``.k``, ``.v`` and ``.out`` of a ``nn.MultiheadAttention``;
            ``<name>.q``, ``.k`` and ``.v`` of a Linear layer called ``qkv`` with three times as many outputs as
            inputs, in that order. A glob that matches the module's own name takes all of its projections.

    Raises:
        ValueError: if nothing matches; the message names the layers there are.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> list(select_layers(model)), list(select_layers(model, "conv+linear"))
        (['0'], ['0', '3'])
    """
    if isinstance(layers, Mapping):
        return dict(layers)
    parts = dict(_trackable(model, split=True))
    trackable = dict(_trackable(model, split=False)) if whole else parts
    if callable(layers):
        chosen = {name: module for name, module in trackable.items() if layers(name, module)}
    elif isinstance(layers, str) and layers in _WORDS:
        kind, head = _automatic(parts) if layers == "auto" else (layers, None)
        fit = {name: module for name, module in trackable.items() if isinstance(module, _KINDS[kind])}
        chosen = {name: module for name, module in fit.items() if name != head or len(fit) == 1}
    else:
        globs = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
        if not all(isinstance(glob, str) for glob in globs):
            raise ArgumentTypeError(
                f"layers={short(layers)}",
                "expected 'auto', 'conv', 'conv+linear', globs over layer names such as ['backbone.*'], a function "
                "(name, module) → bool, or a mapping from names to modules",
            )
        chosen = {n: m for n, m in trackable.items() if any(fnmatchcase(k, g) for g in globs for k in _names(n, m))}
    if not chosen:
        raise ArgumentError(f"layers={layers!r}", f"no tracked module; {_what_there_is(trackable, layers)}")
    return chosen


def _trackable(model: nn.Module, split: bool) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and Linear layers by name, each once; of attentions the projections, if ``split``."""
    inside = set()
    for name, module in _named_modules(model):
        projections = Projection.all_of(name, module) if split else {}
        yield from projections.items()
        if projections and isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)  # its weight is read, but it never runs
        if not projections and module not in inside and isinstance(module, _KINDS["conv+linear"]):
            yield name, module


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the names that wrappers add."""
    shown: dict[str, str] = {}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        above, _, own = path.rpartition(".")
        wrapped = own in _WRAPPED or (own == "module" and isinstance(found[above], WRAPPERS))
        shown[path] = ".".join(filter(None, [shown.get(above, ""), "" if wrapped else own]))
        found[path] = module
        yield shown[path], module


def _automatic(trackable: dict[str, nn.Module]) -> tuple[str, str | None]:
    """The kind that ``"auto"`` stands for, and the name of the head to leave out."""
    weights = {name: _weights(module) for name, module in trackable.items()}
    linear = [name for name, module in trackable.items() if isinstance(module, nn.Linear)]
    if 2 * sum(weights[name] for name in linear) <= sum(weights.values()):
        return "conv", None
    alone = [name for name in linear if not isinstance(trackable[name], Projection)]
    return "conv+linear", alone[-1] if alone else None


def _weights(layer: nn.Module) -> int:
    """Numbers in a layer's weight, also where it has not been made yet or is spread over processes."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels * layer.in_channels // layer.groups * prod(layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return layer.out_features * layer.in_features


def _names(name: str, layer: nn.Module) -> tuple[str, ...]:
    return (name, name.rpartition(".")[0]) if isinstance(layer, Projection) else (name,)


def _what_there_is(trackable: dict[str, nn.Module], layers: LayerSpec) -> str:
    if not trackable:
        return "the model has no Conv1d, Conv2d, Conv3d or Linear layer"
    names = list(trackable)
    wanted = [layers] if isinstance(layers, str) else [] if callable(layers) else list(layers)
    if layers == "conv":
        return "the model has no convolution; expected 'auto' or 'conv+linear'"
    kinds = ", ".join(map(repr, _WORDS))
    begin = f"expected {kinds}, a glob over names or a function; names begin with {', '.join(names[:3])}"
    return "; ".join([begin, *(nearest(want, [*_WORDS, *names]) for want in wanted[:1])])


class Projection(nn.Linear):
    """One of several Linear maps that an attention holds packed: a layer to watch, which never runs by itself.

    Args:
        owner: a ``nn.MultiheadAttention``, or a Linear layer that gives queries, keys and values side by side.
        part: ``"q"``, ``"k"``, ``"v"`` or ``"out"``.

    Attributes:
        weight: ``[C, F]``, where the owner holds it; likewise ``bias``, ``[C]`` or ``None``.
        reads: whether the owner tells what this map reads; the input of ``"out"`` never leaves the attention.
    """

    owner: nn.MultiheadAttention | nn.Linear

    def __init__(self, owner: nn.MultiheadAttention | nn.Linear, part: str) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "owner", owner)  # not as a module inside this one
        self.part, self.reads = part, part != "out"
        if isinstance(owner, nn.Linear):
            self.in_features = self.out_features = owner.in_features
        else:
            self.out_features = owner.embed_dim
            self.in_features = {"k": owner.kdim, "v": owner.vdim}.get(part, owner.embed_dim)

    @classmethod
    def all_of(cls, name: str, module: nn.Module) -> dict[str, Projection]:
        """The projections packed in a module of this name; none in most."""
        packed = False
        if isinstance(module, nn.MultiheadAttention):
            packed = (
                type(module).forward is nn.MultiheadAttention.forward
            )  # another may mean other things by its weights
        elif isinstance(module, nn.Linear):
            packed = name.rpartition(".")[2] == "qkv" and module.out_features == 3 * module.in_features
        if not packed:
            return {}
        parts = ("q", "k", "v") if isinstance(module, nn.Linear) else ("q", "k", "v", "out")
        return {".".join(filter(None, [name, part])): cls(module, part) for part in parts}  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return self._packed()[name == "bias"] if name in ("weight", "bias") else super().__getattr__(name)

    def of_run(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Any, Any]:
        """What this map read, ``None`` where that is not told, and what it gave, when its owner ran.

        Returns:
            ``[B, …, F]`` and ``[B, …, C]``; of an attention without a batch whatever it was given.
        """
        owner = self.owner
        if isinstance(owner, nn.Linear):
            return args[0] if args else kwargs.get("input"), output[..., self._rows]
        if self.part == "out":
            return None, self._batch_first(output[0])
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        read = self._batch_first(next(value for name, value in given.items() if name[0] == self.part))
        weight, bias = self._packed()
        return read, F.linear(read, weight, bias)

    def _batch_first(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if tensor.ndim == 3 and not self.owner.batch_first else tensor

    @property
    def _rows(self) -> slice:
        start = "qkv".index(self.part) * self.out_features
        return slice(start, start + self.out_features)

    def _packed(self) -> tuple[Tensor, Tensor | None]:
        owner = self.owner
        if isinstance(owner, nn.Linear):
            weight, bias = owner.weight[self._rows], owner.bias
        elif self.part == "out":
            return owner.out_proj.weight.detach(), None if owner.out_proj.bias is None else owner.out_proj.bias.detach()
        else:
            separate = getattr(owner, f"{self.part}_proj_weight")
            weight = owner.in_proj_weight[self._rows] if separate is None else separate
            bias = owner.in_proj_bias
        return weight.detach(), None if bias is None else bias.detach()[self._rows]


def listen(layer: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> RemovableHandle:
    """Call ``hook(layer, input, output)`` whenever a tracked layer has run, be it inside an attention.

    The input is ``None`` where the layer's call does not show it.
    """
    owner = layer.owner if isinstance(layer, Projection) else layer
    return owner.register_forward_hook(partial(_heard, layer, hook), with_kwargs=True)


def _heard(
    layer: nn.Module,
    hook: Callable[[nn.Module, Any, Any], None],
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    if isinstance(layer, Projection):
        hook(layer, *layer.of_run(args, kwargs, output))
    else:
        hook(layer, args[0] if args else kwargs.get("input"), output)


class _WeightUses(TorchFunctionMode):
    """Recorder of the first function that reads each of some parameters, and of the module that was running then."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: dict[int, tuple[str, str]] = {}
        self._watched = {id(parameter) for parameter in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        for value in tree_leaves((args, kwargs)):
            if id(value) in self._watched and name != "__get__":  # a look at its shape or type
                self.found.setdefault(id(value), (name, self.running[-1] if self.running else ""))
        return func(*args, **(kwargs or {}))


def used_elsewhere(model: nn.Module, layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> dict[str, str]:
    """Which layers are not run but have their weights read by a function, such as ``F.linear``, by name: by which.

    Args:
        model: any module.
        layers: layers of it that do not run.
        forward: runs the model on any batch.
    """
    owners = {name: layer.owner if isinstance(layer, Projection) else layer for name, layer in layers.items()}
    uses = _WeightUses(parameter for owner in owners.values() for parameter in owner.parameters())
    shown = {module: name for name, module in _named_modules(model)}

    def enter(module: nn.Module, _inputs: Any) -> None:
        uses.running.append(shown[module])

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        uses.running.pop()

    with hooked(((m, enter) for m in shown), before=True), hooked((m, leave) for m in shown), uses:
        forward()
    found = {}
    for name, owner in owners.items():
        told = [uses.found[id(parameter)] for parameter in owner.parameters() if id(parameter) in uses.found]
        if told:
            function, home = told[0]
            found[name] = f"its weight is used by a plain function ({function}) in {home or type(model).__name__}"
    return found


def channel_count(layer: nn.Module) -> int:
    """Output features of a tracked layer."""
    count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return int(count)  # type: ignore[arg-type]  # not a NumPy number, which a checkpoint could not hold


def by_position(layer: nn.Module, tensor: Tensor, images: int, name: str) -> Tensor:
    """A layer's output (or input) as ``[B, C, P]``: images, channels, positions; a view wherever strides allow.

    Args:
        layer: the module it belongs to.
        tensor: ``[B, C, *spatial]`` of a convolution, ``[B, *positions, C]`` of a Linear.
        images: B, the number of images in the batch.
        name: the layer's name, for the error.

    Raises:
        ValueError: if the first dimension is not the batch.
    """
    if why := misfit(layer, tensor, images):
        raise ValueError(f"layer {name!r} gave {why}; leave the layer out with layers=[…]")
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        return tensor.flatten(2)
    return tensor[:, :, None] if tensor.ndim == 2 else tensor.flatten(1, -2).transpose(1, 2)


def misfit(layer: nn.Module, tensor: Any, images: int, what: str = "an output") -> str:
    """Why a layer's output (or input) has no positions of images; empty where it has.

    Args:
        layer: the module it belongs to.
        tensor: the output.
        images: B, the number of images in the batch.
        what: what the tensor is, for the text.
    """
    convolution = isinstance(layer, CONVOLUTIONS + TRANSPOSED)
    if not isinstance(tensor, Tensor) or tensor.is_nested:
        kind = "nested tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
        return f"{what} that is a {kind} for a batch of {images} images: expected one tensor"
    if tensor.is_complex():
        return f"{what} of complex numbers: expected real ones"
    if tensor.ndim < (3 if convolution else 2) or len(tensor) != images:
        return (
            f"{what} of shape {tuple(tensor.shape)} for a batch of {images} images: "
            f"expected {'[B, C, *spatial]' if convolution else '[B, …, C]'} with B = {images}"
        )
    return ""


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a convolution or Linear layer runs anything else than the forward of its class in torch."""
    kind = next(kind for kind in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED) if isinstance(layer, kind))
    steps = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    return any(name in vars(layer) or getattr(type(layer), name) is not getattr(kind, name) for name in steps)


def why_not_affine(layer: nn.Module) -> str:
    """Why a convolution or Linear layer may give something else than its weight times its input plus its bias.

    Returns:
        Empty where the class' own forward runs on plain parameters with no hooks but this package's, which only look.
    """
    if has_own_forward(layer):
        return f"{type(layer).__name__} has a forward of its own, which need not be affine in its input"
    own = dict(layer.named_parameters(recurse=False))
    if own.get("weight") is not layer.weight or own.get("bias") is not layer.bias:
        return "its weight or bias is computed from other parameters (a parametrization, a norm or a pruning mask)"
    if any(not _ours(hook) for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())):
        return "a forward hook on it may change what it reads or gives"
    return ""


def _ours(hook: Callable) -> bool:
    home = getattr(getattr(hook, "func", hook), "__module__", None) or ""  # that of a partial is its function's
    return home.partition(".")[0] == __name__.partition(".")[0]


def widens_pointwise(layer: nn.Module) -> bool:
    """Whether a layer maps each position's input by one matrix to more channels than it has inputs.

    The moments of such an output follow exactly from those of the narrower input, at a fraction of the work.
    """
    if why_not_affine(layer):
        return False
    if isinstance(layer, nn.Linear):
        return layer.in_features < layer.out_features
    return (
        isinstance(layer, CONVOLUTIONS)
        and layer.in_channels < layer.out_channels
        and layer.groups == 1
        and set(layer.kernel_size) == {1} == set(layer.stride)
        and set(layer.padding) == {0}
    )


def affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``[C, F]`` and bias ``[C]`` of a layer for which :func:`widens_pointwise` holds."""
    weight = layer.weight.detach().flatten(1)  # type: ignore[operator]
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()  # type: ignore[operator]
    return weight, bias


def crashes_channels_last(network: nn.Module) -> str:
    """Return the name of a layer that corrupts the heap in PyTorch's CPU kernels (seen in 2.15) with NHWC maps, or "".

    Such layers are strided 1×1 convolutions with fewer than 8 inputs; they give wrong outputs, or crash later.
    """
    for name, layer in network.named_modules():
        narrow = isinstance(layer, nn.Conv2d) and layer.in_channels < 8 and layer.groups == 1
        if narrow and layer.kernel_size == (1, 1) and layer.stride != (1, 1):
            return name
    return ""
