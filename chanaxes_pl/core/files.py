"""Atomic file writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


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
    finally:
        draft.unlink(missing_ok=True)
