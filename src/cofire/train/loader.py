"""Batches of token windows in a seeded order, whose position is one number.

A sample is a window of T + 1 tokens: T inputs and, one to the right, T targets. Windows start every T
tokens, so each token but the first (and a rest shorter than T at the file's end) is predicted once per epoch.

The samples of all epochs form one endless sequence; number g of it is window ``order(g mod N)`` of epoch
``g div N``, where ``order`` is a permutation of the N windows drawn from seed and epoch. A batch is the next
``batch_size`` numbers, and a rank takes its contiguous share of them. So the state is the count of samples that
all ranks together have taken: it does not know of ranks or batches, and a run that goes on with another world
size or batch size still sees every window exactly once per epoch. An epoch's last batch is filled from the next.

The permutation is a Feistel network with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002, section 5): no table, so neither memory nor time grows with N. It shuffles; it is no cipher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cofire.errors import TrainError
from cofire.train.token_file import TokenFile

_ROUNDS = 8
_STATE_VERSION = 1


class EpochOrder:
    """A seeded permutation of ``0 .. size - 1``, evaluated point by point.

    Args:
        size: N, at least 1.
        seed: Seed of the run.
        epoch: Each epoch has its own permutation.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Map positions [n] in ``0 .. size - 1`` to window numbers [n], int64."""
        values = self._permute(positions.astype(np.uint64))
        while True:  # the network permutes 0 .. 4^h - 1; walking its cycle back into range permutes 0 .. size - 1
            outside = values >= self.size
            if not outside.any():
                return values.astype(np.int64)
            values[outside] = self._permute(values[outside])

    def _permute(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


class Loader:
    """Iterates over a token file for one rank.

    Args:
        token_file: Packed tokens.
        sequence_length: T.
        batch_size: Samples of all ranks together per call of :meth:`next_batch`.
        seed: Seed of the epochs' orders.
        rank: This process's number.
        world_size: Number of processes; must divide ``batch_size``.

    Raises:
        TrainError: The file has no window of T + 1 tokens, or the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        token_file: TokenFile,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        token_file.require_sample(sequence_length, "training")
        if batch_size < 1 or batch_size % world_size:
            raise TrainError(
                f"batch_size = {batch_size} must be a multiple of the number of data-parallel ranks, {world_size}"
            )
        if not 0 <= rank < world_size:
            raise TrainError(f"rank = {rank} must lie in 0 .. {world_size - 1}")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_samples = token_file.num_samples(sequence_length)
        self.samples_seen = 0
        self._checksum = token_file.checksum
        self._tokens = token_file.tokens
        self._order: tuple[int, EpochOrder] | None = None

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.samples_seen // self.num_samples

    @property
    def position(self) -> int:
        """Samples taken by all ranks since the epoch began."""
        return self.samples_seen % self.num_samples

    def next_batch(self) -> torch.Tensor:
        """Return this rank's share of the next batch, int64 [batch_size / world_size, T + 1]."""
        return read_windows(self._tokens, self.next_indices(), self.sequence_length)

    def next_indices(self) -> np.ndarray[Any, Any]:
        """Advance by one batch and return the window numbers of this rank's share [batch_size / world_size]."""
        share = self.batch_size // self.world_size
        first = self.samples_seen + self.rank * share
        numbers = np.arange(first, first + share)
        epochs, positions = numbers // self.num_samples, numbers % self.num_samples
        indices = np.empty(share, np.int64)
        for epoch in range(first // self.num_samples, (first + share - 1) // self.num_samples + 1):
            chosen = epochs == epoch
            indices[chosen] = self._epoch_order(epoch)(positions[chosen])
        self.samples_seen += self.batch_size
        return indices

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain numbers and text; the same on every rank."""
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "num_samples": self.num_samples,
            "checksum": self._checksum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, with its seed; batch size and world size may differ.

        Raises:
            TrainError: The state is of other tokens or of another sequence length, or is not a loader's state.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing or state["version"] != _STATE_VERSION:
            raise TrainError(
                f"not the state of a data loader (missing: {', '.join(missing) or 'none'}); start a new run"
            )
        if state["sequence_length"] != self.sequence_length:
            raise TrainError(
                f"data.sequence_length = {self.sequence_length}, but the checkpoint was trained with "
                f"{state['sequence_length']}; set data.sequence_length={state['sequence_length']}"
            )
        if state["checksum"] != self._checksum or state["num_samples"] != self.num_samples:
            raise TrainError(
                "the training tokens differ from the checkpoint's: the corpus, the split or the tokenizer has changed; "
                "restore them, or start a new run"
            )
        self.seed = int(state["seed"])
        self.samples_seen = int(state["epoch"]) * self.num_samples + int(state["position"])
        self._order = None

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, EpochOrder(self.num_samples, self.seed, epoch))
        return self._order[1]


def validation_batches(
    token_file: TokenFile, sequence_length: int, batch_size: int, num_sequences: int
) -> list[torch.Tensor]:
    """Return the same windows on every call, spread evenly over a token file.

    Args:
        token_file: Packed tokens of the validation split.
        sequence_length: T.
        batch_size: Windows per batch; the last batch may have fewer.
        num_sequences: Windows in all; where the file has fewer, all of it is returned.

    Returns:
        Batches, int64 [<= batch_size, T + 1] each.

    Raises:
        TrainError: The file has no window of T + 1 tokens.
    """
    token_file.require_sample(sequence_length, "validation")
    num_samples = token_file.num_samples(sequence_length)
    count = min(num_sequences, num_samples)
    indices = np.arange(count, dtype=np.int64) * num_samples // count
    tokens = token_file.tokens
    starts = range(0, count, batch_size)
    return [read_windows(tokens, indices[start : start + batch_size], sequence_length) for start in starts]


def read_windows(tokens: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], sequence_length: int) -> torch.Tensor:
    """Gather windows of packed ``tokens`` by number: [n] -> int64 [n, T + 1]."""
    offsets = indices[:, None] * sequence_length + np.arange(sequence_length + 1)
    return torch.from_numpy(tokens[offsets].astype(np.int64))


def _mix(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
