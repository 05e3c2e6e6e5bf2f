"""Processors and sampling filters: what each forbids, forces or favours, by worked examples and by definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama.generation import GenerationConfig
from openllama.generation.processors import (
    all_processors,
    bad_words,
    exponential_decay,
    force,
    log_normalize,
    no_repeat_ngram,
    processors_for,
    remove_invalid,
    repetition_penalty,
    sequence_bias,
    suppress,
)
from openllama.generation.sampling import (
    epsilon_cutoff,
    eta_cutoff,
    filters_for,
    min_p,
    temperature,
    top_k,
    top_p,
    typical_p,
)

INF = torch.inf
THREE = torch.tensor([[0.5, 0.3, 0.2]]).log()

scores_lists = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


def ids(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


def kept(scores: Tensor) -> list[bool]:
    return scores[0].isfinite().tolist()


# --- sampling filters ----------------------------------------------------------------------------------------


@given(scores_lists, st.integers(1, 15))
def test_top_k_keeps_exactly_the_scores_at_least_as_high_as_the_kth(values, k):
    scores = torch.tensor([values])
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert kept(top_k(k)(None, scores)) == [value >= threshold for value in scores[0].tolist()]


@given(scores_lists, st.floats(0.01, 0.99))
def test_top_p_keeps_a_smallest_set_that_reaches_the_mass(values, mass):
    probabilities = torch.tensor([values]).softmax(-1)[0]
    stays = top_p(mass)(None, torch.tensor([values]))[0].isfinite()
    assert stays.any()
    assert probabilities[stays].sum() >= mass - 1e-5
    least = probabilities[stays].min()
    assert probabilities[stays].sum() - least < mass + 1e-5
    assert (probabilities[~stays] <= least).all(), "what goes is never likelier than what stays"


@given(scores_lists, st.floats(0.01, 1.0), st.integers(1, 3))
def test_min_p_drops_what_is_less_likely_than_the_share_of_the_likeliest(values, share, keep):
    scores = torch.tensor([values])
    probabilities = scores.softmax(-1)[0]
    stays = min_p(share, keep)(None, scores)[0].isfinite()
    assert torch.equal(stays | (probabilities < share * probabilities.max()), torch.ones_like(stays))
    assert int((stays & (probabilities < share * probabilities.max())).sum()) <= keep - 1
    assert int(stays.sum()) >= min(keep, len(values))


@pytest.mark.parametrize(
    ("filtering", "stays"),
    [
        (top_k(2), [True, True, False]),
        (top_p(0.7), [True, True, False]),
        (min_p(0.5), [True, True, False]),
        (typical_p(0.6), [True, True, False]),
        (typical_p(0.25), [False, True, False]),
        (epsilon_cutoff(0.25), [True, True, False]),
        (epsilon_cutoff(0.9), [True, False, False]),
        (epsilon_cutoff(0.9, keep=2), [True, True, False]),
        (eta_cutoff(0.25), [True, True, True]),
        (eta_cutoff(0.5), [True, True, False]),
        (top_p(0.1, keep=2), [True, True, False]),
        (top_k(1, keep=2), [True, True, False]),
        (min_p(1.0, keep=2), [True, True, False]),
        (typical_p(0.25, keep=2), [True, True, False]),
    ],
)
def test_sampling_filters_by_worked_examples(filtering, stays):
    assert kept(filtering(None, THREE)) == stays


def test_typical_p_of_a_mass_that_rounding_keeps_out_of_reach_keeps_all():
    """transformers 4.31.0 raises a RuntimeError: these probabilities sum to a little less than 1 - 1e-9."""
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(199))
    assert all(kept(typical_p(1 - 1e-9)(None, scores)))


def test_temperature_scales_differences():
    assert temperature(0.5)(None, torch.tensor([[1.0, 3.0]])).tolist() == [[2.0, 6.0]]


def test_log_normalize_makes_exponentials_sum_to_one():
    assert float(log_normalize(None, torch.tensor([[1.0, 3.0]])).exp().sum()) == pytest.approx(1)


# --- processors -------------------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    assert repetition_penalty(2.0)(ids(0, 1, 0), torch.tensor([[3.0, -1.0, 5.0]])).tolist() == [[1.5, -2.0, 5.0]]


@pytest.mark.parametrize(
    ("size", "text", "forbidden"),
    [
        (2, (4, 5, 4), [5]),
        (2, (4, 5), []),
        (1, (4, 5), [4, 5]),
        (3, (1, 2, 3, 1, 2), [3]),
        (3, (1,), []),
        (3, (1, 2), []),
    ],
)
def test_no_repeat_ngram(size, text, forbidden):
    scores = no_repeat_ngram(size)(ids(*text), torch.zeros(1, 6))
    assert (scores[0] == -INF).nonzero().flatten().tolist() == forbidden


def test_sequence_bias_adds_up_where_sequences_end_alike():
    """HF refuses two sequences with a common last token."""
    bias = sequence_bias({(1,): 1.0, (5, 1): -2.0, (4, 5, 1): 0.5, (4, 1): 9.0})
    assert bias(ids(0, 4, 5), torch.zeros(1, 3)).tolist() == [[0.0, -0.5, 0.0]]
    assert bias(ids(5), torch.zeros(1, 3)).tolist() == [[0.0, 1.0, 0.0]], "as HF: the text must be as long"


def test_bad_words_forbid_the_last_token_and_never_eos_alone():
    scores = bad_words([[3], [1, 2], [0, 2], [4]], eos_token_ids=[4])(ids(0, 1), torch.zeros(1, 6))
    assert kept(scores) == [True, True, False, False, True, True]


def test_suppress_holds_between_two_lengths():
    rule = suppress([1], first=2, end=3)
    assert [kept(rule(ids(*range(length)), torch.zeros(1, 2)))[1] for length in (1, 2, 3)] == [True, False, True]


def test_force_leaves_one_choice_at_one_length():
    assert force([1], length=2)(ids(0, 0), torch.ones(1, 3)).tolist() == [[-INF, 0.0, -INF]]
    assert force([1], length=2)(ids(0), torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]


def test_remove_invalid():
    scores = remove_invalid(None, torch.tensor([[torch.nan, INF, -INF, 1.0]]))
    assert scores.tolist() == [[0.0, torch.finfo(torch.float32).max, -INF, 1.0]]


def test_exponential_decay_multiplies_once_for_each_token_beyond():
    rule = exponential_decay(1, 1.5, [1])
    assert rule(ids(0, 0, 0), torch.tensor([[2.0, 2.0]])).tolist() == [[2.0, 4.5]]
    assert rule(ids(0), torch.tensor([[2.0, 2.0]])).tolist() == [[2.0, 2.0]]


def test_a_config_with_defaults_asks_for_nothing_but_top_k():
    assert processors_for(GenerationConfig(eos_token_id=2), 3) == []
    assert filters_for(GenerationConfig()) == []
    assert len(filters_for(GenerationConfig(do_sample=True))) == 1


def test_callers_processors_come_before_the_normalisation():
    config = GenerationConfig(renormalize_logits=True)
    assert all_processors(config, 3, [remove_invalid]) == [remove_invalid, log_normalize]
