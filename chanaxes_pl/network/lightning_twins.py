"""Classes and hooks of Lightning under either of its two names, ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

from typing import Any


def overrides(module: Any, hook: str) -> bool:
    """Return whether a module or datamodule has a hook of its own, and not Lightning's."""
    home = getattr(getattr(module, hook), "__module__", None) or ""
    return home.partition(".")[0] not in ("lightning", "pytorch_lightning")


def is_a(value: Any, name: str) -> bool:
    """Return whether an object is of a class of this name, or of one derived from it, in either of the two packages."""
    return any(kind.__name__ == name for kind in type(value).__mro__)
