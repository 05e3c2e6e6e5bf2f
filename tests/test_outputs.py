"""Outputs by name, by key and by position, as transformers' outputs are used."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pytest
import torch

from openllama import OpenLlamaModel
from openllama.errors import InputError
from openllama.outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
from tests.tiny import tiny_ids, tiny_model

LOSS, LOGITS, STATES = torch.tensor(1.0), torch.zeros(1, 2, 3), (torch.ones(1, 2, 4),)


def test_positions_count_only_what_is_set() -> None:
    with_loss = CausalLMOutput(loss=LOSS, logits=LOGITS, hidden_states=STATES)
    assert with_loss[0] is LOSS
    assert with_loss[1] is LOGITS
    assert with_loss[2] is with_loss[-1] is STATES
    assert with_loss[:2] == (LOSS, LOGITS)
    without = CausalLMOutput(logits=LOGITS, hidden_states=STATES)
    assert without[0] is LOGITS
    assert without.to_tuple() == (LOGITS, STATES)
    assert len(without) == 2
    with pytest.raises(IndexError):
        without[2]


def test_keys_are_the_names_of_what_is_set() -> None:
    out = CausalLMOutput(logits=LOGITS, hidden_states=STATES)
    assert list(out) == out.keys() == ["logits", "hidden_states"]
    assert out["logits"] is out.logits is LOGITS
    assert "logits" in out
    assert "loss" not in out
    assert dict(**out) == dict(out.items()) == {"logits": LOGITS, "hidden_states": STATES}
    assert out.values() == [LOGITS, STATES]
    assert out.get("logits") is LOGITS
    assert out.get("loss") is None
    assert out.get("no such field", 5) == 5


@pytest.mark.parametrize("key", ["loss", "no_such_field", "keys"])
def test_a_key_that_is_not_set_is_an_error_that_lists_those_that_are(key: str) -> None:
    with pytest.raises(KeyError, match=rf"{key}.*logits, hidden_states"):
        CausalLMOutput(logits=LOGITS, hidden_states=STATES)[key]


def test_a_loss_of_zero_is_a_loss() -> None:
    assert CausalLMOutput(loss=torch.tensor(0.0), logits=LOGITS).keys() == ["loss", "logits"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (BaseModelOutput, ["last_hidden_state", "past_key_values", "hidden_states", "attentions"]),
        (CausalLMOutput, ["loss", "logits", "past_key_values", "hidden_states", "attentions"]),
        (SequenceClassifierOutput, ["loss", "logits", "past_key_values", "hidden_states", "attentions"]),
    ],
)
def test_the_order_of_the_fields_is_hf_s(kind: type, names: list[str]) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == names


def test_outputs_of_models_can_be_pickled() -> None:
    out = tiny_model(OpenLlamaModel)(tiny_ids(), output_hidden_states=True)
    again = pickle.loads(pickle.dumps(out))
    assert again.keys() == out.keys()
    assert torch.equal(again[0], out[0])


def test_an_output_is_printed_with_shapes_in_place_of_numbers() -> None:
    model = tiny_model()
    out = model(tiny_ids(), labels=tiny_ids(), output_hidden_states=True)
    assert re.fullmatch(
        r"CausalLMOutput\(loss=3\.\d+, logits=float32 \(2, 7, 23\), "
        r"past_key_values=GrowingCache\(2 layers, 7 tokens\), hidden_states=3 x float32 \(2, 7, 24\)\)",
        repr(out),
    )
    made = model.generate(tiny_ids(), max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
    assert repr(made).startswith("GenerateOutput(sequences=int64 (2, 9), attentions=2 x 2 x float32 (2, 2, 7, 7), past")
    assert len(repr(model.model(tiny_ids()))) < 150


def test_an_output_is_a_dict_for_those_who_ask_and_is_made_again_from_its_items() -> None:
    out = tiny_model()(tiny_ids(), labels=tiny_ids())
    assert isinstance(out, dict)
    assert ("loss" in out, "attentions" in out) == (True, False)
    for again in (type(out)(dict(out)), type(out)((name, value) for name, value in out.items()), {**out}):
        assert list(again) == ["loss", "logits", "past_key_values"]
        assert all(again[name] is out[name] for name in out)
    out["loss"] = None
    assert out.keys() == ["logits", "past_key_values"]


@pytest.mark.parametrize("name", ["pop", "popitem", "setdefault", "update", "clear", "__delitem__"])
def test_the_fields_of_an_output_cannot_be_taken_away(name: str) -> None:
    with pytest.raises(InputError, match=r"keeps its fields; dataclasses\.replace"):
        getattr(tiny_model()(tiny_ids()), name)("logits")


def test_what_a_dict_does_does_not_lose_the_fields() -> None:
    out = tiny_model()(tiny_ids())
    again = out.copy()
    assert again is not out
    assert again.logits is out.logits
    assert list(reversed(out)) == ["past_key_values", "logits"]
    for operation in (lambda: out | {"loss": 1}, lambda: {"loss": 1} | out):
        with pytest.raises(InputError, match="keeps its fields"):
            operation()
    with pytest.raises(InputError, match="an output has no field 'score'; it has loss, logits"):
        out["score"] = 1
