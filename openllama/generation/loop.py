"""Greedy search and sampling: predict, process, pick, append, until every text has ended.

Token ids in, token ids out; text belongs to the tokenizer. ``stream`` is the loop, ``generate`` collects
what it yields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from openllama.cache import Cache, KeyValue, PreallocatedCache, as_cache
from openllama.errors import InputError
from openllama.generation.config import GenerationConfig
from openllama.generation.processors import LogitsProcessor, processors_for
from openllama.inputs import check_attention_mask, check_input_ids, check_inputs_embeds

if TYPE_CHECKING:
    from openllama.heads import OpenLlamaForCausalLM


class Streamer(Protocol):
    """Takes ids as they are made, as transformers' streamers do: first the prompt, then token by token."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """Everything one generation needs, checked."""

    input_ids: Tensor  # (B, L), begins the output
    attention_mask: Tensor  # (B, S), over cached tokens and prompt
    inputs_embeds: Tensor | None  # (B, E, C), computed in place of the prompt's ids
    past: Cache | None
    config: GenerationConfig  # its max_length is settled
    processors: list[LogitsProcessor]
    generator: torch.Generator | None


def generate(
    model: OpenLlamaForCausalLM, input_ids: Tensor | None = None, *, streamer: Streamer | None = None, **arguments: Any
) -> Tensor:
    """The prompt (B, L) and its continuation, as ids (B, L + new); arguments as of ``prepare``."""
    request = prepare(model, input_ids, **arguments)
    if streamer is not None:
        streamer.put(request.input_ids.cpu())
    tokens = []
    for token in decode(model, request):
        tokens.append(token[:, None])
        if streamer is not None:
            streamer.put(token.cpu())
    if streamer is not None:
        streamer.end()
    return torch.cat((request.input_ids, *tokens), dim=1)


def stream(model: OpenLlamaForCausalLM, input_ids: Tensor | None = None, **arguments: Any) -> Iterator[Tensor]:
    """The continuation token by token, each (B,), before the next is computed; arguments as of ``prepare``."""
    return decode(model, prepare(model, input_ids, **arguments))


def pick(scores: Tensor, do_sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """One token per row of scores (B, V) -> (B,): drawn, or the first of the highest."""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)


@torch.no_grad()
def decode(model: OpenLlamaForCausalLM, request: Request) -> Iterator[Tensor]:
    """Yield the next token of every text, (B,), until all have ended or reached the length."""
    config = request.config
    batch, length = request.input_ids.shape
    seen, total = request.attention_mask.shape[1], config.max_length
    ids = request.input_ids.new_zeros(batch, total)
    ids[:, :length] = request.input_ids
    mask = request.attention_mask.new_ones(batch, seen + total - length)
    mask[:, :seen] = request.attention_mask
    cache = _make_cache(model, request.past, batch, mask.shape[1]) if config.use_cache else request.past
    eos = ids.new_tensor(config.eos_token_ids)
    padding = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_ids or [0])[0]
    running = torch.ones(batch, dtype=torch.bool, device=ids.device)

    for end in range(length, total):
        inputs = model.prepare_inputs_for_generation(
            ids[:, :end],
            past_key_values=cache,
            attention_mask=mask[:, : seen + end - length],
            inputs_embeds=request.inputs_embeds if end == length else None,
            use_cache=config.use_cache,
        )
        scores = model(**inputs, logits_to_keep=1, return_dict=True).logits[:, -1]
        for process in request.processors:
            scores = process(ids[:, :end], scores)
        token = pick(scores, config.do_sample, request.generator).where(running, padding)
        ids[:, end] = token
        yield token
        running &= ~torch.isin(token, eos)
        if not running.any():
            return


def _make_cache(model: OpenLlamaForCausalLM, past: Cache | None, batch: int, room: int) -> PreallocatedCache:
    """A preallocated cache for ``room`` tokens that begins with ``past``: itself where it has the room."""
    if isinstance(past, PreallocatedCache) and past.max_length >= room:
        return past
    cache = PreallocatedCache(model.config, batch, room, model.dtype, model.device)
    if past is not None and len(past):
        cache.advance([cache.append(layer, key, value) for layer, (key, value) in enumerate(past)])
    return cache


