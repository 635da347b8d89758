"""From a corpus to packed tokens: split, tokenizer, token files, and what is needed to judge a loss.

1. *Scan.* Every document is hashed. The hash of all documents and of the settings names a folder of the cache; where
   it holds whole files, they are used and nothing else is done.
2. *Split.* Whole documents are held out, chosen by the hash of their own text: neither order nor file names
   matter, and copies of a document fall on the same side. See :class:`Split` for small corpora.
3. *Tokenizer.* Trained on the training split alone: on all of it up to ``TOKENIZER_SAMPLE_BYTES``, beyond that on
   the documents whose hash falls below the matching fraction. Or the user's ``tokenizer.json``.
4. *Encode.* Both splits are encoded, in the corpus's order, into token files.

The corpus is streamed, once for each of steps 1, 3 and 4; memory holds 16 bytes per document and a batch of text.
The cache is ``data.cache``, else ``$COFIRE_CACHE``, else the platform's user cache folder; it may be deleted
at any time.

Left out: near-duplicate removal, quality filters, mixing weights between sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from cofire.errors import TrainError
from cofire.spec.io import user_cache_folder
from cofire.spec.run import DataSpec
from cofire.train.atomic import folder_lock, remove_temporary_files, replace_file
from cofire.train.corpus import Corpus
from cofire.train.token_file import TokenFile, open_token_file, write_token_file
from cofire.train.tokenizer import (
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

TOKENIZER_SAMPLE_BYTES = 64 << 20
_FORMAT = 1  # of the cache: raise it when the same corpus and settings give other files
_BATCH_CHARACTERS = 1 << 22
_OVERSHOOT = 1.25

Progress = Callable[[str, float], None]
"""Called with the name of a phase and the fraction of it that is done, 0 to 1."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedData:
    """What a training run reads.

    Attributes:
        train: Packed tokens of the training split.
        validation: Packed tokens of the held-out split.
        tokenizer_path: The ``tokenizer.json`` that made them.
        bytes_per_token: UTF-8 bytes of text per token of the validation split;
            bits per byte = loss in nats per token / bytes_per_token / ln 2.
        unigram_entropy: Nats per token of the validation split under the training split's token
            frequencies: the loss of the best model that ignores the context.
        content_hash: Hexadecimal hash of the documents and the settings.
    """

    train: TokenFile
    validation: TokenFile
    tokenizer_path: Path
    bytes_per_token: float
    unigram_entropy: float
    content_hash: str


@dataclass(frozen=True)
class Split:
    """Which text is held out, for a corpus of known documents.

    Documents are taken in the order of their hashes, each with all its copies, and left out where they
    would overshoot the wanted size by more than a quarter. Where none fits (one file; a few large ones),
    the end of the longest document is held out instead, and ``cut_key`` names it.

    Attributes:
        held_out: Keys of the documents that are held out whole.
        cut_key: Key of the document that is cut, if any.
        cut_fraction: Part of its characters that is held out.
    """

    held_out: frozenset[int]
    cut_key: int | None = None
    cut_fraction: float = 0.0

    def divide(self, text: str, key: int) -> tuple[str, str]:
        """Return the part of a document that is trained on and the part that is held out."""
        if key in self.held_out:
            return "", text
        if key != self.cut_key:
            return text, ""
        place = max(1, min(len(text) - 1, round(len(text) * (1 - self.cut_fraction))))
        slack = int((len(text) - place) * (_OVERSHOOT - 1))
        place = text.rfind("\n", max(0, place - slack), place) + 1 or place
        return text[:place], text[place:]


@dataclass(frozen=True)
class CorpusScan:
    """What one reading of a corpus tells: hash of all documents in order, their bytes, and the split."""

    documents_hash: str
    num_documents: int
    num_bytes: int
    split: Split


