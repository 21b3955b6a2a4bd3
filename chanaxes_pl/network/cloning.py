"""Copies of a model that share nothing with it."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import ProxyTypes, ReferenceType

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from chanaxes_pl.core.errors import InputError
from chanaxes_pl.network.batches import FAILURES

# What a copy of a model never changes, or what copy.deepcopy shares.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.ndarray, torch.dtype, torch.device)
_ATOMIC = (type, FunctionType, BuiltinFunctionType, ReferenceType, property, range)
# What leads on to other parts of a model; an object of another class is copied or shared as a whole.
_OPEN = (dict, list, tuple, set, frozenset, deque, partial, MethodType, nn.Module)

# What objects that refuse to be copied raise.
_UNCOPIABLE = (*FAILURES, OSError, copy.Error, pickle.PickleError)


def clone(model: nn.Module, tensors: bool = True) -> nn.Module:
    """Return a copy of a model that shares no module, parameter, buffer or container with it.

    What leads from one part of the model to another leads to the same part of the copy: tied parameters, modules in
    plain lists and dicts, bound methods such as hooks. Tensors that an operation gave, such as the last logits, are
    copied without their history, and gradients are left out. A Trainer is left as ``None``. What cannot be copied is
    shared with the model: locks, open files, generators, and an object that holds such a thing, unless a module is in
    it too. Data sets and their loaders are shared as well. Functions and weak references lead where they led.

    Args:
        model: model; it does not change.
        tensors: whether parameters and buffers are copied too; without, the copy holds those of the model.

    Raises:
        ValueError: if an object in the model refuses to be copied.
    """
    memo, _alive = _kept_apart(model)
    if not tensors:
        memo |= {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    try:
        return copy.deepcopy(model, memo)
    except torch.OutOfMemoryError:
        raise
    except _UNCOPIABLE as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): expected a module that "
            "copy.deepcopy takes; keep what cannot be copied out of it, or give its class a __getstate__ without it"
        ) from error


def _kept_apart(model: nn.Module) -> tuple[dict[int, Any], list[Any]]:
    """Return the memo of ``copy.deepcopy``: what stands for each object that is not copied as usual.

    The ids in it hold as long as the second result lives.
    """
    memo: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        stand_in, parts = _taken(value)
        if parts is None:
            memo[id(value)] = stand_in
        elif isinstance(value, _OPEN) or not _is_shared(parts):
            waiting += parts
        else:
            memo[id(value)] = value
    return memo, list(seen.values())


def _is_shared(parts: Iterable[Any]) -> bool:
    """Return whether an object of such parts is shared: some part cannot be copied, and none is of a model."""
    seen: dict[int, Any] = {}
    waiting, shared = list(parts), False
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (nn.Module, nn.Parameter)):
            return False
        stand_in, inside = _taken(value)
        shared = shared or (inside is None and (stand_in is None or stand_in is value))
        waiting += inside or ()
    return shared


def _taken(value: Any) -> tuple[Any, list[Any] | None]:
    """Return what stands for a value in a copy, and ``None``; where it is copied as usual, the parts to go on with."""
    if isinstance(value, ProxyTypes):
        return (None if isinstance(value, Trainer) else value), None
    if isinstance(value, Trainer):
        return None, None
    if isinstance(value, Tensor):
        # Of tensors, deepcopy refuses those with a history, and copies gradients; of parameters it does neither.
        if isinstance(value, nn.Parameter) or (value.is_leaf and value.grad is None):
            return value, []
        return value.detach().clone().requires_grad_(value.is_leaf and value.requires_grad), None
    if isinstance(value, torch.Generator):
        return value.clone_state(), None
    if isinstance(value, dict):
        return value, [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value, list(value)
    if isinstance(value, MethodType):
        return value, [value.__self__]
    if isinstance(value, nn.Module):
        return value, [vars(value)]
    if isinstance(value, (Dataset, DataLoader)):
        return value, None
    if isinstance(value, _ATOMIC) or hasattr(value, "__deepcopy__"):
        return value, []
    try:
        made = value.__reduce_ex__(4)
    except _UNCOPIABLE:  # copy.deepcopy would raise it too
        return value, None
    return value, [] if isinstance(made, str) else [list(p) if isinstance(p, Iterator) else p for p in made[1:]]
