"""Which entries of a network's tensors belong together: labels that follow the values through one forward pass.

Every index of every dimension of every parameter and buffer gets a label, a whole number above 0. A value carries the
label of the channel that it holds: what a layer gives carries the labels of the rows of its weight. Operations that
move values move their labels alike, by the same function of PyTorch. An operation that combines values joins their
labels, because one cannot go without the other: a sum joins the channels that it adds, a product the columns of its
weight with the channels that they read. What remains apart can be removed apart.

Labels are kept as small tensors that broadcast to the shape of their value, in float64, which holds whole numbers
exactly and passes through every operation. A value may carry several of them, which vary along different dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from chanaxes_pl.network.hooks import entered
from chanaxes_pl.network.layers import CONVOLUTIONS, TRANSPOSED

#: Layers with a weight, whose channels can be removed.
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
#: Normalisations whose features are followed by themselves, because some have no tensor that shows their number.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
#: Norms over the last dimensions, each with statistics of all its features.
LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Side:
    """One dimension of a tensor, or the features of a norm.

    Attributes:
        path: name of the parameter, buffer or norm.
        dimension: dimension of the tensor; ``None`` for a norm's features.
        size: number of its indices.
        start: label of its first index.
    """

    path: str
    dimension: int | None
    size: int
    start: int


@dataclass(frozen=True, eq=False)
class Heads:
    """One side of a product of two activations over their channels, as of queries and keys.

    Attributes:
        module: name of the module that computes it.
        labels: ``[heads, width]``, the labels of the channels of each head.
        rescaled: whether it is the left side, and PyTorch scales the product by the width.
    """

    module: str
    labels: np.ndarray
    rescaled: bool


def goes_by_groups(layer: nn.Module) -> bool:
    """Return whether whole groups of a grouped convolution are removed, and not a place in every group.

    They are where that gives more units, and always in depthwise convolutions.
    """
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED) or layer.groups == 1:
        return False
    return _by_groups(layer.groups, layer.in_channels // layer.groups, layer.out_channels // layer.groups)


def _by_groups(groups: int, per_in: int, per_out: int) -> bool:
    return per_in == 1 or groups > min(per_in, per_out)


class Flow(TorchDispatchMode):
    """Follower of labels through the operations that run inside a ``with`` block, without gradients.

    Args:
        model: model whose parameters and buffers get labels.
        widths: whether heads of attention go in part, the same channels of each head, rather than as a whole.

    Attributes:
        sides: every labelled dimension.
        heads: products of activations over their channels.
        reads: labels of the columns of weights that products used.
    """

    def __init__(self, model: nn.Module, widths: bool = False) -> None:
        super().__init__()
        self.widths = widths
        self.sides: list[Side] = []
        self.heads: list[Heads] = []
        self.reads: list[Tensor] = []
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what is computed from parameters alone
        self._scales = False
        self._paused = False
        self._expands = True
        # Shape of the first input of the operation that runs, which it may change.
        self._shape = torch.Size()
        self._norms: dict[str, Tensor] = {}
        self._modules = dict(model.named_modules())
        self._owners = {id(module.weight) for module in self._modules.values() if isinstance(module, LAYERS)}
        self._model = model
        self._within: list[str] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._grids: list[Tensor] = []
        self._gates: list[tuple[Tensor, Tensor]] = []
        self._fixed: list[tuple[Tensor, str]] = []
        self._notes: list[tuple[Tensor, str]] = []
        self._count = 1
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not (tensor.is_floating_point() or tensor.is_complex()):  # such as indices
                continue
            fields = []
            for dimension, size in enumerate(tensor.shape):
                if dimension > 1 and id(tensor) in self._owners:  # places of a kernel
                    continue
                field = self._side(path, dimension, size)
                fields.append(field.reshape([-1 if d == dimension else 1 for d in range(tensor.ndim)]))
            self._put(tensor, fields)
            self._weights[tensor] = True
        for name, module in self._modules.items():
            if isinstance(module, NORMS):
                self._norms[name] = self._side(name, None, width(module))

    @contextmanager
    def following(self, expands: bool = True) -> Iterator[None]:
        """Follow the forward passes of the model inside the block; attention runs as plain products there.

        Args:
            expands: whether an expanded value counts as the one that it repeats. Its code may write a fixed number of
                channels, which only a trial shows.
        """
        self._expands = expands
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                entered(self._model) as self._within,
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                sdpa_kernel(SDPBackend.MATH),
                _Functions(self),
                self,
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def fix(self, values: Iterable[Any], reason: str) -> None:
        """Keep the channels that some values hold."""
        for value in values:
            if isinstance(value, Tensor):
                self._fixed += [(labels, reason) for labels in self._of(value)]

    def units(self) -> tuple[np.ndarray, dict[int, str], dict[int, str]]:
        """Return the unit of every label, ``[labels]``; unit → why it stays; and unit → what joins its channels."""
        unit, changed = self._joined(), True
        while changed:
            steps = [self._free_one(unit, grid) for grid in self._grids]
            if not any(steps):  # gates come last, when all else is joined
                steps = [self._settle(unit, *gate) for gate in self._gates]
            changed = any(steps)
            unit = self._joined() if changed else unit
        fixed = {int(u): reason for labels, reason in reversed(self._fixed) for u in np.unique(unit[_whole(labels)])}
        notes = {int(u): note for labels, note in reversed(self._notes) for u in np.unique(unit[_whole(labels)])}
        fixed[int(unit[0])] = _ALONE
        return unit, fixed, notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._shape = args[0].shape if args and isinstance(args[0], Tensor) else torch.Size()
        result = func(*args, **kwargs)
        if self._paused:
            return result
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if inputs and all(value in self._weights for value in inputs):
            self._weights.update({value: True for value in tree_leaves(result) if isinstance(value, Tensor)})
        if any(value in self._labels for value in inputs):
            name = func._overloadpacket.__name__
            rule = _RULES.get(name.removesuffix("_") if name.endswith("_") else name)
            if rule is None and torch.Tag.pointwise in func.tags:
                rule = _pointwise
            (rule or _unknown)(self, func, args, kwargs, result)
        return result

    # What rules read and write.

    def _side(self, path: str, dimension: int | None, size: int) -> Tensor:
        self.sides.append(Side(path, dimension, size, self._count))
        labels = torch.arange(self._count, self._count + size, dtype=torch.float64)
        self._count += size
        return labels

    def _of(self, value: Any) -> list[Tensor]:
        return self._labels[value] if isinstance(value, Tensor) and value in self._labels else []

    def _put(self, value: Tensor, fields: Iterable[Tensor]) -> None:
        kept = [labels for field in fields if (labels := _tight(field)).numel() > 1]
        if kept:
            self._labels[value] = kept
        else:
            self._labels.pop(value, None)

    @property
    def _current(self) -> str:
        return self._within[-1] if self._within else ""

    @property
    def _where(self) -> str:
        name = self._current
        kind = type(self._modules[name]).__name__
        return f"{name} ({kind})" if name else kind

    def _join(self, a: Tensor, b: Tensor) -> None:
        """Join labels that go together, position by position."""
        self._pairs.append((a, b))

    def _join_along(self, labels: Tensor, axes: Iterable[int], note: str = "") -> Tensor:
        """Join the labels along some dimensions, and return the first ones there."""
        first = _first(labels, axes)
        if first.shape != labels.shape:
            self._join(first, labels)
            if note:
                self._notes.append((first, note))
        return first

    def _meet(self, a: Tensor, a_shape: Sequence[int], b: Tensor, b_shape: Sequence[int], gates: bool) -> Tensor:
        """Join the labels of two values that an operation combines; return those of the result."""
        for small, shape, big in ((a, a_shape, b), (b, b_shape, a)):
            if gates and any(shape[axis] == 1 for axis in _axes(big)) and _axes(small) < _axes(big):
                self._gates.append((small, big))
                return big
        self._join(a, b)
        wide, other = (a, b) if len(_axes(a)) >= len(_axes(b)) else (b, a)
        wide, other = torch.broadcast_tensors(wide, other)
        return torch.where(wide != 0, wide, other)

    def _merge(
        self, operands: Sequence[tuple[list[Tensor], Sequence[int]]], action: str, gates: bool = True
    ) -> list[Tensor]:
        """Combine values that broadcast to one shape, each given by its labels and its shape."""
        ndim = max(len(shape) for _, shape in operands)
        shapes = [(1,) * (ndim - len(shape)) + tuple(shape) for _, shape in operands]
        merged: list[tuple[Tensor, tuple[int, ...], set[int]]] = []
        for number, ((fields, _), shape) in enumerate(zip(operands, shapes, strict=True)):
            for labels in fields:
                labels = labels.reshape((1,) * (ndim - labels.ndim) + labels.shape)
                for place, (other, other_shape, numbers) in enumerate(merged):
                    if number not in numbers and _axes(other) & _axes(labels):
                        joined = self._meet(other, other_shape, labels, shape, gates)
                        merged[place] = joined, tuple(map(max, other_shape, shape)), numbers | {number}
                        break
                else:
                    merged.append((labels, shape, {number}))
        kept = []
        for labels, _, numbers in merged:
            alone = [shape for number, shape in enumerate(shapes) if number not in numbers]
            stays = {axis for shape in alone for axis in _axes(labels) if shape[axis] > 1}
            if stays == _axes(labels):
                self._fixed.append((labels, f"{self._where} {action}"))
            else:
                kept.append(self._join_along(labels, stays))
        return kept

    # How labels come together in the end.

    def _joined(self) -> np.ndarray:
        rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for a, b in self._pairs:
            a, b = torch.broadcast_tensors(a, b)
            pair = np.stack([_whole(a).ravel(), _whole(b).ravel()])
            for side in (0, 1):  # a label that meets 0 stays
                lone = pair[side][(pair[1 - side] == 0) & (pair[side] != 0)]
                if len(lone):
                    self._fixed.append((torch.from_numpy(np.unique(lone)).double(), _ALONE))
            pair = pair[:, (pair != 0).all(0)]
            rows.append(pair[0])
            columns.append(pair[1])
        row, column = np.concatenate(rows), np.concatenate(columns)
        edges = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(self._count, self._count))
        self._pairs = [(torch.from_numpy(row).double(), torch.from_numpy(column).double())]
        return connected_components(edges, directed=False)[1]

    def _free_one(self, unit: np.ndarray, grid: Tensor) -> bool:
        """Let the labels of a channel dimension that was split in several vary along one of them only.

        Where nothing else decides, it is the last one: code writes the number of groups, and not their size.
        """
        found = unit[_whole(grid)]
        free = [axis for axis in _axes(grid) if (found != found.take([0], axis)).any()]
        if len(free) < 2:
            return False
        self._join_along(grid, free[:-1], "it is split into parts of one size")
        return True

    def _settle(self, unit: np.ndarray, small: Tensor, big: Tensor) -> bool:
        """Join a gate with what it opens, if its label leads to one unit there; otherwise let the gate stay."""
        shared = _axes(small)
        found = unit[_whole(big)]
        others = [axis for axis in _axes(big) if axis not in shared]
        if all((found == found.take([0], axis)).all() for axis in others):
            one = _first(big, others)
        else:
            one = _first(big, shared)
            self._fixed.append((small, "it is used alike for several units"))
            small, one = big, one
        a, b = (np.broadcast_to(unit[_whole(x)], torch.broadcast_shapes(small.shape, one.shape)) for x in (small, one))
        if (a == b).all():
            return False
        self._join(small, one)
        return True


class _Functions(TorchFunctionMode):
    """Tells a flow of functions whose operations do not show what they are.

    Attention scales its product by the width of its heads. The root mean square of a norm is one number for all its
    features, which can still go one by one; as operations, a mean and a product, it would join them. Circular padding
    writes parts of a map into a new one.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.rms_norm, torch.rms_norm):
            return self._rms_norm(*args, **kwargs)
        if func is F.pad and kwargs.get("mode") == "circular":  # which PyTorch always names
            return self._circular(*args[:2])
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self._flow._scales = kwargs.get("scale") is None
        try:
            return func(*args, **kwargs)
        finally:
            self._flow._scales = False

    def _rms_norm(
        self, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        with self._pausing():
            result = F.rms_norm(input, normalized_shape, weight, eps)
        if input in self._flow._weights:
            self._flow._weights[result] = True
        _layer_norm(self._flow, None, (input, normalized_shape, weight), {}, (result,))
        return result

    def _circular(self, input: Tensor, pad: list[int]) -> Tensor:
        with self._pausing():
            result = F.pad(input, pad, "circular")
        positions = range(input.ndim - len(pad) // 2, input.ndim)
        note = f"{self._flow._where} mixes its positions"
        self._flow._put(result, [self._flow._join_along(labels, positions, note) for labels in self._flow._of(input)])
        return result

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """Follow no operation inside the block."""
        self._flow._paused = True
        try:
            yield
        finally:
            self._flow._paused = False


_ALONE = "it is combined with values that no layer gives"


def width(norm: nn.Module) -> int:
    """Return the number of features that a norm normalises, over its last dimension if it has several."""
    if isinstance(norm, LAYER_NORMS):
        return norm.normalized_shape[-1]
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else int(norm.num_features)  # type: ignore[arg-type]


def _whole(labels: Tensor) -> np.ndarray:
    return labels.numpy().astype(np.int64)


def _axes(labels: Tensor) -> set[int]:
    return {axis for axis, size in enumerate(labels.shape) if size > 1}


def _extent(value: Tensor) -> tuple[int, ...]:
    """Return the shape of a value before it was expanded, as by ``gate.expand_as(maps)``."""
    if value.layout != torch.strided:
        return tuple(value.shape)
    return tuple(1 if stride == 0 else size for size, stride in zip(value.shape, value.stride(), strict=True))


def _first(labels: Tensor, axes: Iterable[int]) -> Tensor:
    """Return the first labels along some dimensions, which keep size 1."""
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels


def _tight(labels: Tensor) -> Tensor:
    """Return labels with size 1 along the dimensions in which they do not vary."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            labels = labels.narrow(axis, 0, 1)
    return labels.clone()


# Rules: each is called after the operation, with its arguments and result.


def _unknown(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    flow.fix(tree_leaves((args, kwargs)), f"it passes {func._overloadpacket.__name__} in {flow._where}")
    for value in tree_leaves(result):
        if isinstance(value, Tensor):
            flow._put(value, [])


def _nothing(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """The result has no channels."""


def _pointwise(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    name = func._overloadpacket.__name__
    shapes = [_extent(value) if flow._expands else value.shape for value in values]
    fields = flow._merge(
        list(zip(map(flow._of, values), shapes, strict=True)), f"combines it with values that no layer gives ({name})"
    )
    for value in tree_leaves(result):
        if isinstance(value, Tensor):
            flow._put(value, fields)


def _same(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    for value in tree_leaves(result):
        if isinstance(value, Tensor) and value.shape == args[0].shape:
            flow._put(value, flow._of(args[0]))


def _stride(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    if [*args[0].shape] == [*args[1]]:  # only the layout changes
        return
    _unknown(flow, func, args, kwargs, result)


def _copy(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    target, source = args[:2]
    if target._is_view() or target.untyped_storage().nbytes() != target.numel() * target.element_size():
        flow.fix([target, source], f"{flow._where} writes it into a part of another tensor")
    else:
        flow._put(result, [labels.expand(target.shape) for labels in flow._of(source)])


def _move(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value, *rest = args
    if any(flow._of(other) for other in tree_leaves((rest, kwargs))):
        return _unknown(flow, func, args, kwargs, result)
    moved: list[list[Tensor]] = [[] for _ in range(len(result) if isinstance(result, (tuple, list)) else 1)]
    for labels in flow._of(value):
        found = func(labels.expand(flow._shape), *rest, **kwargs)
        for part, out in zip(moved, found if isinstance(found, (tuple, list)) else [found], strict=True):
            part.append(_tight(out))
    for out, fields in zip(result if isinstance(result, (tuple, list)) else [result], moved, strict=True):
        flow._put(out, fields)
    return None


def _view(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    fields = []
    for labels in flow._of(args[0]):
        moved = _tight(labels.expand(args[0].shape).reshape(result.shape))
        if len(_axes(moved)) > max(1, len(_axes(labels))):
            flow._grids.append(moved)
        fields.append(moved)
    flow._put(result, fields)


def _roll(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Move values around, unless they are channels: how far depends on their number then."""
    dims = args[2] if len(args) > 2 else kwargs.get("dims", [])
    dims = {dim % args[0].ndim for dim in dims} or set(range(args[0].ndim))
    rolled = any(dims & _axes(labels) for labels in flow._of(args[0]))
    (_unknown if rolled else _move)(flow, func, args, kwargs, result)


def _glu(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value = args[0]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % value.ndim
    fields = []
    for labels in flow._of(value):
        if axis in _axes(labels):
            labels, gate = labels.chunk(2, axis)
            flow._join(labels, gate)
        fields.append(labels)
    flow._put(result, fields)


def _split(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    _move(flow, func, args, kwargs, result)
    axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
    if len({part.shape for part in result}) == 1:
        for labels in flow._of(args[0]):
            if axis in _axes(labels):
                flow._grids.append(labels.unflatten(axis, (len(result), -1)))


def _embedding(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    flow._put(result, [torch.embedding(labels.expand(args[0].shape), args[1]) for labels in flow._of(args[0])])


def _pad(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value, widths = args[:2]
    fields = []
    for labels in flow._of(value):
        kept = list(widths)
        for pair in range(len(widths) // 2):
            if labels.shape[value.ndim - 1 - pair] == 1:  # zeros along other dimensions than the channels'
                kept[2 * pair : 2 * pair + 2] = 0, 0
        fields.append(torch.constant_pad_nd(labels, kept))
    flow._put(result, fields)


def _join_values(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    values = [value for value in args[0] if value.numel()]
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    stacks = func._overloadpacket.__name__ == "stack"
    axis %= result.ndim
    families: list[dict[int, Tensor]] = []
    for number, value in enumerate(values):
        for labels in flow._of(value):
            labels = labels.unsqueeze(axis) if stacks else labels
            same = next(
                (f for f in families if number not in f and any(_axes(o) & _axes(labels) for o in f.values())), None
            )
            if same is None:
                families.append({number: labels})
            else:
                same[number] = labels
    fields = []
    for family in families:
        if not stacks and not any(axis in _axes(labels) for labels in family.values()):
            # Other dimensions stay a rectangle: what goes from one part goes from all.
            operands = [
                ([family[number]] if number in family else [], (*value.shape[:axis], 1, *value.shape[axis + 1 :]))
                for number, value in enumerate(values)
            ]
            fields += flow._merge(operands, "joins it with values that no layer gives", gates=False)
            continue
        common = list(torch.broadcast_shapes(*([*f.shape[:axis], 1, *f.shape[axis + 1 :]] for f in family.values())))
        parts = []
        for number, value in enumerate(values):
            common[axis] = 1 if stacks else value.shape[axis]
            labels = family.get(number)
            parts.append(torch.zeros(common, dtype=torch.float64) if labels is None else labels.expand(common))
        fields.append(torch.cat(parts, axis))
    flow._put(result, fields)


def _spatial(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    name = func._overloadpacket.__name__
    ndim = int(re.findall(r"(\d)d", name)[0])
    fields = [
        flow._join_along(labels, range(labels.ndim - ndim, labels.ndim), f"{flow._where} mixes its positions")
        for labels in flow._of(args[0])
    ]
    for value in tree_leaves(result):
        if isinstance(value, Tensor):
            flow._put(value, fields)


def _sample(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    image, grid = args[:2]
    if flow._of(grid):
        return _unknown(flow, func, args, kwargs, result)
    ndim = image.ndim - 2
    return flow._put(result, [flow._join_along(labels, range(2, 2 + ndim)) for labels in flow._of(image)])


def _reduce(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value = args[0]
    name = func._overloadpacket.__name__
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    dims = given.get("dim")
    dims = range(value.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted({dim % value.ndim for dim in dims}) if value.ndim else []
    fields = []
    for labels in flow._of(value):
        first = flow._join_along(labels, dims, f"{name} in {flow._where} mixes them")
        outs = [out for out in tree_leaves(result) if isinstance(out, Tensor)]
        if outs[0].ndim < value.ndim:
            for dim in reversed(dims):
                first = first.squeeze(dim)
        fields.append(first)
    for out in tree_leaves(result):
        if isinstance(out, Tensor):
            flow._put(out, fields)


def _batch_norm(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value = args[0]
    out = _scaled(flow, value, flow._of(value), 1, args[1:5])
    flow._put(result[0] if isinstance(result, (tuple, list)) else result, out)


def _scaled(flow: Flow, value: Tensor, fields: list[Tensor], axis: int, tensors: Sequence[Any]) -> list[Tensor]:
    """Join the labels of a normalised value with those of ``[C]`` tensors, and of the norm, along one dimension."""
    shape = [-1 if dim == axis else 1 for dim in range(value.ndim)]
    of_tensors = [flow._of(part) for part in tensors if isinstance(part, Tensor)]
    of_norm = flow._norms.get(flow._current)
    if of_norm is not None and len(of_norm) == value.shape[axis]:
        of_tensors.append([of_norm])
    full = [value.shape[axis] if dim == axis else 1 for dim in range(value.ndim)]
    operands = [(fields, tuple(value.shape))]
    operands += [([part.reshape(shape) for part in parts], tuple(full)) for parts in of_tensors]
    return flow._merge([operand for operand in operands if operand[0]], "normalises it") if fields else []


def _layer_norm(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value, normalised = args[:2]
    norm = flow._modules[flow._current]
    last = value.ndim - 1
    fields = []
    for labels in flow._of(value):
        mixed = range(value.ndim - len(normalised), value.ndim)
        plain = _axes(labels) == {last} and len(normalised) == 1 and isinstance(norm, LAYER_NORMS)
        if not plain:  # they still vary, for heads of attention that go as a whole
            flow._join_along(labels, mixed, f"{flow._where} normalises them together")
        fields.append(labels)
    # Over several dimensions, all are joined to one, and its parameters stay.
    flow._put(result[0], _scaled(flow, value, fields, last, args[2:4]) if len(normalised) == 1 else fields)


def _group_norm(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value, weight, bias, _, channels, _, groups = args[:7]
    norm = flow._modules[flow._current]
    fields = []
    for labels in flow._of(value):
        if 1 in _axes(labels) and (groups > 1 or not isinstance(norm, nn.GroupNorm)):
            parts = labels.unflatten(1, (groups, channels // groups))
            flow._join_along(parts, [2], f"{flow._where} normalises them together")
        fields.append(labels)
    flow._put(result[0], _scaled(flow, value, fields, 1, (weight, bias)))


def _product(flow: Flow, left: Tensor, right: Tensor) -> list[Tensor]:
    """Return the labels of the product of ``[…, n, k]`` and ``[…, k, m]``."""
    k = left.ndim - 1
    of_left, of_right = flow._of(left), flow._of(right)
    for labels in of_left:
        if k in _axes(labels):
            partners = [other for other in of_right if k - 1 in _axes(other)]
            for other in partners:
                flow._join(labels[..., None], other[..., None, :, :])
            if not partners:
                flow._fixed.append((labels, f"{flow._where} multiplies it with values that no layer gives"))
    for labels in of_right:
        if k - 1 in _axes(labels) and not any(k in _axes(other) for other in of_left):
            flow._fixed.append((labels, f"{flow._where} multiplies it with values that no layer gives"))
    for fields, axis in ((of_left, k), (of_right, k - 1)):
        if len(fields) > 1:
            flow.reads += [labels for labels in fields if axis in _axes(labels)]
    first = _summed(flow, of_left, k, left not in flow._weights and right not in flow._weights)
    second = _summed(flow, of_right, k - 1, left not in flow._weights and right not in flow._weights)
    shapes = [(*left.shape[:-1], 1), (*right.shape[:-2], 1, right.shape[-1])]
    action = "multiplies it with values that no layer gives"
    return flow._merge([(first, shapes[0]), (second, shapes[1])], action, gates=False)


def _summed(flow: Flow, fields: list[Tensor], axis: int, attends: bool) -> list[Tensor]:
    """Return the labels of one side of a product that are left after the sum over a dimension.

    Where both sides are activations, the channels of a head go as a whole, or (``widths``) those of all heads alike.
    """
    left = []
    for labels in fields:
        others = _axes(labels) - {axis}
        batch = {other for other in others if other < labels.ndim - 2}
        if attends and axis in _axes(labels) and others == batch:
            last = labels.movedim(axis, -1).flatten(0, -2)
            is_left = axis == labels.ndim - 1
            flow.heads.append(Heads(flow._current, _whole(last), is_left and flow._scales))
            if flow.widths:
                flow._join_along(labels, batch)
                continue
        if others:
            left.append(flow._join_along(labels, [axis], f"a product in {flow._where} mixes them"))
    return left


def _mm(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    flow._put(result, _product(flow, args[0], args[1]))


def _addmm(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    bias, left, right = args[:3]
    product = _product(flow, left, right)
    flow._put(result, flow._merge([(product, result.shape), (flow._of(bias), bias.shape)], "adds it to values"))


def _convolution(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value, weight, bias, *_, groups = args[:9]
    transposed = args[6]
    spatial = range(2, value.ndim)
    inputs = []
    for labels in flow._of(value):
        if 1 in _axes(labels):
            inputs.append(labels)
        else:
            flow._join_along(labels, [axis for axis in spatial if axis in _axes(labels)], f"{flow._where} mixes them")
    into, out = (0, 1) if transposed else (1, 0)
    columns = [labels for labels in flow._of(weight) if into in _axes(labels)]
    rows = [labels for labels in flow._of(weight) if out in _axes(labels)]
    per_in, per_out = value.shape[1] // groups, result.shape[1] // groups
    if rows:
        flow.reads += columns
    if groups == 1:
        for labels in columns:
            flat = labels.movedim(into, 0).reshape(per_in, -1)
            for held in inputs:
                flow._join(held.movedim(1, 0).reshape(per_in, 1, -1), flat[:, :, None])
            if not inputs:
                flow._fixed.append((labels, "it reads the network's input"))
        for held in inputs if not columns else []:
            flow._fixed.append((held, f"{flow._where} convolves it with values that no layer gives"))
        given = [labels.movedim(out, 0).reshape(result.shape[1], -1) for labels in rows]
    else:
        given = _grouped(flow, inputs, columns, rows, groups, per_in, per_out, transposed)
    fields = [flow._join_along(labels, [1]).reshape(1, -1, *[1] * (value.ndim - 2)) for labels in given]
    if bias is not None:
        shape = (1, -1, *[1] * (value.ndim - 2))
        extra = [labels.reshape(shape) for labels in flow._of(bias)]
        fields = flow._merge([(fields, result.shape), (extra, (1, len(bias), *shape[2:]))], "adds a bias to it")
    flow._put(result, fields)


def _grouped(
    flow: Flow,
    inputs: list[Tensor],
    columns: list[Tensor],
    rows: list[Tensor],
    groups: int,
    per_in: int,
    per_out: int,
    transposed: bool,
) -> list[Tensor]:
    """Join the labels around a grouped convolution; return those of its outputs, ``[outputs, 1]``."""
    by_groups = _by_groups(groups, per_in, per_out)
    held = [labels.movedim(1, 0).reshape(groups, per_in, -1) for labels in inputs]
    if not rows and not columns and per_in == per_out == 1:  # one kernel for every channel, as a blur has it
        return [flow._join_along(labels, [2])[:, 0] for labels in held]
    if transposed:  # the weight is [inputs, outputs of a group]
        taken = [labels.reshape(groups, per_in, -1) for labels in columns]
        for labels, other in ((a, b) for a in held for b in taken):
            flow._join(labels[..., None], other[:, :, None])
        if by_groups:
            for labels in (*held, *taken):
                flow._join_along(labels, [1, 2])
            return [labels[:, :1, :1].expand(groups, per_out, 1).reshape(-1, 1) for labels in taken]
        for labels in (*held, *taken):
            flow._join_along(labels, [0, 2])
        of_place = [labels.movedim(1, 0).reshape(1, per_out, -1)[..., :1] for labels in rows]
        return [labels.expand(groups, -1, 1).reshape(-1, 1) for labels in of_place]
    given = [labels.reshape(groups, per_out, -1) for labels in rows]
    if by_groups:
        for labels in (*held, *given):
            flow._join_along(labels, [1, 2])
        for labels, other in ((a, b) for a in held for b in given):
            flow._join(labels[:, :1, :1], other[:, :1, :1])
        if not held:
            flow._fixed += [(labels, "it reads the network's input") for labels in given]
    else:
        for labels in (*held, *given):
            flow._join_along(labels, [0, 2])
        for labels, other in ((a, b) for a in held for b in columns):
            flow._join(labels[0, :, 0], other.movedim(1, 0).reshape(per_in, -1)[:, 0])
    return [labels.reshape(groups * per_out, -1) for labels in rows]


def _im2col(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    value, kernel = args[:2]
    if any(_axes(labels) & {value.ndim - 2, value.ndim - 1} for labels in flow._of(value)):
        return _unknown(flow, func, args, kwargs, result)
    taps = math.prod(kernel)
    return flow._put(result, [labels.repeat_interleave(taps, -3).flatten(-2) for labels in flow._of(value)])


def _rules(names: str, rule: Callable[..., None]) -> dict[str, Callable[..., None]]:
    return dict.fromkeys(names.split(), rule)


#: Name of an operation of ATen → its rule; operations that PyTorch tags as pointwise need none.
_RULES = {
    **_rules("view _unsafe_view reshape unflatten", _view),
    **_rules(
        "permute t transpose expand squeeze unsqueeze select slice unbind clone flip index index_select repeat "
        "gather pixel_shuffle pixel_unshuffle channel_shuffle split_with_sizes movedim unfold diagonal",
        _move,
    ),
    **_rules("roll", _roll),
    **_rules("glu", _glu),
    **_rules("split chunk tensor_split", _split),
    **_rules("cat stack", _join_values),
    **_rules("constant_pad_nd", _pad),
    **_rules(
        "detach alias _to_copy lift_fresh contiguous ones_like zeros_like empty_like rand_like randn_like full_like "
        "bernoulli native_dropout fill zero dropout",
        _same,
    ),
    # These lack PyTorch's tag of pointwise operations in some release.
    **_rules(
        "_prelu_kernel hardswish hardsigmoid hardtanh silu elu celu selu leaky_relu softplus softshrink mish threshold "
        "log_sigmoid_forward rrelu_with_noise gelu relu relu6 clamp",
        _pointwise,
    ),
    **_rules("copy", _copy),
    **_rules("as_strided", _stride),
    **_rules(
        "avg_pool1d avg_pool2d avg_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "max_pool2d max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_trilinear3d reflection_pad1d reflection_pad2d "
        "replication_pad1d replication_pad2d mkldnn_max_pool2d",
        _spatial,
    ),
    **_rules("grid_sampler_2d grid_sampler_3d", _sample),
    **_rules(
        "mean sum amax amin max min prod var std var_mean std_mean logsumexp linalg_vector_norm norm _softmax "
        "_log_softmax _safe_softmax softmax any all cumsum argmax",
        _reduce,
    ),
    **_rules(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "_batch_norm_with_update _batch_norm_no_update",
        _batch_norm,
    ),
    **_rules("native_layer_norm", _layer_norm),
    **_rules("native_group_norm", _group_norm),
    **_rules("mm bmm", _mm),
    **_rules("addmm baddbmm", _addmm),
    **_rules("convolution", _convolution),
    **_rules("im2col", _im2col),
    **_rules("embedding", _embedding),
    **_rules("new_zeros new_empty new_ones new_full size stride _local_scalar_dense is_same_size equal", _nothing),
}
