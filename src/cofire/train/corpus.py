"""The documents of a corpus, read one after the other from any place that fsspec reaches.

A path is a file, a folder (walked recursively) or a glob, local or behind any fsspec protocol
(``memory://``, ``s3://``, ...); ``.gz``, ``.bz2`` and ``.xz`` are read through. By their suffix,
``.jsonl`` and ``.ndjson`` are one document a line and ``.parquet`` one document a row (``text_field``); every
other file is text, one document a file. ``stdlib`` is the source of the running Python's own standard library.

What is kept: text as it is, character for character; nothing is normalised. Text is UTF-8 (a byte order mark is
dropped). Python source is decoded by its own coding cookie and, where that is wrong, as Latin-1: three files of
the standard library's tests are deliberately broken. Lone surrogates of JSON become U+FFFD. A text longer than
``PIECE_CHARACTERS`` is several documents, cut after a line end, so that memory stays bounded and a
corpus of one large file can be split. Empty documents, and in folders hidden and binary files, are left out.

Left out: nested JSON fields, formats with markup, and deduplication.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import io
import json
import logging
import lzma
import os
import sysconfig
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs

from cofire.errors import TrainError

STDLIB = "stdlib"
PIECE_CHARACTERS = 1 << 20
_BLOCK_BYTES = 1 << 20
_SNIFF_BYTES = 8192
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zip", ".zst")
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, ValueError, RuntimeError)
_NOT_SOURCE = frozenset({"site-packages", "dist-packages", "__pycache__"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    ``explicit`` tells a file that the user named, alone or by a glob, from one that was met in a folder: a
    binary file is an error in the first case and passed over in the second.
    """

    filesystem: fsspec.AbstractFileSystem
    path: str
    size: int
    explicit: bool

    @property
    def suffix(self) -> str:
        """Suffix that decides the format, below that of a compression; lower case, with its dot."""
        path = PurePosixPath(self.path.lower())
        return PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix

    def open(self) -> BinaryIO:
        """Open for reading bytes, decompressed."""
        return cast(BinaryIO, self.filesystem.open(self.path, "rb", compression="infer"))


class Corpus:
    """The documents behind ``data.paths``, in an order that depends on the paths' names alone.

    Args:
        paths: fsspec paths, globs, or ``stdlib``.
        text_field: Field or column of JSONL and Parquet records that holds the text.

    Raises:
        TrainError: A path matches nothing, or its protocol is unknown or not installed.
    """

    def __init__(self, paths: Sequence[str], text_field: str = "text") -> None:
        self.text_field = text_field
        if not paths:
            raise TrainError('data.paths is empty; name at least one path, or "stdlib"')
        files: dict[tuple[str, str], SourceFile] = {}
        for path in paths:
            for file in _stdlib_files() if path == STDLIB else _expand(path):
                files.setdefault((str(file.filesystem.protocol), file.path), file)
        self.files = list(files.values())
        self.size = sum(file.size for file in self.files)
        """Bytes of all files as stored; compressed ones count compressed."""

    def documents(self) -> Iterator[tuple[str, int]]:
        """Iterate over ``(text, bytes_done)``: each document, and about how many of :attr:`size` lie before it.

        Raises:
            TrainError: A file cannot be read or decoded, or a record has no text.
        """
        done = skipped = 0
        for file in self.files:
            try:
                within = 0
                for text in self._read(file):
                    if text:
                        yield text, done + min(file.size, within)
                        within += len(text)
            except _BinaryFileError:
                if file.explicit:
                    raise TrainError(
                        f"{file.path}: holds zero bytes, so it is not UTF-8 text; name text, .jsonl or .parquet files"
                    ) from None
                skipped += 1
            except TrainError:
                raise
            except Exception as error:
                if not _is_input_fault(file.filesystem, error):
                    raise
                raise TrainError(f"cannot read {file.path}: {_reason(error)}; repair it, or leave it out") from None
            done += file.size
        if skipped:
            _log.info("passed over %d binary files", skipped)

    def _read(self, file: SourceFile) -> Iterator[str]:
        if file.suffix in (".jsonl", ".ndjson"):
            return _read_jsonl(file, self.text_field)
        if file.suffix == ".parquet":
            return _read_parquet(file, self.text_field)
        if file.suffix in (".py", ".pyi"):
            return _read_python(file)
        return _read_text(file)


class _BinaryFileError(Exception):
    """A file met as text begins with a block that has zero bytes."""


# -- which files ------------------------------------------------------------------------------------


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    local = fsspec.filesystem("file")
    found: list[SourceFile] = []
    for folder, children, names in os.walk(root):
        children[:] = [name for name in children if name not in _NOT_SOURCE]
        paths = [os.path.join(folder, name) for name in names if name.endswith(".py")]
        found += [SourceFile(local, path, os.path.getsize(path), explicit=False) for path in paths if isfile(path)]
    if not found:
        raise TrainError(f"data.paths: stdlib has no .py files under {root}; name a folder of text instead")
    return sorted(found, key=lambda file: Path(file.path).relative_to(root).as_posix())


