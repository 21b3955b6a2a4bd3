"""Networks as torch.fx graphs: run again in part after a change, and two run side by side, layer by layer."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.network.batches import logits_of
from chanaxes_pl.network.hooks import calls, same_outputs
from chanaxes_pl.network.layers import CONVOLUTIONS

#: What a module's output is replaced by.
Edit = Callable[[Tensor], Tensor]


# Run as one, so that their hooks fire, also where torchvision or others derive from them.
_LEAVES = (*CONVOLUTIONS, nn.Linear, nn.LayerNorm)
# What a model's own code raises when it meets torch.fx's stand-ins for tensors, where its path depends on shapes,
# types or values. An error of the model itself comes up again in its forward pass.
_UNTRACEABLE = (ValueError, TypeError, RuntimeError, AttributeError, NameError, LookupError, ArithmeticError)
_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# Logits of the graph and of the model differ by no more than a GPU's choice of algorithm.
_SHARE = 1e-4
_MANY = 1 << 30


@contextmanager
def edited(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace the outputs of some modules of a model inside the block.

    Args:
        model: any module.
        edits: name of a submodule → what is made of its output.
    """
    handles = []
    try:
        for name, edit in edits.items():
            hook = model.get_submodule(name).register_forward_hook
            handles.append(hook(lambda _module, _inputs, output, edit=edit: edit(output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Trace:
    """A model of one input as a graph whose operations never overwrite their inputs.

    Attributes:
        operations: the graph's nodes in order, without its inputs, each with the values that nothing after it reads.
        modules: node → the module that it calls: every convolution, Linear and LayerNorm that runs, and torch's own.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._image, *self._options = (node for node in graph.nodes if node.op == "placeholder")
        self.operations = last_reads(node for node in graph.nodes if node.op != "placeholder")
        calls = (node for node, _ in self.operations if node.op == "call_module")
        self.modules = {node: root.get_submodule(str(node.target)) for node in calls}

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

    def rerun(self, changed: Iterable[str] = (), edits: Mapping[str, Edit] | None = None) -> Tensor:
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
        if self._trace is None or self._values is None:
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

    def _plan(self, names: tuple[str, ...]) -> list[tuple[fx.Node, list[fx.Node]]]:
        """What lies downstream of some modules, each with the values that nothing after it reads."""
        assert self._trace is not None
        if names not in self._plans:
            sources = {self._model.get_submodule(name) for name in names}
            nodes: dict[fx.Node, None] = {}
            for node, _ in self._trace.operations:
                if self._trace.modules.get(node) in sources or not nodes.keys().isdisjoint(node.all_input_nodes):
                    nodes[node] = None
            self._plans[names] = last_reads(nodes)
        return self._plans[names]


class Activations(NamedTuple):
    """A layer's input and output in the dense network, and its input in the slim one, for one batch.

    Attributes:
        dense_input: what the layer reads in the dense network.
        dense_output: what it gives there.
        slim_input: what the layer of the same name reads in the slim one.
    """

    dense_input: Tensor
    dense_output: Tensor
    slim_input: Tensor


def paired_activations(
    dense: nn.Module,
    slim: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str],
    memory: float = math.inf,
) -> Iterator[tuple[str, Iterator[Activations]]]:
    """Run two networks side by side, and give each layer in turn with its activations, batch by batch.

    Later layers see the changes made to earlier ones of the slim network. Where both networks can be traced, batches
    wait at a layer with the values that the rest of the network needs, as many as ``memory`` has room for; each of
    these runs once. The others stay where they last had room, at first at the image, and run again from there for every
    layer. The results are the same. Elsewhere every layer takes a pass of its own, and no batch waits.

    Args:
        dense: in eval mode.
        slim: of the same class, with the same layers; in eval mode.
        batches: images, on the networks' device; iterated again whenever some have to run from the image.
        layers: names of layers that run once in a forward pass, in the order in which they do.
        memory: bytes for the values that wait and those of the images that are running. Batches are split so that
            the latter take no more than an eighth of it, if one image does not, and the same again in passing.

    Raises:
        ValueError: if the values of one image take more than ``memory``.
    """
    image = next(iter(batches))[:1].clone()
    traces = [_checked_trace(model, layers, image) for model in (dense, slim)]
    whole, cut = traces
    if whole is None or cut is None:
        running = sum(_largest_call(model, image) for model in (dense, slim))
        batches = _Parts(batches, _images_at_once(dense, running, memory))
        for name in layers:
            yield name, (Activations(*_caught(dense, name, b), _caught(slim, name, b)[0]) for b in batches)
        return
    running = sum(_most_bytes(trace, image) for trace in (whole, cut))
    at_once = _images_at_once(dense, running, memory)
    waiting = _Waiting(whole, cut, _Parts(batches, at_once), memory - 2 * at_once * running)
    for name in layers:
        yield name, waiting.activations(dense.get_submodule(name), slim.get_submodule(name))


def _checked_trace(model: nn.Module, layers: Sequence[str], image: Tensor) -> Trace | None:
    """A model's trace; ``None`` where it does not give the model's logits or does not call each layer once."""
    trace = Trace.of(model)
    if trace is None:
        return None
    calls = Counter(trace.modules.values())
    if any(calls[model.get_submodule(name)] != 1 for name in layers):  # such as inside a module of torch's
        return None
    return None if trace.values(image, logits_of(model(image))) is None else trace


class _Place(NamedTuple):
    """Where a batch is in a network: the next operation, and the values that it and those after it read."""

    operation: int
    values: dict[fx.Node, Any]


class _Waiting:
    """Batches that go through two traced networks layer by layer, and wait where there is room for their values.

    Args:
        dense: trace of the dense network.
        slim: trace of the slim one.
        parts: images.
        room: bytes for values that wait.
    """

    def __init__(self, dense: Trace, slim: Trace, parts: _Parts, room: float) -> None:
        self._traces, self._parts, self._room = (dense, slim), parts, room
        self._places: dict[int, tuple[_Place, _Place]] = {}  # number of the part → where it waits
        self._bytes: dict[int, int] = {}
        self._used = 0

    def activations(self, dense: nn.Module, slim: nn.Module) -> Iterator[Activations]:
        """What a layer of both networks reads and gives, part by part."""
        for number, images in self._started():
            starts = self._places.get(number) or [_Place(0, trace.inputs(images)) for trace in self._traces]
            whole, cut = (_run_to(*each) for each in zip(self._traces, starts, (dense, slim), strict=True))
            node, finished = self._traces[0].operations[whole.operation]
            read, gave = whole.values[node.all_input_nodes[0]], self._traces[0].compute(node, whole.values)
            reads = cut.values[self._traces[1].operations[cut.operation][0].all_input_nodes[0]]
            whole.values[node] = gave
            for used in finished:
                del whole.values[used]
            # The slim layer runs when the batch goes on, because it may change until then.
            self._wait(number, _Place(whole.operation + 1, whole.values), cut)
            del starts, whole, cut, images
            yield Activations(read, gave, reads)
            del read, gave, reads  # before the next batch runs

    def _started(self) -> Iterator[tuple[int, Tensor]]:
        """The number of each part, with its images unless all parts wait somewhere."""
        if len(self._places) == self._parts.count:
            yield from ((number, torch.empty(0)) for number in range(self._parts.count))
        else:
            yield from enumerate(self._parts)

    def _wait(self, number: int, whole: _Place, cut: _Place) -> None:
        """Let a part wait here instead of where it did, if there is room."""
        size = _bytes_of((whole.values, cut.values))
        used = self._used - self._bytes.get(number, 0) + size
        if used <= self._room:
            self._places[number], self._bytes[number], self._used = (whole, cut), size, used


class _Parts:
    """Batches of images in parts of a bounded size.

    Attributes:
        count: number of parts; −1 before the first complete iteration.
    """

    def __init__(self, batches: Iterable[Tensor], size: int) -> None:
        self._batches, self._size = batches, size
        self.count = -1

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        for images in self._batches:
            parts = images.split(self._size)
            # A part that waits must not keep its whole batch.
            for part in parts:
                yield part if len(parts) == 1 else part.clone()
            count += len(parts)
        self.count = count


def _run_to(trace: Trace, start: _Place, layer: nn.Module) -> _Place:
    """Go on until right before a layer; the values at the start stay as they are."""
    operation, values = start.operation, dict(start.values)
    while trace.modules.get(trace.operations[operation][0]) is not layer:
        node, finished = trace.operations[operation]
        values[node] = trace.compute(node, values)
        for used in finished:
            del values[used]
        operation += 1
    return _Place(operation, values)


def _images_at_once(model: nn.Module, one: float, memory: float) -> int:
    """How many images run at once, of which one takes ``one`` bytes."""
    if one > memory:
        raise InputError(
            f"{max(memory, 0) / 1e9:.2g} GB are left for activations, and those of one image take {one / 1e9:.2g} GB "
            f"in {type(model).__name__} and its slim copy; raise memory="
        )
    return int(max(1.0, min(memory / 8 / max(one, 1), _MANY)))


def _most_bytes(trace: Trace, image: Tensor) -> int:
    """The most bytes that the values of a batch take on its way through a network."""
    values, most = trace.inputs(image), 0
    for node, finished in trace.operations:
        values[node] = trace.compute(node, values)
        most = max(most, _bytes_of(values))
        for used in finished:
            del values[used]
    return most


def _largest_call(model: nn.Module, image: Tensor) -> int:
    """About the most bytes that a batch takes on its way: a residual, an input and an output of the largest module."""
    sizes = (max(prod(call.input_shape), prod(call.output_shape)) for call in calls(model, lambda: model(image)))
    return 3 * image.element_size() * max(sizes)


def _bytes_of(values: Any) -> int:
    """Bytes of all memory that the tensors in nested containers keep, without the networks' own parameters."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(values)}.values())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(values, Tensor) and not isinstance(values, nn.Parameter):
        yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        yield from chain.from_iterable(map(_storages, values))
    elif isinstance(values, Mapping):
        yield from chain.from_iterable(map(_storages, values.values()))


class _Reached(Exception):
    """Thrown by a hook to end a forward pass early."""


def _caught(model: nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of one layer, by a forward pass that goes no further."""
    held: list[Any] = []

    def catch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        held.extend((inputs[0], output))
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(catch)
    try:
        with torch.compiler.set_stance("force_eager"):
            model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return held[0], held[1]


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
    return node.target in _OUT_OF_PLACE or bool(node.kwargs.get("inplace")) or (name.endswith("_") and not private)


def _rewrite(node: fx.Node) -> bool:
    """Make an operation give a new tensor; whether that is possible."""
    if node.op == "call_module":
        return True  # its flag is switched off while it runs
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
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
