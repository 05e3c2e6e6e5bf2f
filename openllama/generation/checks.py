"""A call of ``generate``, checked and completed before any forward pass; what comes out is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openllama.cache import Cache, KeyValue
from openllama.checks import (
    as_cache,
    check_attention_mask,
    check_input_ids,
    check_inputs_embeds,
    check_tensor,
    values_of,
)
from openllama.config import OpenLlamaConfig
from openllama.dropin import GENERATING, without_neutral
from openllama.errors import InputError, warn
from openllama.generation.config import GenerationConfig, adopt, as_list
from openllama.generation.processors import LogitsProcessor, all_processors
from openllama.generation.sampling import filters_for
from openllama.generation.state import LanguageModel, Request, has_own_inputs
from openllama.generation.stopping import StoppingCriterion, max_time


def prepare(
    model: LanguageModel,
    input_ids: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | Sequence[KeyValue] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | None = None,
    assistant_model: LanguageModel | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Request:
    """Check a call of ``generate`` before any forward pass; raises ``InputError``.

    ``input_ids``, or ``inputs`` (B, L): the prompt; without one the output begins with the bos id. ``attention_mask``
    (B, L): 0 for padding, which belongs on the left; inferred from the padding id. ``inputs_embeds`` (B, E, C):
    computed in place of the ids. ``past_key_values``: of the prompt's first tokens; a ``PreallocatedCache`` with room
    for all is used itself, another past is copied. ``generation_config``: instead of the model's own, may be one of
    transformers; ``options`` are fields of it. ``logits_processor``: after the configured ones, before sampling
    filters. ``stopping_criteria``: asked after each token. ``assistant_model``: guesses tokens ahead. ``generator``:
    None is torch's global one.
    """
    _check_types(logits_processor, stopping_criteria, assistant_model, generator)
    config = model.generation_config
    if generation_config is not None:
        config = adopt(generation_config, config)
    config = config.replace(**without_neutral("generate", options, GENERATING))
    if inputs is not None:
        if input_ids is not None:
            raise InputError("inputs and input_ids are two names of the prompt; give one")
        input_ids = inputs
    input_ids = _prompt_ids(model, input_ids, inputs_embeds, config)
    if inputs_embeds is not None:
        config = config.replace(use_cache=True)  # they cannot be computed again from ids
    config = _settle_length(config, input_ids.shape[1])
    past = None
    if past_key_values is not None:
        past = as_cache(past_key_values, len(input_ids), model.config, model.dtype, model.device)
    mask, width = _prompt_mask(input_ids, attention_mask, inputs_embeds, past, config)
    stopping = [max_time(config.max_time)] if config.max_time is not None else []
    stopping += stopping_criteria or ()
    request = Request(
        input_ids=input_ids,
        attention_mask=mask,
        config=config,
        offset=width - input_ids.shape[1],
        inputs_embeds=inputs_embeds,
        past=past,
        processors=all_processors(config, input_ids.shape[1], logits_processor or ()),
        filters=filters_for(config),
        stopping=stopping,
        generator=generator,
        assistant=assistant_model,
    )
    _check(request, model)
    return request.repeated(config.num_return_sequences if config.do_sample else 1)


def _check_types(processors: object, criteria: object, assistant: object, generator: object) -> None:
    """Refuse objects of another kind, which would be noticed only after a forward pass."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    for name, functions in {"logits_processor": processors, "stopping_criteria": criteria}.items():
        if functions is not None and not (isinstance(functions, (list, tuple)) and all(map(callable, functions))):
            raise InputError(f"{name} must be a list of functions, got {functions!r}")
    if assistant is not None and not isinstance(getattr(assistant, "config", None), OpenLlamaConfig):
        raise InputError(f"assistant_model must be an OpenLlamaForCausalLM of openllama, got {type(assistant)}")