def prepare(
    model: OpenLlamaForCausalLM,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | Sequence[KeyValue] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    generator: torch.Generator | None = None,
    **options: Any,
) -> Request:
    """Check a call of ``generate`` before any forward pass; raises ``InputError``.

    ``input_ids`` (B, L) is the prompt; without one the text begins with the bos id. ``attention_mask``
    (B, L) marks padding with 0; by default the config's padding id is padding. ``inputs_embeds``
    (B, E, C) is computed in place of the ids. ``past_key_values`` holds the prompt's first tokens.
    ``generation_config`` replaces the model's own, ``options`` are fields of it. ``logits_processor``
    are applied after the configured ones. ``generator`` draws the tokens; None is torch's global one.
    """
    config = (generation_config or model.generation_config).replace(**options)
    if input_ids is None:
        if config.bos_token_id is None:
            raise InputError("give input_ids, or a bos_token_id to begin with")
        batch = 1 if inputs_embeds is None else inputs_embeds.shape[0]
        input_ids = torch.full((batch, 1), config.bos_token_id)
    check_input_ids(input_ids, model.config.vocab_size)
    input_ids = input_ids.to(model.device, torch.long)
    if inputs_embeds is not None:
        check_inputs_embeds(inputs_embeds, model.config.hidden_size)
    past = None if past_key_values is None else as_cache(past_key_values, len(input_ids), model.config, model.dtype)
    return Request(
        input_ids=input_ids,
        attention_mask=_prompt_mask(input_ids, attention_mask, inputs_embeds, past, config).to(model.device),
        inputs_embeds=inputs_embeds,
        past=past,
        config=_settle_length(config, input_ids.shape[1], model.config.vocab_size),
        processors=[*processors_for(config), *logits_processor],
        generator=generator,
    )


def _prompt_mask(
    input_ids: Tensor, mask: Tensor | None, inputs_embeds: Tensor | None, past: Cache | None, config: GenerationConfig
) -> Tensor:
    """The padding mask over cached tokens and prompt, given or inferred, (B, S).

    With n tokens cached, the ids may be the whole text, or only what is new if the mask covers both.
    """
    batch, length = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
    cached = 0 if past is None else past.get_seq_length()
    if mask is None and inputs_embeds is not None:
        mask = input_ids.new_ones(batch, cached + length)
    elif mask is None:
        mask = _infer_mask(input_ids, config)
    width = mask.shape[-1]
    if width <= cached:
        raise InputError(
            f"past_key_values holds {cached} tokens, the prompt covers {width}: give the cached and the new tokens "
            "as input_ids, or only the new ones and an attention_mask over both"
        )
    full = cached + length if width == cached + length else length
    check_attention_mask(mask, batch, full - cached, full)
    if mask.ndim != 2:
        raise InputError(f"generate takes a padding mask ({batch}, {full}), got {tuple(mask.shape)}")
    return mask


def _infer_mask(input_ids: Tensor, config: GenerationConfig) -> Tensor:
    """Padding ids are padding, unless the same id also ends a text; as transformers infers it."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_ids:
        return torch.ones_like(input_ids)
    return (input_ids != config.pad_token_id).to(input_ids.dtype)


def _settle_length(config: GenerationConfig, length: int, vocab_size: int) -> GenerationConfig:
    """The config with ``max_length`` counting a prompt of ``length`` and its continuation."""
    for eos in config.eos_token_ids:
        if not 0 <= eos < vocab_size:
            raise InputError(f"eos_token_id {eos} is outside the vocabulary of {vocab_size}")
    if config.max_new_tokens is not None:
        return config.replace(max_length=length + config.max_new_tokens)
    if config.max_length <= length:
        raise InputError(f"max_length {config.max_length} leaves no room after a prompt of {length} tokens; raise it")
    return config
