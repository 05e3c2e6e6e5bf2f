"""Logits processors: pure functions of (input_ids (B, L), scores (B, V)) that return new scores.

A score of -inf is a token that cannot be drawn. Arithmetic and order are those of transformers 4.31.0,
so that the same seed draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from openllama.generation.config import GenerationConfig

LogitsProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def temperature(value: float) -> LogitsProcessor:
    """Divide the scores: 0.5 doubles every difference."""
    return lambda input_ids, scores: scores / value


def top_k(count: int) -> LogitsProcessor:
    """Keep the ``count`` highest scores, and any that tie with the last of them."""

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        lowest_kept = scores.topk(min(count, scores.shape[-1])).values[:, -1:]
        return scores.masked_fill(scores < lowest_kept, -torch.inf)

    return process


def top_p(mass: float) -> LogitsProcessor:
    """Keep the likeliest tokens that together reach probability ``mass`` (Holtzman et al. 2020).

    Probabilities 0.5, 0.3, 0.2 and mass 0.7: the tail 0.2 is at most 1 - 0.7 and goes; 0.2 + 0.3 is
    more, so 0.3 stays. The likeliest token always stays.
    """

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(descending=False)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
        drop[:, -1] = False
        return scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)

    return process


def processors_for(config: GenerationConfig) -> list[LogitsProcessor]:
    """The processors a config asks for, in the order they apply; greedy search needs none."""
    if not config.do_sample:
        return []
    processors = []
    if config.temperature != 1.0:
        processors.append(temperature(config.temperature))
    if config.top_k:
        processors.append(top_k(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        processors.append(top_p(config.top_p))
    return processors
