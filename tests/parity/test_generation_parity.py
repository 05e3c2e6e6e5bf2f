"""``generate`` makes the ids that transformers 4.31.0 makes: greedy, and sampling under the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws
from tests.parity.generation import (
    ALL_OUTPUTS,
    assert_same_outputs,
    both,
    filterings,
    lengths,
    models,
    processings,
    prompts,
)

pytestmark = pytest.mark.filterwarnings("ignore:a sequence of more than", "ignore:min_new_tokens")

#: greedy continuations that were not one token again and again, so that equality says something
varied: list[bool] = []


@examples(30)
@given(data=st.data(), config=models(), seed=draws.seeds, use_cache=st.booleans())
def test_greedy_ids_equal_hf(data, config, seed, use_cache):
    prompt = data.draw(prompts(config))
    expected, ids = both(config, seed, prompt, use_cache=use_cache, **data.draw(lengths))
    assert torch.equal(ids, expected)
    compared["models, greedy ids"] += 1
    varied.append(max(len(set(row[-10:].tolist())) for row in ids) > 3)


@examples(40)
@given(data=st.data(), config=models(), seed=draws.seeds)
def test_greedy_ids_equal_hf_with_processors(data, config, seed):
    prompt, settings = data.draw(prompts(config)), data.draw(processings(config))
    expected, ids = both(config, seed, prompt, **settings, **data.draw(lengths))
    assert torch.equal(ids, expected)
    compared["models, greedy ids with processors"] += 1


@examples(40)
@given(data=st.data(), config=models(), seed=draws.seeds, settings=filterings, copies=st.integers(1, 3))
def test_sampled_ids_equal_hf_under_the_same_seed(data, config, seed, settings, copies):
    prompt = data.draw(prompts(config))
    processing = data.draw(processings(config)) if data.draw(st.booleans()) else {}
    settings = {**processing, **settings, **data.draw(lengths)}
    expected, ids = both(config, seed, prompt, do_sample=True, num_return_sequences=copies, **settings)
    assert torch.equal(ids, expected)
    compared["models, sampled ids"] += 1


@examples(8)
@given(data=st.data(), config=models(), seed=draws.seeds, do_sample=st.booleans())
def test_scores_attentions_and_hidden_states_have_hfs_structure_and_values(data, config, seed, do_sample):
    prompt, settings = data.draw(prompts(config)), data.draw(processings(config))
    expected, output = both(config, seed, prompt, do_sample=do_sample, max_new_tokens=12, **settings, **ALL_OUTPUTS)
    assert_same_outputs(output, expected)
    compared["models, outputs of generate"] += 1


@examples(8)
@given(config=models(), seed=draws.seeds, batch=st.integers(1, 3), length=st.integers(1, 6))
def test_ids_continued_from_inputs_embeds_equal_hf(config, seed, batch, length):
    embeds = torch.randn(batch, length, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    expected, ids = both(config, seed, {"inputs_embeds": embeds}, max_new_tokens=8)
    assert torch.equal(ids, expected)


@examples(8)
@given(config=models(), seed=draws.seeds, length=st.integers(2, 8))
def test_ids_continued_from_past_key_values_equal_hf(config, seed, length):
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    ids = torch.randint(3, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        past = hf(ids[:, :-1]).past_key_values
    expected = hf.generate(ids, past_key_values=past, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(ours.generate(ids, past_key_values=past, attention_mask=mask, max_new_tokens=6), expected)


def test_more_new_tokens_than_there_is_room_for_give_hfs_ids():
    config = draws.OpenLlamaConfig(
        vocab_size=20, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, initializer_range=0.5
    )
    prompt = {"input_ids": torch.tensor([[5, 9, 13]])}
    free, _ = both(config, 1, prompt, max_new_tokens=6)
    eos = int(free[0, 4])
    with pytest.warns(UserWarning, match="min_new_tokens 9 is above the 6"):
        expected, ids = both(config, 1, prompt, max_new_tokens=6, min_new_tokens=9, eos_token_id=eos)
    assert torch.equal(ids, expected)
    assert ids.shape[1] == 9
    assert eos not in ids[0, 3:]


def test_the_drawn_continuations_were_not_constant():
    if not varied:
        pytest.skip("runs after test_greedy_ids_equal_hf")
    assert sum(varied) > len(varied) / 2
