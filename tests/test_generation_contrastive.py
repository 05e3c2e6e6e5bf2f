"""Contrastive search: its choice by definition, its cache, its batches."""

from __future__ import annotations

import pytest
import torch

from openllama.errors import InputError
from openllama.generation.contrastive import best
from tests.generating import make_model

PROMPT = torch.tensor([[5, 9, 13, 2], [7, 21, 3, 30]])


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_the_choice_by_worked_example():
    """Candidate 0 says again what the text says; 1 is new, and wins once alpha is high enough."""
    context = torch.tensor([[[1.0, 0.0], [0.8, 0.6]]])
    tried = torch.tensor([[[2.0, 0.0]], [[0.0, -3.0]]])
    likely = torch.tensor([[0.7, 0.2]])
    assert best(context, tried, likely, 0.1).tolist() == [0]
    assert best(context, tried, likely, 0.6).tolist() == [1]


@torch.no_grad()
def test_it_equals_a_search_without_any_cache(model):
    ids = PROMPT[:1]
    for _ in range(8):
        output = model(ids, output_hidden_states=True)
        likely, tokens = output.logits[:, -1].softmax(-1).topk(4)
        tried = [torch.cat((ids, token.view(1, 1)), dim=1) for token in tokens[0]]
        states = [model(text, output_hidden_states=True).hidden_states[-1][:, -1:] for text in tried]
        ids = tried[int(best(output.hidden_states[-1], torch.cat(states), likely, 0.6))]
    assert torch.equal(model.generate(PROMPT[:1], penalty_alpha=0.6, top_k=4, max_new_tokens=8), ids)


def test_it_differs_from_greedy_search_and_a_batch_equals_each_alone(model):
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 8}
    together = model.generate(PROMPT, **settings)
    assert not torch.equal(together, model.generate(PROMPT, max_new_tokens=8))
    assert torch.equal(together, torch.cat([model.generate(row[None], **settings) for row in PROMPT]))


def test_it_streams_and_ends(model):
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 8}
    free = model.generate(PROMPT, **settings)
    streamed = torch.stack(list(model.stream(PROMPT, **settings)), dim=1)
    assert torch.equal(streamed, free[:, 4:])
    eos = int(free[0, 6])
    ended = model.generate(PROMPT, eos_token_id=eos, **settings)
    assert set(ended[0, free[0].tolist().index(eos, 4) + 1 :].tolist()) <= {0}


def test_top_k_beyond_the_vocabulary_tries_every_token(model):
    """transformers 4.31.0, whose default is 50, raises."""
    every = model.generate(PROMPT, penalty_alpha=0.6, top_k=40, max_new_tokens=4)
    assert torch.equal(model.generate(PROMPT, penalty_alpha=0.6, max_new_tokens=4), every)


def test_its_cache_continues(model):
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 6}
    output = model.generate(PROMPT, return_dict_in_generate=True, **settings)
    longer = torch.cat((output.sequences, PROMPT), dim=1)
    mask = torch.ones_like(longer)
    continued = model.generate(longer, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=4)
    assert torch.equal(continued, model.generate(longer, attention_mask=mask, max_new_tokens=4))


def test_a_past_is_refused(model):
    past = model(PROMPT[:, :2]).past_key_values
    with pytest.raises(InputError, match="without past_key_values"):
        model.generate(PROMPT, past_key_values=past, penalty_alpha=0.6)