def prepare(data: DataSpec, vocab_size: int, progress: Progress | None = None) -> PackedData:
    """Read a corpus, and make or find its tokenizer and its packed token files.

    Args:
        data: Paths, split, tokenizer and cache.
        vocab_size: Tokens of the tokenizer to train; upper bound for the ids of a given one.
        progress: Told how far each phase is.

    Returns:
        Both splits and their statistics.

    Raises:
        TrainError: The corpus is missing, empty, undecodable or too small, the tokenizer does not fit the
            model, or the cache cannot be written. Nothing half-written is left.
    """
    report = _in_steps(progress) if progress else lambda phase, fraction: None
    given = None if data.tokenizer is None else load_tokenizer(data.tokenizer, vocab_size).to_str()
    corpus = Corpus(data.paths, data.text_field)
    scan = scan_corpus(corpus, data.validation_fraction, report)
    content_hash = _content_hash(scan, data, vocab_size, given)
    folder = cache_folder(data) / content_hash[:32]
    files = _open_cached(folder, vocab_size)
    if files is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(folder) as held:
                if held:
                    remove_temporary_files(folder)
                files = _open_cached(folder, vocab_size, notice=True)
                if files is None:
                    _build(corpus, scan, folder, vocab_size, given, report)
                    files = _open_cached(folder, vocab_size, notice=True)
        except OSError as error:
            raise TrainError(
                f"cannot write the data cache {folder}: {error.strerror or error}; free space there or set data.cache"
            ) from None
    if files is None:
        raise TrainError(f"the data cache {folder} was changed while it was written; run again or set data.cache")
    train, validation = files
    train.require_sample(data.sequence_length, "training")
    validation.require_sample(data.sequence_length, "validation")
    return PackedData(
        train=train,
        validation=validation,
        tokenizer_path=folder / "tokenizer.json",
        bytes_per_token=validation.bytes_per_token,
        unigram_entropy=unigram_entropy(train, validation),
        content_hash=content_hash,
    )


def cache_folder(data: DataSpec) -> Path:
    """Return where tokenizers and token files are kept for this run."""
    return Path(data.cache).expanduser() if data.cache else user_cache_folder()


def unigram_entropy(train: TokenFile, validation: TokenFile) -> float:
    """Return the cross-entropy of ``validation`` under the add-one-smoothed token frequencies of ``train``.

    H = - sum_v (m_v / M) ln((n_v + 1) / (N + V)), with counts n of training and m of validation tokens.

    Returns:
        Nats per token.
    """
    counts, held_out = count_tokens(train), count_tokens(validation)
    log_probability = np.log(counts + 1.0) - np.log(counts.sum() + train.vocab_size)
    return float(-(held_out * log_probability).sum() / held_out.sum())


def count_tokens(token_file: TokenFile) -> np.ndarray:
    """Return how often each token id occurs, int64 [V]."""
    tokens, block = token_file.tokens, 1 << 22  # bincount widens each block to 8 bytes a token
    counts = np.zeros(token_file.vocab_size, np.int64)
    for start in range(0, len(tokens), block):
        counts += np.bincount(tokens[start : start + block], minlength=token_file.vocab_size)
    return counts


# -- scan and split ---------------------------------------------------------------------------------


def scan_corpus(corpus: Corpus, validation_fraction: float, progress: Progress) -> CorpusScan:
    """Read a corpus once: hash it and decide its split.

    Raises:
        TrainError: The corpus has no text, or too little to hold any out.
    """
    keys, sizes = array("Q"), array("Q")
    whole = hashlib.blake2b(digest_size=32)
    for text, done in corpus.documents():
        digest = _digest(text)
        whole.update(digest)
        keys.append(_key(digest))
        sizes.append(len(text.encode("utf-8")))
        progress("read", done / max(1, corpus.size))
    progress("read", 1.0)
    if not keys:
        raise TrainError(f"data.paths: none of the files found ({len(corpus.files)}) holds text; name files that do")
    split = choose_split(np.array(keys, np.uint64), np.array(sizes, np.int64), validation_fraction)
    return CorpusScan(whole.hexdigest(), len(keys), sum(sizes), split)


def choose_split(keys: np.ndarray, sizes: np.ndarray, validation_fraction: float) -> Split:
    """Decide which documents are held out; see :class:`Split`.

    Args:
        keys: Hash of each document [N], uint64; equal for equal texts.
        sizes: Bytes of each document [N].
        validation_fraction: Wanted part of all bytes.

    Raises:
        TrainError: There is a single document of a single byte.
    """
    unique, inverse = np.unique(keys, return_inverse=True)
    weight = np.bincount(inverse, weights=sizes)
    wanted = validation_fraction * weight.sum()
    held_out: list[int] = []
    taken = 0.0
    for key, size in zip(unique.tolist(), weight.tolist(), strict=True):
        if taken >= wanted:
            break
        if taken + size <= _OVERSHOOT * wanted and len(held_out) + 1 < len(unique):
            held_out.append(key)
            taken += size
    if held_out:
        return Split(frozenset(held_out))
    longest = int(weight.argmax())
    if sizes[inverse == longest].max() < 2:
        raise TrainError("data.paths: the corpus is too small to hold out a part for validation; use more text")
    return Split(frozenset(), int(unique[longest]), min(0.5, wanted / weight[longest]))


