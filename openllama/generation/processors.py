"""Logits processors: what tokens are forbidden, forced, favoured, whatever the strategy.

Pure functions of (input_ids (B, L), scores (B, V)) that return new scores; -inf is a token that cannot
come. Arithmetic and order are those of transformers 4.31.0. None reads a value back from the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from openllama.generation.config import GenerationConfig, as_list

LogitsProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def apply(processors: Iterable[LogitsProcessor], input_ids: Tensor, scores: Tensor) -> Tensor:
    """Each processor on what the one before it made."""
    for process in processors:
        scores = process(input_ids, scores)
    return scores


def on_device(values: Sequence[int]) -> Callable[[torch.device], Tensor]:
    """Ids as a tensor that is copied to a device once, not for every token."""
    return functools.cache(lambda device: torch.tensor(values, device=device))


def sequence_bias(bias: Mapping[tuple[int, ...], float]) -> LogitsProcessor:
    """Add a number to the token that would complete a sequence.

    {(7,): 1.0, (5, 7): -2.0}: 7 gets +1 anywhere and, after 5, another -2. As in transformers, there
    must be as many ids as the sequence has already, so the second one is not seen when 5 is all
    there is.
    """
    terms = [(on_device(beginning), len(beginning), last, value) for (*beginning, last), value in bias.items()]

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        total = torch.zeros_like(scores)
        for beginning, length, last, value in terms:
            if length == 0:
                total[:, last] += value
            elif length < input_ids.shape[1]:
                matches = (input_ids[:, -length:] == beginning(input_ids.device)).all(dim=1)
                total[:, last] = torch.where(matches, total[:, last] + value, total[:, last])
        return scores + total

    return process


def bad_words(words: Sequence[Sequence[int]], eos_token_ids: Sequence[int]) -> LogitsProcessor:
    """Forbid the token that would complete one of the sequences; a lone eos id is never forbidden."""
    ending = [[eos] for eos in eos_token_ids]
    return sequence_bias({tuple(word): -torch.inf for word in words if list(word) not in ending})


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """Make tokens that have come less likely (Keskar et al. 2019): penalty 2 turns 3 into 1.5 and -1 into -2."""

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = scores.gather(1, input_ids)
        return scores.scatter(1, input_ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return process


def no_repeat_ngram(size: int) -> LogitsProcessor:
    """Forbid tokens that would repeat ``size`` tokens: size 2 and ids 4 5 4 forbid 5."""

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length < size:
            return scores
        windows = input_ids.unfold(1, size, 1)  # (B, L - size + 1, size)
        ending = input_ids[:, length - size + 1 :]  # (B, size - 1)
        matches = (windows[:, :, :-1] == ending[:, None]).all(dim=-1)
        forbidden = torch.zeros_like(scores).scatter_add(1, windows[:, :, -1], matches.to(scores.dtype))
        return scores.masked_fill(forbidden > 0, -torch.inf)

    return process


def suppress(tokens: Sequence[int], first: int = 0, end: int | None = None) -> LogitsProcessor:
    """Forbid ``tokens`` while there are at least ``first`` and fewer than ``end`` ids."""
    forbidden = on_device(tokens)

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length < first or (end is not None and length >= end):
            return scores
        return scores.index_fill(1, forbidden(scores.device), -torch.inf)

    return process


def force(tokens: Sequence[int], length: int) -> LogitsProcessor:
    """After ``length`` tokens one of ``tokens`` must come: they score 0, all others -inf."""
    forced = on_device(tokens)

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != length:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, forced(scores.device), 0.0)

    return process


def remove_invalid(input_ids: Tensor, scores: Tensor) -> Tensor:
    """NaN becomes 0 and inf the largest number; -inf stays."""
    return scores.nan_to_num(nan=0.0, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)


def exponential_decay(start: int, factor: float, eos_token_ids: Sequence[int]) -> LogitsProcessor:
    """Multiply the scores of the eos ids by ``factor`` once for each token beyond ``start``.

    Start 10, factor 1.5, 12 tokens: 2.0 becomes 4.5. A negative score moves the other way, -2.0 to
    -4.5: that is what transformers 4.31.0 does, and with beams, whose scores are log-probabilities,
    a factor below 1 is the one that ends a sequence sooner.
    """
    ends = on_device(eos_token_ids)

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        beyond = input_ids.shape[1] - start
        if beyond <= 0:
            return scores
        eos = ends(scores.device)
        return scores.index_copy(1, eos, scores[:, eos] * factor**beyond)

    return process


def log_normalize(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Scores as log-probabilities: their exponentials sum to 1."""
    return scores.log_softmax(dim=-1)


def processors_for(config: GenerationConfig, prompt_length: int) -> list[LogitsProcessor]:
    """The processors a config asks for, in the order they apply; ``max_length`` must be settled."""
    eos = config.eos_token_ids
    processors: list[LogitsProcessor] = []
    if config.sequence_bias:
        processors.append(sequence_bias(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        processors.append(repetition_penalty(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(no_repeat_ngram(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        processors.append(bad_words(config.bad_words_ids, eos))
    if eos and config.min_length:
        processors.append(suppress(eos, end=config.min_length))
    if eos and config.min_new_tokens:
        processors.append(suppress(eos, end=prompt_length + config.min_new_tokens))
    if config.forced_bos_token_id is not None:
        processors.append(force([config.forced_bos_token_id], length=1))
    if as_list(config.forced_eos_token_id):
        processors.append(force(as_list(config.forced_eos_token_id), length=config.max_length - 1))
    if config.remove_invalid_values:
        processors.append(remove_invalid)
    if config.exponential_decay_length_penalty is not None:
        wait, factor = config.exponential_decay_length_penalty
        processors.append(exponential_decay(prompt_length + wait, factor, eos))
    if config.suppress_tokens:
        processors.append(suppress(config.suppress_tokens))
    if config.begin_suppress_tokens:
        begin = prompt_length + (prompt_length == 1 and config.forced_bos_token_id is not None)
        processors.append(suppress(config.begin_suppress_tokens, begin, begin + 1))
    return processors


def all_processors(
    config: GenerationConfig, prompt_length: int, custom: Iterable[LogitsProcessor]
) -> list[LogitsProcessor]:
    """The configured processors, then a caller's own, then the normalisation; sampling filters come after all."""
    processors = [*processors_for(config, prompt_length), *custom]
    return [*processors, log_normalize] if config.renormalize_logits else processors
