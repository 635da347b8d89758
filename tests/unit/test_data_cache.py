"""The cache of packed tokens: found again, never believed when damaged, never half-written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cofire.errors import TrainError
from cofire.spec import DataSpec
from cofire.train import data as data_module
from cofire.train.atomic import folder_lock, replace_file
from cofire.train.data import PackedData, prepare
from cofire.train.token_file import HEADER_BYTES, open_token_file, write_token_file

NAMES = ["tokenizer.json", "train.tokens", "validation.tokens"]
HASH = "0f" * 32

PROGRAM = """
import sys
from cofire.errors import TrainError
from cofire.spec import DataSpec
from cofire.train.data import prepare
{before}
try:
    packed = prepare(DataSpec(paths=(sys.argv[1] + "/corpus",), cache=sys.argv[1] + "/cache", sequence_length=16), 300)
    print(packed.content_hash, packed.train.checksum, packed.validation.checksum)
except TrainError as error:
    print("TrainError:", error)
"""


def spec(folder: Path, **fields) -> DataSpec:
    return DataSpec(paths=(str(folder / "corpus"),), cache=str(folder / "cache"), sequence_length=16, **fields)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus").mkdir()
    for i in range(100):
        (tmp_path / "corpus" / f"{i}.txt").write_text(" ".join(str(i * k % 89) for k in range(60)) + "\n")
    return tmp_path


def contents(packed: PackedData) -> dict[str, bytes]:
    home = packed.tokenizer_path.parent
    assert sorted(path.name for path in home.iterdir()) == [".lock", *NAMES]
    return {name: (home / name).read_bytes() for name in NAMES}


def test_a_second_call_reads_the_corpus_and_builds_nothing(folder, monkeypatch):
    first = prepare(spec(folder), 300)
    monkeypatch.setattr(data_module, "_build", None)
    phases = []
    assert prepare(spec(folder), 300, lambda phase, _: phases.append(phase)) == first
    assert set(phases) == {"read"}


def test_settings_and_documents_choose_the_folder(folder):
    homes = {prepare(data, size).tokenizer_path for data, size in [(spec(folder), 300), (spec(folder), 310)]}
    homes.add(prepare(spec(folder, validation_fraction=0.3), 300).tokenizer_path)
    (folder / "corpus" / "7.txt").write_text("1 2 3 changed\n")
    homes.add(prepare(spec(folder), 300).tokenizer_path)
    assert len(homes) == 4
    longer = spec(folder).model_copy(update={"sequence_length": 20})
    assert prepare(longer, 300).tokenizer_path in homes  # windows are cut later


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "truncated": lambda data: data[:-2],
    "longer": lambda data: data + b"\0\0",
    "empty": lambda data: b"",
    "foreign": lambda data: b"something else entirely" * 20,
    "header": lambda data: flip(data, 20),
    "payload": lambda data: flip(data, len(data) - 5),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt_with_a_notice(folder, caplog, name, damage):
    packed = prepare(spec(folder), 300)
    before = contents(packed)
    (packed.tokenizer_path.parent / name).write_bytes(DAMAGES[damage](before[name]))
    with caplog.at_level(logging.WARNING):
        again = prepare(spec(folder), 300)
    assert again == packed
    assert contents(again) == before
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == ["rebuilding cached data"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_rebuilt(folder, name):
    packed = prepare(spec(folder), 300)
    before = contents(packed)
    (packed.tokenizer_path.parent / name).unlink()
    assert contents(prepare(spec(folder), 300)) == before


def test_a_token_file_of_another_vocabulary_is_not_believed(folder, caplog):
    packed, other = prepare(spec(folder), 300), prepare(spec(folder), 310)
    before = contents(packed)
    packed.train.path.write_bytes(other.train.path.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert contents(prepare(spec(folder), 300)) == before
    assert "made by another tokenizer" in caplog.text


def start(folder: Path, before: str = "") -> subprocess.Popen[str]:
    program = [sys.executable, "-c", PROGRAM.format(before=before), str(folder)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_prepare_at_once_share_one_whole_result(folder):
    spy = (
        "import time\nfrom cofire.train import data\n"
        "build = data._build\n"
        "def spy(*arguments):\n    print('built', end=' ')\n    time.sleep(0.5)\n    build(*arguments)\n"
        "data._build = spy"
    )
    running = [start(folder, spy) for _ in range(3)]
    outputs = []
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output)
    packed = prepare(spec(folder), 300)
    expected = f"{packed.content_hash} {packed.train.checksum} {packed.validation.checksum}\n"
    assert [output.removeprefix("built ") for output in outputs] == [expected] * 3
    assert sum(output.startswith("built ") for output in outputs) == 1
    contents(packed)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file size limit")
@pytest.mark.parametrize("limit", [1_000, 12_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(folder, limit):
    """A limit on file size stands for the full disk: the first stops the tokenizer's file, the second the tokens'."""
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    for i in range(200):
        (folder / "corpus" / f"more{i}.txt").write_text(" ".join(str(i * k % 83) for k in range(60)) + "\n")
    output, errors = start(folder, before).communicate(timeout=120)
    assert output.startswith(f"TrainError: cannot write the data cache {folder}/cache"), output + errors
    assert output.endswith("File too large; free space there or set data.cache\n")
    left = [path.name for path in (folder / "cache").rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == ([] if limit == 1_000 else ["tokenizer.json"])
    contents(prepare(spec(folder), 300))


def test_what_a_killed_writer_left_is_cleared_away(folder):
    packed = prepare(spec(folder), 300)
    home = packed.tokenizer_path.parent
    (home / ".train.tokens-abc.partial").write_bytes(b"half")
    packed.train.path.unlink()
    contents(prepare(spec(folder), 300))


def test_a_process_killed_while_it_writes_harms_nothing(folder):
    before = (
        "import os, signal\nfrom cofire.train import data\n"
        "def kill(*_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "data.encode_documents = kill"
    )
    process = start(folder, before)
    process.communicate(timeout=120)
    assert process.returncode == -9
    leftovers = list((folder / "cache").rglob("*.partial"))
    assert len(leftovers) == 2
    contents(prepare(spec(folder), 300))


def test_a_cache_that_cannot_be_made_is_one_line(folder):
    (folder / "cache").write_text("a file")
    rule = r"cannot write the data cache .*(File exists|Not a directory).* set data.cache"
    with pytest.raises(TrainError, match=rule):
        prepare(spec(folder), 300)


# -- token files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(300, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (1 << 32, 4)])
def test_token_files_are_as_narrow_as_the_vocabulary_allows(tmp_path, vocab_size, itemsize):
    tokens = np.array([0, 1, vocab_size - 1, 7], np.int64)
    with write_token_file(tmp_path / "t", vocab_size, HASH) as writer:
        writer.append(tokens[:2], 10, 1)
        writer.append(tokens[2:], 5, 2)
    file = open_token_file(tmp_path / "t")
    assert os.path.getsize(tmp_path / "t") == HEADER_BYTES + 4 * itemsize
    assert file.tokens.tolist() == tokens.tolist()
    assert (file.vocab_size, len(file), file.num_bytes, file.num_documents) == (vocab_size, 4, 15, 3)
    assert file.tokenizer_hash == HASH
    assert file.bytes_per_token == 15 / 4
    assert isinstance(file.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


def test_an_id_outside_of_the_vocabulary_is_refused_and_the_old_file_stays(tmp_path):
    for ids in ([300], [-1]):
        with (
            pytest.raises(TrainError, match=rf"token id {ids[0]} is not in 0 .. 299"),
            write_token_file(tmp_path / "t", 300, HASH) as writer,
        ):
            writer.append(np.array([1, *ids]), 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_token_file_opens(tmp_path):
    with write_token_file(tmp_path / "t", 300, HASH):
        pass
    file = open_token_file(tmp_path / "t")
    assert (len(file), len(file.tokens), file.num_samples(8)) == (0, 0, 0)


def test_every_changed_byte_of_the_header_is_noticed(tmp_path):
    with write_token_file(tmp_path / "t", 300, HASH) as writer:
        writer.append(np.arange(50), 100, 1)
    whole = (tmp_path / "t").read_bytes()
    for place in range(HEADER_BYTES):
        (tmp_path / "t").write_bytes(flip(whole, place))
        with pytest.raises(
            TrainError, match=r"(is not a Cofire token file|header is damaged); delete it to rebuild it"
        ):
            open_token_file(tmp_path / "t")


def test_a_token_file_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cofire.train.token_file.VERSION", 2)
    with write_token_file(tmp_path / "t", 300, HASH):
        pass
    monkeypatch.undo()
    with pytest.raises(TrainError, match="is of version 2, this is version 1"):
        open_token_file(tmp_path / "t")


def test_a_missing_token_file_is_one_line(tmp_path):
    with pytest.raises(TrainError, match=r"cannot read .*/t: No such file"):
        open_token_file(tmp_path / "t")


# -- whole files and locks --------------------------------------------------------------------------


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with replace_file(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("a", b"old")]
    with replace_file(path) as file:
        file.write(b"new")
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("a", b"new")]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_replaced_file_has_the_permissions_of_any_new_file(tmp_path):
    with replace_file(tmp_path / "a") as file:
        file.write(b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_the_lock_of_a_folder_is_held_by_one_process(tmp_path):
    program = (
        "import sys, json\nfrom cofire.train.atomic import folder_lock\n"
        "for i in range(300):\n"
        "    with folder_lock(sys.argv[1]) as held:\n"
        "        assert held\n"
        "        path = sys.argv[1] + '/count'\n"
        "        count = int(open(path).read())\n"
        "        open(path, 'w').write(str(count + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / "count").read_text()) == 600