def _prompt_ids(
    model: LanguageModel, input_ids: Tensor | None, inputs_embeds: Tensor | None, config: GenerationConfig
) -> Tensor:
    """The ids that begin the output, (B, L): those given, or bos."""
    if inputs_embeds is not None:
        check_inputs_embeds(inputs_embeds, model.config.hidden_size)
    if input_ids is None:
        if config.bos_token_id is None:
            raise InputError("give input_ids, or a bos_token_id to begin with")
        batch = 1 if inputs_embeds is None else inputs_embeds.shape[0]
        input_ids = torch.full((batch, 1), config.bos_token_id)
    check_input_ids(input_ids, model.config.vocab_size)
    if inputs_embeds is not None and len(inputs_embeds) != len(input_ids):
        raise InputError(
            f"inputs_embeds has {len(inputs_embeds)} rows, input_ids {len(input_ids)}; give the same number"
        )
    return input_ids.to(model.device, torch.long)


def _prompt_mask(
    input_ids: Tensor, mask: Tensor | None, inputs_embeds: Tensor | None, past: Cache | None, config: GenerationConfig
) -> tuple[Tensor | None, int]:
    """The padding mask over cached tokens and prompt, given or inferred, (B, S), None if it is all ones; and S.

    With n tokens cached, the ids may be of all tokens, or only of the new ones if the mask covers both.
    """
    batch, length = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
    cached = 0 if past is None else past.get_seq_length()
    pads = None  # of each row, whether it ends with padding
    if mask is None and inputs_embeds is not None:
        mask = input_ids.new_ones(batch, cached + length)
    elif mask is None:
        mask = _infer_mask(input_ids, config)
        pads = input_ids[:, -1] == config.pad_token_id if config.pad_token_id in config.eos_token_ids else None
    check_tensor("attention_mask", mask)
    if mask.ndim != 2:
        raise InputError(f"generate takes a padding mask ({batch}, {cached + length}), got {tuple(mask.shape)}")
    width = mask.shape[1]
    if width <= cached:
        raise InputError(
            f"past_key_values holds {cached} tokens, the prompt covers {width}: give the cached and the new tokens "
            "as input_ids, or only the new ones and an attention_mask over both"
        )
    full = cached + length if width == cached + length else length
    nothing_is_padding = check_attention_mask(mask, batch, full - cached, full)
    _warn_of_right_padding(pads if nothing_is_padding else mask[:, -1] == 0)
    return None if nothing_is_padding else mask.to(input_ids.device), full


def _warn_of_right_padding(pads: Tensor | None) -> None:
    """``pads`` (B,): whether each prompt ends with padding; None where none does."""
    count = 0 if pads is None else sum(values_of(pads, torch.clone) or ())
    if count:
        warn(
            f"{count} of the prompts end with padding, which generation would go on from, so that the text is another: "
            'pad on the left (padding_side="left" of a tokenizer)'
        )


def _infer_mask(input_ids: Tensor, config: GenerationConfig) -> Tensor:
    """Padding ids are padding, unless the same id also ends a sequence; as transformers infers it."""
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_ids:
        return torch.ones_like(input_ids)
    return (input_ids != config.pad_token_id).to(input_ids.dtype)


def _settle_length(config: GenerationConfig, length: int) -> GenerationConfig:
    """The config with ``max_length`` counting a prompt of ``length`` and its continuation."""
    if config.max_new_tokens is not None:
        config = config.replace(max_length=length + config.max_new_tokens)
    most = config.max_length
    if most <= length:
        raise InputError(f"max_length {most} leaves no room after a prompt of {length} tokens; raise it")
    if (config.min_length or 0) > most:
        raise InputError(f"min_length {config.min_length} is above the {most} tokens of max_length; lower it")
    if (config.min_new_tokens or 0) > most - length:
        warn(
            f"min_new_tokens {config.min_new_tokens} is above the {most - length} there is room for: no sequence will "
            f"end before max_length {most}"
        )
    return config


def _check(request: Request, model: LanguageModel) -> None:
    _check_ids(request.config, model.config.vocab_size)
    _check_padding(request, model.config.vocab_size)
    _check_combination(request)
    _check_guessing(request, model)


