"""The heads: which tensor makes the logits, which token decides a class, and what a loss may be asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.errors import InputError
from openllama.model import Inputs, SharedHead
from tests.draw import examples
from tests.parity.draws import Batch, batches, configs, in_float64, length_of, randomise_norms, seeds
from tests.tiny import tiny_config, tiny_ids, tiny_model

no_dropout = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}


def drawn_model(config: OpenLlamaConfig, seed: int) -> OpenLlamaForCausalLM:
    """In float64, where laws can be told from rounding whatever the weights."""
    torch.manual_seed(seed)
    return randomise_norms(OpenLlamaForCausalLM(config, attn_implementation="eager"), seed).eval().double()


# --- which tensor makes the logits ---


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_shared_means_no_head_and_tied_means_the_same_tensor(shared: bool, tied: bool) -> None:
    model = tiny_model(shared_input_output_embedding=shared, tie_word_embeddings=tied)
    table = model.model.embedding.tokens.weight
    assert isinstance(model.lm_head, SharedHead) is shared
    assert ("lm_head.weight" in model.state_dict()) is not shared
    weight = model.get_output_embeddings().weight
    assert (weight is table) is (shared or tied)
    last = model(tiny_ids(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model(tiny_ids()).logits, F.linear(last, weight))


def test_a_shared_head_is_the_raw_table_not_the_normalised_one() -> None:
    model = tiny_model()
    last = model.model(tiny_ids()).last_hidden_state
    assert torch.equal(model(tiny_ids()).logits, last @ model.model.embedding.tokens.weight.T)


@pytest.mark.parametrize("change", [lambda model: model.double(), lambda model: model.to(torch.bfloat16)])
def test_a_tie_survives_a_change_of_type(change: Any) -> None:
    model = change(tiny_model(shared_input_output_embedding=False, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embedding.tokens.weight


def test_tying_again_mends_a_tie_that_assigning_broke() -> None:
    model = tiny_model(shared_input_output_embedding=False, tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight is not model.model.embedding.tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embedding.tokens.weight


def test_training_a_tied_table_moves_both_ends() -> None:
    model = tiny_model(shared_input_output_embedding=False, tie_word_embeddings=True)
    ids = tiny_ids(1, 3)
    model(ids, labels=ids).loss.backward()
    unused = [i for i in range(23) if i not in ids]
    assert bool((model.lm_head.weight.grad[unused].norm(dim=-1) > 0).all())  # as logits only
    assert len(list(model.parameters())) == len(list(tiny_model().parameters()))


# --- logits and loss ---


@examples(30)
@given(data=st.data(), config=configs(), seed=seeds, keep=st.integers(0, 25))
@torch.no_grad()
def test_keeping_some_logits_is_a_slice_of_all(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, keep: int
) -> None:
    batch: Batch = in_float64(data.draw(batches(config)))
    del batch["labels"]
    model = drawn_model(config, seed)
    kept = model(**batch, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, model(**batch).logits[:, -keep:])


@examples(30)
@given(data=st.data(), config=configs(), seed=seeds)
def test_the_loss_scores_each_token_by_the_logits_before_it(
    data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = in_float64(data.draw(batches(config)))
    out = drawn_model(config, seed)(**batch)
    labels, logits = batch["labels"], out.logits.double().log_softmax(-1)
    surprises = [
        -logits[row, t - 1, labels[row, t]]
        for row in range(labels.shape[0])
        for t in range(1, labels.shape[1])
        if labels[row, t] != -100
    ]
    if length_of(batch) == 1:
        assert out.loss.isnan()
        return
    torch.testing.assert_close(out.loss, torch.stack(surprises).mean())


@examples(25)
@given(data=st.data(), config=configs(**no_dropout), seed=seeds)
def test_the_loss_without_all_logits_is_the_same_with_the_same_gradients(
    data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = in_float64(data.draw(batches(config).filter(lambda drawn: length_of(drawn) > 1)))
    model, other = drawn_model(config, seed), drawn_model(config, seed)
    whole = model(**batch).loss
    whole.backward()
    chunked = other.loss(batch.pop("input_ids", None), batch.pop("labels"), **batch)
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"logits_to_keep": -1}, ("logits_to_keep", "-1")),
        ({"labels": tiny_ids(), "logits_to_keep": 2}, ("labels", "logits_to_keep=2")),
        ({"labels": tiny_ids(2, 6)}, ("(2, 7)", "(2, 6)")),
        ({"labels": tiny_ids().float()}, ("integers", "torch.float32")),
        ({"labels": tiny_ids() + 22}, ("outside the vocabulary of 23", "-100")),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_an_impossible_loss_is_refused(arguments: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        tiny_model()(tiny_ids(), **arguments)
    assert [part for part in said if part not in str(caught.value)] == []


def test_labels_of_any_integer_type_give_the_same_loss() -> None:
    model, ids = tiny_model(), tiny_ids()
    losses = [model(ids, labels=ids.to(dtype)).loss for dtype in (torch.int64, torch.int32, torch.int16)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_a_tuple_is_the_output_in_order(kind: Any) -> None:
    model = tiny_model(kind)
    everything = {"output_attentions": True, "output_hidden_states": True}
    named = model(tiny_ids(), **everything)
    plain = model(tiny_ids(), **everything, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named) == 4
    assert torch.equal(plain[0], named[0])
    model.config = dataclasses.replace(model.config, return_dict=False, use_cache=False)
    assert isinstance(model(tiny_ids()), tuple)
    assert len(model(tiny_ids())) == 1
    assert model(tiny_ids(), return_dict=True).keys() in (["logits"], ["last_hidden_state"])


# --- arguments that have been checked ---


def test_inputs_go_through_unchecked_and_give_the_same() -> None:
    model, mask = tiny_model(), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(tiny_ids(), attention_mask=mask, output_hidden_states=True)
    inputs = Inputs(tiny_ids(), mask=mask, output_hidden_states=True)
    for found in (model(inputs), model(inputs, logits_to_keep=0)):
        torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=0, atol=0)
    assert torch.equal(model.model(inputs).last_hidden_state, expected.hidden_states[-1])
    model.config = dataclasses.replace(model.config, return_dict=False)
    assert torch.equal(model(inputs).logits, expected.logits)


@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM])
@pytest.mark.parametrize("name", ["attention_mask", "past_key_values", "use_cache", "output_attentions"])
def test_arguments_beside_inputs_would_be_ignored_and_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(InputError, match="Inputs hold all arguments"):
        tiny_model(kind)(Inputs(tiny_ids()), **{name: torch.ones(2, 7)})


def test_a_classifier_takes_inputs_too() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    assert torch.equal(model(Inputs(ids)).logits, model(ids).logits)
    vectors = model.model.embedding(ids)
    assert torch.equal(model(Inputs(vectors)).logits, model(inputs_embeds=vectors).logits)


def test_warnings_name_the_line_that_calls_the_package() -> None:
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache is switched off") as caught:
        model(tiny_ids())
    assert [one.filename for one in caught] == [__file__]
    with pytest.warns(UserWarning, match="a sequence of more than 16 tokens") as caught:
        tiny_model().generate(tiny_ids(), max_new_tokens=12)
    assert [one.filename for one in caught] == [__file__]


# --- classification ---


def pooled(model: OpenLlamaForSequenceClassification, ids: Tensor, at: list[int]) -> Tensor:
    hidden = model.model(ids).last_hidden_state
    return model.score(hidden[torch.arange(len(ids)), torch.tensor(at)])


def test_the_last_token_that_is_not_padding_decides_wherever_padding_is() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 5, 6], [5, 6, 0, 0], [5, 0, 6, 0], [5, 0, 0, 0]])
    out = model(ids)
    assert out.logits.shape == (5, 3)
    torch.testing.assert_close(out.logits, pooled(model, ids, [3, 3, 1, 2, 0]))


def test_without_a_padding_id_or_with_embeddings_the_last_token_decides() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [1, 2, 3, 0]])
    model = tiny_model(OpenLlamaForSequenceClassification, pad_token_id=None)
    torch.testing.assert_close(model(ids).logits, pooled(model, ids, [3, 3]))
    model = tiny_model(OpenLlamaForSequenceClassification, pad_token_id=0)
    embedded = model(inputs_embeds=model.model.embedding(ids)).logits
    torch.testing.assert_close(embedded, pooled(model, ids, [3, 3]))


def test_a_row_of_nothing_but_padding_is_refused_by_number() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, pad_token_id=4)
    with pytest.raises(InputError, match=r"row 1 .*padding \(id 4\)"):
        model(torch.tensor([[1, 4], [4, 4], [4, 4]]))


def test_a_call_with_labels_leaves_the_config_alone() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification)
    before = model.config
    assert model(tiny_ids(), labels=torch.tensor([0, 1])).loss.ndim == 0
    assert model.config is before
    assert model.config.problem_type is None


@pytest.mark.parametrize(
    ("labels", "num_labels"),
    [
        (torch.tensor([0, 2], dtype=torch.int32), 3),
        (torch.tensor([0, 2]), 3),
        (torch.rand(2, 3), 3),
        (torch.rand(2), 1),
        (torch.tensor([1, 2]), 1),
    ],
    ids=str,
)
def test_classification_trains_on_labels_of_every_kind(labels: Tensor, num_labels: int) -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, num_labels=num_labels)
    out = model(tiny_ids(), labels=labels)
    out.loss.backward()
    assert bool(out.loss.isfinite())
    assert model.score.weight.grad.abs().sum() > 0
    assert model.model.embedding.tokens.weight.grad.abs().sum() > 0


def test_impossible_classification_labels_are_refused() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, num_labels=3)
    with pytest.raises(InputError, match=r"label 3 .*3 classes"):
        model(tiny_ids(), labels=torch.tensor([0, 3]))
    with pytest.raises(InputError, match=r"\(2,\).*\(3,\)"):
        model(tiny_ids(), labels=torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("kind", [OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_heads_keep_the_decoder_in_model(kind: Any) -> None:
    model = tiny_model(kind)
    assert model.base_model is model.get_decoder() is model.model
    assert model.get_input_embeddings() is model.model.embedding.tokens
    assert model.config == tiny_config()
