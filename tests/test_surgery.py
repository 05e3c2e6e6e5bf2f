"""Changing the vocabulary: tables, heads and configuration stay one model, whatever is shared or tied."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.errors import InputError
from openllama.model import SharedHead
from tests.checkpoints import assert_same_tensors
from tests.draw import examples
from tests.parity.draws import configs, randomise_norms, seeds
from tests.tiny import tiny_ids, tiny_model

KINDS = (OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification)
HEADS = [
    pytest.param({"shared_input_output_embedding": shared, "tie_word_embeddings": tied}, id=name)
    for shared, tied, name in (
        (True, True, "shared and tied"),
        (True, False, "shared"),
        (False, True, "tied"),
        (False, False, "neither"),
    )
]


def tables(model: Any) -> Iterator[nn.Module]:
    """The embedding, and ``lm_head`` where there is one with rows of its own."""
    yield model.get_input_embeddings()
    if isinstance(getattr(model, "lm_head", None), nn.Linear):
        yield model.lm_head


def assert_ties_hold(model: Any) -> None:
    """What the config wants to be one tensor is one, and nothing else is."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if not isinstance(model, OpenLlamaForCausalLM):
        assert head is None
        return
    assert isinstance(head, SharedHead) == model.config.shared_input_output_embedding
    one = model.config.shared_input_output_embedding or model.config.tie_word_embeddings
    assert (head.weight is table) == one
    assert head.weight.shape == table.shape


@examples(60)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    config=configs(bos_token_id=None, eos_token_id=None),
    size=st.integers(1, 100),
    seed=seeds,
)
def test_old_rows_are_kept_and_everything_follows(
    data: st.DataObject, kind: Any, config: OpenLlamaConfig, size: int, seed: int
) -> None:
    size = max(size, (config.padding_idx or 0) + 1)
    torch.manual_seed(seed)
    model = randomise_norms(kind(config, attn_implementation="eager"), seed).eval()
    before = [module.weight.detach().clone() for module in tables(model)]
    kept = min(size, config.vocab_size)
    ids = torch.randint(kept, (2, data.draw(st.integers(1, 9))))
    states = model.base_model(ids, output_hidden_states=True).hidden_states
    logits = model(ids)[0] if kind is OpenLlamaForCausalLM else None

    returned = model.resize_token_embeddings(size)

    assert returned is model.get_input_embeddings()
    assert model.config == dataclasses.replace(config, vocab_size=size, pad_token_id=model.config.pad_token_id)
    assert model.base_model.config is model.config
    assert_ties_hold(model)
    for module, old in zip(tables(model), before, strict=True):
        assert module.weight.shape == (size, config.hidden_size)
        assert torch.equal(module.weight[:kept], old[:kept])
        assert bool(module.weight.isfinite().all())
    assert returned.padding_idx == model.config.padding_idx == config.padding_idx
    after = model.base_model(ids, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, after, states))
    if logits is not None:
        torch.testing.assert_close(model(ids)[0][..., :kept], logits[..., :kept])
    fresh = kind(model.config, attn_implementation="eager").eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert all(map(torch.equal, fresh.base_model(ids, output_hidden_states=True).hidden_states, states))


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [17, 40])
def test_a_resized_model_can_be_saved_and_loaded(fields: dict[str, bool], kind: Any, size: int, tmp_path: Path) -> None:
    model = tiny_model(kind, **fields)
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = kind.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.config.vocab_size == size
    assert_ties_hold(loaded)
    ids = tiny_ids() % 17
    assert torch.equal(loaded(ids)[0], model(ids)[0])


