"""Packed tokens in one memory-mapped file, with a header that tells whether the file is whole and whose it is.

A file is a header of 128 bytes and the token ids of all documents back to back, each document followed by the
end-of-text token: uint16 where the vocabulary fits, else uint32, little-endian.

    magic 8 | version u32 | bytes per token u32 | vocab_size u64 | num_tokens u64 | num_bytes u64 | num_documents u64 |
    tokenizer hash 32 | payload checksum 32 (BLAKE2b-256) | 12 zero bytes | CRC-32 of the header u32

The checksum of the payload is verified on opening up to ``VERIFY_BYTES_MAX``; beyond that, where reading the
file would take longer than what the check saves, the header and the length are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cofire.errors import TrainError
from cofire.train.atomic import replace_file

MAGIC = b"COFIRETK"
VERSION = 1
HEADER_BYTES = 128
VERIFY_BYTES_MAX = 1 << 30
_HEADER = struct.Struct("<8sIIQQQQ32s32s12x")
_CRC = struct.Struct("<I")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A packed token file on disk.

    Attributes:
        path: Where it lies.
        vocab_size: Every token id is below it.
        num_tokens: Token ids in the file, end-of-text tokens included.
        num_bytes: UTF-8 bytes of the text behind them.
        num_documents: Documents, each ended by an end-of-text token.
        tokenizer_hash: Hexadecimal hash of the tokenizer that made it.
        checksum: Hexadecimal BLAKE2b-256 of the token ids' bytes.
    """

    path: Path
    vocab_size: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    tokenizer_hash: str
    checksum: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored ids."""
        return token_dtype(self.vocab_size)

    @property
    def tokens(self) -> np.ndarray[Any, Any]:
        """Token ids [num_tokens], memory mapped and read-only; each use maps anew, so hold on to it."""
        if not self.num_tokens:
            return np.zeros(0, self.dtype)  # an empty range cannot be mapped
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.num_tokens,))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-text tokens counted as tokens."""
        return self.num_bytes / self.num_tokens

    def num_samples(self, sequence_length: int) -> int:
        """Return how many windows of T + 1 tokens with stride T fit, for T = ``sequence_length``."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    def require_sample(self, sequence_length: int, split: str) -> None:
        """Check that the file has one window of T + 1 tokens; ``split`` names it in the message.

        Raises:
            TrainError: It has not.
        """
        if self.num_samples(sequence_length) >= 1:
            return
        fixes = ["use more text"]
        if self.num_tokens > 1:
            fixes.append(f"lower data.sequence_length to {self.num_tokens - 1}")
        if split == "validation":
            fixes.append("raise data.validation_fraction")
        raise TrainError(
            f"the {split} split has {self.num_tokens} tokens, but a sample of data.sequence_length = "
            f"{sequence_length} needs {sequence_length + 1}; {', or '.join(fixes)}"
        )

    def __len__(self) -> int:
        return self.num_tokens


class TokenWriter:
    """Appends documents to a token file that is being written; made by :func:`write_token_file`."""

    def __init__(self, file: BinaryIO, vocab_size: int, tokenizer_hash: str) -> None:
        self._file = file
        self._vocab_size = vocab_size
        self._tokenizer_hash = bytes.fromhex(tokenizer_hash)
        self._hash = hashlib.blake2b(digest_size=32)
        self._counts = [0, 0, 0]
        file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray[Any, Any], num_bytes: int, num_documents: int) -> None:
        """Append the ids of ``num_documents`` whole documents, end-of-text tokens included.

        Args:
            tokens: Ids [N], of any integer type.
            num_bytes: UTF-8 bytes of the documents' text.
            num_documents: How many documents these are.

        Raises:
            TrainError: An id is outside of the vocabulary.
        """
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(outside):
            raise TrainError(
                f"token id {int(outside[0])} is not in 0 .. {self._vocab_size - 1}; set model.vocab_size to what the "
                "tokenizer has"
            )
        data = tokens.astype(token_dtype(self._vocab_size)).tobytes()
        self._hash.update(data)
        self._file.write(data)
        for index, count in enumerate((len(tokens), num_bytes, num_documents)):
            self._counts[index] += count

    def _write_header(self) -> None:
        itemsize = token_dtype(self._vocab_size).itemsize
        fields = (MAGIC, VERSION, itemsize, self._vocab_size, *self._counts, self._tokenizer_hash, self._hash.digest())
        header = _HEADER.pack(*fields)
        self._file.seek(0)
        self._file.write(header + _CRC.pack(zlib.crc32(header)))


@contextlib.contextmanager
def write_token_file(path: str | os.PathLike[str], vocab_size: int, tokenizer_hash: str) -> Iterator[TokenWriter]:
    """Write a token file; it appears under its name, whole, when the block ends without an exception.

    Args:
        path: The file's name.
        vocab_size: Bound of the token ids; decides their width.
        tokenizer_hash: 64 hexadecimal digits.

    Raises:
        OSError: The disk is full or the folder not writable; nothing is left over.
    """
    with replace_file(path) as file:
        writer = TokenWriter(file, vocab_size, tokenizer_hash)
        yield writer
        writer._write_header()


def open_token_file(path: str | os.PathLike[str]) -> TokenFile:
    """Read a token file's header and verify it, and the payload up to ``VERIFY_BYTES_MAX``.

    Raises:
        TrainError: The file is missing, foreign, of another version, truncated or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            token_file = _parse_header(path, header)
            size = os.fstat(file.fileno()).st_size
            expected = HEADER_BYTES + token_file.num_tokens * token_file.dtype.itemsize
            if size != expected:
                raise TrainError(f"{path}: has {size} bytes where its header says {expected}; delete it to rebuild it")
            if size <= VERIFY_BYTES_MAX and _payload_checksum(file) != token_file.checksum:
                raise TrainError(f"{path}: its tokens do not match their checksum; delete it to rebuild it")
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror}") from None
    return token_file


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that stores ids below ``vocab_size``."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _parse_header(path: Path, header: bytes) -> TokenFile:
    if len(header) < HEADER_BYTES or header[: len(MAGIC)] != MAGIC:
        raise TrainError(f"{path}: is not a Cofire token file; delete it to rebuild it")
    body = header[: _HEADER.size]
    if _CRC.unpack_from(header, _HEADER.size)[0] != zlib.crc32(body):
        raise TrainError(f"{path}: its header is damaged; delete it to rebuild it")
    _, version, itemsize, vocab_size, tokens, num_bytes, documents, tokenizer_hash, checksum = _HEADER.unpack(body)
    if version != VERSION or itemsize != token_dtype(vocab_size).itemsize:
        raise TrainError(f"{path}: is of version {version}, this is version {VERSION}; delete it to rebuild it")
    return TokenFile(path, vocab_size, tokens, num_bytes, documents, tokenizer_hash.hex(), checksum.hex())


def _payload_checksum(file: BinaryIO) -> str:
    digest = hashlib.blake2b(digest_size=32)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
