"""The sequences that decode together, and one step of all of them.

Plain: each step runs the main model over the last token of every sequence. Speculative: over the last token and
the D drafts, then the MTP modules over the same positions to draft again.

MTP module k at position i takes the (k - 1)-th module's output there and token i + k (DeepSeek-V3 technical report,
eq. 21). When it drafts, its last tokens are drafts themselves; once the real ones are known its entries must be
computed again. A step therefore runs every module over the D - 1 positions before the new ones too, from main
outputs that are kept for it. For the released models D = 1 and that window is empty.

Left out: prefill in chunks; a prompt is computed whole before the next decode step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cofire.errors import ServeError
from cofire.model import Decoder
from cofire.serve.cache import KVCache
from cofire.serve.sampling import DRAFT, BatchSampler, SamplingParameters, draw
from cofire.serve.speculative import verify


class Batch:
    """Active sequences in slots 0 to B - 1 of one cache.

    Args:
        decoder: The model.
        slots_max: Largest number of sequences.
        context_max: Largest number of tokens of a sequence, prompt and output; at most what the model takes.
        speculative: Draft with the MTP modules.
    """

    def __init__(
        self, decoder: Decoder, slots_max: int = 8, context_max: int | None = None, speculative: bool = False
    ) -> None:
        spec = decoder.spec
        self.decoder = decoder
        self.slots_max = slots_max
        self.context_max = spec.max_sequence_length if context_max is None else context_max
        if not 2 <= self.context_max <= spec.max_sequence_length:
            raise ServeError(
                f"context limit = {context_max} must be between 2 and the {spec.max_sequence_length} tokens of "
                f"{spec.name}; leave it out to use all of them"
            )
        if speculative and not len(decoder.mtp):
            raise ServeError(f"{spec.name} has no MTP module to draft with; decode without speculation")
        self.depth = len(decoder.mtp) if speculative else 0
        weight = decoder.embedding.weight
        self.device = weight.device
        margin = 2 * self.depth  # drafts, and the scratch positions of a short sequence's window
        self.cache = KVCache(spec, slots_max, self.context_max + margin, weight.dtype, self.device, self.depth > 0)
        self.lengths = np.zeros(0, dtype=np.int64)
        self.parameters: list[SamplingParameters] = []
        self.drafted = self.accepted = 0
        # Committed tokens and, behind them, the drafts; zeros() touches no memory before it is used.
        self._tokens = torch.zeros(slots_max, self.context_max + margin + self.depth + 1, dtype=torch.int64)
        self._tokens = self._tokens.to(self.device)
        self._history = weight.new_zeros(slots_max, max(self.depth - 1, 0), spec.hidden_size)
        self._draft_probabilities: Tensor | None = None
        self._sampler: BatchSampler | None = None

    def __len__(self) -> int:
        return len(self.parameters)

    @torch.inference_mode()
    def add(self, prompt: Sequence[int], parameters: SamplingParameters) -> int:
        """Compute a prompt, put its sequence into the next slot and return its first new token."""
        slot, length = len(self), len(prompt)
        self.cache.reserve(slot + 1, max(length, *self.lengths.tolist(), 0) + 1 + 2 * self.depth)
        tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=self.device)
        views = self.cache.views(slot, 1)
        hidden = self.decoder(tokens, None, views, form="expanded").hidden
        sampler = BatchSampler([parameters], self.device)
        first = sampler.choose(self.decoder.logits(hidden[:, -1]), np.array([length]))
        self._tokens[slot, :length] = tokens[0]
        self._tokens[slot, length] = first[0]
        if self.depth:
            kept = hidden[0, max(length - self.depth + 1, 0) :] if self.depth > 1 else hidden[0, :0]
            self._history[slot, self.depth - 1 - len(kept) :] = kept
            positions = torch.arange(length, device=self.device).unsqueeze(0)
            last = torch.tensor([length - 1], device=self.device)
            self._draft(slice(slot, slot + 1), hidden, positions, last, np.array([length + 1]), sampler)
        self.lengths = np.append(self.lengths, length + 1)
        self.parameters.append(parameters)
        self._sampler = None
        return int(first[0])

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """Advance every sequence by at least one token; return the new tokens by slot."""
        if self._sampler is None:
            self._sampler = BatchSampler(self.parameters, self.device)
        batch = len(self)
        self.cache.reserve(batch, int(self.lengths.max()) + 2 * self.depth)
        if self.depth:
            return self._speculative_step(batch, self._sampler)
        positions = torch.from_numpy(self.lengths[:, None] - 1).to(self.device)
        tokens = self._tokens[:batch]
        hidden = self.decoder(tokens.gather(1, positions), positions, self.cache.views(0, batch)).hidden
        chosen = self._sampler.choose(self.decoder.logits(hidden[:, 0]), self.lengths)
        tokens.scatter_(1, positions + 1, chosen.unsqueeze(1))
        self.lengths = self.lengths + 1
        return [[token] for token in chosen.tolist()]

    @torch.inference_mode()
    def remove(self, slot: int) -> None:
        """End a sequence; the last one moves into its slot."""
        last = len(self) - 1
        if slot != last:
            self.cache.move(last, slot, int(self.lengths[last]))
            self._tokens[slot] = self._tokens[last]
            self._history[slot] = self._history[last]
            if self._draft_probabilities is not None:
                self._draft_probabilities[slot] = self._draft_probabilities[last]
            self.lengths[slot] = self.lengths[last]
            self.parameters[slot] = self.parameters[last]
        self.lengths = self.lengths[:last].copy()
        self.parameters.pop()
        self._sampler = None

    def _speculative_step(self, batch: int, sampler: BatchSampler) -> list[list[int]]:
        depth, tokens = self.depth, self._tokens[:batch]
        starts = torch.from_numpy(self.lengths[:, None] - 1).to(self.device)
        positions = starts + torch.arange(depth + 1, device=self.device)
        inputs = tokens.gather(1, positions)
        hidden = self.decoder(inputs, positions, self.cache.views(0, batch)).hidden
        drafts = inputs[:, 1:]
        index = self.lengths[:, None] + np.arange(depth + 1)
        verdict = verify(self.decoder.logits(hidden), drafts, self._drawn_from(drafts, sampler), sampler, index)
        tokens.scatter_(1, positions + 1, verdict.tokens)
        new, accepted = verdict.tokens.tolist(), verdict.accepted.tolist()
        self.drafted += batch * depth
        self.accepted += sum(accepted)
        self.lengths = self.lengths + np.array(accepted) + 1
        self._draft_window(batch, hidden, starts, verdict.accepted, sampler)
        return [row[: kept + 1] for row, kept in zip(new, accepted, strict=True)]

    def _draft_window(
        self, batch: int, hidden: Tensor, starts: Tensor, accepted: Tensor, sampler: BatchSampler
    ) -> None:
        """Draft after a step whose main outputs are ``hidden`` [B, 1 + D, hidden] from position ``starts`` [B, 1]."""
        back = self.depth - 1
        if back:
            hidden = torch.cat((self._history[:batch], hidden), dim=1)
            rows = torch.arange(batch, device=self.device).unsqueeze(1)
            kept = accepted.unsqueeze(1) + 1 + torch.arange(back, device=self.device)
            self._history[:batch] = hidden[rows, kept]
        positions = starts - back + torch.arange(back + self.depth + 1, device=self.device)
        if back:
            # Before a short sequence's start lies nothing: that part of the window works beyond its end, where
            # whatever it leaves is overwritten before a query can see it.
            positions = torch.where(positions < 0, starts + self.depth - positions, positions)
        self._draft(slice(0, batch), hidden, positions, back + accepted, self.lengths, sampler)

    def _draft(
        self,
        slots: slice,
        hidden: Tensor,
        positions: Tensor,
        last: Tensor,
        lengths: np.ndarray,
        sampler: BatchSampler,
    ) -> None:
        """Run the MTP modules and write their drafts behind the tokens of ``slots``.

        Args:
            slots: B consecutive ones.
            hidden: [B, T, hidden] of the main model.
            positions: [B, T] of ``hidden``.
            last: [B], which of the T belongs to the token before the last.
            lengths: [B], tokens known.
            sampler: Of these rows.
        """
        tokens, batch = self._tokens[slots], slots.stop - slots.start
        views = self.cache.views(slots.start, batch)[-self.depth :]
        rows = torch.arange(batch, device=self.device)
        ends = torch.from_numpy(lengths).to(self.device)
        for k in range(1, self.depth + 1):
            hidden = self.decoder.draft(k - 1, hidden, tokens.gather(1, positions + k), positions, views[k - 1])
            logits = self.decoder.logits(hidden[rows, last])
            if sampler.all_greedy:
                chosen = logits.argmax(-1)
            else:
                probabilities = sampler.distribution(logits)
                chosen = draw(probabilities, sampler.uniforms(lengths + k - 1, DRAFT))
                self._stored(probabilities)[slots, k - 1] = probabilities
            tokens[rows, ends + k - 1] = chosen

    def _stored(self, probabilities: Tensor) -> Tensor:
        if self._draft_probabilities is None:
            shape = (self.slots_max, self.depth, probabilities.shape[-1])
            self._draft_probabilities = probabilities.new_zeros(shape)
        return self._draft_probabilities

    def _drawn_from(self, drafts: Tensor, sampler: BatchSampler) -> Tensor | None:
        """Return the distributions [B, D, V] of the drafts; a greedy row's may never have been stored."""
        if sampler.all_greedy:
            return None
        assert self._draft_probabilities is not None
        drawn_from = self._draft_probabilities[: len(drafts)]
        certain = torch.nn.functional.one_hot(drafts, drawn_from.shape[-1]).to(drawn_from.dtype)
        return torch.where(sampler.greedy.view(-1, 1, 1), certain, drawn_from)
