"""What becomes of a layer's output right after it: norms, a residual sum, and a function that cuts values off."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from chanaxes_pl.network.tracing import Trace

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_UNCHANGED = (nn.Identity, nn.modules.dropout._DropoutNd)
# A norm that multiplies a channel by less than this share of its median factor passes nothing on.
_TINY = 1e-3
#: Up to the first of these values, and from the second one on, a function gives the same whatever it gets.
Flat = tuple[float, float]
_NOWHERE: Flat = (-math.inf, math.inf)
_RELU, _RELU6, _HARDSWISH, _HARDSIGMOID = (0.0, math.inf), (0.0, 6.0), (-3.0, math.inf), (-3.0, 3.0)
_FLAT: dict[Any, Flat] = {
    nn.ReLU: _RELU,
    nn.ReLU6: _RELU6,
    nn.Hardswish: _HARDSWISH,
    nn.Hardsigmoid: _HARDSIGMOID,
    F.relu: _RELU,
    F.relu6: _RELU6,
    F.hardswish: _HARDSWISH,
    F.hardsigmoid: _HARDSIGMOID,
    torch.relu: _RELU,
    "relu": _RELU,
}


class Passed(NamedTuple):
    """What a passage does with a layer's output, in units of that output.

    Attributes:
        beside: what a sum adds; ``None`` without a sum.
        counts: ``[C]``, of which channels norms pass more than next to nothing on; ``None`` if there are no norms.
        flat: ``[C]`` twice: if output and ``beside`` together are at most the first or at least the second, it does not
            matter how far. ``None`` where no function cuts values off.
    """

    beside: Tensor | None
    counts: Tensor | None
    flat: tuple[Tensor, Tensor] | None


class Passage(NamedTuple):
    """What follows a layer, as far as it treats channels one by one.

    Attributes:
        beside: what is added, known before the layer runs; ``None`` without a sum.
        norms: the norms, in eval mode, that the layer's output goes through before.
        flat: where the function behind them is flat.
    """

    beside: fx.Node | None
    norms: tuple[nn.Module, ...]
    flat: Flat

    def of(self, values: Mapping[fx.Node, Any]) -> Passed | None:
        """What it does where some values are known; ``None`` if what is added is not a tensor."""
        added = None if self.beside is None else values[self.beside]
        if self.beside is not None and not isinstance(added, Tensor):
            return None
        if not self.norms:
            flat = None if self.flat == _NOWHERE else (torch.tensor([self.flat[0]]), torch.tensor([self.flat[1]]))
            return Passed(added, None, flat)
        factor, offset, counts = torch.ones(()), torch.zeros(()), None
        for norm in self.norms:
            assert isinstance(norm, _NORMS)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            here = norm.running_var.add(norm.eps).rsqrt()
            here = here * norm.weight if norm.affine else here
            passes = here.abs() > _TINY * here.abs().median()
            counts = passes if counts is None else counts & passes
            factor = factor.to(here) * here
            offset = (offset.to(here) - norm.running_mean) * here
            offset = offset + norm.bias if norm.affine else offset
        assert counts is not None
        if added is not None:
            units = torch.where(factor == 0, 0.0, 1 / factor)
            added = added * units.view(1, -1, *[1] * (added.ndim - 2))
        return Passed(added, counts, self._flat(factor, offset, counts))

    def _flat(self, factor: Tensor, offset: Tensor, counts: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the function is flat, in units of what norms read."""
        if self.flat == _NOWHERE:
            return None
        ends = [(end - offset) / factor for end in self.flat]
        low, high = (torch.where(factor > 0, one, other) for one, other in (ends, reversed(ends)))
        return torch.where(counts, low, -math.inf), torch.where(counts, high, math.inf)


def passage(trace: Trace, layer: fx.Node) -> Passage | None:
    """Return what follows a layer; ``None`` if that is neither a sum that it completes nor a function with flat parts.

    Args:
        trace: of a network in eval mode.
        layer: where the layer runs.
    """
    order = [node for node, _ in trace.operations]
    later, norms, node, beside = set(order[order.index(layer) :]), [], layer, None
    while len(node.users) == 1:
        (user,) = node.users
        module = trace.modules.get(user)
        flat = _flat_of(user, module)
        if flat is not None:
            return Passage(beside, tuple(norms), flat)
        if _adds(user) and beside is None:
            beside = next((term for term in user.args if term is not node), None)
            while beside in later and isinstance(trace.modules.get(beside), _UNCHANGED):
                beside = beside.all_input_nodes[0]  # which may be known earlier
            if not isinstance(beside, fx.Node) or beside in later or beside.op == "get_attr":
                return None
        elif isinstance(module, _NORMS) and module.running_var is not None and beside is None:
            norms.append(module)
        elif not isinstance(module, _UNCHANGED):
            break
        node = user
    return None if beside is None else Passage(beside, tuple(norms), _NOWHERE)


def _adds(node: fx.Node) -> bool:
    function = node.op == "call_function" and node.target in (operator.add, torch.add)
    method = node.op == "call_method" and node.target == "add"
    return (function or method) and len(node.args) == 2 and not node.kwargs


def _flat_of(node: fx.Node, module: nn.Module | None) -> Flat | None:
    if type(module) is nn.Hardtanh:
        return module.min_val, module.max_val
    called: Callable[..., Any] | str | type = type(module) if node.op == "call_module" else node.target
    return _FLAT.get(called)
