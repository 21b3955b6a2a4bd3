"""Observation of a model: hooks that are always removed, contexts that change nothing, comparison of outputs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from chanaxes_pl.core.errors import ArgumentError, ArgumentTypeError, InputError, short

# What every module has: its parameters, its modes, its hooks.
_OWN = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, set, deque)
# Their parameters are parts of one large one while they run, or lie elsewhere.
_SHARDING = ("FullyShardedDataParallel", "FSDPModule")


@contextmanager
def hooked(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]], before: bool = False) -> Iterator[None]:
    """Register forward hooks for the duration of a block.

    Args:
        pairs: pairs ``(module, hook)``; a hook is called as ``hook(module, inputs, output)``, and may return another
            output. Inputs that the module is given by name come last.
        before: whether to call ``hook(module, inputs)`` before the module runs instead.
    """
    handles: list[RemovableHandle] = []
    try:
        for module, hook in pairs:
            if before:
                handles.append(module.register_forward_pre_hook(partial(_enter, hook), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(_leave, hook), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(hook: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hook(module, (*args, *kwargs.values()))


def _leave(
    hook: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    return hook(module, (*args, *kwargs.values()), output)


@contextmanager
def entered(model: nn.Module) -> Iterator[list[str]]:
    """Give the names of the modules that run at any time inside the block, outermost first.

    After an error they are those in which it was raised.
    """
    names: list[str] = []

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        names.pop()

    inside = [(module, lambda _m, _i, name=name: names.append(name)) for name, module in model.named_modules()]
    with hooked(inside, before=True), hooked((module, leave) for module, _ in inside):
        yield names


class Call(NamedTuple):
    """One run of a module.

    Attributes:
        name: name of the module in the model.
        module: module that ran.
        input_shape: shape of its first argument; empty if that is not a tensor.
        output_shape: shape of its output; empty if that is not a tensor.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def calls(model: nn.Module, forward: Callable[[], Any]) -> list[Call]:
    """List the runs of all modules in a forward pass, in the order in which they end: members before their container.

    Args:
        model: model to run in eval mode without gradients; it does not change.
        forward: function that runs the model on any batch.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> [(call.name, call.output_shape) for call in calls(model, lambda: model(torch.zeros(4, 2)))]
        [('0', (4, 3)), ('1', (4, 3)), ('', (4, 3))]
    """
    ran: list[Call] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        ran.append(Call(name, module, _shape(inputs[0] if inputs else None), _shape(output)))

    with observed(model), hooked((module, partial(note, name)) for name, module in model.named_modules()):
        forward()
    return ran


def activation_bytes(model: nn.Module, image: Tensor) -> int:
    """Return about how many bytes the outputs of all operations take for one image ``[1, …]``.

    Those of functions are not seen, and are taken to be as many as those of modules.
    """
    seen = calls(model, lambda: model(image))
    outputs = sum(prod(call.output_shape) for call in seen if not list(call.module.children()))
    return 2 * image.element_size() * (outputs + image.numel())


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


@contextmanager
def observed(model: nn.Module, buffers: bool = True) -> Iterator[None]:
    """Put ``model`` in eval mode without gradients inside the block; then restore its flags, buffers and RNG streams.

    Some networks write buffers in eval mode too: observers of quantisation, norms that stay in training mode. A
    compiled model runs uncompiled in the block, because hooks added after its first call would not fire. It is given
    copies of its inputs, because some networks normalise their images in place.

    Args:
        model: model in any mode.
        buffers: whether to restore its buffers.
    """
    training = {module: module.training for module in model.modules()}
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffers and buffer is not None and not is_lazy(buffer)
    ]
    copies = model.register_forward_pre_hook(_copied, with_kwargs=True)
    with isolated_rng():
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                model.eval()
                yield
        finally:
            copies.remove()
            _restore(training)
            _write_back(kept)


def check_network(model: object, inside: bool = False) -> None:
    """Check that hooks can listen to a model, and with ``inside`` to all that it consists of.

    Raises:
        TypeError: if it is no module, or TorchScript.
    """
    if not isinstance(model, nn.Module):
        hint = ", such as slim.model of a Slim" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ArgumentTypeError(f"model={short(model)}", f"expected a network, a torch.nn.Module{hint}")
    for name, module in model.named_modules() if inside else [("", model)]:
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name!r}, which is " if name else ""
            raise ArgumentTypeError(
                f"model={type(model).__name__}(…)",
                f"expected a network of Python modules, got {what}TorchScript, which hooks cannot listen to; pass what "
                "torch.jit.script or torch.jit.trace was given",
            )


