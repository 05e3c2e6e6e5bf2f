"""What every strategy shares: what it needs of a model, what was asked for, and the sequences being made.

A strategy is a loop of ``sequences.forward()`` for logits and ``sequences.append(tokens)``. Nothing is checked here,
as ``checks.py`` has settled the request, and no value is read but "have all ended?", on a CPU also "is it a number?".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openllama.attention import backend_with_weights
from openllama.cache import Cache, GrowingCache, PreallocatedCache
from openllama.checkpoint.gather import is_spread
from openllama.checks import warn_beyond_training
from openllama.config import OpenLlamaConfig
from openllama.errors import NumericalError
from openllama.generation.config import GenerationConfig
from openllama.generation.processors import LogitsProcessor
from openllama.generation.stopping import StoppingCriterion, stopped
from openllama.masks import positions_from_mask
from openllama.model import Inputs
from openllama.outputs import CausalLMOutput


class Decoding(Protocol):
    """What reading sequences needs of a model; all three classes have it."""

    @property
    def config(self) -> OpenLlamaConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def attn_implementation(self) -> str: ...

    @property
    def training(self) -> bool: ...

    def get_decoder(self) -> Callable[..., Any]: ...


class LanguageModel(Decoding, Protocol):
    """What generation needs of a model, as ``OpenLlamaForCausalLM`` has it."""

    @property
    def generation_config(self) -> GenerationConfig: ...

    @property
    def forward(self) -> Callable[..., Any]: ...

    @property
    def __call__(self) -> Callable[..., Any]: ...

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., dict[str, Any]]: ...

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]: ...

    def parameters(self) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Request:
    """A checked call: the prompts and how to continue them."""

    input_ids: Tensor  # (B, L), begins the output
    attention_mask: Tensor | None  # (B, S), over cached tokens and prompt; None where nothing is padding
    config: GenerationConfig  # its max_length is settled
    offset: int = 0  # S - L: tokens of the cache, or of inputs_embeds, that are not among the ids
    inputs_embeds: Tensor | None = None  # (B, E, C), computed in place of the prompt's ids
    past: Cache | None = None
    processors: Sequence[LogitsProcessor] = ()
    filters: Sequence[LogitsProcessor] = ()  # of sampling, after the processors
    stopping: Sequence[StoppingCriterion] = ()
    generator: torch.Generator | None = None
    assistant: LanguageModel | None = None

    def repeated(self, copies: int) -> Request:
        """Each prompt ``copies`` times, next to each other: rows a, b -> a, a, b, b; the past is copied."""
        if copies == 1:
            return self
        rows = torch.arange(len(self.input_ids), device=self.input_ids.device).repeat_interleave(copies)
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            inputs_embeds=None if self.inputs_embeds is None else self.inputs_embeds[rows],
            past=None if self.past is None else GrowingCache(self.past).reorder(rows),
        )


class Sequences:
    """The sequences being made: ids, padding mask, positions and cache, with room for all that may come.

    A prompt of 3 tokens, forward: the cache holds 3. Append 1: 4 ids. Forward computes that 1.
    """

    def __init__(self, model: LanguageModel, request: Request) -> None:
        config, prompt = request.config, request.input_ids
        batch, self.length = prompt.shape
        self.model, self.config = model, config
        backend = model.attn_implementation
        self.backend = backend_with_weights(backend) if config.output_attentions else backend
        self._ids = F.pad(prompt, (0, config.max_length - self.length))
        self._offset, self._mask, self._positions = request.offset, request.attention_mask, None
        if self._mask is not None:
            self._mask = F.pad(self._mask, (0, config.max_length - self.length), value=1)
            self._positions = positions_from_mask(self._mask)
        self._embeds = request.inputs_embeds
        self._is_spread = any(map(is_spread, model.parameters()))
        self._own_inputs, self._takes_inputs = has_own_inputs(model), takes_inputs(model)
        self.cache: Cache = GrowingCache(()) if request.past is None else request.past
        if config.use_cache:
            self.cache = self._make_cache(batch, self._offset + config.max_length)
        self._stopping = request.stopping
        self._eos = prompt.new_tensor(config.eos_token_ids)
        self._can_end = bool(config.eos_token_ids or request.stopping)  # before the length is reached
        self._running = torch.ones(batch, dtype=torch.bool, device=prompt.device)
        self._warned = False
        self._first = self.length
        self._invalid = torch.zeros(batch, dtype=torch.long, device=prompt.device)  # new token of that number; 0: none
        self._reads_at_once = prompt.is_cpu  # elsewhere each look at a value waits for the device

    @property
    def ids(self) -> Tensor:
        """All tokens so far, (B, length)."""
        return self._ids[:, : self.length]

    def forward(self, keep: int = 1, hidden_states: bool = False) -> tuple[Tensor, CausalLMOutput]:
        """Compute the tokens that are not cached.

        Returns the logits of the last ``keep`` positions, in at least float32, and the model's whole output.
        """
        self._warned = self._warned or warn_beyond_training(self._offset + self.length, self.model.config)
        hidden_states = hidden_states or self.config.output_hidden_states
        # Products round by shape: eager gives those of transformers, which projects every position.
        computed = 0 if self.backend == "eager" else keep
        if self._takes_inputs:
            output = self.model(self._inputs(hidden_states), logits_to_keep=computed, return_dict=True)
        else:
            output = self.model(**self._named_inputs(hidden_states), logits_to_keep=computed, return_dict=True)
        self._embeds = None  # from here on the cache holds them
        if self.config.use_cache:
            self.cache = output.past_key_values
            if self._is_spread:
                self.cache = self._make_cache(len(output.logits), self._offset + self.config.max_length)
        logits = output.logits[:, -keep:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), output

    def check_picked(self, scores: Tensor, tokens: Tensor) -> None:
        """Raise ``NumericalError`` if scores (B * n, V) are no numbers where they picked tokens (B * n,).

        The last of n tokens is about to be appended. Where reading would wait for a device, ``check`` raises.
        """
        picked = scores.gather(1, tokens[:, None]).view(len(self._running), -1)
        invalid = ~(picked > -torch.inf)  # NaN, or nothing is allowed
        if self.config.do_sample:
            invalid |= picked == torch.inf
        if self._reads_at_once and not invalid.any():
            return
        first = self.length - self._first + 2 - picked.shape[1]
        found = torch.where(invalid.any(1) & self._running, first + invalid.int().argmax(1), 0)
        self._invalid = torch.where(self._invalid > 0, self._invalid, found)
        if self._reads_at_once:
            self.check()

    def check(self) -> None:
        """Raise ``NumericalError`` if tokens were picked by scores that are no numbers."""
        for row, number in enumerate(self._invalid.tolist()):
            if number:
                raise no_numbers(f"{row}, new token {number}")

    def append(self, tokens: Tensor) -> None:
        """Add one token to each sequence, (B,), or several, (B, n)."""
        tokens = tokens.view(len(self._ids), -1)
        self._ids[:, self.length : self.length + tokens.shape[1]] = tokens
        self.length += tokens.shape[1]

    def pad_ended(self, tokens: Tensor) -> Tensor:
        """The next tokens (B,), with padding in place of those of sequences that have ended."""
        if not self._can_end or len(tokens) == 1:  # a single sequence is not continued after its end
            return tokens
        return tokens.where(self._running, self.config.padding_id)

    def have_ended(self, scores: Tensor) -> bool:
        """Whether all have ended, now that tokens picked by ``scores`` were appended.

        This reads one value, and none where only the length ends a sequence.
        """
        if not self._can_end:
            return False
        self._running &= ~(self.ended(self.ids, scores) | (self._invalid > 0))
        return not self._running.any()

    def ended(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Which of ids (B, L) end with their last token, picked by ``scores``; (B,)."""
        by_eos = torch.isin(ids[:, -1], self._eos)
        return by_eos | stopped(self._stopping, ids, scores) if self._stopping else by_eos

    def replace_last(self, tokens: Tensor) -> None:
        """Change the last token of each sequence, (B,), though not what the cache holds of it."""
        self._ids[:, self.length - 1] = tokens

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes what ``rows[i]`` was; there may be more or fewer of them after."""
        self._ids = self._ids[rows]
        if self._mask is not None and self._positions is not None:
            self._mask, self._positions = self._mask[rows], self._positions[rows]
        self.cache = self.cache.reorder(rows)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; the cache, too."""
        self.length = length
        self.cache = self.cache.crop(self._offset + length)

    @torch.no_grad()
    def _make_cache(self, batch: int, room: int) -> Cache:
        """The cache to begin with: the caller's own where it has room; else growing, as transformers', for eager.

        Products round by memory layout, too. Other backends promise no bits and save the copy for each token.
        """
        past, model = self.cache, self.model
        if isinstance(past, PreallocatedCache) and past.max_length >= room:
            return past
        if self.backend == "eager" or not self._own_inputs:  # replaced inputs may put tokens before the prompt
            return GrowingCache(past)
        heads, dtype, device = None, model.dtype, model.device
        if self._is_spread:  # a process may have a part of the heads, or another type: the first keys tell
            if not past:
                return past
            heads, dtype, device = past[0][0].shape[1], past[0][0].dtype, past[0][0].device
        cache = PreallocatedCache(model.config, batch, room, dtype, device, heads)
        if past:
            cache.advance([cache.append(layer, key, value) for layer, (key, value) in enumerate(past)])
        return cache

    def _inputs(self, hidden_states: bool) -> Inputs:
        """What the cache does not hold; positions skip padding."""
        start, end = self.cache.get_seq_length(), self._offset + self.length
        return Inputs(
            tokens=self._ids[:, start - self._offset : self.length] if self._embeds is None else self._embeds,
            mask=None if self._mask is None else self._mask[:, :end],
            positions=None if self._positions is None else self._positions[:, start:end],
            cache=self.cache,
            backend=self.backend,
            use_cache=self.config.use_cache,
            output_attentions=self.config.output_attentions,
            output_hidden_states=hidden_states,
        )

    def _named_inputs(self, hidden_states: bool) -> dict[str, Any]:
        """The same by the names of ``forward``, as the model's ``prepare_inputs_for_generation`` makes them."""
        mask = self._mask
        if mask is None:
            mask = self._ids.new_ones(len(self._ids), self._offset + self.config.max_length)
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            past_key_values=self.cache or None,
            attention_mask=mask[:, : self._offset + self.length],
            inputs_embeds=self._embeds,
            use_cache=self.config.use_cache,
        )
        return {
            **inputs,
            "output_attentions": self.config.output_attentions,
            "output_hidden_states": hidden_states,
        }


