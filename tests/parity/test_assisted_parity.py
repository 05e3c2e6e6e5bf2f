"""Assisted decoding makes the ids of transformers 4.31.0, where that treats all tokens alike.

Its last token of each round skips processors and warpers, so that only settings without any compare.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama import OpenLlamaConfig
from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws
from tests.parity.generation import models

pytestmark = pytest.mark.filterwarnings("ignore:a sequence of more than")

unpadded = models(rope_scaling=None, pad_token_id=0)  # HF drops the mask here; dynamic RoPE remembers rejected guesses


def both(config: OpenLlamaConfig, seed: int, assistant_seed: int, layers: int, **settings: Any) -> tuple[Any, Any]:
    """Ids by HF and by us of one drawn prompt, with an assistant that is another model or the same one."""
    small = dataclasses.replace(config, num_hidden_layers=layers)
    hf, hf_assistant = draws.hf_model(config, seed), draws.hf_model(small, assistant_seed)
    ours, assistant = draws.our_twin(hf, config), draws.our_twin(hf_assistant, small)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (1, 1 + seed % 6), generator=generator)
    torch.manual_seed(seed)
    expected = hf.generate(ids, assistant_model=hf_assistant, top_k=0, **settings)
    torch.manual_seed(seed)
    return expected, ours.generate(ids, assistant_model=assistant, top_k=0, **settings)


@examples(20)
@given(config=unpadded, seed=draws.seeds, same=st.booleans(), length=st.integers(1, 30))
def test_greedy_assisted_ids_equal_hf(config, seed, same, length):
    layers = config.num_hidden_layers if same else 1
    expected, ids = both(config, seed, seed if same else seed + 1, layers, max_new_tokens=length)
    assert torch.equal(ids, expected)
    compared["models, assisted ids"] += 1


@examples(20)
@given(config=unpadded, seed=draws.seeds, same=st.booleans())
def test_sampled_assisted_ids_equal_hf_under_the_same_seed(config, seed, same):
    """As long as guesses do not reach the end, which HF goes beyond, and we do not."""
    layers = config.num_hidden_layers if same else 1
    expected, ids = both(config, seed, seed if same else seed + 1, layers, max_new_tokens=30, do_sample=True)
    assert torch.equal(ids[:, :12], expected[:, :12])
    compared["models, sampled assisted ids"] += 1