@pytest.mark.parametrize("fields", HEADS)
def test_new_tokens_can_be_read_trained_and_written(fields: dict[str, bool]) -> None:
    model = tiny_model(**fields)
    model.resize_token_embeddings(25)
    ids = torch.tensor([[5, 24, 23, 6, 24]])
    out = model(ids, labels=ids)
    assert out.logits.shape == (1, 5, 25)
    out.loss.backward()
    for module in tables(model):
        assert bool(module.weight.grad[23:].any(-1).all())
    assert model.generate(ids, max_new_tokens=3).shape == (1, 8)
    torch.testing.assert_close(model.loss(ids, ids), out.loss)


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize("stable", [True, False])
def test_new_rows_are_drawn_as_those_of_a_new_model_are(fields: dict[str, bool], stable: bool) -> None:
    model = tiny_model(**fields, use_stable_embedding=stable, initializer_range=0.05)
    model.resize_token_embeddings(2000)
    xavier = (2 / (2000 + 24)) ** 0.5
    table, *head = (module.weight.detach()[23:] for module in tables(model))
    assert float(table.std()) == pytest.approx(xavier if stable else 0.05, rel=0.05)
    assert float(table.mean()) == pytest.approx(0.0, abs=0.005)
    if head and not model.config.tie_word_embeddings:
        assert float(head[0].std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(("size", "multiple", "expected"), [
    (None, 8, 24), (None, 23, 23), (24, 8, 24), (25, 8, 32), (1000, 64, 1024), (17, 16, 32), (7, 1, 7),
])  # fmt: skip
def test_sizes_are_rounded_up_to_a_multiple(size: int | None, multiple: int | None, expected: int) -> None:
    model = tiny_model()
    assert model.resize_token_embeddings(size, pad_to_multiple_of=multiple).weight.shape == (expected, 24)
    assert model.config.vocab_size == expected


@pytest.mark.parametrize("fields", HEADS)
def test_the_same_size_changes_nothing_at_all(fields: dict[str, bool]) -> None:
    model = tiny_model(**fields, pad_token_id=-1)
    config, parameters = model.config, list(model.parameters())
    for size in (None, 23):
        assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config is config
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


@pytest.mark.parametrize("fields", HEADS)
def test_growing_and_shrinking_again_gives_the_model_back(fields: dict[str, bool]) -> None:
    model = tiny_model(**fields)
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config
    model.resize_token_embeddings(100)
    model.resize_token_embeddings(23)
    assert_same_tensors(model.state_dict(), before)
    assert model.config == config


@pytest.mark.parametrize("pad", [-1, -20])
def test_a_negative_padding_id_becomes_the_number_of_its_row(pad: int) -> None:
    model = tiny_model(pad_token_id=pad)
    model.resize_token_embeddings(24)
    assert model.config.pad_token_id == model.get_input_embeddings().padding_idx == 23 + pad
    model.model(torch.tensor([[23, 23 + pad]])).last_hidden_state.square().sum().backward()
    assert model.get_input_embeddings().weight.grad.any(-1).nonzero().flatten().tolist() == [23]


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize("frozen", [("input",), ("output",), ("input", "output"), ()])
def test_frozen_tables_stay_frozen_and_others_do_not(fields: dict[str, bool], frozen: tuple[str, ...]) -> None:
    model = tiny_model(**fields)
    for which in frozen:
        {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}[which].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.resize_token_embeddings(40)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_type_device_and_mode_are_kept(dtype: torch.dtype, training: bool) -> None:
    model = tiny_model(shared_input_output_embedding=False).to(dtype).train(training)
    model.resize_token_embeddings(40)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {module.training for module in model.modules()} == {training}
    model.to("meta").resize_token_embeddings(50)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(("fields", "size", "said"), [
    ({"pad_token_id": 12}, 12, "a vocabulary of 12 has no row for pad_token_id 12"),
    ({"pad_token_id": -1}, 22, "a vocabulary of 22 has no row for pad_token_id 22"),
    ({"bos_token_id": 9}, 5, "a vocabulary of 5 has no row for bos_token_id 9"),
    ({"eos_token_id": 9}, 9, "a vocabulary of 9 has no row for eos_token_id 9"),
    ({"eos_token_id": [2, 15]}, 10, "a vocabulary of 10 has no row for eos_token_id 15"),
    ({}, 0, "must be a positive integer, got 0"),
    ({}, -3, "must be a positive integer, got -3"),
    ({}, 30.0, r"must be a positive integer, got 30\.0"),
    ({}, "30", "must be a positive integer, got '30'"),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_is_refused_and_nothing_has_changed(
    kind: Any, fields: dict[str, Any], size: Any, said: str
) -> None:
    model = tiny_model(kind, **fields)
    config, before = model.config, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        model.resize_token_embeddings(size)
    assert model.config is config
    assert_same_tensors(model.state_dict(), before)


def test_a_special_id_may_be_the_last_row_or_none() -> None:
    model = tiny_model(pad_token_id=None, bos_token_id=None, eos_token_id=[1, 4])
    assert model.resize_token_embeddings(5).padding_idx is None
    assert model.config.eos_token_id == [1, 4]


# ---- getting and setting


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_that_is_set_is_the_one_used(kind: Any) -> None:
    model = tiny_model(kind, tie_word_embeddings=True, shared_input_output_embedding=False)
    new = nn.Embedding(23, 24, padding_idx=0)
    other = tiny_model(kind, tie_word_embeddings=True, shared_input_output_embedding=False)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(new.weight)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert_ties_hold(model)
    assert torch.equal(model(tiny_ids())[0], other(tiny_ids())[0])


@pytest.mark.parametrize("fields", [{"shared_input_output_embedding": False}, {"tie_word_embeddings": True}])
def test_modules_of_another_kind_are_refused_by_name(fields: dict[str, bool]) -> None:
    model = tiny_model(**{"shared_input_output_embedding": False, **fields})
    with pytest.raises(InputError, match=r"nn\.Linear without bias, got Embedding"):
        model.set_output_embeddings(model.get_input_embeddings())
    with pytest.raises(InputError, match=r"nn\.Linear without bias, got Linear.*bias=True"):
        model.set_output_embeddings(nn.Linear(24, 23))
    with pytest.raises(InputError, match=r"nn\.Linear without bias, got None"):
        model.set_output_embeddings(None)
    with pytest.raises(InputError, match=r"nn\.Embedding, got Linear"):
        model.set_input_embeddings(nn.Linear(24, 23))


def test_a_shared_model_takes_its_own_table_back_as_its_head() -> None:
    model = tiny_model(shared_input_output_embedding=True)
    head = model.get_output_embeddings()
    for same in (head, model.get_input_embeddings()):
        model.set_output_embeddings(same)
        assert model.lm_head is head


@pytest.mark.parametrize("place", ["lm_head", "model.embedding.tokens"])
def test_what_an_adapter_has_wrapped_is_not_resized(place: str) -> None:
    model = tiny_model(shared_input_output_embedding=False)
    module = model.get_submodule(place)
    wrapper = nn.Sequential(module)
    wrapper.weight = module.weight
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, wrapper)
    with pytest.raises(InputError, match="Sequential; remove adapters" if not parent else "Sequential and Linear"):
        model.resize_token_embeddings(30)
    assert model.config.vocab_size == 23


def test_a_head_with_a_bias_is_not_resized() -> None:
    model = tiny_model(shared_input_output_embedding=False)
    model.lm_head = nn.Linear(24, 23)
    with pytest.raises(InputError, match="bias of 23 numbers"):
        model.resize_token_embeddings(30)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 23


def test_a_hook_on_the_table_outlives_another_size() -> None:
    model = tiny_model().requires_grad_(False)
    model.enable_input_require_grads()
    model.resize_token_embeddings(30)
    assert model(tiny_ids()).logits.requires_grad


def test_an_id_that_only_generation_knows_keeps_its_row() -> None:
    model = tiny_model()
    model.generation_config = model.generation_config.replace(eos_token_id=22)
    with pytest.raises(InputError, match="no row for eos_token_id 22"):
        model.resize_token_embeddings(22)


@pytest.mark.parametrize("multiple", ["8", 2.5, 0])
def test_a_multiple_that_is_no_positive_integer_is_refused(multiple: object) -> None:
    with pytest.raises(InputError, match="pad_to_multiple_of must be a positive integer"):
        tiny_model().resize_token_embeddings(30, pad_to_multiple_of=multiple)


@pytest.mark.parametrize("shape", [(22, 24), (23, 12), (24, 24)])
def test_tables_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    model = tiny_model(shared_input_output_embedding=False)
    with pytest.raises(InputError, match=rf"input embeddings must be \(23, 24\), got \({shape[0]}, {shape[1]}\)"):
        model.set_input_embeddings(nn.Embedding(*shape))
    with pytest.raises(InputError, match=rf"output embeddings must be \(23, 24\), got \({shape[0]}, {shape[1]}\)"):
        model.set_output_embeddings(nn.Linear(shape[1], shape[0], bias=False))


def test_a_head_of_its_own_can_be_replaced() -> None:
    model = tiny_model(shared_input_output_embedding=False)
    new = nn.Linear(24, 23, bias=False)
    model.set_output_embeddings(new)
    assert model.get_output_embeddings() is model.lm_head is new
    hidden = model.model(tiny_ids()).last_hidden_state
    assert torch.equal(model(tiny_ids()).logits, new(hidden))


@pytest.mark.parametrize("fields", HEADS[:3])
def test_a_head_that_is_the_table_cannot_become_another_tensor(fields: dict[str, bool]) -> None:
    model = tiny_model(**fields)
    said = "shared_input_output_embedding" if fields["shared_input_output_embedding"] else "tie_word_embeddings"
    with pytest.raises(InputError, match=f"{said}: the output is the input table"):
        model.set_output_embeddings(nn.Linear(24, 23, bias=False))
    same = nn.Linear(24, 23, bias=False)
    same.weight = model.get_input_embeddings().weight
    model.set_output_embeddings(same)
    assert_ties_hold(model)


def test_a_trained_head_can_be_set_loose_from_its_table() -> None:
    model = tiny_model(shared_input_output_embedding=False, tie_word_embeddings=True)
    before = model(tiny_ids()).logits
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    loose = nn.Linear(24, 23, bias=False)
    with torch.no_grad():
        loose.weight.copy_(model.get_input_embeddings().weight)
    model.set_output_embeddings(loose)
    assert torch.equal(model(tiny_ids()).logits, before)
    model.resize_token_embeddings(40)
    assert_ties_hold(model)


def test_the_padding_row_is_that_of_the_config_as_it_is_now() -> None:
    model = tiny_model(pad_token_id=0)
    model.resize_token_embeddings(31)
    model.config = dataclasses.replace(model.config, pad_token_id=30)
    assert model.resize_token_embeddings(40).padding_idx == 30


def test_weights_of_an_old_optimizer_are_no_longer_the_model_s() -> None:
    model = tiny_model()
    old: Tensor = model.get_input_embeddings().weight
    model.resize_token_embeddings(40)
    assert not any(p is old for p in model.parameters())
    assert old.shape == (23, 24)