def no_numbers(where: str) -> NumericalError:
    """The error of scores by which no token can be picked."""
    return NumericalError(
        f"the scores are NaN or infinite, and pick no token (sequence {where}): `openllama verify` finds weights that "
        "are, a logits processor may make them, and float16 overflows where bfloat16 and float32 do not; "
        "remove_invalid_values=True computes on"
    )


def prepare_inputs_for_generation(
    model: LanguageModel,
    input_ids: Tensor,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Arguments of the next forward pass: what the cache does not hold, at positions that skip padding.

    A method of the model. Generation does the same by itself, without the checks of a call from outside, unless the
    method is replaced, as adapters do that put tokens of their own before the prompt; one token is new at least.
    """
    width = (input_ids if attention_mask is None else attention_mask).shape[1]
    new = max(1, width - (past_key_values.get_seq_length() if past_key_values else 0))
    tokens = {"input_ids": input_ids[:, -new:]} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    positions = None if attention_mask is None else positions_from_mask(attention_mask)[:, -new:]
    return {
        **tokens,
        "attention_mask": attention_mask,
        "position_ids": positions,
        "past_key_values": past_key_values,
        "use_cache": kwargs.get("use_cache"),
    }


def has_own_inputs(model: LanguageModel) -> bool:
    """Whether nobody has replaced the model's ``prepare_inputs_for_generation``, in a subclass or on the instance."""
    return getattr(model.prepare_inputs_for_generation, "__func__", None) is prepare_inputs_for_generation


def takes_inputs(model: LanguageModel) -> bool:
    """Whether ``Inputs`` reach the model as they are: where a subclass, a wrapper or a hook may want its arguments by
    name, it gets them."""
    forward = inspect.unwrap(model).forward  # of the model in a ``FastModel``
    is_own = inspect.ismethod(forward) and forward.__func__.__module__.startswith("openllama.")
    return has_own_inputs(model) and is_own and not getattr(model, "_forward_pre_hooks", None)
