"""Greedy search and sampling: predict, process, pick, append, until every text has ended.

Token ids in, token ids out; text belongs to the tokenizer. Every other strategy is a variation of
``decode`` in a file of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openllama.cache import Cache, PreallocatedCache
from openllama.generation.outputs import Step
from openllama.generation.processors import apply
from openllama.generation.request import Request
from openllama.outputs import CausalLMOutput

if TYPE_CHECKING:
    from openllama.interface import OpenLlamaForCausalLM


@torch.no_grad()
def decode(texts: Texts, request: Request) -> Iterator[Step]:
    """Yield the next token of every text until all have ended or reached the length."""
    config = request.config
    running = torch.ones(len(texts.ids), dtype=torch.bool, device=texts.ids.device)
    while texts.length < config.max_length:
        logits, output = texts.forward()
        scores = apply([*request.processors, *request.warpers], texts.ids, logits[:, -1])
        token = pick(scores, config.do_sample, request.generator).where(running, config.padding_id)
        texts.append(token)
        yield Step(token, scores, logits[:, -1], output.attentions, output.hidden_states)
        running &= ~request.ended(texts.ids, scores)
        if not running.any():
            return


def pick(scores: Tensor, do_sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """One token per row of scores (B, V) -> (B,): drawn, or the first of the highest."""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)


class Texts:
    """The texts being made: ids, padding mask and cache, with room for all that may come.

    A prompt of 3 tokens, forward: the cache holds 3. Append 1: 4 ids. Forward computes that 1.
    """

    def __init__(self, model: OpenLlamaForCausalLM, request: Request) -> None:
        batch, self.length = request.input_ids.shape
        seen = request.attention_mask.shape[1]  # cached tokens that are not among the ids included
        self.model, self.config = model, request.config
        self._extra = seen - self.length
        self._ids = request.input_ids.new_zeros(batch, self.config.max_length)
        self._ids[:, : self.length] = request.input_ids
        self._mask = request.attention_mask.new_ones(batch, self._extra + self.config.max_length)
        self._mask[:, :seen] = request.attention_mask
        self._embeds = request.inputs_embeds
        self.cache = request.past
        if self.config.use_cache:
            self.cache = _make_cache(model, request.past, batch, self._mask.shape[1])
        self._warned = False

    @property
    def ids(self) -> Tensor:
        """All tokens so far, (B, length)."""
        return self._ids[:, : self.length]

    def forward(self, keep: int = 1, hidden_states: bool = False) -> tuple[Tensor, CausalLMOutput]:
        """Compute the tokens that the cache does not hold: logits of the last ``keep``, at least float32, and all."""
        self._warn_beyond_training()
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            past_key_values=self.cache,
            attention_mask=self._mask[:, : self._extra + self.length],
            inputs_embeds=self._embeds,
            use_cache=self.config.use_cache,
        )
        self._embeds = None  # from here on the cache holds them
        output = self.model(
            **inputs,
            logits_to_keep=keep,
            output_attentions=self.config.output_attentions,
            output_hidden_states=hidden_states or self.config.output_hidden_states,
            return_dict=True,
        )
        if self.config.use_cache:
            self.cache = output.past_key_values
        return output.logits.to(torch.promote_types(output.logits.dtype, torch.float32)), output

    def append(self, tokens: Tensor) -> None:
        """Add one token to each text, (B,), or several, (B, n)."""
        tokens = tokens.view(len(self._ids), -1)
        self._ids[:, self.length : self.length + tokens.shape[1]] = tokens
        self.length += tokens.shape[1]

    def replace_last(self, tokens: Tensor) -> None:
        """Change the last token of each text, (B,), though not what the cache holds of it."""
        self._ids[:, self.length - 1] = tokens

    def reorder(self, rows: Tensor) -> None:
        """Text i becomes what text ``rows[i]`` was; there may be more or fewer of them after."""
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        if self.cache is not None:
            self.cache = self.cache.reorder(rows)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; the cache, too."""
        self.length = length
        if self.cache is not None:
            self.cache = self.cache.crop(self._extra + length)

    def _warn_beyond_training(self) -> None:
        limit = self.model.config.max_position_embeddings
        if self._extra + self.length > limit and not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of more than {limit} tokens (max_position_embeddings): the model was not trained for it",
                stacklevel=2,
            )


def _make_cache(model: OpenLlamaForCausalLM, past: Cache | None, batch: int, room: int) -> PreallocatedCache:
    """A preallocated cache for ``room`` tokens that begins with ``past``: itself where it has the room."""
    if isinstance(past, PreallocatedCache) and past.max_length >= room:
        return past
    cache = PreallocatedCache(model.config, batch, room, model.dtype, model.device)
    if past is not None and len(past):
        cache.advance([cache.append(layer, key, value) for layer, (key, value) in enumerate(past)])
    return cache
