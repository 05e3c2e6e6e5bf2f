"""The keyword arguments of ``generate`` for type checkers and editors; nothing here runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from openllama.cache import Cache, KeyValue
from openllama.generation.config import GenerationConfig
from openllama.generation.processors import LogitsProcessor
from openllama.generation.state import LanguageModel
from openllama.generation.stopping import StoppingCriterion


class GenerationSettings(TypedDict, total=False):
    """The fields of ``GenerationConfig`` but ``return_dict_in_generate``, which decides what is returned."""

    max_length: int
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    max_time: float | None
    do_sample: bool
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float | None
    early_stopping: bool | Literal["never"]
    length_penalty: float
    penalty_alpha: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    use_cache: bool
    num_return_sequences: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    sequence_bias: Mapping[tuple[int, ...], float] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool
    renormalize_logits: bool
    output_scores: bool
    output_logits: bool
    output_attentions: bool
    output_hidden_states: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None


class Arguments(GenerationSettings, total=False):
    """The settings and everything else that ``prepare`` takes."""

    inputs: Tensor | None
    attention_mask: Tensor | None
    inputs_embeds: Tensor | None
    past_key_values: Cache | Sequence[KeyValue] | None
    generation_config: GenerationConfig | None
    logits_processor: Sequence[LogitsProcessor] | None
    stopping_criteria: Sequence[StoppingCriterion] | None
    assistant_model: LanguageModel | None
    generator: torch.Generator | None
