"""Byte-level BPE: exact sizes, exact round trips, and nothing that a document's text can forge."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cofire.errors import TrainError
from cofire.train.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

DOCUMENTS = [f"def f{i}(argument):\n    return argument + {i} * {i * i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS, 320)


def test_the_vocabulary_has_exactly_the_size_asked_for(tokenizer):
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(vocabulary.values()) == list(range(320))
    assert vocabulary[END_OF_TEXT] == 0 == end_of_text_id(tokenizer)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_decoding_gives_back_any_text(tokenizer, text):
    ids = encode_documents(tokenizer, [text], 0)
    assert ids[-1] == 0
    assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=6))
def test_packed_documents_come_apart_at_the_end_of_text_tokens(tokenizer, documents):
    ids = encode_documents(tokenizer, documents, 0)
    ends = np.flatnonzero(ids == 0)
    assert len(ends) == len(documents)
    parts = np.split(ids, ends + 1)[:-1]
    assert [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts] == documents


def test_a_document_cannot_forge_its_end(tokenizer):
    text = f"print('{END_OF_TEXT}')"
    ids = encode_documents(tokenizer, [text], 0)
    assert np.count_nonzero(ids == 0) == 1
    assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
    assert tokenizer.encode(text).ids.count(0) == 1  # a prompt may still spell the special token


def test_training_compresses_what_it_was_trained_on(tokenizer):
    ids = encode_documents(tokenizer, DOCUMENTS, 0)
    assert sum(map(len, DOCUMENTS)) / len(ids) > 2.0


def test_training_is_the_same_in_another_process_with_another_number_of_threads(tokenizer):
    program = (
        "import json, sys\nfrom cofire.train.tokenizer import *\n"
        "print(tokenizer_hash(train_tokenizer(json.load(sys.stdin), 320).to_str()))"
    )
    environment = {"RAYON_NUM_THREADS": "3", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(DOCUMENTS), text=True, capture_output=True, env=environment
    )
    assert result.stdout.strip() == tokenizer_hash(tokenizer.to_str()), result.stderr


def test_a_vocabulary_that_the_text_cannot_fill_names_the_size_that_it_can():
    with pytest.raises(TrainError, match=r"vocab_size = 400 cannot be reached: .* gives (\d+) tokens") as caught:
        train_tokenizer(["abababab cdcd"], 400)
    reached = int(str(caught.value).split("gives ")[1].split()[0])
    assert train_tokenizer(["abababab cdcd"], reached).get_vocab_size() == reached


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(TrainError, match=r"vocab_size = 256 must be at least 257"):
        train_tokenizer(DOCUMENTS, 256)


def test_a_tokenizer_file_is_read_back(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert load_tokenizer(path, 320).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(TrainError, match=r"token ids up to 319, but model.vocab_size = 319; set model.vocab_size=320"):
        load_tokenizer(path, 319)


def test_a_given_tokenizer_neither_cuts_nor_pads_documents(tmp_path):
    path = tmp_path / "tokenizer.json"
    cutting = train_tokenizer(DOCUMENTS, 300)
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    cutting.save(str(path))
    loaded = load_tokenizer(path, 300)
    ids = encode_documents(loaded, DOCUMENTS[:2], 0)
    assert loaded.decode(ids.tolist()) == "".join(DOCUMENTS[:2])


def test_the_usual_names_of_an_end_of_text_token_are_known(tmp_path):
    other = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    assert end_of_text_id(other) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data.tokenizer: no file '.*tokenizer.json'"),
        ("{}", r"tokenizer.json: not a tokenizer.json: "),
        ("not json", r"tokenizer.json: not a tokenizer.json: "),
        (Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str(), r"has no end-of-text token; add <\|endoftext\|>"),
    ],
)
def test_a_foreign_tokenizer_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrainError, match=message) as caught:
        load_tokenizer(path, 1000)
    assert "\n" not in str(caught.value)