def _in_steps(progress: Progress) -> Progress:
    """Pass on the first and last call of a phase, and those between that are half a percent further."""
    last = ("", -1.0)

    def report(phase: str, fraction: float) -> None:
        nonlocal last
        if phase != last[0] or fraction >= last[1] + 0.005 or fraction >= 1.0 > last[1]:
            last = (phase, fraction)
            progress(phase, fraction)

    return report


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def _content_hash(scan: CorpusScan, data: DataSpec, vocab_size: int, tokenizer: str | None) -> str:
    settings = {
        "format": _FORMAT,
        "documents": scan.documents_hash,
        "validation_fraction": data.validation_fraction,
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
        "tokenizer_sample_bytes": TOKENIZER_SAMPLE_BYTES,
        "tokenizers": tokenizers.__version__,
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=32).hexdigest()


# -- the cache --------------------------------------------------------------------------------------


def _open_cached(folder: Path, vocab_size: int, notice: bool = False) -> tuple[TokenFile, TokenFile] | None:
    """Return the token files of a cache folder, or None where one of the three files is missing or wrong."""
    paths = [folder / name for name in ("tokenizer.json", "train.tokens", "validation.tokens")]
    if not all(path.is_file() for path in paths):
        return None
    try:
        text = paths[0].read_text("utf-8")
        files = open_token_file(paths[1]), open_token_file(paths[2])
        for file in files:
            if file.tokenizer_hash != tokenizer_hash(text) or file.vocab_size != vocab_size:
                raise TrainError(f"{file.path}: was made by another tokenizer than {paths[0].name}")
    except (TrainError, OSError, UnicodeDecodeError) as error:
        if notice:
            _log.warning("rebuilding cached data: %s", str(error).removesuffix("; delete it to rebuild it"))
        return None
    return files


def _build(
    corpus: Corpus, scan: CorpusScan, folder: Path, vocab_size: int, given: str | None, progress: Progress
) -> None:
    """Write the three files of a cache folder; the token files come last and name the tokenizer's hash."""
    tokenizer_path = folder / "tokenizer.json"
    text = given
    if text is None:
        text = train_tokenizer(_tokenizer_sample(corpus, scan, progress), vocab_size).to_str()
        progress("train tokenizer", 1.0)
    with replace_file(tokenizer_path) as file:
        file.write(text.encode("utf-8"))
    _encode(corpus, scan, folder, vocab_size, text, progress)
    progress("encode", 1.0)


def _tokenizer_sample(corpus: Corpus, scan: CorpusScan, progress: Progress) -> Iterator[str]:
    """Iterate over the training documents that the tokenizer learns from."""
    limit = min(1.0, TOKENIZER_SAMPLE_BYTES / scan.num_bytes) * 2.0**64
    for text, done in corpus.documents():
        digest = _digest(text)
        part, _ = scan.split.divide(text, _key(digest))
        # The other half of the digest: the half that decides the split would be skewed here.
        if part and int.from_bytes(digest[8:], "little") < limit:
            yield part
        progress("train tokenizer", 0.5 * done / max(1, corpus.size))


def _encode(
    corpus: Corpus, scan: CorpusScan, folder: Path, vocab_size: int, tokenizer_text: str, progress: Progress
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_text)
    end_id = end_of_text_id(tokenizer)
    made_by = tokenizer_hash(tokenizer_text)
    whole = hashlib.blake2b(digest_size=32)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(write_token_file(folder / name, vocab_size, made_by))
            for name in ("train.tokens", "validation.tokens")
        ]
        batches: tuple[list[str], list[str]] = ([], [])
        waiting = 0

        def flush() -> None:
            for writer, batch in zip(writers, batches, strict=True):
                num_bytes = sum(len(part.encode("utf-8")) for part in batch)
                writer.append(encode_documents(tokenizer, batch, end_id), num_bytes, len(batch))
                batch.clear()

        for text, done in corpus.documents():
            digest = _digest(text)
            whole.update(digest)
            for batch, part in zip(batches, scan.split.divide(text, _key(digest)), strict=True):
                if part:
                    batch.append(part)
            waiting += len(text)
            if waiting >= _BATCH_CHARACTERS:
                flush()
                waiting = 0
                progress("encode", done / max(1, corpus.size))
        flush()
        if whole.hexdigest() != scan.documents_hash:
            raise TrainError("data.paths: the corpus changed while it was read; run again when it is at rest")