def _check_ids(config: GenerationConfig, vocab_size: int) -> None:
    """Every id in the settings is one of the vocabulary's."""
    named = {
        "eos_token_id": config.eos_token_ids,
        "forced_bos_token_id": as_list(config.forced_bos_token_id),
        "forced_eos_token_id": as_list(config.forced_eos_token_id),
        "suppress_tokens": config.suppress_tokens or (),
        "begin_suppress_tokens": config.begin_suppress_tokens or (),
        "bad_words_ids": [token for word in config.bad_words_ids or () for token in word],
        "sequence_bias": [token for sequence in config.sequence_bias or () for token in sequence],
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InputError(f"{name} {token} is outside the vocabulary of {vocab_size}")


def _check_padding(request: Request, vocab_size: int) -> None:
    """A sequence that ends before others is followed by padding, which the model must be able to read."""
    config = request.config
    rows = len(request.input_ids) * config.num_beams * config.num_return_sequences
    if rows > 1 and (config.eos_token_ids or request.stopping) and not 0 <= config.padding_id < vocab_size:
        raise InputError(
            f"pad_token_id {config.padding_id} is outside the vocabulary of {vocab_size}; it pads sequences that end "
            "early"
        )


def _check_combination(request: Request) -> None:
    """Settings that contradict each other."""
    config, beams, groups = request.config, request.config.num_beams, request.config.num_beam_groups
    several = config.num_return_sequences
    if beams == 1 and several > 1 and not config.do_sample:
        raise InputError(f"num_return_sequences {several} would be all the same; use do_sample=True or num_beams")
    if beams > 1 and several > beams and not config.do_sample:
        raise InputError(f"num_return_sequences {several} is more than num_beams {beams}; use more beams")
    if beams % groups:
        raise InputError(f"num_beams {beams} is not divisible by num_beam_groups {groups}")
    if groups > 1 and config.do_sample:
        raise InputError(f"num_beam_groups {groups} cannot be combined with do_sample=True; use one of them")
    if (groups > 1) != bool(config.diversity_penalty):
        raise InputError(
            f"diversity_penalty {config.diversity_penalty} with num_beam_groups {groups}: "
            "groups need a penalty above 0, or all are alike, and a penalty needs groups"
        )
    if config.penalty_alpha:
        if beams > 1 or config.do_sample or not config.use_cache:
            raise InputError("penalty_alpha needs num_beams=1, do_sample=False and use_cache=True")
        if not config.top_k or config.top_k < 2:
            raise InputError(f"contrastive search (penalty_alpha) compares top_k >= 2 tokens, got {config.top_k}")
        if request.past is not None:
            raise InputError("contrastive search compares with the whole prompt; give it without past_key_values")
    if config.exponential_decay_length_penalty is not None and not config.eos_token_ids:
        raise InputError("exponential_decay_length_penalty needs an eos_token_id")


def _check_guessing(request: Request, model: LanguageModel) -> None:
    """Assisted decoding and prompt lookup: what they cannot be combined with."""
    config, assistant = request.config, request.assistant
    name = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
    if assistant is None and config.prompt_lookup_num_tokens is None:
        return
    if assistant is not None and config.prompt_lookup_num_tokens is not None:
        raise InputError("give either assistant_model or prompt_lookup_num_tokens, not both")
    if config.num_beams > 1 or config.penalty_alpha:
        raise InputError(f"{name} serves greedy search and sampling, not num_beams or penalty_alpha")
    if len(request.input_ids) * config.num_return_sequences > 1:
        rows = f"{len(request.input_ids)} prompts and num_return_sequences {config.num_return_sequences}"
        raise InputError(f"{name} continues one sequence at a time, got {rows}")
    if not config.use_cache or request.inputs_embeds is not None:
        raise InputError(f"{name} needs use_cache=True and input_ids instead of inputs_embeds")
    if not all(has_own_inputs(one) for one in (model, assistant or model)):
        raise InputError(f"{name} needs the model's own prepare_inputs_for_generation, which has been replaced")
    if assistant is not None and assistant.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"assistant_model has a vocabulary of {assistant.config.vocab_size}, the model {model.config.vocab_size}"
        )
