"""Files that appear whole or not at all.

A file is written under a temporary name beside its target, flushed to the disk (fsync) and renamed over the target, and
the folder's entry is flushed after it: a reader, or a machine that lost power, sees the old file or the new
one and nothing between. :func:`folder_lock` makes processes that want to write the same files take turns.
Left out: locks over network file systems that have none; there two writers do the same work twice, and the
rename still keeps each file whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

TEMPORARY_SUFFIX = ".partial"


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the name ``path`` when the block ends without an exception.

    Args:
        path: The final name; its folder must exist.

    Yields:
        A binary file, readable and seekable.

    Raises:
        OSError: The disk is full or the folder not writable; ``path`` is as before and nothing is left over.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", suffix=TEMPORARY_SUFFIX, dir=target.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    flush_folder(target.parent)


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold the lock of a folder; wait while another process or thread holds it.

    The lock is the operating system's: it ends with the process that holds it, however that ends.

    Args:
        folder: An existing, writable folder; the lock is its file ``.lock``.

    Yields:
        True where the lock is held, False where the file system has none.
    """
    with open(Path(folder) / ".lock", "ab") as file:
        held = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
        yield held  # closing the file lets the lock go


def remove_temporary_files(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed left in a folder; only for the holder of its lock."""
    for path in Path(folder).glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    """Return the process's umask; mkstemp makes files for the owner alone, which a shared cache is not."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
