"""From a corpus to packed tokens: what is held out, what the numbers mean, and what a small corpus is told."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cofire.errors import TrainError
from cofire.spec import DataSpec
from cofire.train import data as data_module
from cofire.train.data import PackedData, Split, cache_folder, choose_split, prepare
from cofire.train.token_file import TokenFile
from cofire.train.tokenizer import tokenizer_hash, train_tokenizer

VOCAB = 300


def texts(count: int) -> list[str]:
    return [f"document {i}: " + " ".join(str(i * k % 97) for k in range(40 + i % 50)) + "\n" for i in range(count)]


def spec(folder: Path, **fields) -> DataSpec:
    fields = {"sequence_length": 16, "validation_fraction": 0.1, **fields}
    return DataSpec(paths=(str(folder / "corpus"),), cache=str(folder / "cache"), **fields)


def write_corpus(folder: Path, documents: list[str], name: str = "a.jsonl") -> None:
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def unpack(packed: PackedData, file: TokenFile) -> list[str]:
    """Return the documents of a token file."""
    tokenizer = Tokenizer.from_file(str(packed.tokenizer_path))
    tokens = np.array(file.tokens)
    assert tokens[-1] == 0
    parts = np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> PackedData:
    folder = tmp_path_factory.mktemp("packed")
    write_corpus(folder, texts(200))
    return prepare(spec(folder), VOCAB)


def test_the_two_splits_hold_every_document_once_and_in_order(packed):
    train, validation = unpack(packed, packed.train), unpack(packed, packed.validation)
    held_out = set(validation)
    assert train == [text for text in texts(200) if text not in held_out]
    assert validation == [text for text in texts(200) if text in held_out]
    assert (packed.train.num_documents, packed.validation.num_documents) == (len(train), len(validation))
    assert packed.train.num_bytes == sum(len(text.encode()) for text in train)
    total = packed.train.num_bytes + packed.validation.num_bytes
    assert 0.1 <= packed.validation.num_bytes / total <= 0.125


def test_the_tokenizer_has_seen_the_training_split_alone(packed):
    expected = train_tokenizer(unpack(packed, packed.train), VOCAB).to_str()
    assert packed.tokenizer_path.read_text() == expected
    assert packed.train.tokenizer_hash == packed.validation.tokenizer_hash == tokenizer_hash(expected)
    assert train_tokenizer(texts(200), VOCAB).to_str() != expected  # with the held-out text it would be another


def test_unigram_entropy_is_the_smoothed_cross_entropy(packed):
    train, validation = Counter(packed.train.tokens.tolist()), Counter(packed.validation.tokens.tolist())
    rows, total = sum(train.values()), sum(validation.values())
    expected = -sum(n / total * math.log((train[token] + 1) / (rows + VOCAB)) for token, n in validation.items())
    assert packed.unigram_entropy == pytest.approx(expected, rel=1e-12)
    assert 1 < packed.unigram_entropy < math.log(VOCAB)


def test_bytes_per_token_turns_nats_into_bits_per_byte(packed):
    held_out = "".join(unpack(packed, packed.validation))
    assert packed.bytes_per_token == len(held_out.encode()) / len(packed.validation.tokens)


def test_the_split_depends_on_neither_order_nor_file_names(packed, tmp_path):
    shuffled = np.random.default_rng(0).permutation(np.array(texts(200), dtype=object)).tolist()
    write_corpus(tmp_path, shuffled[:50], "x.jsonl")
    write_corpus(tmp_path, shuffled[50:], "b.jsonl")
    other = prepare(spec(tmp_path), VOCAB)
    assert sorted(unpack(other, other.validation)) == sorted(unpack(packed, packed.validation))
    assert other.content_hash != packed.content_hash  # the order of the training text did change


documents_strategy = st.lists(
    st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 1000)), min_size=2, max_size=60, unique_by=lambda pair: pair[0]
)


@settings(max_examples=300, deadline=None)
@given(documents_strategy, st.floats(0.01, 0.9), st.randoms(use_true_random=False))
def test_a_split_is_a_function_of_the_set_of_documents(documents, fraction, random):
    def choose(rows):
        return choose_split(np.array([key for key, _ in rows], np.uint64), np.array([s for _, s in rows]), fraction)

    documents = [(key, size + 1) for key, size in documents]
    split = choose(documents)
    shuffled = random.sample(documents, len(documents))
    assert choose(shuffled) == split
    held = sum(size for key, size in documents if key in split.held_out)
    total = sum(size for _, size in documents)
    if split.cut_key is None:
        assert 0 < held <= 1.25 * fraction * total
        assert len(split.held_out) < len(documents)
    else:
        assert not split.held_out
        longest = max(size for _, size in documents)
        assert dict(documents)[split.cut_key] == longest
        assert split.cut_fraction == pytest.approx(min(0.5, fraction * total / longest))


def test_the_held_out_part_of_many_documents_is_close_to_the_fraction_asked_for():
    random = np.random.default_rng(1)
    keys = random.integers(0, 2**63, 5000).astype(np.uint64)
    sizes = random.lognormal(8, 1.5, 5000).astype(np.int64) + 1
    for fraction in (0.01, 0.02, 0.1, 0.5):
        split = choose_split(keys, sizes, fraction)
        held = sizes[np.isin(keys, np.array(list(split.held_out), np.uint64))].sum() / sizes.sum()
        assert fraction <= held <= 1.25 * fraction


def test_copies_count_when_the_held_out_part_is_measured():
    keys = np.repeat(np.arange(1, 101, dtype=np.uint64) << np.uint64(50), np.where(np.arange(100) < 20, 10, 1))
    sizes = np.full(len(keys), 100)
    split = choose_split(keys, sizes, 0.2)
    held = np.isin(keys, np.array(list(split.held_out), np.uint64)).mean()
    assert 0.2 <= held <= 0.25


def test_copies_of_a_document_fall_on_one_side(tmp_path):
    write_corpus(tmp_path, texts(60) * 3)
    packed = prepare(spec(tmp_path), VOCAB)
    train, validation = unpack(packed, packed.train), unpack(packed, packed.validation)
    assert not set(train) & set(validation)
    assert all(validation.count(text) == 3 for text in validation)


def test_a_corpus_of_one_file_holds_out_its_end_from_a_line_start_on(tmp_path):
    (tmp_path / "corpus").mkdir()
    text = "".join(texts(100))
    (tmp_path / "corpus" / "one.txt").write_text(text)
    packed = prepare(spec(tmp_path, validation_fraction=0.05), VOCAB)
    (train,), (validation,) = unpack(packed, packed.train), unpack(packed, packed.validation)
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.05 <= len(validation) / len(text) <= 0.0625


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=2), st.floats(0.001, 0.999))
def test_a_cut_document_gives_both_splits_a_part(text, fraction):
    train, validation = Split(frozenset(), cut_key=5, cut_fraction=fraction).divide(text, 5)
    assert train + validation == text
    assert train
    assert validation


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    write_corpus(tmp_path, texts(50))
    given_tokenizer = train_tokenizer(["other text of " * 9, *texts(5)], 270)
    given_tokenizer.save(str(tmp_path / "given.json"))
    packed = prepare(spec(tmp_path, tokenizer=str(tmp_path / "given.json")), 1000)
    assert Tokenizer.from_file(str(packed.tokenizer_path)).get_vocab() == given_tokenizer.get_vocab()
    assert packed.train.vocab_size == 1000
    assert sorted(unpack(packed, packed.train) + unpack(packed, packed.validation)) == sorted(texts(50))
    with pytest.raises(TrainError, match=r"token ids up to 269, but model.vocab_size = 269"):
        prepare(spec(tmp_path, tokenizer=str(tmp_path / "given.json")), 269)


def test_a_large_corpus_trains_its_tokenizer_on_a_sample_of_the_training_split(tmp_path, monkeypatch):
    write_corpus(tmp_path, texts(300))
    size = sum(len(text) for text in texts(300))
    monkeypatch.setattr(data_module, "TOKENIZER_SAMPLE_BYTES", size // 4)
    seen: list[str] = []

    def spy(documents, vocab_size):
        seen.extend(documents)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(data_module, "train_tokenizer", spy)
    packed = prepare(spec(tmp_path), VOCAB)
    assert set(seen) < set(unpack(packed, packed.train))
    assert 0.7 * size / 4 < sum(map(len, seen)) < 1.3 * size / 4


def test_batches_of_encoding_do_not_show_in_the_tokens(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "_BATCH_CHARACTERS", 1000)
    write_corpus(tmp_path, texts(200))
    assert prepare(spec(tmp_path), VOCAB).train.checksum == packed.train.checksum


def test_progress_names_three_phases_that_each_reach_the_end(tmp_path):
    write_corpus(tmp_path, texts(600))
    calls: list[tuple[str, float]] = []
    prepare(spec(tmp_path), VOCAB, lambda phase, fraction: calls.append((phase, fraction)))
    assert list(dict.fromkeys(phase for phase, _ in calls)) == ["read", "train tokenizer", "encode"]
    for name in ("read", "train tokenizer", "encode"):
        fractions = [fraction for phase, fraction in calls if phase == name]
        assert fractions == sorted(fractions)
        assert fractions[0] >= 0
        assert fractions[-1] == 1.0


def test_the_cache_folder_is_the_spec_s_then_the_environment_s_then_the_user_s(monkeypatch):
    monkeypatch.setenv("COFIRE_CACHE", "/environment")
    assert cache_folder(DataSpec(cache="/spec")) == Path("/spec")
    assert cache_folder(DataSpec()) == Path("/environment")
    monkeypatch.delenv("COFIRE_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(DataSpec()) == Path("/xdg/cofire")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder(DataSpec()) == Path("/home/someone/.cache/cofire")


# -- bad input --------------------------------------------------------------------------------------


def message(folder: Path, vocab_size: int = VOCAB, **fields) -> str:
    with pytest.raises(TrainError) as caught:
        prepare(spec(folder, **fields), vocab_size)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_empty_corpus_is_refused(tmp_path):
    write_corpus(tmp_path, ["", ""])
    assert message(tmp_path) == "data.paths: none of the files found (1) holds text; name files that do"


def test_a_corpus_of_one_letter_is_refused(tmp_path):
    write_corpus(tmp_path, ["x"])
    assert "too small to hold out a part for validation" in message(tmp_path)


def test_a_split_too_short_for_a_sample_names_the_length_that_fits(tmp_path):
    write_corpus(tmp_path, texts(50))
    text = message(tmp_path, sequence_length=2000)
    assert "the validation split has" in text
    longest = int(text.split("lower data.sequence_length to ")[1].split(",")[0])
    assert prepare(spec(tmp_path, sequence_length=longest), VOCAB).validation.num_samples(longest) == 1
    assert "the validation split" in message(tmp_path, sequence_length=longest + 1)


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused_and_nothing_is_left(tmp_path):
    write_corpus(tmp_path, ["abc\n" * 50, "abd\n" * 40])
    assert "vocab_size = 5000 cannot be reached" in message(tmp_path, vocab_size=5000)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_corpus_that_changes_while_it_is_read_is_noticed(tmp_path):
    write_corpus(tmp_path, texts(50))

    def meddle(phase: str, fraction: float) -> None:
        if (phase, fraction) == ("train tokenizer", 1.0):
            write_corpus(tmp_path, [*texts(49), "another text\n"])

    with pytest.raises(TrainError, match="the corpus changed while it was read; run again"):
        prepare(spec(tmp_path), VOCAB, meddle)
    assert prepare(spec(tmp_path), VOCAB).train.num_documents > 0
