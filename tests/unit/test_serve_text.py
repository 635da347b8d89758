"""Text in and out: streams = whole decoding, stop strings = str.find, ends of other tokenizers, chat templates."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cofire.errors import ServeError
from cofire.serve.text import ChatTemplate, TextOutput, TextStream, encode_prompt, load_chat_template, load_tokenizer


def _byte_tokenizer(*special: str) -> Tokenizer:
    """One token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


BYTES = _byte_tokenizer("<|endoftext|>")
END = BYTES.token_to_id("<|endoftext|>")


@given(text=st.text(max_size=200), cuts=st.lists(st.integers(0, 600), max_size=20))
@settings(deadline=None)
def test_the_pieces_of_a_stream_are_the_text(text, cuts):
    ids = BYTES.encode(text).ids
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    stream = TextStream(BYTES)
    pieces = [stream.feed(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join(pieces) + stream.feed((), last=True) == BYTES.decode(ids) == text
    assert all(chr(0xFFFD) not in piece for piece in pieces) or chr(0xFFFD) in text


@given(data=st.binary(max_size=150))
@settings(deadline=None)
def test_bytes_that_are_no_text_come_out_as_the_whole_would(data):
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    by_byte = _symbols()
    ids = [alphabet[by_byte[byte]] for byte in data]
    stream = TextStream(BYTES)
    text = "".join(stream.feed([token]) for token in ids) + stream.feed((), last=True)
    assert text == BYTES.decode(ids) == data.decode("utf-8", errors="replace")


def _symbols() -> dict[int, str]:
    """GPT-2's table from bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


@given(
    text=st.text(alphabet="ab\u00e9\n", max_size=60),
    stop=st.lists(st.text(alphabet="ab\u00e9\n", min_size=1, max_size=4), max_size=4),
    batch=st.integers(1, 7),
)
@settings(deadline=None, max_examples=300)
def test_a_stop_string_ends_the_text_where_it_first_occurs(text, stop, batch):
    ids = BYTES.encode(text).ids
    pieces: list[str] = []
    output = TextOutput(BYTES, len(ids) + 1, pieces.append, stop)
    for start in range(0, len(ids), batch):
        if not output.take(ids[start : start + batch]):
            break
    else:
        output.take([END])
    # Of several, the one that is whole first counts, and of those that end together the one that begins first.
    ends = [text.find(one) + len(one) for one in stop if one in text]
    cut = (
        min((at for one in stop if (at := text[: min(ends)].find(one)) >= 0), default=len(text)) if ends else len(text)
    )
    assert output.text == "".join(pieces) == text[:cut]
    assert output.reason == "stop"


@pytest.mark.parametrize("name", ["<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>"])
def test_a_text_ends_at_the_end_token_of_every_usual_tokenizer(name):
    tokenizer = _byte_tokenizer(name)
    end = tokenizer.token_to_id(name)
    output = TextOutput(tokenizer, 10)
    assert not output.take([*tokenizer.encode("ab").ids, end, 5])
    assert (output.text, output.reason, len(output.ids)) == ("ab", "stop", 2)
    assert encode_prompt(tokenizer, "") == [end]


def test_a_full_output_ends_with_length():
    output = TextOutput(BYTES, 3)
    assert not output.take(BYTES.encode("abcdef").ids)
    assert (output.text, output.reason) == ("abc", "length")


def test_the_beginning_token_is_added_where_the_configuration_asks_for_it(tmp_path):
    tokenizer = _byte_tokenizer("<s>", "</s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a").ids == tokenizer.encode("a").ids
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert encode_prompt(loaded, "a") == [tokenizer.token_to_id("<s>"), *tokenizer.encode("a").ids]
    assert encode_prompt(loaded, "a", special_tokens=False) == tokenizer.encode("a").ids


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_without_a_template_a_chat_is_paragraphs():
    template = ChatTemplate()
    assert template.render(MESSAGES) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    assert "\n\nUser:" in template.stop


def test_the_models_own_template_is_used(tmp_path):
    source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}"
    config = {"bos_token": "<s>", "chat_template": source + "{% if add_generation_prompt %}[assistant]{% endif %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path).render(MESSAGES) == "<s>[system]Be brief.[user]Hi[assistant]"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert load_chat_template(tmp_path).render(MESSAGES) == "Hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system messages') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_can_refuse_and_cannot_reach_the_process(source):
    with pytest.raises(ServeError, match="chat template refuses"):
        ChatTemplate(source).render(MESSAGES)


def test_a_broken_template_is_one_line(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ServeError, match="no Jinja template"):
        load_chat_template(tmp_path)


def test_a_folder_that_is_none_is_named():
    with pytest.raises(ServeError, match="is not a folder"):
        load_tokenizer("/no/such/folder")
