"""Which modules are tracked, and under what names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from chanaxes_pl.core.errors import ArgumentError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = {"conv": CONVOLUTIONS, "conv+linear": (*CONVOLUTIONS, nn.Linear)}
#: ``"conv"``, ``"conv+linear"``, a glob or several over layer names, or ``(name, module) → bool``.
LayerSpec = str | Sequence[str] | Callable[[str, nn.Module], bool]


def select_layers(model: nn.Module, layers: LayerSpec = "conv") -> dict[str, nn.Module]:
    """The tracked modules of a model, by their own names in it.

    Trackable are modules that are affine in their input: ``Conv1d/2d/3d`` of any groups, and ``Linear``.
    A wrapper that ``torch.compile`` put around a module does not show in the name.

    Args:
        model: any module.
        layers: ``"conv"``, ``"conv+linear"``, a glob or a list of globs over names
            (``"layer[34].*"``), or a function ``(name, module) → bool``.

    Raises:
        ValueError: if nothing matches; the message names the layers there are.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> list(select_layers(model)), list(select_layers(model, "conv+linear"))
        (['0'], ['0', '3'])
    """
    trackable = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in model.named_modules()
        if isinstance(module, _KINDS["conv+linear"])
    }
    if callable(layers):
        chosen = {name: module for name, module in trackable.items() if layers(name, module)}
    elif isinstance(layers, str) and layers in _KINDS:
        chosen = {name: module for name, module in trackable.items() if isinstance(module, _KINDS[layers])}
    else:
        globs = [layers] if isinstance(layers, str) else list(layers)
        chosen = {n: m for n, m in trackable.items() if any(fnmatchcase(n, g) for g in globs)}
    if not chosen:
        raise ArgumentError(f"layers={layers!r}", f"no tracked module; {_what_there_is(trackable, layers)}")
    return chosen


def _what_there_is(trackable: dict[str, nn.Module], layers: LayerSpec) -> str:
    if not trackable:
        return "the model has no Conv1d, Conv2d, Conv3d or Linear layer"
    names = list(trackable)
    wanted = [layers] if isinstance(layers, str) else [] if callable(layers) else list(layers)
    near = [hit for want in wanted for hit in difflib.get_close_matches(want, [*_KINDS, *names], n=2)]
    begin = f"expected 'conv', 'conv+linear', a glob over names or a function; names begin with {', '.join(names[:3])}"
    return begin + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def channel_count(layer: nn.Module) -> int:
    """Output features of a tracked layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


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
    convolution = isinstance(layer, CONVOLUTIONS)
    if tensor.ndim < (3 if convolution else 2) or len(tensor) != images:
        raise ValueError(
            f"layer {name!r} gave an output of shape {tuple(tensor.shape)} for a batch of {images} images: "
            f"expected {'[B, C, *spatial]' if convolution else '[B, …, C]'} with B = {images}; "
            "leave the layer out with layers=[…]"
        )
    if convolution:
        return tensor.flatten(2)
    return tensor[:, :, None] if tensor.ndim == 2 else tensor.flatten(1, -2).transpose(1, 2)


def why_not_affine(layer: nn.Module) -> str:
    """Why a convolution or Linear layer may give something else than its weight times its input plus its bias.

    Returns:
        Empty where the class' own forward runs on plain parameters with no hooks but this package's, which only look.
    """
    kind = next(kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(layer, kind))
    steps = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    if any(name in vars(layer) or getattr(type(layer), name) is not getattr(kind, name) for name in steps):
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
