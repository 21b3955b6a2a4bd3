"""Errors about arguments: they quote the call and the argument, and say what was expected and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral

_LENGTH = 60  # longest quotation, in characters


class InputError(ValueError):
    """Error about something that the user passed.

    The code that finds the fault does not know which public function was called; :func:`naming` adds its name.

    Attributes:
        text: what was expected, and how to fix it.
        argument: the argument at fault as it was written, such as ``"budget=1.5"``; may be empty.
        call: name of the public function, such as ``"prune"``; empty until :func:`naming` sets it.
    """

    def __init__(self, text: str, argument: str = "") -> None:
        super().__init__(text, argument)
        self.text, self.argument, self.call = text, argument, ""

    def __str__(self) -> str:
        given = f"({self.argument})" if self.call and self.argument else self.argument
        return f"{self.call}{given}: {self.text}" if self.call or given else self.text


class ArgumentError(InputError):
    """Error about the value of an argument.

    Example:
        >>> str(ArgumentError("budget=1.5", "expected a share of the MACs, above 0 and at most 1"))
        'budget=1.5: expected a share of the MACs, above 0 and at most 1'
    """

    def __init__(self, argument: str, text: str) -> None:
        super().__init__(text, argument)
        self.args = (argument, text)  # pickle passes these to the constructor


class ArgumentTypeError(ArgumentError, TypeError):
    """Error about the type of an argument."""


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Prefix every :class:`InputError` raised in the block with the name of a public function; the outermost one wins.

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


def check_several(name: str, values: object) -> None:
    """Check an argument that takes a list, of which a single value is easily given instead.

    Raises:
        TypeError: if it is a string, whose letters would be taken, or has no length.

    Example:
        >>> check_several("scores", "l1")
        Traceback (most recent call last):
        chanaxes_pl.core.errors.ArgumentTypeError: scores='l1': expected several, such as ['l1']
    """
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise ArgumentTypeError(f"{name}={values!r}", f"expected several, such as [{values!r}]")


def is_whole(value: object, least: int = 0) -> bool:
    """Return whether a value is a whole number of any kind but a truth value, and not below ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_seed(seed: object) -> None:
    """Check a random seed.

    Raises:
        ValueError: if it is no whole number that every generator takes.
    """
    if not is_whole(seed) or int(seed) >= 1 << 63:  # type: ignore[call-overload]
        raise ArgumentError(f"seed={short(seed)}", "expected a whole number from 0 on, below 2 to the power of 63")


def check_resampling(resamples: object, seed: object = 0, least: int = 0) -> None:
    """Check a number of resamples and their random seed.

    Raises:
        ValueError: if there are fewer than ``least``, or the seed is none.
    """
    if not is_whole(resamples, least):
        expected = f"expected a whole number from {least} on, such as 1000" + ("" if least else "; 0 for no intervals")
        raise ArgumentError(f"resamples={short(resamples)}", expected)
    check_seed(seed)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: the names most like it, or else the first few.

    Example:
        >>> nearest("layer1.conv", ["layer1.conv1", "fc"])
        "did you mean 'layer1.conv1'?"
        >>> nearest("l3", ["stem", "a.conv1", "a.conv2", "fc"])
        "there is 'stem', 'a.conv1', 'a.conv2' and 1 more"
    """
    names = list(names)
    same = [other for other in names if other.lower() == name.lower()]
    near = same or get_close_matches(name[:_LENGTH], names, n=2) or (names if len(names) <= 2 else [])
    if near or not names:
        return f"did you mean {' or '.join(map(repr, near))}?" if near else "there is none"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"there is {', '.join(map(repr, names[:3]))}{more}"


def short(value: object) -> str:
    """Return a value as one line of at most 61 characters.

    Example:
        >>> short("one\\ntwo"), len(short(list(range(1000))))
        ("'one\\\\ntwo'", 61)
    """
    text = repr(value)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
