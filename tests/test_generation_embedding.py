"""Embeddings of sequences: pooled hidden states."""

from __future__ import annotations

import pytest
import torch

from openllama import OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.errors import InputError
from openllama.generation import embed_sequences
from tests.generating import CONFIG, make_model

IDS = [[5, 9, 13, 2], [7, 21], [3, 30, 8, 1, 12, 39, 4], [17]]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_a_row_is_the_pooled_hidden_state_of_the_text_alone(model, backend):
    model.set_attn_implementation(backend)
    for batch_size in (1, 3, 8):
        mean, last = (embed_sequences(model, IDS, pooling, batch_size) for pooling in ("mean", "last"))
        for row, ids in enumerate(IDS):
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(mean[row], hidden.mean(0))
            torch.testing.assert_close(last[row], hidden[-1])


def test_a_decoder_and_a_classifier_embed_as_well(model):
    decoder = OpenLlamaModel(CONFIG, attn_implementation="eager").eval()
    decoder.load_state_dict(model.model.state_dict())
    classifier = OpenLlamaForSequenceClassification(CONFIG, attn_implementation="eager").eval()
    classifier.model.load_state_dict(model.model.state_dict())
    model.set_attn_implementation("eager")
    for other in (decoder, classifier):
        assert torch.equal(embed_sequences(other, IDS), embed_sequences(model, IDS))


def test_half_precision_is_pooled_in_single(model):
    half = make_model().to(torch.bfloat16)
    vectors = embed_sequences(half, IDS)
    assert vectors.dtype == torch.float32
    hidden = half.model(torch.tensor([IDS[2]])).last_hidden_state[0].detach()
    assert torch.equal(embed_sequences(half, [IDS[2]])[0], hidden.float().mean(0))


def test_under_dynamic_rope_a_text_in_a_batch_embeds_as_alone():
    model = make_model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=8)
    ids = [torch.arange(1, 8), torch.arange(1, 4)]
    assert torch.equal(embed_sequences(model, ids), torch.cat([embed_sequences(model, [one]) for one in ids]))


def test_what_cannot_be_embedded_is_refused_and_long_texts_warn(model):
    with pytest.raises(InputError, match="pooling must be one of 'mean', 'last', got 'max'"):
        embed_sequences(model, IDS, "max")
    with pytest.raises(InputError, match=r"sequence 1 has shape \(0,\); give one token or more"):
        embed_sequences(model, [[1], []])
    with pytest.raises(InputError, match="batch_size"):
        embed_sequences(model, IDS, batch_size=0)
    with pytest.warns(UserWarning, match=r"9 tokens .* max_position_embeddings 8: .*; embed its parts") as caught:
        embed_sequences(make_model(max_position_embeddings=8), [[1] * 9, [2] * 9], batch_size=1)
    assert len(caught) == 1
    assert embed_sequences(model, []).shape == (0, CONFIG.hidden_size)
