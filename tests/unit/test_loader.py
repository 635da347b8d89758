"""The loader's promises, against brute force: every window once per epoch, whatever ranks and batches do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.errors import TrainError
from cofire.train.loader import EpochOrder, Loader, validation_batches
from cofire.train.token_file import TokenFile, open_token_file, write_token_file

T = 4


def token_file(folder, num_tokens: int, name: str = "t.tokens", vocab_size: int = 1 << 17, first: int = 0) -> TokenFile:
    """A file whose token at place i is ``first + i``, so that a window tells where it lies."""
    with write_token_file(folder / name, vocab_size, "ab" * 32) as writer:
        writer.append(np.arange(first, first + num_tokens), num_bytes=3 * num_tokens, num_documents=1)
    return open_token_file(folder / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 1 to 40 windows of T + 1 tokens, with rests of every length."""
    folder = tmp_path_factory.mktemp("tokens")
    return [token_file(folder, n * T + 1 + n % T, f"{n}.tokens") for n in range(1, 41)]


# A schedule is a list of (batch_size per rank, world_size, number of batches): a run cut and resumed at each change.
schedules = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 8)), min_size=1, max_size=6)


def run_schedule(file: TokenFile, seed: int, schedule) -> list[int]:
    """Return the first token of each sample in global order, over runs that hand on only their state."""
    taken: list[int] = []
    state = None
    for share, world_size, num_batches in schedule:
        ranks = [Loader(file, T, share * world_size, seed, rank, world_size) for rank in range(world_size)]
        if state is not None:
            for loader in ranks:
                loader.load_state_dict(state)
        for _ in range(num_batches):
            for loader in ranks:
                taken += loader.next_batch()[:, 0].tolist()
        states = [loader.state_dict() for loader in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
    return taken


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 39), st.integers(0, 2**64), schedules)
def test_every_window_comes_once_per_epoch_across_changes_of_world_size_and_batch_size(files, which, seed, schedule):
    file = files[which]
    num_windows = which + 1
    windows = {i * T for i in range(num_windows)}
    taken = run_schedule(file, seed, schedule)
    for start in range(0, len(taken), num_windows):
        epoch = taken[start : start + num_windows]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= windows
        assert len(epoch) < num_windows or set(epoch) == windows


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 39), st.integers(0, 2**32), schedules)
def test_the_order_of_samples_does_not_depend_on_ranks_or_batches(files, which, seed, schedule):
    taken = run_schedule(files[which], seed, schedule)
    plain = run_schedule(files[which], seed, [(1, 1, len(taken))])
    assert taken == plain


def test_a_batch_holds_whole_windows_of_consecutive_tokens(files):
    batch = Loader(files[9], T, batch_size=6, seed=3).next_batch()
    assert batch.dtype == torch.int64
    assert batch.shape == (6, T + 1)
    assert torch.equal(batch, batch[:, :1] + torch.arange(T + 1))


def test_epochs_and_seeds_have_different_orders(files):
    first, second = (run_schedule(files[39], seed, [(1, 1, 80)]) for seed in (0, 1))
    assert first[:40] != first[40:]
    assert first != second
    assert first[:40] != sorted(first[:40])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_an_epoch_order_is_a_permutation(size, seed, epoch):
    order = EpochOrder(size, seed, epoch)(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


def test_an_epoch_order_needs_no_table_for_a_trillion_samples():
    size = 10**12
    positions = np.arange(size - 50_000, size)
    order = EpochOrder(size, 0, 0)(positions)
    assert len(np.unique(order)) == len(order)
    assert order.min() >= 0
    assert order.max() < size
    assert abs(order.mean() / size - 0.5) < 0.01


def test_epoch_orders_are_close_to_uniform():
    """Chi-square of which window comes first, and of which follows window 0, over 4,000 seeds; 9 degrees of freedom."""
    orders = np.array([EpochOrder(10, seed, 0)(np.arange(10)) for seed in range(4000)])
    for column in (0, 5, 9):
        counts = np.bincount(orders[:, column], minlength=10)
        assert ((counts - 400) ** 2 / 400).sum() < 27.9  # p = 0.001
    place = np.argsort(orders, axis=1)
    distance = (place[:, 1] - place[:, 0]) % 10
    counts = np.bincount(distance, minlength=10)[1:]
    assert ((counts - 4000 / 9) ** 2 / (4000 / 9)).sum() < 26.1


@pytest.mark.parametrize("taken", [0, 2, 5])
def test_a_state_survives_json_and_goes_on_at_the_next_sample(files, taken):
    whole = Loader(files[12], T, 4, seed=9)
    expected = [whole.next_batch() for _ in range(9)]
    first = Loader(files[12], T, 4, seed=9)
    for _ in range(taken):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    assert (state["epoch"], state["position"]) == divmod(4 * taken, 13)
    second = Loader(files[12], T, 4, seed=12345)  # the checkpoint's seed counts
    second.next_batch()
    second.load_state_dict(state)
    for batch in expected[taken:]:
        assert torch.equal(second.next_batch(), batch)


def test_a_state_of_other_tokens_is_refused(files, tmp_path):
    state = Loader(files[5], T, 2, seed=0).state_dict()
    other = token_file(tmp_path, files[5].num_tokens, first=1)
    with pytest.raises(TrainError, match=r"the training tokens differ .* start a new run"):
        Loader(other, T, 2, seed=0).load_state_dict(state)


def test_a_state_of_another_sequence_length_is_refused(files):
    state = Loader(files[5], T, 2, seed=0).state_dict()
    with pytest.raises(TrainError, match=r"sequence_length = 3, .* trained with 4; set data.sequence_length=4"):
        Loader(files[5], T - 1, 2, seed=0).load_state_dict(state)


def test_a_foreign_state_is_refused(files):
    with pytest.raises(TrainError, match=r"not the state of a data loader \(missing: version, epoch"):
        Loader(files[5], T, 2, seed=0).load_state_dict({"step": 3})


@pytest.mark.parametrize(("batch_size", "rank", "world_size"), [(3, 0, 2), (0, 0, 1), (4, 2, 2), (4, -1, 2)])
def test_batches_that_ranks_cannot_share_are_refused(files, batch_size, rank, world_size):
    with pytest.raises(TrainError, match=r"must (be a multiple|lie in)"):
        Loader(files[5], T, batch_size, 0, rank, world_size)


def test_a_file_shorter_than_one_sample_is_refused(tmp_path):
    short = token_file(tmp_path, T)
    with pytest.raises(TrainError, match=r"training split has 4 tokens.* needs 5;.*lower data.sequence_length to 3"):
        Loader(short, T, 1, 0)
    with pytest.raises(TrainError, match=r"validation split has 4 tokens.*raise data.validation_fraction"):
        validation_batches(short, T, 1, 1)
    assert Loader(short, T - 1, 1, 0).next_batch().tolist() == [[0, 1, 2, 3]]


def test_validation_windows_are_fixed_and_spread_over_the_file(files):
    file = files[39]
    batches = validation_batches(file, T, 3, 8)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    windows = torch.cat(batches)
    assert windows[:, 0].tolist() == [T * window for window in range(0, 40, 5)]
    assert torch.equal(windows, windows[:, :1] + torch.arange(T + 1))
    again = torch.cat(validation_batches(file, T, 5, 8))
    assert torch.equal(windows, again)


def test_validation_takes_the_whole_file_where_it_is_shorter_than_asked(files):
    windows = torch.cat(validation_batches(files[6], T, 4, 100))
    assert windows[:, 0].tolist() == [T * window for window in range(7)]
