"""A network and its slim copy side by side, layer by layer, in bounded memory."""

from __future__ import annotations

import ctypes
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate, chain
from math import prod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from chanaxes_pl.compensation.passage import Passed, passage
from chanaxes_pl.core.errors import InputError
from chanaxes_pl.core.memory import GIGABYTE
from chanaxes_pl.network.batches import logits_of
from chanaxes_pl.network.hooks import calls, hooked
from chanaxes_pl.network.tracing import Trace

#: What is kept of a layer of the dense network for one batch.
T = TypeVar("T")


class Seen(NamedTuple):
    """What there is of a batch when a layer is about to run.

    Attributes:
        read: what the layer reads.
        after: what will be done with its output; ``None`` if not known.
    """

    read: Tensor
    after: Passed | None = None


#: ``(layer, number of the batch's first image, what there is before it runs, what it gives)`` → what is kept of them.
Take = Callable[[str, int, Seen, Tensor], T]

_MANY = 1 << 30
# Freed memory is given back after as many parts: after each would take long.
_PARTS = 8
# Reading and writing a number takes about as long as this many multiply–accumulates.
_ELEMENTWISE = 16


def paired(
    dense: nn.Module,
    slim: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str],
    take: Take[T],
    *,
    images: int,
    memory: float = math.inf,
) -> Iterator[tuple[str, Iterator[tuple[T, Seen]]]]:
    """Give for each layer in turn, batch by batch, what was taken of it in the dense network and what its twin sees.

    Later layers see the changes made to earlier ones of the slim network. The dense network runs once for as many
    layers ahead as half of ``memory`` has room for what is taken of them. Where the slim one can be traced, its batches
    wait at a layer with the values that the rest of the network needs, and if there is room for all of them, each runs
    once. Otherwise some wait there, some where they waited before, and the others at the image, from which they run
    again for every layer: whatever saves the most work. Elsewhere every layer takes a slim pass of its own, and no
    batch waits. The results are the same, except that what follows a layer is not known.

    Args:
        dense: in eval mode.
        slim: of the same class, with the same layers; in eval mode.
        batches: images, on the networks' device; iterated again whenever some have to run from the image.
        layers: names of layers that run once in a forward pass, in the order in which they do.
        take: keeps of a dense layer what its user needs, in tensors of its own.
        images: number of images in all batches.
        memory: bytes for what was taken, the values that wait and those of the images that are running. Batches are
            split so that the latter take no more than an eighth of it, if one image does not, and the same in passing.

    Raises:
        ValueError: if the values of one image take more than ``memory``.
    """
    image = next(iter(batches))[:1].clone()
    traced, original = (_Traced.of(model, layers, image) for model in (slim, dense))
    running, work = max(_largest_call(model, image) for model in (dense, slim)), []
    for network in filter(None, (original, traced)):
        most, work = _bytes_and_work(network.trace, image)
        running = max(running, most)
    if running > memory:
        raise InputError(
            f"{max(memory, 0) / GIGABYTE:.2g} GB are left for activations, and those of one image take "
            f"{running / GIGABYTE:.2g} GB in {type(dense).__name__} or its slim copy; raise memory="
        )
    at_once = int(max(1.0, min(memory / 8 / max(running, 1), _MANY)))
    parts = _Parts(batches, at_once)
    room = memory - 2 * at_once * running
    ahead = _Ahead(original or _Hooked(dense), list(layers), take, image, parts, images, room / 2)
    waiting = None if traced is None else _Waiting(traced, work, parts, room)
    for name in layers:
        _give_back()
        ahead.pass_on(name)
        if waiting is None:
            yield name, ((ahead.of(name, part), _caught(slim, name, part)) for part in parts)
        else:
            yield name, waiting.inputs(name, ahead)


class _Traced:
    """A network as a graph that calls each of some layers once.

    Args:
        trace: the graph.
        model: the network.
        layers: names of the layers.

    Attributes:
        trace: the graph.
        nodes: layer → where it runs.
    """

    def __init__(self, trace: Trace, model: nn.Module, layers: Sequence[str]) -> None:
        nodes = {module: node for node, module in trace.modules.items()}
        self.trace = trace
        self.nodes = {name: nodes[model.get_submodule(name)] for name in layers}
        self._passages = {name: passage(trace, node) for name, node in self.nodes.items()}

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[str], image: Tensor) -> _Traced | None:
        """Trace a model; ``None`` where that does not give the model's logits or does not call each layer once."""
        trace = Trace.of(model)
        if trace is None:
            return None
        runs = Counter(trace.modules.values())
        if any(runs[model.get_submodule(name)] != 1 for name in layers):  # such as inside a module of torch's
            return None
        return None if trace.values(image, logits_of(model(image))) is None else cls(trace, model, layers)

    def seen(self, name: str, values: Mapping[fx.Node, Any]) -> Seen:
        """What there is when a layer is about to run."""
        follows, read = self._passages[name], values[self.nodes[name].all_input_nodes[0]]
        if follows is not None and follows.norms and isinstance(self.trace.modules[self.nodes[name]], nn.Linear):
            follows = follows if read.ndim == 2 else None  # those norms treat positions one by one
        if follows is not None and follows.beside is not None:
            beside = values[follows.beside]
            follows = follows if isinstance(beside, Tensor) and beside.ndim == read.ndim else None
        return Seen(read, follows and follows.of(values))

    def visit(self, layers: list[str], images: Tensor, note: Callable[[str, Seen, Tensor], None]) -> None:
        """Run some images as far as the last of some layers, and note what each of these sees and gives."""
        values, wanted = self.trace.inputs(images), {self.nodes[name]: name for name in layers}
        for node, finished in self.trace.operations:
            values[node] = self.trace.compute(node, values)
            if node in wanted:
                note(wanted[node], self.seen(wanted[node], values), values[node])
                if wanted[node] == layers[-1]:
                    return
            for used in finished:
                del values[used]


