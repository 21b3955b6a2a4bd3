"""How much memory a computation may take, in gigabytes."""

from __future__ import annotations

import math
from numbers import Real

from chanaxes_pl.core.errors import ArgumentError, short

#: Bytes in a gigabyte.
GIGABYTE = 1e9
#: Default bound, in gigabytes.
MEMORY = 2.0


def check_memory(memory: float) -> None:
    """Raise ValueError if a bound on memory is not a number above 0, in gigabytes."""
    if isinstance(memory, bool) or not isinstance(memory, Real) or not 0 < memory < math.inf:
        raise ArgumentError(f"memory={short(memory)}", "expected gigabytes, a number above 0 such as 2.0")
