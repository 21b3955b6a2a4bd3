"""Networks as torch.fx graphs, which can be run again in part after a change."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from chanaxes_pl.network.batches import FAILURES, logits_of
from chanaxes_pl.network.hooks import hooked, same_outputs
from chanaxes_pl.network.layers import CONVOLUTIONS

#: What a module's output is replaced by.
Edit = Callable[[Tensor], Tensor]


# Run as one, so that their hooks fire, also where torchvision or others derive from them.
_LEAVES = (*CONVOLUTIONS, nn.Linear, nn.LayerNorm, nn.RMSNorm)
# What a model's own code raises when it meets torch.fx's stand-ins for tensors, where its path depends on shapes,
# types or values. An error of the model itself comes up again in its forward pass.
_UNTRACEABLE = (*FAILURES, NameError, ArithmeticError)
_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# Logits of the graph and of the model differ by no more than a GPU's choice of algorithm.
_SHARE = 1e-4


@contextmanager
def edited(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace the outputs of some modules of a model inside the block.

    Args:
        model: any module.
        edits: name of a submodule → what is made of its output.
    """
    with hooked(
        (model.get_submodule(name), lambda _module, _inputs, output, edit=edit: edit(output))
        for name, edit in edits.items()
    ):
        yield


class Trace:
    """A model of one input as a graph whose operations never overwrite their inputs.

    Attributes:
        operations: the graph's nodes in order, without its inputs, each with the values that nothing after it reads.
        modules: node → the module that it calls: every layer, every norm of features, and torch's own.
        holders: node → the module whose parameter or buffer it reads, for a function such as ``F.linear``.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._image, *self._options = (node for node in graph.nodes if node.op == "placeholder")
        self.operations = last_reads(node for node in graph.nodes if node.op != "placeholder")
        calls = (node for node, _ in self.operations if node.op == "call_module")
        self.modules = {node: root.get_submodule(str(node.target)) for node in calls}
        reads = (node for node, _ in self.operations if node.op == "get_attr")
        self.holders = {node: root.get_submodule(str(node.target).rpartition(".")[0]) for node in reads}

    @classmethod
    def of(cls, model: nn.Module) -> Trace | None:
        """Trace a model; ``None`` where torch.fx cannot, say because its control flow depends on the data."""
        root: nn.Module = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
        before = [(module, dict(vars(module))) for module in root.modules()]
        try:
            graph = _Tracer().trace(root)
        except _UNTRACEABLE:
            return None
        finally:  # a forward pass that keeps its logits would keep stand-ins for them
            for module, held in before:
                vars(module).clear()
                vars(module).update(held)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if not inputs or str(inputs[0].target).startswith("*") or not all(node.args for node in inputs[1:]):
            return None  # an input beside the images has to have a default
        return cls(root, graph) if _without_overwriting(graph, root) else None

    def inputs(self, images: Tensor) -> dict[fx.Node, Any]:
        """The values of the graph's inputs, from which :meth:`compute` goes on."""
        return {self._image: images, **{node: node.args[0] for node in self._options}}

    def values(self, images: Tensor, logits: Tensor) -> dict[fx.Node, Any] | None:
        """What every operation gives for a batch; ``None`` where that does not end in the model's own logits.

        Args:
            images: ``[B, …]``, what the model takes.
            logits: ``[B, K]``, what the model gives for them.
        """
        values = self.inputs(images)
        try:
            for node, _ in self.operations:
                values[node] = self.compute(node, values)
        except _UNTRACEABLE:  # of the trace alone: the model itself has run
            return None
        return values if same_outputs(next(reversed(values.values())), logits, _SHARE) else None

    def compute(self, node: fx.Node, values: Mapping[fx.Node, Any], fresh: Mapping[fx.Node, Any] | None = None) -> Any:
        """Run one operation.

        Args:
            node: the operation.
            values: what those before it gave.
            fresh: values that take the place of those in ``values``.
        """

        def value(used: fx.Node) -> Any:
            return fresh[used] if fresh and used in fresh else values[used]

        if node.op == "get_attr":
            return reduce(getattr, str(node.target).split("."), self._root)
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "output":
            return logits_of(args[0])
        if node.op == "call_module":
            return _called(self.modules[node], args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def last_reads(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Operations in order, each with the values that none of those after it reads."""
    nodes = list(nodes)
    last = {used: node for node in nodes for used in node.all_input_nodes}
    return [(node, [used for used in node.all_input_nodes if last[used] is node]) for node in nodes]


class PartialForward:
    """Logits of one batch, over and over, as modules of the network change.

    :meth:`run` keeps what every operation of the network gave for a batch, and :meth:`rerun` repeats only what lies
    downstream of a change. A network that torch.fx cannot trace (its control flow depends on the data, say), or that
    is found to compute something else than its trace, runs as a whole every time: the numbers are the same.

    Memory is that of all the activations of a batch. Everything has to happen inside
    :func:`observed`, beginning with the constructor: a trace is of one mode, and hooks have to fire.

    Args:
        model: ``model(images)`` gives logits, or something that :func:`logits_of` finds them in.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> forward = PartialForward(model)
        >>> logits = forward.run(torch.ones(3, 2))
        >>> forward.rerun(edits={"0": torch.zeros_like}).equal(model[2].bias.expand(3, 1))
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trace = Trace.of(model)
        self._plans: dict[tuple[str, ...], list[tuple[fx.Node, list[fx.Node]]]] = {}
        self._images: Tensor | None = None
        self._values: dict[fx.Node, Any] | None = None

    @property
    def partial(self) -> bool:
        """Whether the last batch can be run again in part."""
        return self._values is not None

    def run(self, images: Tensor, logits: Tensor | None = None) -> Tensor:
        """Logits of a batch, whose values are kept for :meth:`rerun`.

        Args:
            images: ``[B, …]``, what the model takes.
            logits: ``[B, K]``, what it gives for them, where that is known already.
        """
        self._images, self._values = images, None
        whole = logits_of(self._model(images)) if logits is None else logits
        if self._trace is not None:
            self._values = self._trace.values(images, whole)
        return whole

    def rerun(self, changed: Collection[str] = (), edits: Mapping[str, Edit] | None = None) -> Tensor:
        """Logits of the last batch now that some modules have changed; a change has to be named while it lasts.

        Args:
            changed: names of submodules whose hooks or parameters are not as they were: they run again.
            edits: name of a submodule → what is made of its output: it runs again only if its input changed.

        Raises:
            AttributeError: if the model has no submodule of such a name.
            RuntimeError: before the first :meth:`run`.
        """
        edits = edits or {}
        if self._images is None:
            raise RuntimeError(
                "PartialForward.rerun() before PartialForward.run(images): there is no batch to run again"
            )
        if self._trace is None or self._values is None or not self._shows(changed, edits):
            with edited(self._model, edits):
                return logits_of(self._model(self._images))
        repeat = {self._model.get_submodule(name) for name in changed}
        rewrite = {self._model.get_submodule(name): edit for name, edit in edits.items()}
        fresh: dict[fx.Node, Any] = {}
        value = next(reversed(self._values.values()))  # the network's output
        for node, finished in self._plan((*changed, *edits)):
            module = self._trace.modules.get(node)
            kept = module in rewrite and module not in repeat and fresh.keys().isdisjoint(node.all_input_nodes)
            value = self._values[node] if kept else self._trace.compute(node, self._values, fresh)
            fresh[node] = value = rewrite[module](value) if module in rewrite else value
            for used in finished:
                fresh.pop(used, None)
        return value

    def _shows(self, changed: Collection[str], edits: Collection[str]) -> bool:
        """Whether the trace has all these modules; those inside a module of torch's own are not in it."""
        assert self._trace is not None
        called, held = ({*of.values()} for of in (self._trace.modules, self._trace.holders))
        repeat, rewrite = ({self._model.get_submodule(name) for name in names} for names in (changed, edits))
        return repeat <= called | held and rewrite <= called

    def _plan(self, names: tuple[str, ...]) -> list[tuple[fx.Node, list[fx.Node]]]:
        """What lies downstream of some modules, each with the values that nothing after it reads."""
        assert self._trace is not None
        if names not in self._plans:
            sources = {self._model.get_submodule(name) for name in names}
            modules = self._trace.modules | self._trace.holders
            nodes: dict[fx.Node, None] = {}
            for node, _ in self._trace.operations:
                if modules.get(node) in sources or not nodes.keys().isdisjoint(node.all_input_nodes):
                    nodes[node] = None
            self._plans[names] = last_reads(nodes)
        return self._plans[names]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        inside = getattr(m, "_orig_mod", None)  # torch.compile's wrapper does not let itself be traced
        return super().call_module(m, forward, args, kwargs) if inside is None else inside(*args, **kwargs)


def _called(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Run a module that does not overwrite its input, which may be a value that is kept."""
    if getattr(module, "inplace", False) is not True:
        return module(*args, **kwargs)
    try:
        module.inplace = False  # type: ignore[assignment]
        return module(*args, **kwargs)
    finally:
        module.inplace = True  # type: ignore[assignment]


def _without_overwriting(graph: fx.Graph, root: nn.Module) -> bool:
    """Rewrite operations that overwrite an input into ones that do not; whether that is possible."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        if _overwrites(node, root):
            if not _rewrite(node):
                return False
            # Whatever reads the input from here on reads what has become of it.
            node.all_input_nodes[0].replace_all_uses_with(node, delete_user_cb=lambda user: user not in seen)
    return True


def _overwrites(node: fx.Node, root: nn.Module) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    if node.op not in ("call_method", "call_function"):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    private = name.startswith("_") or node.target in (operator.and_, operator.or_, operator.is_, operator.not_)
    if node.kwargs.get("out") is not None or _in_place(node) is not None:
        return True
    return node.target in _OUT_OF_PLACE or (name.endswith("_") and not private)


def _in_place(node: fx.Node) -> inspect.BoundArguments | None:
    """The arguments of a function of ``torch.nn.functional`` that is told to overwrite its input."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != F.__name__:
        return None
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it has no signature
        return None
    return given if given.arguments.get("inplace") else None


def _rewrite(node: fx.Node) -> bool:
    """Make an operation give a new tensor; whether that is possible."""
    if node.op == "call_module":
        return True  # its flag is switched off while it runs
    if node.kwargs.get("out") is not None:
        return False
    if (given := _in_place(node)) is not None:
        given.arguments["inplace"] = False
        node.args, node.kwargs = given.args, given.kwargs
    elif node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
        return hasattr(Tensor, node.target)
    elif node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
    else:
        name = getattr(node.target, "__name__", "").removesuffix("_")
        twin = getattr(torch, name, None) or getattr(F, name, None)
        if twin is None:
            return False
        node.target = twin
    return True
