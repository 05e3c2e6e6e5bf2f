"""``generate`` draws the ids that transformers 4.31.0 draws: greedy, and sampling under the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig
from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws

pytestmark = pytest.mark.filterwarnings("ignore:a text of more than")

#: greedy continuations that were not one token again and again, so that equality says something
varied: list[bool] = []


@st.composite
def models(draw: st.DrawFn) -> OpenLlamaConfig:
    """Configurations whose text can be padded and can end (HF's embedding refuses a padding id of -1)."""
    pad = draw(st.sampled_from((None, 0, 1)))
    eos = draw(st.sampled_from((None, 2, [2, 1])))
    head = draw(st.sampled_from(("own", "own", "own", "shared", "tied")))  # the last two mostly repeat a token
    return draw(
        draws.configs(
            pad_token_id=pad,
            eos_token_id=eos,
            vocab_size=draw(st.integers(16, 80)),
            num_hidden_layers=draw(st.integers(2, 3)),
            hidden_size=draw(st.sampled_from((16, 24, 40, 64))),
            num_attention_heads=4,
            initializer_range=draw(st.floats(0.3, 0.5)),
            shared_input_output_embedding=head == "shared",
            tie_word_embeddings=head == "tied",
        )
    )


@st.composite
def prompts(draw: st.DrawFn, config: OpenLlamaConfig) -> dict[str, Tensor]:
    """Left-padded ids, with their mask, or without where padding is to be inferred."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(draws.seeds))
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    mask = draws.padding_mask(draw(st.sampled_from(("ones", "left"))), batch, length, generator)
    mask[:, -1] = True
    ids = ids.where(mask, config.pad_token_id or 0)
    return {"input_ids": ids, "attention_mask": mask.long()} if draw(st.booleans()) else {"input_ids": ids}


@st.composite
def lengths(draw: st.DrawFn) -> dict[str, int]:
    return draw(st.sampled_from(({"max_new_tokens": 12}, {"max_length": 20})))


samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.2, 3.0),
        "top_k": st.integers(0, 90),
        "top_p": st.floats(0.05, 1.0),
    },
)


def both(config: OpenLlamaConfig, seed: int, prompt: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """The ids HF makes and the ids we make, each from a model that has made none before."""
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    torch.manual_seed(seed)
    expected = hf.generate(**prompt, **settings)
    torch.manual_seed(seed)
    return expected, ours.generate(**prompt, **settings)


@examples(30)
@given(data=st.data(), config=models(), seed=draws.seeds, use_cache=st.booleans())
def test_greedy_ids_equal_hf(data, config, seed, use_cache):
    prompt = data.draw(prompts(config))
    expected, ids = both(config, seed, prompt, use_cache=use_cache, **data.draw(lengths()))
    assert torch.equal(ids, expected)
    compared["models, greedy ids"] += 1
    varied.append(max(len(set(row[-10:].tolist())) for row in ids) > 3)


@examples(30)
@given(data=st.data(), config=models(), seed=draws.seeds, settings=samplings)
def test_sampled_ids_equal_hf_under_the_same_seed(data, config, seed, settings):
    prompt = data.draw(prompts(config))
    expected, ids = both(config, seed, prompt, do_sample=True, **settings, **data.draw(lengths()))
    assert torch.equal(ids, expected)
    compared["models, sampled ids"] += 1


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


def test_the_drawn_continuations_were_not_constant():
    if not varied:
        pytest.skip("runs after test_greedy_ids_equal_hf")
    assert sum(varied) > len(varied) / 2
