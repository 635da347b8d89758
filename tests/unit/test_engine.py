"""Continuous batching: any order of arrivals and cancels gives a request what it gets alone; faults reach callers."""

import queue
import random
import threading
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cofire.errors import ServeError
from cofire.model import build
from cofire.serve.engine import Engine, Event, Request
from cofire.serve.sampling import SamplingParameters
from cofire.spec import ModelSpec, load_as


@pytest.fixture(scope="module")
def decoder():
    return build(load_as(ModelSpec, "tiny", ["init_std=0.2"]), seed=0).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocab = {f"w{i}": i for i in range(512)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


@pytest.fixture
def start(decoder, tokenizer):
    engines = []

    def make(**options) -> Engine:
        engine = Engine(decoder, tokenizer, **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close(0.0)


class _Caller:
    def __init__(self, prompt, tokens=8, seed=0, temperature=0.9):
        self.events: queue.Queue[Event] = queue.Queue()
        parameters = SamplingParameters(temperature=temperature, seed=seed)
        self.request = Request(prompt, self.events.put, parameters, tokens)

    def result(self, timeout=60) -> tuple[str, Event]:
        text, deadline = "", time.monotonic() + timeout
        while True:
            event = self.events.get(timeout=deadline - time.monotonic())
            text += event.text
            if event.last:
                assert self.events.empty()
                return text, event


def _alone(start, prompt, **options) -> tuple[str, Event]:
    caller = _Caller(prompt, **options)
    start(slots_max=1).submit([caller.request])
    return caller.result()


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_request_gets_the_same_text_whatever_else_runs(start, seed, speculative):
    """Greedy and drawn, more requests than slots, random arrivals, and cancels in between."""
    chance = random.Random(seed)
    callers = [
        _Caller(
            [chance.randrange(512) for _ in range(chance.randrange(1, 12))],
            tokens=chance.randrange(1, 16),
            seed=i,
            temperature=0.0 if speculative or i % 2 else 0.9,
        )
        for i in range(14)
    ]
    engine = start(slots_max=3, speculative=speculative)
    cancelled = set(chance.sample(range(14), 4))
    for i, caller in enumerate(callers):
        engine.submit([caller.request])
        time.sleep(chance.random() * 0.01)
        if i in cancelled:
            engine.cancel(caller.request)
    alone = start(slots_max=1)
    for i, caller in enumerate(callers):
        if i in cancelled:
            continue
        again = _Caller(caller.request.prompt, caller.request.max_tokens)
        again.request.parameters = caller.request.parameters
        alone.submit([again.request])
        assert caller.result() == again.result()
    for _ in range(200):
        counts = engine.statistics()
        if counts.finished + counts.cancelled == 14:
            break
        time.sleep(0.01)
    assert (counts.running, counts.waiting, counts.failed) == (0, 0, 0)
    assert counts.finished + counts.cancelled == 14
    assert counts.finished >= 10


def test_requests_decode_together(start):
    callers = [_Caller([1 + i], tokens=20) for i in range(4)]
    engine = start(slots_max=4)
    engine.submit([caller.request for caller in callers])
    for caller in callers:
        assert caller.result()[1].tokens == 20
    assert engine.statistics().steps < 2 * 20


def test_the_queue_takes_all_of_a_call_or_none(start):
    engine = start(slots_max=1, queue_max=2)
    blocker = _Caller([1], tokens=200)
    engine.submit([blocker.request])
    while not engine.statistics().running:
        time.sleep(0.001)
    with pytest.raises(ServeError, match="queue takes 2") as refused:
        engine.submit([_Caller([1]).request for _ in range(3)])
    assert refused.value.reason == "busy"
    assert engine.statistics().waiting == 0
    engine.submit([_Caller([1]).request for _ in range(2)])
    with pytest.raises(ServeError, match="queue takes 2"):
        engine.submit([_Caller([1]).request])


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 1, "no tokens"),
        ([1], 0, "at least 1"),
        ([1] * 20, 10**6, "ask for at most"),
        ([512], 1, "between 0 and 511"),
    ],
)
def test_what_can_never_be_served_is_refused(start, prompt, tokens, message):
    with pytest.raises(ServeError, match=message):
        start().submit([_Caller(prompt, tokens).request])


def test_a_cancelled_request_frees_its_slot(start):
    engine = start(slots_max=1)
    first, second = _Caller([1], tokens=250), _Caller([2], tokens=3)
    engine.submit([first.request])
    first.events.get(timeout=30)
    engine.submit([second.request])
    engine.cancel(first.request)
    assert second.result()[1].tokens == 3
    assert engine.statistics().cancelled == 1


def test_a_prompt_that_fails_fails_alone(start, monkeypatch):
    engine = start(slots_max=2)
    add = engine.batch.add
    monkeypatch.setattr(engine.batch, "add", lambda p, s: add(p, s) if len(p) < 5 else _raise(MemoryError("no room")))
    good, bad = _Caller([1], tokens=30), _Caller([1] * 6)
    engine.submit([good.request, bad.request])
    assert bad.result()[1].error == "MemoryError: no room"
    assert good.result()[1].tokens == 30
    assert engine.fault is None


def test_a_step_that_fails_is_told_to_everyone_and_ends_the_engine(start, monkeypatch):
    engine = start(slots_max=2)
    monkeypatch.setattr(engine.batch, "step", lambda: _raise(RuntimeError("device lost\nmore")))
    callers = [_Caller([1]) for _ in range(3)]
    engine.submit([caller.request for caller in callers])
    for caller in callers:
        assert caller.result()[1].error == "RuntimeError: device lost"
    with pytest.raises(ServeError, match="device lost") as refused:
        engine.submit([_Caller([1]).request])
    assert refused.value.reason == "stopped"


def test_closing_finishes_what_there_is_and_refuses_more(start):
    engine = start(slots_max=1)
    callers = [_Caller([1], tokens=20) for _ in range(3)]
    engine.submit([caller.request for caller in callers])
    closing = threading.Thread(target=engine.close)
    closing.start()
    for caller in callers:
        assert caller.result()[1].tokens == 20
    closing.join(timeout=30)
    assert not closing.is_alive()
    with pytest.raises(ServeError, match="shutting down"):
        engine.submit([_Caller([1]).request])


def test_closing_at_once_fails_what_is_left(start):
    engine = start(slots_max=1)
    caller = _Caller([1], tokens=250)
    engine.submit([caller.request])
    caller.events.get(timeout=30)
    engine.close(0.0)
    assert caller.result()[1].error == "it was stopped"


def _raise(error: Exception):
    raise error
