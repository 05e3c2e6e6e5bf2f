"""Sampling: the draw, and filters that reshape the distribution before it, mostly by cutting its tail.

Filters are processors: pure functions of (input_ids (B, L), scores (B, V)) that return new scores; -inf is a
token that cannot be drawn. Arithmetic and order are those of transformers 4.31.0, so that the same seed draws
the same tokens. ``keep`` tokens always stay: 1, or 2 for beams, which need one that does not end the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openllama.generation.config import GenerationConfig
from openllama.generation.processors import LogitsProcessor, log_normalize


def pick(scores: Tensor, do_sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """One token per row of scores (B, V) -> (B,): drawn, or the first of the highest."""
    if not do_sample:
        return scores.argmax(dim=-1)
    return draw(scores, 1, generator).squeeze(1)


def draw(scores: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` different tokens per row of scores (B, V) -> (B, count).

    A row without probabilities gets tokens whose scores are no numbers, which is found where tokens are checked; the
    others get theirs.
    """
    probabilities = scores.softmax(dim=-1)
    numbers = probabilities.isfinite().all(dim=-1, keepdim=True)
    instead = 1 + 1e30 * scores.isfinite().logical_not()
    return torch.multinomial(torch.where(numbers, probabilities, instead), count, generator=generator)


def temperature(value: float) -> LogitsProcessor:
    """Divide the scores: 0.5 doubles every difference."""
    return lambda input_ids, scores: scores / value


def top_k(count: int, keep: int = 1) -> LogitsProcessor:
    """Keep the ``count`` highest scores, and any that tie with the last of them."""
    return lambda input_ids, scores: _drop(scores, scores < _nth_highest(scores, max(count, keep)))


def top_p(mass: float, keep: int = 1) -> LogitsProcessor:
    """Keep the likeliest tokens that together reach probability ``mass`` (Holtzman et al. 2020).

    Probabilities 0.5, 0.3, 0.2 and mass 0.7: the tail 0.2 is at most 1 - 0.7 and goes; 0.2 + 0.3 is
    more, so 0.3 stays. The likeliest token always stays.
    """

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(descending=False)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
        drop[:, -keep:] = False
        return _drop(scores, drop.scatter(1, order, drop))

    return process


def min_p(share: float, keep: int = 1) -> LogitsProcessor:
    """Drop tokens less likely than ``share`` of the likeliest (Nguyen et al. 2024).

    Probabilities 0.6, 0.3, 0.1 and share 0.25: the bar is 0.15, and 0.1 goes. As in transformers >= 4.39.
    """

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        bar = share * probabilities.amax(dim=-1, keepdim=True)
        return _drop(scores, (probabilities < bar).scatter(1, scores.topk(min(keep, scores.shape[-1])).indices, False))

    return process


def typical_p(mass: float, keep: int = 1) -> LogitsProcessor:
    """Keep the tokens whose surprise -log p is nearest the expected one, to ``mass`` (Meister et al. 2022).

    Probabilities 0.5, 0.3, 0.2: surprises 0.69, 1.20, 1.61, expected 1.03; distances 0.34, 0.17, 0.58.
    In the order 0.3, 0.5, 0.2, mass 0.6 is reached by the first two, and 0.2 goes.
    """

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.log_softmax(dim=-1)
        expected = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)
        distance, order = (-log_p - expected).abs().sort(descending=False)
        reached = scores.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (reached < mass).sum(dim=1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        drop = distance > distance.gather(1, last)
        drop[:, :keep] = False
        return _drop(scores, drop.scatter(1, order, drop))

    return process


def epsilon_cutoff(least: float, keep: int = 1) -> LogitsProcessor:
    """Drop tokens less likely than ``least`` (Hewitt et al. 2022): 0.5, 0.3, 0.2 and 0.25 lose the last."""
    return lambda input_ids, scores: _drop(
        scores, (scores.softmax(dim=-1) < least) & (scores < _nth_highest(scores, keep))
    )


def eta_cutoff(least: float, keep: int = 1) -> LogitsProcessor:
    """``epsilon_cutoff`` with a lower bar where the distribution is flat (Hewitt et al. 2022).

    The bar is min(least, sqrt(least) * exp(-entropy)): for 0.5, 0.3, 0.2 (entropy 1.03) and least 0.25
    it is 0.5 * 0.357 = 0.18, so that all stay.
    """

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        entropy = torch.distributions.Categorical(logits=scores, validate_args=False).entropy()
        limit = torch.full((), least, device=scores.device)
        bar = torch.minimum(limit, limit.sqrt() * (-entropy).exp())[:, None]
        return _drop(scores, (scores.softmax(dim=-1) < bar) & (scores < _nth_highest(scores, keep)))

    return process


def filters_for(config: GenerationConfig) -> list[LogitsProcessor]:
    """The sampling filters a config asks for, in the order they apply; without sampling there are none."""
    if not config.do_sample:
        return []
    keep = 2 if config.num_beams > 1 else 1
    filters = []
    if config.temperature not in (None, 1.0):
        filters.append(temperature(config.temperature))
    if config.top_k:
        filters.append(top_k(config.top_k, keep))
    if config.top_p not in (None, 1.0):
        filters.append(top_p(config.top_p, keep))
    if config.min_p:
        filters.append(min_p(config.min_p, keep))
    if config.typical_p not in (None, 1.0):
        filters.append(typical_p(config.typical_p, keep))
    if config.epsilon_cutoff:
        filters.append(epsilon_cutoff(config.epsilon_cutoff, keep))
    if config.eta_cutoff:
        filters.append(eta_cutoff(config.eta_cutoff, keep))
    return [*filters, log_normalize] if config.renormalize_logits else filters


def _nth_highest(scores: Tensor, count: int) -> Tensor:
    """The ``count``-th highest score of each row, (B, 1); the lowest where there are not so many."""
    return scores.topk(min(count, scores.shape[-1])).values[:, -1:]


def _drop(scores: Tensor, unwanted: Tensor) -> Tensor:
    return scores.masked_fill(unwanted, -torch.inf)
