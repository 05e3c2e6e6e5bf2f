"""Every processor and sampling filter is bitwise equal to the class of transformers 4.31.0 that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama.generation import GenerationConfig, processors, sampling
from openllama.generation.beam import Diversity
from tests.draw import examples
from tests.oracle import compared, transformers
from tests.parity import draws

hf = transformers.generation.logits_process

FILTERS = ("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
mass = st.floats(0.01, 0.99)
PAIRS: dict[str, tuple[st.SearchStrategy[Any], Callable[..., Any], Callable[..., Any]]] = {
    "temperature": (st.floats(0.05, 10), hf.TemperatureLogitsWarper, sampling.temperature),
    "top_k": (st.integers(1, 30), hf.TopKLogitsWarper, sampling.top_k),
    "top_p": (mass, hf.TopPLogitsWarper, sampling.top_p),
    "typical_p": (mass, hf.TypicalLogitsWarper, sampling.typical_p),
    "epsilon_cutoff": (mass, hf.EpsilonLogitsWarper, sampling.epsilon_cutoff),
    "eta_cutoff": (mass, hf.EtaLogitsWarper, sampling.eta_cutoff),
    "repetition_penalty": (st.floats(0.1, 5), hf.RepetitionPenaltyLogitsProcessor, processors.repetition_penalty),
    "no_repeat_ngram_size": (st.integers(1, 4), hf.NoRepeatNGramLogitsProcessor, processors.no_repeat_ngram),
    "suppress_tokens": (
        st.lists(st.integers(0, 11), min_size=1),
        hf.SuppressTokensLogitsProcessor,
        processors.suppress,
    ),
    "begin_suppress_tokens": (
        st.integers(1, 12),
        lambda begin: hf.SuppressTokensAtBeginLogitsProcessor([1, 3], begin),
        lambda begin: processors.suppress([1, 3], begin, begin + 1),
    ),
    "min_length": (
        st.integers(0, 12),
        lambda least: hf.MinLengthLogitsProcessor(least, [2, 3]),
        lambda least: processors.suppress([2, 3], end=least),
    ),
    "min_new_tokens": (
        st.integers(0, 8),
        lambda least: hf.MinNewTokensLengthLogitsProcessor(4, least, 2),
        lambda least: processors.suppress([2], end=4 + least),
    ),
    "forced_bos_token_id": (
        st.integers(0, 11),
        hf.ForcedBOSTokenLogitsProcessor,
        lambda token: processors.force([token], length=1),
    ),
    "forced_eos_token_id": (
        st.integers(2, 13),
        lambda most: hf.ForcedEOSTokenLogitsProcessor(most, [2, 5]),
        lambda most: processors.force([2, 5], length=most - 1),
    ),
    "exponential_decay_length_penalty": (
        st.tuples(st.integers(0, 6), st.floats(0.5, 2)),
        lambda penalty: hf.ExponentialDecayLengthPenalty(penalty, [2, 5], 3),
        lambda penalty: processors.exponential_decay(3 + penalty[0], penalty[1], [2, 5]),
    ),
}
tokens = st.integers(0, 5)  # few, so that sequences of them do occur


@st.composite
def texts_and_scores(draw: st.DrawFn, vocab_size: int = 12) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and scores (B, V) of any size, some of which are forbidden, tied or huge."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(draws.seeds))
    ids = torch.randint(min(6, vocab_size), (batch, length), generator=generator)
    scores = torch.randn(batch, vocab_size, generator=generator) * draw(st.sampled_from((0.1, 1.0, 5.0, 50.0)))
    kind = draw(st.sampled_from(("any", "tied", "forbidden", "log-probabilities")))
    if kind == "tied":
        scores = scores.round()
    elif kind == "forbidden":
        scores[:, 1:] = scores[:, 1:].masked_fill(
            torch.rand(batch, vocab_size - 1, generator=generator) < 0.5, -torch.inf
        )
    elif kind == "log-probabilities":
        scores = scores.log_softmax(-1)
    return ids, scores


def check(ours: Any, theirs: Any, ids: Tensor, scores: Tensor, name: str) -> None:
    before = scores.clone()
    got = ours(ids, scores)
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)  # not written to
    assert torch.equal(got, theirs(ids, before)), name
    compared["score tensors, processors"] += 1


@pytest.mark.parametrize("name", PAIRS)
@examples(25)
@given(data=st.data())
def test_each_processor_equals_hf(name, data):
    values, hf_class, our_function = PAIRS[name]
    ids, scores = data.draw(texts_and_scores(data.draw(st.sampled_from((12, 40)))))
    value = data.draw(values)
    if name in FILTERS[1:]:  # with beams, two tokens stay
        keep = data.draw(st.integers(1, 2))
        check(our_function(value, keep), hf_class(value, min_tokens_to_keep=keep), ids, scores, name)
    else:
        check(our_function(value), hf_class(value), ids, scores, name)


@examples(40)
@given(
    case=texts_and_scores(),
    bias=st.dictionaries(st.lists(tokens, min_size=1, max_size=3).map(tuple), st.floats(-9, 9), min_size=1, max_size=5),
)
def test_sequence_bias_equals_hf(case, bias):
    longer = [ids[-1] for ids in bias if len(ids) > 1]
    bias = {ids: value for ids, value in bias.items() if len(ids) == 1 or longer.count(ids[-1]) == 1}  # HF's limit
    if bias:
        check(processors.sequence_bias(bias), hf.SequenceBiasLogitsProcessor(bias), *case, "sequence_bias")


@examples(40)
@given(
    case=texts_and_scores(),
    words=st.lists(
        st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=5, unique_by=lambda ids: (len(ids) > 1, ids[-1])
    ).filter(lambda words: any(word not in ([2], [4]) for word in words)),
)
def test_bad_words_equal_hf(case, words):
    check(processors.bad_words(words, [2, 4]), hf.NoBadWordsLogitsProcessor(words, [2, 4]), *case, "bad_words_ids")


@examples(25)
@given(case=texts_and_scores(), seed=draws.seeds)
def test_remove_invalid_values_equals_hf(case, seed):
    ids, scores = case
    kinds = torch.randint(4, scores.shape, generator=torch.Generator().manual_seed(seed))
    for kind, value in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
        scores = scores.masked_fill(kinds == kind, value)
    check(processors.remove_invalid, hf.InfNanRemoveLogitsProcessor(), ids, scores, "remove_invalid_values")


@examples(25)
@given(case=texts_and_scores())
def test_renormalisation_equals_hf(case):
    check(processors.log_normalize, hf.LogitNormalization(), *case, "renormalize_logits")


@examples(25)
@given(
    seed=draws.seeds,
    batch=st.integers(1, 3),
    groups=st.integers(2, 4),
    size=st.integers(1, 3),
    penalty=st.floats(0.1, 5),
)
def test_diversity_equals_hf(seed, batch, groups, size, penalty):
    generator = torch.Generator().manual_seed(seed)
    taken = torch.randint(12, (batch, groups, size), generator=generator)
    theirs = hf.HammingDiversityLogitsProcessor(penalty, num_beams=groups * size, num_beam_groups=groups)
    ours = Diversity(penalty)
    for group in range(groups):
        scores = torch.randn(batch * size, 12, generator=generator)
        expected = theirs(None, scores.clone(), current_tokens=taken.flatten(), beam_group_idx=group)
        assert torch.equal(ours(None, scores), expected)
        ours.taken.append(taken[:, group])
    compared["score tensors, processors"] += groups


def test_the_configured_order_is_hfs():
    """All at once: the order shows in the numbers."""
    settings = {
        "sequence_bias": {(3,): 2.0},
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[4, 5]],
        "min_length": 3,
        "min_new_tokens": 9,
        "forced_eos_token_id": 2,
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (0, 1.3),
        "suppress_tokens": [7],
        "begin_suppress_tokens": [8],
        "renormalize_logits": True,
        "eos_token_id": 2,
        "max_length": 30,
    }
    filtering = dict(zip(FILTERS, (0.7, 9, 0.9, 0.9, 0.02, 0.01), strict=True))
    theirs = transformers.GenerationConfig(**settings, **filtering)
    ours = GenerationConfig(**settings, **filtering, do_sample=True)
    model = draws.hf_model(draws.OpenLlamaConfig(vocab_size=12, hidden_size=8, num_attention_heads=2), 0)
    for length in range(5, 12):
        ids = torch.randint(3, 6, (4, length), generator=torch.Generator().manual_seed(length))
        scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(length))
        hf_list = model._get_logits_processor(theirs, 5, ids, None, hf.LogitsProcessorList())
        expected = model._get_logits_warper(theirs)(ids, hf_list(ids, scores.clone()))
        processing = [*processors.all_processors(ours, 5, ()), *sampling.filters_for(ours)]
        assert torch.equal(processors.apply(processing, ids, scores), expected)
