"""Decoding: the cache's size, speculative = greedy, batches = one at a time, whole characters, one-line errors."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cofire.errors import ServeError
from cofire.model import build
from cofire.serve.batch import Batch
from cofire.serve.cache import KVCache
from cofire.serve.generation import generate
from cofire.serve.sampling import SamplingParameters
from cofire.serve.text import TextStream, load_tokenizer
from cofire.spec import ModelSpec, load_as

GREEDY = SamplingParameters(temperature=0.0, seed=0)


def _decoder(*overrides: str, dtype=torch.float32, seed: int = 0):
    spec = load_as(ModelSpec, "tiny", ["init_std=0.2", *overrides])
    return build(spec, seed=seed, dtype=dtype).eval()


def _prompts(count: int, vocab: int = 512) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = [3 + 5 * i for i in range(count)]
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def _decode(decoder, prompts, steps: int, speculative: bool = False) -> tuple[list[list[int]], Batch]:
    batch = Batch(decoder, slots_max=len(prompts), speculative=speculative)
    outputs = [[batch.add(prompt, GREEDY)] for prompt in prompts]
    while min(map(len, outputs)) < steps:
        for output, new in zip(outputs, batch.step(), strict=True):
            output.extend(new)
    return [output[:steps] for output in outputs], batch


@torch.no_grad()
def _naive(decoder, prompt: list[int], steps: int) -> list[int]:
    """Run the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(decoder.logits(decoder(torch.tensor([tokens])).hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "overrides", [(), ("attention.q_lora_rank=none",), ("moe=none",)], ids=["v3", "full q", "dense"]
)
def test_cached_decoding_of_a_ragged_batch_equals_running_everything_anew(overrides, dtype):
    decoder = _decoder(*overrides, dtype=dtype)
    prompts = _prompts(3)
    outputs, _ = _decode(decoder, prompts, 20)
    assert outputs == [_naive(decoder, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_speculative_greedy_output_equals_plain_greedy_token_for_token(count, depth, dtype):
    for seed in range(3):
        decoder = _decoder(f"mtp.depth={depth}", dtype=dtype, seed=seed)
        plain, _ = _decode(decoder, _prompts(count), 30)
        drafted, batch = _decode(decoder, _prompts(count), 30, speculative=True)
        assert drafted == plain, f"seed {seed}"
        assert batch.drafted > 0


def test_drafts_of_a_model_that_repeats_itself_are_kept():
    """With a constant answer every draft is right: fewer steps than tokens, and the output is still plain's."""
    decoder = _decoder()
    with torch.no_grad():
        decoder.head.weight.zero_()
    outputs, batch = _decode(decoder, _prompts(2), 20, speculative=True)
    assert outputs == [[0] * 20] * 2
    assert batch.accepted == batch.drafted


def test_the_cache_holds_exactly_the_latent_and_the_rotated_key():
    spec = load_as(ModelSpec, "deepseek-v3", ["num_layers=4", "mtp=none", "moe.num_first_dense_layers=1"])
    cache = KVCache(spec, slots_max=2, capacity_max=64, dtype=torch.bfloat16)
    cache.reserve(2, 64)
    assert cache.num_bytes == 4 * 2 * 64 * (512 + 64) * 2


def test_a_finished_sequence_leaves_the_others_as_they_were():
    decoder = _decoder()
    prompts = _prompts(3)
    wanted = [_naive(decoder, prompt, 12) for prompt in prompts]
    batch = Batch(decoder, slots_max=3, speculative=True)
    outputs = {i: [batch.add(prompt, GREEDY)] for i, prompt in enumerate(prompts)}
    slots = [0, 1, 2]
    while any(len(outputs[i]) < 12 for i in slots):
        for slot, new in enumerate(batch.step()):
            outputs[slots[slot]].extend(new)
        if slots == [0, 1, 2] and len(outputs[0]) > 4:
            batch.remove(0)
            slots = [2, 1]
    for i in slots:
        assert outputs[i][:12] == wanted[i]


def test_a_request_does_not_depend_on_its_companions():
    decoder = _decoder(dtype=torch.float64)
    warm = SamplingParameters(temperature=1.0, top_p=0.9, seed=17)
    prompts = _prompts(3)
    batch = Batch(decoder, slots_max=3)
    together = [[batch.add(prompt, warm)] for prompt in prompts]
    for _ in range(10):
        for output, new in zip(together, batch.step(), strict=True):
            output.extend(new)
    for prompt, output in zip(prompts, together, strict=True):
        alone = Batch(decoder, slots_max=1)
        tokens = [alone.add(prompt, warm)]
        for _ in range(10):
            tokens.extend(alone.step()[0])
        assert tokens == output


def test_speculative_sampling_keeps_the_models_distribution():
    """The second and third token's joint frequencies, with and without drafts, differ by chance only."""
    decoder = _decoder("vocab_size=4", "mtp.loss_weight=0.1", seed=2)
    counts = []
    for speculative in (False, True):
        batch = Batch(decoder, slots_max=400, speculative=speculative)
        outputs = [
            [batch.add([1, 2, 3], SamplingParameters(temperature=1.0, seed=10_000 * speculative + i))]
            for i in range(400)
        ]
        for _ in range(3):
            for output, new in zip(outputs, batch.step(), strict=True):
                output.extend(new)
        counts.append(torch.bincount(torch.tensor([4 * o[1] + o[2] for o in outputs]), minlength=16).double())
    both = counts[0] + counts[1]
    seen = both > 0
    chi_square = float((((counts[0] - counts[1]) ** 2)[seen] / both[seen]).sum())
    assert chi_square < 40  # 15 degrees of freedom: p < 0.0005


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to learn from, twice over"] * 3, trainer)
    return tokenizer


def test_characters_are_shown_only_when_they_are_whole():
    tokenizer = _tokenizer()
    text = "a" + chr(0x20AC) + "b" + chr(0x1F600)
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.feed([token]) for token in ids[:-1]] + [stream.feed(ids[-1:], last=True)]
    assert "".join(pieces) == text
    assert all(chr(0xFFFD) not in piece for piece in pieces)


def test_generate_stops_at_the_limit_and_is_repeatable():
    tokenizer, decoder = _tokenizer(), _decoder("vocab_size=300")
    shown: list[tuple[int, str]] = []
    parameters = [SamplingParameters(temperature=1.0, seed=3), GREEDY]
    result = generate(decoder, tokenizer, ["some", ""], parameters, 15, show=lambda i, text: shown.append((i, text)))
    again = generate(decoder, tokenizer, ["some", ""], parameters, 15)
    assert again.token_ids == result.token_ids
    assert all(
        len(ids) == 15 or reason == "stop" for ids, reason in zip(result.token_ids, result.finish_reasons, strict=True)
    )
    for i, text in enumerate(result.texts):
        assert "".join(piece for j, piece in shown if j == i) == text


def test_bad_requests_are_one_line(tmp_path):
    tokenizer, decoder = _tokenizer(), _decoder("vocab_size=300", "mtp=none")
    with pytest.raises(ServeError, match="no MTP module"):
        generate(decoder, tokenizer, ["x"], [GREEDY], speculative=True)
    with pytest.raises(ServeError, match="this model takes between"):
        generate(decoder, tokenizer, ["x" * 2000], [GREEDY])
    with pytest.raises(ServeError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ServeError, match="temperature = -1"):
        SamplingParameters(temperature=-1)
