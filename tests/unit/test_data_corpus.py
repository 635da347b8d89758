"""Where documents come from: text, JSONL, Parquet, folders, globs, compression, and what is said about bad files."""

from __future__ import annotations

import gzip
import json
import os

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import TrainError
from cofire.train import corpus as corpus_module
from cofire.train.corpus import Corpus, cut_pieces


def documents(*paths, text_field: str = "text") -> list[str]:
    return [text for text, _ in Corpus([str(path) for path in paths], text_field).documents()]


def message(*paths, text_field: str = "text") -> str:
    with pytest.raises(TrainError) as caught:
        documents(*paths, text_field=text_field)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write_jsonl(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_text_file_is_one_document_kept_as_it_is(tmp_path):
    text = "\u00e9\u4e2d\U0001f600\r\n\ttab \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "no_suffix").write_bytes(b"\xef\xbb\xbfmarked")
    assert documents(tmp_path / "a.txt", tmp_path / "no_suffix") == [text, "marked"]


def test_folders_are_walked_in_order_without_hidden_and_binary_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.py", ".git/config", "a/.hidden", "__pycache__/x.txt", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert documents(tmp_path) == ["a/y.py", "a/z.md", "b.txt"]


def test_globs_and_repeated_paths_give_each_file_once(tmp_path):
    for name in ("one.txt", "two.txt", "three.md"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "*.txt", tmp_path / "one.txt", tmp_path) == ["one.txt", "two.txt", "three.md"]


def test_a_name_with_glob_characters_is_a_file_where_it_exists(tmp_path):
    (tmp_path / "a[1].txt").write_text("bracket")
    assert documents(tmp_path / "a[1].txt") == ["bracket"]


def test_fsspec_protocols_are_read(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus_test/a.txt", b"in memory")
    memory.pipe("/corpus_test/sub/b.jsonl", b'{"text": "a record"}\n')
    try:
        assert documents("memory://corpus_test") == ["in memory", "a record"]
        assert documents("memory://corpus_test/*.txt") == ["in memory"]
        (tmp_path / "c.txt").write_text("local")
        assert documents(f"file://{tmp_path}/c.txt") == ["local"]
    finally:
        memory.rm("/corpus_test", recursive=True)


def test_compressed_files_are_read_through(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"squeezed"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "squeezed record"}\n'))
    assert documents(tmp_path) == ["squeezed", "squeezed record"]


def test_jsonl_records_are_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "n": 1}, {"body": ""}, {"body": "two \U0001f600"}])
    (tmp_path / "b.ndjson").write_text('\n{"body": "three"}\n\n{"body": "four"}')
    assert documents(tmp_path, text_field="body") == ["one", "two \U0001f600", "three", "four"]


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d\ude00b\ud800c"}')
    assert documents(tmp_path / "a.jsonl") == ["a\U0001f600b\ufffdc"]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_rows_are_documents_over_row_groups(tmp_path, kind):
    texts = [f"row {i}" if i % 7 else None for i in range(1000)]
    column = pyarrow.array(texts, pyarrow.large_string() if kind == "large_string" else pyarrow.string())
    column = column.dictionary_encode() if kind == "dictionary" else column
    table = pyarrow.table({"id": range(1000), "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert documents(tmp_path / "a.parquet") == [text for text in texts if text is not None]


def test_python_source_is_decoded_by_its_cookie_and_else_as_latin_1(tmp_path):
    (tmp_path / "cookie.py").write_bytes("# coding: cp1252\ns = '\u20ac'\n".encode("cp1252"))
    (tmp_path / "wrong.py").write_bytes(b"# coding: no-such-codec\ns = '\xe9'\n")
    (tmp_path / "plain.py").write_bytes(b"s = '\xe9'\n")
    assert documents(tmp_path / "cookie.py") == ["# coding: cp1252\ns = '\u20ac'\n"]
    assert documents(tmp_path / "wrong.py") == ["# coding: no-such-codec\ns = '\u00e9'\n"]
    assert documents(tmp_path / "plain.py") == ["s = '\u00e9'\n"]


def test_stdlib_is_the_source_of_the_running_python():
    corpus = Corpus(["stdlib"])
    paths = [file.path for file in corpus.files]
    assert os.__file__ in paths
    assert json.__file__ in paths
    assert not any("site-packages" in path or "__pycache__" in path for path in paths)
    assert paths == [file.path for file in Corpus(["stdlib"]).files]
    assert corpus.size > 5_000_000


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab\n\u00e9", max_size=200), st.integers(1, 40))
def test_pieces_join_to_the_text_and_are_bounded(text, size):
    original = corpus_module.PIECE_CHARACTERS
    corpus_module.PIECE_CHARACTERS = size
    try:
        pieces = cut_pieces(text)
    finally:
        corpus_module.PIECE_CHARACTERS = original
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces[:-1])
    assert len(pieces[-1]) <= size
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece[size // 2 :]


def test_a_large_text_is_read_in_pieces_whatever_the_blocks_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(corpus_module, "_BLOCK_BYTES", 301)
    text = "".join(f"line {i} \u4e2d\U0001f600\n" for i in range(2000))
    (tmp_path / "large.txt").write_text(text)
    pieces = documents(tmp_path / "large.txt")
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert all(len(piece) <= 1000 and piece.endswith("\n") for piece in pieces)


def test_bytes_done_rise_to_the_size_of_the_corpus(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "0123456789"}\n' * 50)
    corpus = Corpus([str(tmp_path)])
    done = [place for _, place in corpus.documents()]
    assert done == sorted(done)
    assert done[0] == 0
    assert corpus.size / 3 * 2 < done[-1] < corpus.size


# -- bad input --------------------------------------------------------------------------------------


def test_no_paths_are_refused():
    with pytest.raises(TrainError, match=r"data.paths is empty"):
        Corpus([])


def test_a_missing_path_names_the_nearest_one(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    text = message(tmp_path / "shakespear.txt")
    assert text.startswith("data.paths: no file matches")
    assert text.endswith(f"nearest: {tmp_path}/shakespeare.txt")
    assert message("stdlb").endswith("nearest: stdlib")
    assert "no file matches" in message(tmp_path / "*.nothing")


def test_an_empty_folder_is_no_corpus(tmp_path):
    assert "no file matches" in message(tmp_path)


def test_an_unknown_protocol_names_the_nearest_one():
    assert message("memry://x/y").endswith("Protocol not known: memry; nearest: memory")
    assert message("zzzzzzzz://x/y").endswith("Protocol not known: zzzzzzzz")


@pytest.mark.parametrize("failing", ["exists", "_open"])
def test_an_error_of_a_remote_store_s_own_type_is_one_line(failing, monkeypatch):
    class StoreError(Exception):
        pass

    class Store(MemoryFileSystem):
        protocol = "cofirestore"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("cofirestore://", "memory://"))

    def fail(*_, **__):
        raise StoreError("no credentials\nwere found")

    fsspec.register_implementation("cofirestore", Store, clobber=True)
    Store().pipe("/cofire_store_test.txt", b"text")
    try:
        assert documents("cofirestore://cofire_store_test.txt") == ["text"]
        monkeypatch.setattr(Store, failing, fail)
        text = message("cofirestore://cofire_store_test.txt")
        assert "cannot read" in text
        assert "cofire_store_test.txt" in text
        assert "no credentials were found; " in text
    finally:
        MemoryFileSystem().rm("/cofire_store_test.txt")


def test_a_wrong_byte_is_named_with_its_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK_BYTES", 7)
    for place in range(1, 40):
        data = bytearray(("\u00e9" * 20).encode())
        data[place] = 0xFF
        (tmp_path / "a.txt").write_bytes(data)
        start = place if place % 2 == 0 else place - 1  # an odd place spoils the character that began before it
        text = message(tmp_path / "a.txt")
        assert f"a.txt: byte {data[start]:#04x} at offset {start} is not UTF-8; convert" in text


def test_a_binary_file_that_the_user_named_is_an_error(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc\0def")
    assert "a.bin: holds zero bytes, so it is not UTF-8 text" in message(tmp_path / "a.bin")
    assert "holds zero bytes" in message(tmp_path / "*.bin")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"txt": "a", "id": 1}', "line 2: no field 'text'; nearest: txt; set data.text_field"),
        ('{"a": "a", "b": 1}', "line 2: no field 'text'; it has: a, b; set data.text_field"),
        ('{"text": 5}', "line 2: 'text' is a int, not text; set data.text_field"),
        ('["text"]', "line 2: holds a list, but a line must be an object with the field 'text'"),
        ('{"text": "cut', "line 2: not valid JSON: "),
        ('{"text": "\udcff"}', "line 2: not UTF-8; "),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, expected):
    data = ('{"text": "good"}\n' + line + "\n").encode("utf-8", "surrogateescape")
    (tmp_path / "a.jsonl").write_bytes(data)
    assert f"a.jsonl, {expected}" in message(tmp_path / "a.jsonl")


def test_bad_parquet_files_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"], "id": [1]}), path)
    assert "a.parquet: no field 'text'; nearest: texts; set data.text_field" in message(path)
    assert "a.parquet: column 'id' is int64, not text; set data.text_field" in message(path, text_field="id")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "a.parquet: not a readable Parquet file: " in message(path)
    path.write_bytes(b"")
    assert "a.parquet: not a readable Parquet file: " in message(path)


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"a long text with the number {i}" for i in range(500)]})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    assert f"cannot read {path}: " in message(path)


def test_a_truncated_compressed_file_is_named(tmp_path):
    whole = gzip.compress(b"0123456789" * 1000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.txt.gz").write_bytes(b"never compressed")
    assert "cut.txt.gz: Compressed file ended" in message(tmp_path / "cut.txt.gz")
    assert "plain.txt.gz: Not a gzipped file" in message(tmp_path / "plain.txt.gz")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    assert f"cannot read {tmp_path}/a.txt: Permission denied" in message(tmp_path / "a.txt")
