"""Files that are whole or not there, and earlier ones that stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from uuid import uuid4


def set_aside(path: Path) -> Path | None:
    """Rename ``folder/name.ext`` to ``folder/name-1.ext``, or the next number that is free, if it is there.

    Returns:
        The new path; ``None`` if there was no such file.
    """
    if not path.is_file():
        return None
    kept = next(free for n in count(1) if not (free := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists())
    return path.replace(kept)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a draft that replaces ``path`` at the end of the block; after an error or a crash, ``path`` is unchanged.

    Args:
        path: file to write; a missing folder is made.

    Yields:
        Path of the draft: a unique name in the same folder, so that renaming copies nothing.

    Raises:
        OSError: if the folder cannot be written, or the block wrote no draft.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with replacing(path) as draft:
        ...     _ = draft.write_text("whole")
        ...     path.exists()
        False
        >>> path.read_text()
        'whole'
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{path} cannot be written: {error.filename} is a file, expected a folder") from error
    # No other process, on this machine or another, and no other thread gets the same name.
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}")
    try:
        yield draft
        with draft.open("r+b") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as from pyarrow, on a full disk
            error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)
