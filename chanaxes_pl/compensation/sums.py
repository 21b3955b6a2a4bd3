"""Residual sums: what is added to a layer's output once it has run."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from chanaxes_pl.network.tracing import Trace

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_UNCHANGED = (nn.Identity, nn.modules.dropout._DropoutNd)
# A norm that multiplies a channel by less than this share of its median factor passes nothing on.
_TINY = 1e-3


class Sum(NamedTuple):
    """A sum that a layer completes: what is added to its output is known before the layer runs.

    Attributes:
        beside: what is added.
        norms: the norms, in eval mode, that the layer's output goes through before.
    """

    beside: fx.Node
    norms: tuple[nn.Module, ...]

    def of(self, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor | None] | None:
        """What is added, and ``[C]``, of which channels norms pass more than next to nothing on, if there are norms.

        It is in units of the layer's output: divided by the factor that each channel gets from norms, 0 where that is
        0. ``None`` if it is not a tensor.
        """
        added, passed = values[self.beside], None
        if not isinstance(added, Tensor):
            return None
        for norm in self.norms:
            assert isinstance(norm, _NORMS)
            assert norm.running_var is not None
            factors = norm.running_var.add(norm.eps).rsqrt()
            factors = factors * norm.weight if norm.affine else factors
            here = factors.abs() > _TINY * factors.abs().median()
            passed = here if passed is None else passed & here
            units = torch.where(factors == 0, 0.0, 1 / factors)
            added = added * units.view(1, -1, *[1] * (added.ndim - 2))
        return added, passed


def completed_sum(trace: Trace, layer: fx.Node) -> Sum | None:
    """Return the sum that a layer completes, where nothing but norms and dropout lies between; ``None`` elsewhere.

    Args:
        trace: of a network in eval mode.
        layer: where the layer runs.
    """
    order = [node for node, _ in trace.operations]
    later, norms, node = set(order[order.index(layer) :]), [], layer
    while len(node.users) == 1:
        (user,) = node.users
        module = trace.modules.get(user)
        if _adds(user):
            beside = next((term for term in user.args if term is not node), None)
            while beside in later and isinstance(trace.modules.get(beside), _UNCHANGED):
                beside = beside.all_input_nodes[0]  # which may be known earlier
            if isinstance(beside, fx.Node) and beside not in later and beside.op != "get_attr":
                return Sum(beside, tuple(norms))
            return None
        if isinstance(module, _NORMS) and module.running_var is not None:
            norms.append(module)
        elif not isinstance(module, _UNCHANGED):
            return None
        node = user
    return None


def _adds(node: fx.Node) -> bool:
    function = node.op == "call_function" and node.target in (operator.add, torch.add)
    method = node.op == "call_method" and node.target == "add"
    return (function or method) and len(node.args) == 2 and not node.kwargs