def check_made(model: nn.Module) -> None:
    """Check that a network's parameters have their sizes.

    Raises:
        ValueError: naming one that waits for a first batch: a measurement would make it, and change all that draws
            random numbers later.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"the parameter {name!r} of {type(model).__name__} has no size before a first batch has run: run one "
                "through the network before training, as in its __init__ or configure_model()"
            )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Compute inside the block in the model's own precision and with gradients, whatever context surrounds it.

    Under autocast a forward pass may use cached weights after they have changed, also where the model enters it in its
    own forward: only the outermost autocast clears the cache, so there is none here. Inference mode knows no gradients.

    Raises:
        TypeError: if ``model`` is no module, or TorchScript.
        ValueError: if its weights were made in inference mode.
    """
    check_network(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ArgumentError(
            f"model={type(model).__name__}(…)",
            "its weights were made in inference mode, which knows no gradients; build or load it outside of "
            "torch.inference_mode()",
        )
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False, cache_enabled=False):
        yield


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the RNG streams at the end of the block, also after an exception, where ``isolate_rng`` would not."""
    streams = isolate_rng()
    streams.__enter__()
    try:
        yield
    finally:
        streams.__exit__(None, None, None)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore what the modules of a model hold beside buffers, after a forward pass that may change any of it.

    These are parameters, and attributes: counters, metrics of torchmetrics, hidden states, lists of features,
    generators of random numbers, and what lists, dictionaries, sets and deques among them hold. Containers within
    these and other objects are not looked into, nor parameters that are spread over processes; modules that are made
    meanwhile stay. There is a copy of the weights and of such tensors meanwhile, where they are. For buffers see
    :func:`observed`.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    undo = [*map(_attributes, modules), *map(_empty_buffers, modules), *_parameters(model)]
    with ExitStack() as stack:
        for restore in undo:
            stack.callback(restore)
        yield


def _attributes(module: nn.Module) -> Callable[[], None]:
    """A function that puts back what a module holds in attributes of its own."""
    held = {name: value for name, value in vars(module).items() if name not in _OWN}
    inside = [_contents(value) for value in held.values()]

    def restore() -> None:
        for name in [name for name in vars(module) if name not in _OWN and name not in held]:
            del vars(module)[name]
        vars(module).update(held)
        for contents in filter(None, inside):
            contents()

    return restore


def _empty_buffers(module: nn.Module) -> Callable[[], None]:
    """A function that takes away buffers which were not there."""
    held = {name for name, buffer in module._buffers.items() if buffer is not None}
    names = set(module._buffers)

    def restore() -> None:
        for name in module._buffers.keys() - held:
            if name in names:
                module._buffers[name] = None
            else:
                del module._buffers[name]

    return restore


def _contents(value: Any) -> Callable[[], Any] | None:
    """A function that puts back what an object holds, if it is of a kind that is looked into."""
    if not isinstance(value, _CONTAINERS):
        return _state(value)
    held = value.copy()
    inside = list(filter(None, map(_state, held.values() if isinstance(held, dict) else held)))

    def restore() -> None:
        if not _same_objects(value, held):
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(held)
        for state in inside:
            state()

    return restore


def _same_objects(one: Any, other: Any) -> bool:
    """Whether two containers of one kind hold the very same objects."""

    def objects(container: Any) -> list[int]:
        return [*map(id, chain.from_iterable(container.items()) if isinstance(container, dict) else container)]

    return objects(one) == objects(other)


def _state(value: Any) -> Callable[[], Any] | None:
    """A function that puts back the values of a tensor, or where a generator is."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and _dense(value):
        return partial(_write, value, value.detach().clone())
    return None


def _parameters(model: nn.Module) -> list[Callable[[], None]]:
    """Functions that put back the values of parameters."""
    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if kinds.intersection(_SHARDING) or any(hasattr(p, "ds_id") or type(p) is not nn.Parameter for p in parameters):
        return []

    def restored(parameter: nn.Parameter) -> Callable[[], None]:
        data, values = parameter.data, parameter.detach().clone()

        def restore() -> None:
            if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                parameter.data = data
            _write(parameter.data, values)

        return restore

    return [restored(parameter) for parameter in parameters if _dense(parameter)]


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's values can be compared and copied."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta":
        return False
    return all(step or size == 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))  # not expanded


def _write(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor its values back, unless it has them: a backward pass sees a write, and expanded ones allow none."""
    with torch.inference_mode():  # it may be a tensor of that mode
        if tensor.shape != values.shape:
            tensor.resize_(values.shape)
        if tensor.layout is torch.strided and torch.equal(tensor, values):
            return
        if _dense(tensor) and torch.allclose(tensor, values, rtol=0.0, atol=0.0, equal_nan=True):
            return
        tensor.copy_(values)


def _restore(training: dict[nn.Module, bool]) -> None:
    """Bring modules back into their modes, by their own ``train`` where they have one: it may unmerge a LoRA."""
    for module, flag in training.items():
        if module.training != flag and type(module).train is not nn.Module.train:
            module.train(flag)
        module.training = flag
    for module, flag in training.items():  # which the train of another may have changed
        module.training = flag


def _write_back(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for _, _, buffer, _ in buffers:
        if buffer.grad_fn is not None:  # it was written to with gradients
            buffer.detach_()
    for module, name, buffer, values in buffers:
        module._buffers[name] = buffer
        _write(buffer, values)


def _copied(_model: nn.Module, args: Any, kwargs: Any) -> Any:
    torch.clear_autocast_cache()  # a decorated forward has a cache of its own
    return tree_map_only(Tensor, Tensor.clone, (args, kwargs))


def same_outputs(found: object, wanted: Tensor, share: float) -> bool:
    """Return whether two outputs differ at most by a share of the largest finite expected value.

    Args:
        found: output to check; anything but a tensor of the expected shape differs.
        wanted: expected output of any shape; where it is NaN or infinite, ``found`` has to be the same.
        share: share of the largest absolute value, such as 1e-4.

    Example:
        >>> wanted = torch.tensor([100.0, 1.0, float("nan")])
        >>> same_outputs(wanted + 0.5, wanted, 0.01), same_outputs(wanted + 2, wanted, 0.01)
        (True, False)
    """
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    largest = float(wanted.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax()) if wanted.numel() else 0.0
    return torch.allclose(found.to(wanted.dtype), wanted, rtol=0.0, atol=share * largest, equal_nan=True)
