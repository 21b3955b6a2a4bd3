"""Two networks run side by side over the same images, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

# What a model raises that is handed a placeholder, where its path depends on shapes, types or values.
_UNTRACEABLE = (TraceError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


class Signals(NamedTuple):
    """What one batch gives a layer and its twin.

    Attributes:
        dense_input: what the layer reads in the dense network.
        dense_output: what it makes of it.
        slim_input: what its twin reads in the slim one.
    """

    dense_input: Tensor
    dense_output: Tensor
    slim_input: Tensor


def lockstep(
    dense: nn.Module, slim: nn.Module, batches: Sequence[Tensor], layers: Sequence[str]
) -> Iterator[tuple[str, Iterator[Signals]]]:
    """Every layer in turn, with an iterator over the batches' signals at it.

    A change to the slim network's layer while it is its turn is seen by all layers after it. Where both networks can be
    traced, each batch runs through each of them once, and waits before a layer until all batches have come as far:
    the maps of all images at one depth are held at a time. Elsewhere every layer takes a pass of its own.

    Args:
        dense: in eval mode.
        slim: of the same class, with the same layers; in eval mode.
        batches: images, on the networks' device.
        layers: names of layers that run once in a forward pass, in the order in which they do.
    """
    traced = [_traced(model, layers, batches[0][:1]) for model in (dense, slim)]
    if any(graph is None for graph in traced):
        for name in layers:
            yield name, (Signals(*_caught(dense, name, b), _caught(slim, name, b)[0]) for b in batches)
        return
    walks = [[_walk(graph, images, layers) for graph in traced if graph is not None] for images in batches]
    for name in layers:
        yield name, (Signals(next(whole), next(whole), next(cut)) for whole, cut in walks)
        for _, cut in walks:
            next(cut)


def _traced(model: nn.Module, layers: Sequence[str], image: Tensor) -> fx.GraphModule | None:
    """A model as a graph that stops at some layers; ``None`` where it is not all in sight, or not the same."""
    try:
        graph = fx.symbolic_trace(model)
        found, wanted = graph(image), model(image)
    except _UNTRACEABLE:
        return None
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    if any(calls[name] != 1 for name in layers):  # such as inside a module of torch's, which is traced as a whole
        return None
    return graph if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True) else None


def _walk(graph: fx.GraphModule, images: Tensor, layers: Sequence[str]) -> Iterator[Tensor]:
    """The input and then the output of each of some layers, none of them run before it is asked for."""
    wanted = set(layers)
    run = fx.Interpreter(graph)
    run.args_iter = iter([images])
    for node in graph.graph.nodes:
        stop = node.op == "call_module" and node.target in wanted
        if stop:
            yield run.fetch_args_kwargs_from_env(node)[0][0]
        run.env[node] = run.run_node(node)
        if stop:
            yield run.env[node]
        for read in run.user_to_last_uses.get(node, []):
            del run.env[read]


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
