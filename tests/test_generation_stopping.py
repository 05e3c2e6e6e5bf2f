"""What ends a text besides eos and length, what is warned of, and how a text is gone on with."""

from __future__ import annotations

import itertools
import time
import warnings

import pytest
import torch

from openllama.cache import PreallocatedCache
from openllama.generation.stopping import max_time, stopped
from tests.generating import CONFIG, count_forwards, make_model

PROMPT = torch.tensor([[5, 9, 13, 2], [7, 21, 3, 30]])


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_one_bool_stops_all_texts(model):
    seen = []

    def stop(ids, scores):
        seen.append((ids.shape, scores.shape))
        return ids.shape[1] == 7

    assert model.generate(PROMPT, max_new_tokens=9, stopping_criteria=[stop]).shape == (2, 7)
    assert seen == [((2, length), (2, 40)) for length in (5, 6, 7)]


def test_a_bool_per_text_stops_each_by_itself(model):
    free = model.generate(PROMPT, max_new_tokens=6)
    ids = model.generate(PROMPT, max_new_tokens=6, stopping_criteria=[lambda ids, scores: torch.tensor([True, False])])
    assert torch.equal(ids[1], free[1])
    assert ids[0].tolist() == [*free[0, :5].tolist(), 0, 0, 0, 0, 0]


def test_any_of_several_criteria_stops():
    ids, scores = torch.zeros(2, 3), torch.zeros(2, 4)
    never, first = (lambda ids, scores: False), (lambda ids, scores: torch.tensor([True, False]))
    assert stopped([], ids, scores).tolist() == [False, False]
    assert stopped([never, first], ids, scores).tolist() == [True, False]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 3}])
def test_max_time_stops_after_the_token_that_takes_too_long(model, settings):
    assert model.generate(PROMPT, max_new_tokens=9, max_time=1e-9, **settings).shape == (2, 5)
    assert model.generate(PROMPT, max_new_tokens=9, max_time=1e9, **settings).shape == (2, 13)


def test_max_time_counts_from_when_it_is_made(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    criterion = max_time(2)
    assert [criterion(PROMPT, PROMPT) for _ in range(4)] == [False, False, True, True]


def test_texts_longer_than_the_model_was_trained_for_are_warned_of_once():
    model = make_model(max_position_embeddings=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(PROMPT, max_new_tokens=3)  # the last token is made from 6
        assert caught == []
        model.generate(PROMPT, max_new_tokens=9)
    assert [str(warning.message)[:32] for warning in caught] == ["a sequence of more than 6 tokens"]


def test_a_conversation_goes_on_from_the_cache_of_its_last_turn(model):
    first = model.generate(PROMPT, max_new_tokens=5, return_dict_in_generate=True)
    turn = torch.cat((first.sequences, torch.tensor([[11, 12], [13, 14]])), dim=1)
    calls: list[int] = []
    handle = count_forwards(model, calls)
    mask = torch.ones_like(turn)
    second = model.generate(turn, past_key_values=first.past_key_values, attention_mask=mask, max_new_tokens=4)
    handle.remove()
    assert calls == [3, 1, 1, 1], "the token that was made last, and the two new ones"
    assert torch.equal(second, model.generate(turn, attention_mask=mask, max_new_tokens=4))


def test_a_callers_own_cache_serves_every_turn_in_place(model):
    cache = PreallocatedCache(CONFIG, 2, 64)
    storage = cache[0][0].untyped_storage().data_ptr()
    ids = PROMPT
    for _ in range(3):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=4,
            return_dict_in_generate=True,
        )
        assert output.past_key_values is cache
        assert torch.equal(output.sequences, expected)
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        ids = torch.cat((output.sequences, PROMPT), dim=1)
    assert cache[0][0].untyped_storage().data_ptr() == storage


def test_several_samples_of_a_prompt_share_its_past(model):
    with torch.no_grad():
        past = model(PROMPT[:, :3]).past_key_values
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5}
    expected = model.generate(PROMPT, generator=torch.Generator().manual_seed(1), **settings)
    ids = model.generate(PROMPT, past_key_values=past, generator=torch.Generator().manual_seed(1), **settings)
    assert torch.equal(ids, expected)
    assert len(set(map(tuple, ids[:3, 4:].tolist()))) > 1
    assert ids[:, 0].tolist() == [5, 5, 5, 7, 7, 7]


def test_outputs_hold_what_is_asked_for_and_nothing_else(model):
    bare = model.generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True)
    assert bare.keys() == ["sequences", "past_key_values"]
    full = model.generate(
        PROMPT,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        repetition_penalty=2.0,
    )
    assert [scores.shape for scores in full.scores] == [(2, 40)] * 3
    assert not torch.equal(full.scores[0], full.logits[0]), "scores are processed, logits are not"
    torch.testing.assert_close(full.logits[0], model(PROMPT).logits[:, -1])
    assert [states[-1].shape for states in full.hidden_states] == [(2, 4, 32), (2, 1, 32), (2, 1, 32)]
    assert [maps[-1].shape for maps in full.attentions] == [(2, 4, 4, 4), (2, 4, 1, 5), (2, 4, 1, 6)]
    assert torch.is_tensor(model.generate(PROMPT, max_new_tokens=3, output_scores=True))
