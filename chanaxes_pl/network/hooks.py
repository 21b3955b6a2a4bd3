"""Hooks that are always removed, and the context in which a model is observed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


@contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in eval mode without leaving a trace: gradients off, flags, RNG streams and hooks as they were.

    A compiled model runs uncompiled meanwhile, because hooks that are added after its first call would not fire.
    """
    training = {module: module.training for module in model.modules()}
    streams = isolate_rng()
    streams.__enter__()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        streams.__exit__(None, None, None)  # told of an exception, isolate_rng would restore nothing
