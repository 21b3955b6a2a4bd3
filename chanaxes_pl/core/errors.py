"""Errors about what a caller passed: they quote the call, the argument, what was expected, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

_LENGTH = 60  # of a quotation, in characters


class InputError(ValueError):
    """What a user handed in does not do.

    Raised where the fault is found, without knowing which public call led there; :func:`naming` adds that.

    Attributes:
        text: what was expected, and the way out.
        argument: the argument at fault as it was written, such as ``"budget=1.5"``; may be empty.
        call: the public call, such as ``"prune"``; empty until :func:`naming` sets it.
    """

    def __init__(self, text: str, argument: str = "") -> None:
        super().__init__(text, argument)
        self.text, self.argument, self.call = text, argument, ""

    def __str__(self) -> str:
        given = f"({self.argument})" if self.call and self.argument else self.argument
        return f"{self.call}{given}: {self.text}" if self.call or given else self.text


class ArgumentError(InputError):
    """An argument's value is out of range.

    Example:
        >>> str(ArgumentError("budget=1.5", "expected a share of the MACs, above 0 and at most 1"))
        'budget=1.5: expected a share of the MACs, above 0 and at most 1'
    """

    def __init__(self, argument: str, text: str) -> None:
        super().__init__(text, argument)
        self.args = (argument, text)  # what pickle hands to the constructor


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument's value is of another type than expected."""


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Put a public call's name in front of every :class:`InputError` raised inside; the outermost name stands.

    Example:
        >>> with naming("prune"):
        ...     raise ArgumentError("budget=1.5", "expected a share of the MACs, above 0 and at most 1")
        Traceback (most recent call last):
        chanaxes_pl.core.errors.ArgumentError: prune(budget=1.5): expected a share of the MACs, above 0 and at most 1
    """
    try:
        yield
    except InputError as error:
        error.call = call
        raise


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name.

    Example:
        >>> nearest("layer1.conv", ["layer1.conv1", "fc"])
        "did you mean 'layer1.conv1'?"
    """
    names = list(names)
    near = get_close_matches(name[:_LENGTH], names, n=2) or names[:3]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "there is none"


def short(value: Any) -> str:
    """A value in one line of at most 61 characters.

    Example:
        >>> short("one\\ntwo"), len(short(list(range(1000))))
        ("'one\\\\ntwo'", 61)
    """
    text = repr(value)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
