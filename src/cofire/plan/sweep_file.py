"""The file of a sweep: JSON lines, one design each, that survive a kill and go on where they ended.

The first line names the sweep. Lines are appended and flushed to the disk (fsync) group by group, so that a crash can
spoil the last lines alone: reading stops at the first line that is not whole, and writing goes on there. The operating
system's lock keeps two sweeps apart. Left out: locks over network file systems that have none.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from cofire.errors import PlanError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

_FORMAT = 1


class SweepFile:
    """A sweep's results on the disk; ``records`` are those that it already held."""

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        """Open or begin the file.

        Args:
            path: Its name; a file of this sweep is continued.
            fingerprint: Of the sweep.

        Raises:
            PlanError: It cannot be written, is in use, or is something else than results of this sweep.
        """
        self.path = Path(path)
        try:
            self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise PlanError(f"cannot write {str(path)!r}: {error.strerror}; take another --out") from None
        try:
            self._lock()
            self.records = self._read({"sweep": fingerprint, "format": _FORMAT})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which lets its lock go."""
        self._file.close()

    def append(self, records: list[dict[str, Any]]) -> None:
        """Append records and flush them to the disk.

        Raises:
            PlanError: The disk is full.
        """
        try:
            self._file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise PlanError(f"cannot write {str(self.path)!r}: {error.strerror}; make room and run it again") from None

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlanError(f"{str(self.path)!r} is written by another sweep; wait, or take another --out") from None
        except OSError:
            return  # a file system without locks

    def _read(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the whole records, cut off what follows them, and write the first line of an empty file."""
        self._file.seek(0)
        whole, records = 0, []
        for number, line in enumerate(self._file):
            record = _parsed(line)
            if number == 0 and record != header:
                if not line.endswith(b"\n") and json.dumps(header).encode().startswith(line):
                    break  # the very first write was cut short
                raise PlanError(f"{str(self.path)!r} holds something else than this sweep; take another --out")
            if record is None:
                break
            whole += len(line)
            if number:
                records.append(record)
        self._file.truncate(whole)
        if not whole:
            self.append([header])
            with contextlib.suppress(OSError):
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record of a whole line; none where it was cut short or spoilt."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
