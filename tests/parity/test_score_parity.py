"""``score`` gives the log-probabilities of transformers 4.31.0's logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.generation import score
from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws
from tests.parity.generation import models


@pytest.mark.filterwarnings("ignore:a sequence of")  # HF's logits are the same beyond max_position_embeddings
@examples(20)
@given(
    config=models(),
    seed=draws.seeds,
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=5),
    batch_size=st.integers(1, 4),
)
def test_log_probabilities_and_perplexity_equal_hf(config, seed, lengths, batch_size):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]
    ours = draws.our_twin(draws.hf_model(config, seed), config)
    for text, result in zip(texts, score(ours, texts, batch_size), strict=True):
        hf = draws.hf_model(config, seed)  # a fresh one: its dynamic RoPE remembers
        with torch.no_grad():
            output = hf(text[None], labels=text[None])
        log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, text[1:, None]).squeeze(1)
        torch.testing.assert_close(result.log_probs, log_probs, rtol=1e-4, atol=1e-4)
        assert result.perplexity == pytest.approx(float(output.loss.exp()), rel=1e-3)
        assert torch.equal(result.token_ids, text)
    compared["models, scores of texts"] += 1