def _expand(pattern: str) -> list[SourceFile]:
    """Return the files behind one path, folder or glob, sorted by path."""
    filesystem = None
    try:
        filesystem, path = url_to_fs(os.path.expanduser(pattern))
        is_glob = any(character in path for character in "*?[") and not filesystem.exists(path)
        roots = sorted(filesystem.glob(path)) if is_glob else [path]
        found: list[SourceFile] = []
        for root in (str(root) for root in roots):
            if filesystem.isdir(root):
                found += _walk(filesystem, root)
            elif filesystem.exists(root):
                found.append(SourceFile(filesystem, root, int(filesystem.size(root) or 0), explicit=True))
    except ImportError as error:
        raise TrainError(f"data.paths: {pattern!r} needs a package that is not installed: {_reason(error)}") from None
    except ValueError as error:
        protocol, separator, _ = pattern.partition("://")
        hint = _nearest(protocol, fsspec.available_protocols(), cutoff=0.7) if separator else ""
        raise TrainError(f"data.paths: cannot read {pattern!r}: {_reason(error)}{hint}") from None
    except Exception as error:
        if not _is_input_fault(filesystem, error):
            raise
        raise TrainError(f"data.paths: cannot read {pattern!r}: {_reason(error)}; check the address") from None
    if not found:
        raise TrainError(f"data.paths: no file matches {pattern!r}{_nearest(pattern, _neighbours(filesystem, path))}")
    return found


def _walk(filesystem: fsspec.AbstractFileSystem, root: str) -> list[SourceFile]:
    listing: dict[str, dict[str, Any]] = filesystem.find(root, detail=True)  # type: ignore[assignment]
    found = []
    for path in sorted(listing):
        inside = PurePosixPath(path[len(root) :]).parts
        if not any(part.startswith(".") or part == "__pycache__" for part in inside):
            found.append(SourceFile(filesystem, path, int(listing[path].get("size") or 0), explicit=False))
    return found


def _neighbours(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Return names that a mistyped path may have meant: those beside it, and ``stdlib``."""
    names = [STDLIB]
    with contextlib.suppress(OSError, NotImplementedError):
        names += [str(name) for name in filesystem.ls(filesystem._parent(path), detail=False)][:1000]
    return names


def _is_input_fault(filesystem: fsspec.AbstractFileSystem | None, error: Exception) -> bool:
    """Tell whether an error comes from a file or its store: clients of remote stores raise types of their own."""
    return isinstance(error, _UNREADABLE) or (filesystem is not None and "file" not in filesystem.protocol)


def _nearest(word: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    short = {PurePosixPath(name).name: name for name in reversed(known)}
    match = difflib.get_close_matches(PurePosixPath(word).name, short, n=1, cutoff=cutoff)
    return f"; nearest: {short[match[0]]}" if match else ""


# -- formats ----------------------------------------------------------------------------------------


def _read_text(file: SourceFile) -> Iterator[str]:
    """Read UTF-8 text in pieces; the place of a wrong byte is counted from the file's start."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, offset = "", 0
    with file.open() as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            if offset == 0:
                if b"\0" in block[:_SNIFF_BYTES]:
                    raise _BinaryFileError
                block = block.removeprefix(codecs.BOM_UTF8)
            pending = len(decoder.getstate()[0])
            try:
                text += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                raise TrainError(
                    f"{file.path}: byte {error.object[error.start]:#04x} at offset {place} is not UTF-8; "
                    "convert the file to UTF-8, or leave it out"
                ) from None
            if not block:
                break
            offset += len(block)
            *pieces, text = cut_pieces(text)
            yield from pieces
    yield text


def _read_python(file: SourceFile) -> Iterator[str]:
    """Read Python source by its coding cookie, else as Latin-1, under which every byte is a character."""
    with file.open() as stream:
        source = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        text = source.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        text = source.decode("latin-1")
    yield from cut_pieces(text)


def _read_jsonl(file: SourceFile, field: str) -> Iterator[str]:
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file.path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                raise TrainError(f"{where}: not UTF-8; convert the file to UTF-8, or leave it out") from None
            except ValueError as error:
                raise TrainError(f"{where}: not valid JSON: {_reason(error)}; each line must be one object") from None
            if not isinstance(record, dict):
                raise TrainError(
                    f"{where}: holds a {type(record).__name__}, but a line must be an object with the field {field!r}"
                )
            if field not in record:
                raise TrainError(_no_field(where, field, list(record)))
            text = record[field]
            if not isinstance(text, str):
                raise TrainError(
                    f"{where}: {field!r} is a {type(text).__name__}, not text; "
                    f"set data.text_field to a field that holds text"
                )
            yield from cut_pieces(_without_surrogates(text))


def _read_parquet(file: SourceFile, field: str) -> Iterator[str]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with file.open() as stream:
        try:
            table = parquet.ParquetFile(stream)
        except (arrow.ArrowInvalid, OSError) as error:
            raise TrainError(
                f"{file.path}: not a readable Parquet file: {_reason(error)}; write it again, or leave it out"
            ) from None
        schema = table.schema_arrow
        if field not in schema.names:
            raise TrainError(_no_field(file.path, field, schema.names))
        kind: Any = schema.field(field).type
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
            raise TrainError(
                f"{file.path}: column {field!r} is {kind}, not text; set data.text_field to a column that holds text"
            )
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield from cut_pieces(text or "")


def cut_pieces(text: str) -> list[str]:
    """Cut a text into pieces of at most ``PIECE_CHARACTERS``, after a line end where one is in the second half.

    Joined, the pieces are the text; the last one may be empty.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS) + 1
        end = end or start + PIECE_CHARACTERS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _without_surrogates(text: str) -> str:
    r"""Join surrogate pairs that JSON's \uXXXX escapes left apart, and replace lone ones by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _no_field(where: str, field: str, known: list[str]) -> str:
    nearest = _nearest(field, known) or (f"; it has: {', '.join(known[:8])}" if known else "")
    return f"{where}: no field {field!r}{nearest}; set data.text_field"


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