class _Hooked:
    """A network that cannot be traced: what is added to its layers' outputs is not known."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def visit(self, layers: list[str], images: Tensor, note: Callable[[str, Seen, Tensor], None]) -> None:
        """As :meth:`_Traced.visit`."""

        def noted(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            note(name, Seen(inputs[0]), output)
            if name == layers[-1]:
                raise _Reached

        with (
            hooked((self._model.get_submodule(name), partial(noted, name)) for name in layers),
            torch.compiler.set_stance("force_eager"),
            suppress(_Reached),
        ):
            self._model(images)


class _Ahead(Generic[T]):
    """What is taken of the dense network's layers, for as many ahead as there is room for.

    Args:
        dense: the network.
        layers: names in order.
        take: what is kept.
        image: one of the images.
        parts: images.
        images: how many there are.
        room: bytes for what is kept.
    """

    def __init__(
        self,
        dense: _Traced | _Hooked,
        layers: list[str],
        take: Take[T],
        image: Tensor,
        parts: _Parts,
        images: int,
        room: float,
    ) -> None:
        self._dense, self._layers, self._take, self._parts, self._room = dense, layers, take, parts, room
        self._held: dict[str, deque[T]] = {}
        self._sizes = {name: images * _bytes_of(taken) for name, taken in self._through(layers, 0, image).items()}
        self._passed = 0  # images of the current layer
        self.bytes = 0

    def pass_on(self, name: str) -> None:
        """Forget the layers before one, and run on if it has not been reached."""
        self._passed = 0
        for earlier in self._layers[: self._layers.index(name)]:
            self._held.pop(earlier, None)
        if name not in self._held:
            self._run(self._layers[self._layers.index(name) :])
        self.bytes = _bytes_of(list(self._held.values()))

    def holds(self, name: str) -> bool:
        """Return whether a layer takes no more images."""
        return name in self._held

    def of(self, name: str, images: Tensor) -> T:
        """What is kept of a layer for the next part, whose images are not read if the layer :meth:`holds`."""
        if name in self._held:
            return self._held[name].popleft()
        taken = self._through([name], self._passed, images)[name]
        self._passed += len(images)
        return taken

    def _run(self, layers: list[str]) -> None:
        """Take what there is room for of some layers; where there is none for the first, nothing is held."""
        total = accumulate(self._sizes[name] for name in layers)
        layers = [name for name, size in zip(layers, total, strict=True) if size <= self._room]
        if not layers:
            return
        self._held, passed = {name: deque() for name in layers}, 0
        for images in self._parts:
            for name, taken in self._through(layers, passed, images).items():
                self._held[name].append(taken)
            passed += len(images)
            _give_back()

    def _through(self, layers: list[str], first: int, images: Tensor) -> dict[str, T]:
        """Run some images as far as the last of some layers."""
        taken: dict[str, T] = {}

        def note(name: str, seen: Seen, gave: Tensor) -> None:
            taken[name] = self._take(name, first, seen, gave)

        self._dense.visit(layers, images, note)
        return taken


class _Place(NamedTuple):
    """Where a batch is in a network: the next operation, and the values that it and those after it read."""

    operation: int
    values: dict[fx.Node, Any]


class _Waits(NamedTuple):
    """A batch that waits: where, how many bytes that takes, and how much work it saves."""

    place: _Place
    bytes: int
    saved: float


class _Waiting:
    """Batches that go through a traced network layer by layer, and wait where that saves the most work.

    Args:
        traced: the network.
        work: what it takes to get from the image to each operation.
        parts: images.
        room: bytes for values that wait and for what is taken of the dense network.
    """

    def __init__(self, traced: _Traced, work: list[float], parts: _Parts, room: float) -> None:
        self._traced, self._work, self._parts, self._room = traced, work, parts, room
        self._waits: dict[int, _Waits] = {}  # by number of the part
        self._used = 0

    def inputs(self, name: str, ahead: _Ahead[T]) -> Iterator[tuple[T, Seen]]:
        """What was taken of a layer, and what it sees, part by part."""
        # The layer itself runs when the batch goes on, because it may change until then.
        node = self._traced.nodes[name]
        room, plan = self._room - ahead.bytes, None
        for number, images in self._started(ahead.holds(name)):
            waits = self._waits.get(number)
            place = self._run_to(node, waits.place if waits else _Place(0, self._traced.trace.inputs(images)))
            here = _Waits(place, _bytes_of(place.values), self._work[place.operation])
            moves, stays = plan = plan or self._plan(here, room)
            if number in moves and self._used + here.bytes - (waits.bytes if waits else 0) <= room:
                self._wait(number, here)
            elif number not in moves and number not in stays:
                self._wait(number, None)
            seen = self._traced.seen(name, place.values)
            del waits, place, here
            if number % _PARTS == 0:
                _give_back()
            yield ahead.of(name, images), seen
            del seen, images  # before the next batch runs

    def _started(self, held: bool) -> Iterator[tuple[int, Tensor]]:
        """The number of each part, with its images unless nothing runs from the image."""
        if held and len(self._waits) == self._parts.count:
            return ((number, torch.empty(0)) for number in range(self._parts.count))
        return enumerate(self._parts)

    def _run_to(self, node: fx.Node, start: _Place) -> _Place:
        """Go on until right before an operation; the values at the start stay as they are."""
        trace, operation, values = self._traced.trace, start.operation, dict(start.values)
        while trace.operations[operation][0] is not node:
            passed, finished = trace.operations[operation]
            values[passed] = trace.compute(passed, values)
            for used in finished:
                del values[used]
            operation += 1
        return _Place(operation, values)

    def _plan(self, here: _Waits, room: float) -> tuple[Collection[int], Collection[int]]:
        """The parts that are to wait here, and those to stay where they wait: what saves the most work in the room.

        Those stay that save most for their bytes. Of the others the last ones move, so that the first ones have made
        room when they do.
        """
        if self._parts.count < 0:
            return range(_MANY), ()
        none = _Waits(here.place, 0, 0.0)
        waits = {number: self._waits.get(number, none) for number in range(self._parts.count)}
        ranked = sorted(waits, key=lambda number: waits[number].saved / max(waits[number].bytes, 1))
        best, plan = 0.0, (set[int](), set[int]())
        for count in range(len(ranked) + 1):
            left, saved, stays = room - count * here.bytes, count * here.saved, set()
            for number in reversed(ranked[count:]):
                if waits[number].bytes <= left:
                    left, saved = left - waits[number].bytes, saved + waits[number].saved
                    stays.add(number)
            if left >= 0 and saved >= best:
                others = sorted(waits.keys() - stays)
                best, plan = saved, (set(others[len(others) - count :]), stays)
        return plan

    def _wait(self, number: int, waits: _Waits | None) -> None:
        before = self._waits.pop(number, None)
        self._used += (waits.bytes if waits else 0) - (before.bytes if before else 0)
        if waits:
            self._waits[number] = waits


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
            parts = images.chunk(math.ceil(len(images) / self._size))
            # A part that waits must not keep its whole batch.
            for part in parts:
                yield part if len(parts) == 1 else part.clone()
            count += len(parts)
        self.count = count


def _bytes_and_work(trace: Trace, image: Tensor) -> tuple[int, list[float]]:
    """The most bytes that the values of an image take on its way through a network, and the work before each operation.

    Work is in multiply–accumulates.
    """
    values, most, work = trace.inputs(image), 0, [0.0]
    for node, finished in trace.operations:
        values[node] = value = trace.compute(node, values)
        most = max(most, _bytes_of(values))
        weight = getattr(trace.modules.get(node), "weight", None)
        each = weight[0].numel() if isinstance(weight, Tensor) else 1
        work.append(work[-1] + (value.numel() * (each + _ELEMENTWISE) if isinstance(value, Tensor) else 0))
        for used in finished:
            del values[used]
    return most, work


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
    elif isinstance(values, (tuple, list, deque)):
        yield from chain.from_iterable(map(_storages, values))
    elif isinstance(values, Mapping):
        yield from chain.from_iterable(map(_storages, values.values()))


def _give_back() -> None:
    """Give freed memory back to the system, as far as the C library can: it keeps what lies between blocks in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


class _Reached(Exception):
    """Thrown by a hook to end a forward pass early."""


def _caught(model: nn.Module, name: str, images: Tensor) -> Seen:
    """What one layer reads, by a forward pass that goes no further."""
    held: list[Seen] = []
    _Hooked(model).visit([name], images, lambda _name, seen, _gave: held.append(seen))
    return held[0]
