"""Contrastive search makes the ids and outputs that transformers 4.31.0 makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws
from tests.parity.generation import ALL_OUTPUTS, assert_same_outputs, both, lengths, models, processings, prompts

pytestmark = pytest.mark.filterwarnings("ignore:a sequence of more than", "ignore:min_new_tokens")


@examples(30)
@given(data=st.data(), config=models(), seed=draws.seeds, top_k=st.integers(2, 8), alpha=st.floats(0.1, 1.0))
def test_contrastive_ids_equal_hf(data, config, seed, top_k, alpha):
    prompt = data.draw(prompts(config))
    settings = data.draw(processings(config)) if data.draw(st.booleans()) else {}
    expected, ids = both(config, seed, prompt, penalty_alpha=alpha, top_k=top_k, **settings, **data.draw(lengths))
    assert torch.equal(ids, expected)
    compared["models, contrastive ids"] += 1


@examples(6)
@given(data=st.data(), config=models(), seed=draws.seeds)
def test_outputs_of_contrastive_search_equal_hf(data, config, seed):
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 6}
    expected, output = both(config, seed, data.draw(prompts(config)), **settings, **ALL_OUTPUTS)
    assert_same_outputs(output, expected)
    compared["models, outputs of contrastive search"] += 1
