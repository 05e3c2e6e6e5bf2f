"""Arguments of a forward pass that cannot be right: each is refused with what was given and what was needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.cache import PreallocatedCache
from openllama.checks import (
    check_attention_mask,
    check_classification_labels,
    check_input_ids,
    check_inputs_embeds,
    check_labels,
    check_position_ids,
    checked_inputs,
    is_integer,
    values_of,
)
from openllama.errors import InputError
from tests.tiny import tiny_config, tiny_ids, tiny_model

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """What the InputError of this call says."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def assert_says(message: str, *parts: object) -> None:
    assert [part for part in parts if str(part) not in message] == [], message


def test_integers_are_the_integer_types_and_not_bool() -> None:
    assert all(is_integer(torch.zeros(1, dtype=dtype)) for dtype in INTEGERS)
    assert not any(is_integer(torch.zeros(1, dtype=dtype)) for dtype in (*FLOATS, torch.bool, torch.complex64))


# --- input_ids ---


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_up_to_the_end_of_the_vocabulary_are_fine(dtype: torch.dtype) -> None:
    check_input_ids(torch.tensor([[0, 9]], dtype=dtype), 10)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 2]], ("tensor", "list")),
        (torch.ones(1, 2), ("integers", "torch.float32")),
        (torch.ones(1, 2, dtype=torch.bool), ("integers", "torch.bool")),
        (torch.tensor([1, 2]), ("(batch, length)", "(2,)")),
        (torch.ones(1, 2, 3, dtype=torch.long), ("(batch, length)", "(1, 2, 3)")),
        (torch.ones(1, 0, dtype=torch.long), ("empty", "(1, 0)")),
        (torch.ones(0, 3, dtype=torch.long), ("empty", "(0, 3)")),
        (torch.tensor([[1, 10]]), ("10", "vocabulary of 10")),
        (torch.tensor([[1, -1]]), ("-1", "vocabulary of 10")),
    ],
    ids=str,
)
def test_impossible_ids_are_refused(ids: Any, said: tuple[str, ...]) -> None:
    assert_says(refusal(check_input_ids, ids, 10), *said)


# --- inputs_embeds ---


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((2, 8), torch.float32, ("(batch, length, 8)", "(2, 8)")),
        ((2, 3, 9), torch.float32, ("(batch, length, 8)", "(2, 3, 9)")),
        ((2, 0, 8), torch.float32, ("empty", "(2, 0, 8)")),
        ((2, 3, 8), torch.int64, ("floating point", "torch.int64")),
    ],
)
def test_impossible_embeddings_are_refused(shape: tuple[int, ...], dtype: torch.dtype, said: tuple[str, ...]) -> None:
    assert_says(refusal(check_inputs_embeds, torch.ones(shape, dtype=dtype), 8), *said)


def test_embeddings_of_any_floating_type_are_fine() -> None:
    for dtype in FLOATS:
        check_inputs_embeds(torch.ones(2, 3, 8, dtype=dtype), 8)


# --- position_ids ---


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)])
def test_positions_of_all_rows_or_of_each_are_fine(shape: tuple[int, ...]) -> None:
    check_position_ids(torch.arange(3).expand(shape), 2, 3)
    logits = [
        tiny_model()(tiny_ids(2, 3), position_ids=torch.arange(3).expand(size)).logits for size in (shape, (2, 3))
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        (torch.zeros(2, 3), ("integers", "torch.float32")),
        (torch.zeros(2, 4, dtype=torch.long), ("(2, 3)", "(2, 4)")),
        (torch.zeros(3, 3, dtype=torch.long), ("(2, 3)", "(3, 3)")),
        (torch.zeros(1, 2, 3, dtype=torch.long), ("(2, 3)", "(1, 2, 3)")),
        (torch.zeros((), dtype=torch.long), ("(2, 3)", "()")),
        (torch.tensor([[0, 1, -2]]), ("negative", "-2")),
    ],
    ids=str,
)
def test_impossible_positions_are_refused(positions: torch.Tensor, said: tuple[str, ...]) -> None:
    assert_says(refusal(check_position_ids, positions, 2, 3), *said)


# --- attention_mask ---


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, torch.bool])
def test_a_padding_mask_of_zeros_and_ones_of_any_type_is_fine(dtype: torch.dtype) -> None:
    check_attention_mask(torch.tensor([[0, 1, 1]]).to(dtype), 1, 2, 3)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (2, 1, 3, 5), (1, 4, 3, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.bool, *FLOATS])
def test_a_full_mask_may_differ_by_row_and_by_head(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_attention_mask(torch.zeros(shape, dtype=dtype), 2, 3, 5, heads=4)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(5), ("(2, 5)", "(5,)")),
        (torch.ones(3, 5), ("(2, 5)", "(3, 5)")),
        (torch.ones(1, 5), ("(2, 5)", "(1, 5)")),
        (torch.ones(2, 3, 5), ("(2, 5)", "(2, 3, 5)")),
        (torch.ones(2, 3), ("covers 3", "there are 5", "2 cached", "3 new", "cover them all")),
        (torch.ones(2, 6), ("covers 6", "there are 5")),
        (torch.tensor([[0, 1, 2, 1, 1]] * 2), ("only 1", "and 0")),
        (torch.tensor([[0.0, -1e9, 0, 0, 0]] * 2), ("only 1", "4-D mask for additive values")),
        (torch.full((2, 5), float("nan")), ("only 1",)),
        (torch.ones(2, 1, 5, 5), ("(2, 1, 3, 5)", "(2, 1, 5, 5)")),
        (torch.ones(3, 1, 3, 5), ("(2, 1, 3, 5)", "(3, 1, 3, 5)")),
        (torch.ones(2, 2, 3, 5), ("(2, 1, 3, 5)", "(2, 2, 3, 5)")),
        (torch.ones(2, 1, 3, 5, dtype=torch.long), ("bool or additive", "torch.int64")),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_impossible_masks_are_refused(mask: torch.Tensor, said: tuple[str, ...]) -> None:
    assert_says(refusal(check_attention_mask, mask, batch=2, length=3, key_length=5, heads=4), *said)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_padding_mask_of_ones_is_dropped_and_any_other_goes_on(dtype: torch.dtype) -> None:
    def mask_of(mask: torch.Tensor) -> torch.Tensor | None:
        return checked_inputs(tiny_config(), torch.float32, tiny_ids(2, 3), mask, None, None, None).mask

    assert mask_of(torch.ones(2, 3, dtype=dtype)) is None
    padded = torch.tensor([[0, 1, 1], [1, 1, 1]]).to(dtype)
    assert mask_of(padded) is padded
    full = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert mask_of(full) is full


# --- labels ---


def test_labels_inside_the_vocabulary_or_ignored_are_fine() -> None:
    check_labels(torch.tensor([[0, 9, -100]]), torch.Size((1, 3)), 10)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(3, dtype=torch.long), ("(1, 3)", "(3,)")),
        (torch.zeros(1, 4, dtype=torch.long), ("(1, 3)", "(1, 4)")),
        (torch.zeros(1, 3), ("integers", "torch.float32")),
        (torch.tensor([[0, 10, 1]]), ("label 10", "vocabulary of 10", "-100")),
        (torch.tensor([[0, -1, 1]]), ("label -1", "vocabulary of 10", "-100")),
    ],
    ids=str,
)
def test_impossible_labels_are_refused(labels: torch.Tensor, said: tuple[str, ...]) -> None:
    assert_says(refusal(check_labels, labels, torch.Size((1, 3)), 10), *said)


@pytest.mark.parametrize(
    ("labels", "num_labels", "kind"),
    [
        (torch.rand(2), 1, "regression"),
        (torch.tensor([1, 2]), 1, "regression"),
        (torch.tensor([1, 2]), 3, "single_label_classification"),
        (torch.tensor([[1], [2]]), 3, "single_label_classification"),
        (torch.tensor([1, 2], dtype=torch.int32), 3, "single_label_classification"),
        (torch.rand(2, 3), 3, "multi_label_classification"),
    ],
    ids=str,
)
def test_the_kind_of_classification_follows_from_the_labels(labels: torch.Tensor, num_labels: int, kind: str) -> None:
    assert check_classification_labels(labels, 2, tiny_config(num_labels=num_labels)) == kind


@pytest.mark.parametrize(
    ("labels", "problem_type", "said"),
    [
        (torch.tensor([0, 1, 1]), None, ("single_label", "(2,)", "(3,)")),
        (torch.rand(2), None, ("multi_label", "(2, 3)", "(2,)")),
        (torch.rand(2, 2), "regression", ("regression", "(2, 3)", "(2, 2)")),
        (torch.rand(2), "single_label_classification", ("integers", "torch.float32")),
        (torch.tensor([0, 3]), None, ("label 3", "3 classes")),
        (torch.tensor([0, -1]), None, ("label -1", "3 classes")),
    ],
    ids=str,
)
def test_impossible_classes_are_refused(labels: torch.Tensor, problem_type: str | None, said: tuple[str, ...]) -> None:
    config = tiny_config(num_labels=3, problem_type=problem_type)
    assert_says(refusal(check_classification_labels, labels, 2, config), *said)


# --- as the models call them ---


@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, ("either input_ids or inputs_embeds", "neither")),
        ({"input_ids": tiny_ids(), "inputs_embeds": torch.ones(2, 7, 24)}, ("either", "both")),
        ({"input_ids": tiny_ids() + 22}, ("vocabulary of 23",)),
        ({"inputs_embeds": torch.ones(2, 7, 23)}, ("(batch, length, 24)", "(2, 7, 23)")),
        ({"input_ids": tiny_ids(), "attention_mask": torch.ones(2, 6)}, ("covers 6", "there are 7")),
        ({"input_ids": tiny_ids(), "attention_mask": torch.ones(2, 3, 7, 7)}, ("(2, 1, 7, 7)", "(2, 3, 7, 7)")),
        ({"input_ids": tiny_ids(), "position_ids": torch.ones(2, 6, dtype=torch.long)}, ("(2, 7)", "(2, 6)")),
        ({"input_ids": tiny_ids(), "past_key_values": ((torch.ones(1), torch.ones(1)),)}, ("1 layers", "2")),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_models_check_what_they_are_given(kind: Any, arguments: dict[str, Any], said: tuple[str, ...]) -> None:
    assert_says(refusal(tiny_model(kind), **arguments), *said)


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels"])
@pytest.mark.parametrize("kind", [OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_lists_are_refused_with_the_way_to_make_a_tensor(kind: Any, name: str) -> None:
    arguments = {"input_ids": tiny_ids()} if name != "inputs_embeds" else {}
    assert_says(refusal(tiny_model(kind), **{**arguments, name: [[1, 1]]}), name, "list", "torch.tensor")


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "attention_mask"])
def test_lists_are_refused_before_generating(name: str) -> None:
    arguments = {"input_ids": tiny_ids()} if name != "inputs_embeds" else {}
    assert_says(refusal(tiny_model().generate, **{**arguments, name: [[1, 1]]}), name, "list", "torch.tensor")


def test_a_mask_of_the_new_tokens_alone_is_refused() -> None:
    model = tiny_model()
    past = model(tiny_ids(2, 4)).past_key_values
    message = refusal(model, tiny_ids(2, 3), past_key_values=past, attention_mask=torch.ones(2, 3))
    assert_says(message, "covers 3", "there are 7", "4 cached and 3 new")


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.ones(2, 6)},
        {"position_ids": torch.full((2, 7), -1)},
        {"past_key_values": [(torch.ones(2, 2, 4, 12), torch.ones(2, 2, 4, 12))]},
        {"past_key_values": PreallocatedCache(tiny_config(), 2, 6)},
        {"labels": torch.full((2, 7), 23)},
        {"logits_to_keep": 1.0},
        {"logits_to_keep": torch.tensor([1])},
    ],
    ids=str,
)
def test_nothing_is_computed_before_a_refusal(arguments: dict[str, Any]) -> None:
    model = tiny_model()
    started: list[object] = []
    for module in model.model.modules():
        if module is not model.model:
            module.register_forward_pre_hook(lambda module, args: started.append(module))
    refusal(model, tiny_ids(), **arguments)
    assert not started


def test_a_loss_needs_labels() -> None:
    assert_says(refusal(tiny_model().loss, tiny_ids(), None), "labels", "NoneType")


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_type_that_torch_computes_with_serves_as_ids_labels_and_positions(dtype: torch.dtype) -> None:
    ids, positions = tiny_ids(), torch.arange(7)
    found = tiny_model()(ids.to(dtype), labels=ids.to(dtype), position_ids=positions.to(dtype))
    expected = tiny_model()(ids, labels=ids, position_ids=positions)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(tiny_model().loss(ids.to(dtype), ids.to(dtype)), tiny_model().loss(ids, ids))


def test_unsigned_types_that_torch_can_only_store_are_refused() -> None:
    assert_says(refusal(tiny_model(), tiny_ids().to(torch.uint16)), "integers", "torch.uint16")


def test_input_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="vocabulary of 23"):
        tiny_model()(torch.tensor([[23]]))


# --- where values cannot be read, shapes are still checked ---


def total(tensor: torch.Tensor) -> list[Any] | None:
    return values_of(tensor, torch.Tensor.sum)


def test_the_values_of_an_ordinary_tensor_are_read() -> None:
    assert total(torch.ones(2, 3)) == [6.0]
    assert total(torch.ones(3, requires_grad=True)) == total(torch.nn.Parameter(torch.ones(3))) == [3.0]
    assert values_of(torch.tensor([[4, 2]]), lambda ids: torch.stack(ids.aminmax())) == [2, 4]


@pytest.mark.parametrize(
    "run",
    [
        lambda read: torch.func.vmap(read)(torch.ones(2, 3)),
        lambda read: make_fx(read, tracing_mode="symbolic")(torch.ones(2)),
        lambda read: torch.compile(read, backend="eager")(torch.ones(2)),
        lambda read: torch.jit.trace(read, (torch.ones(2),), check_trace=False),
        lambda read: read(FakeTensorMode().from_tensor(torch.ones(2))),
    ],
    ids=["vmap", "make_fx, symbolic", "compile", "jit", "fake"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_values_are_read_where_torch_has_none(run: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def read(x: torch.Tensor) -> torch.Tensor:
        seen.append(total(x))
        return x + 1

    run(read)
    assert seen
    assert all(values is None for values in seen)


def test_values_are_not_read_on_the_meta_device() -> None:
    ids = torch.full((1, 2), 99, device="meta")
    assert total(ids) is None
    check_input_ids(ids, 10)
    check_position_ids(-ids, 1, 2)
    check_labels(ids, torch.Size((1, 2)), 10)
    check_attention_mask(ids, 1, 2, 2)
    assert_says(refusal(check_input_ids, ids[0], 10), "(2,)")


def test_shapes_can_be_computed_without_numbers() -> None:
    with FakeTensorMode():
        model, ids = tiny_model(), torch.zeros(2, 4, dtype=torch.long)
        assert model(ids, attention_mask=torch.ones(2, 4), labels=ids).logits.shape == (2, 4, 23)
        model.loss(ids, ids).backward()


def test_operations_can_be_recorded() -> None:
    model, ids = tiny_model(return_dict=False, use_cache=False), tiny_ids()
    recorded = make_fx(lambda ids: model(ids)[0])(ids)
    assert torch.equal(recorded(ids + 1), model(ids + 1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit is deprecated, and tells of every check it cannot follow
        traced = torch.jit.trace(model, (ids,))
    torch.testing.assert_close(traced(ids + 1)[0], model(ids + 1)[0])


def test_checks_of_values_are_no_part_of_a_compiled_graph() -> None:
    def check(ids: torch.Tensor) -> torch.Tensor:
        check_input_ids(ids, 10)
        return ids + 1

    ids = torch.full((1, 2), 99)
    assert torch.equal(torch.compile(check, backend="eager", fullgraph=True)(ids), ids + 1)


def test_a_sequence_beyond_the_training_is_warned_of_once_it_is_too_long() -> None:
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past = model(tiny_ids(1, 16)).past_key_values
        tiny_model(rope_scaling={"type": "linear", "factor": 2.0})(tiny_ids(1, 17))
        model(tiny_ids(1, 17), position_ids=torch.arange(17)[None] % 9)  # packed documents
    for length, cache in ((17, None), (1, past)):
        with pytest.warns(UserWarning, match=r"a sequence of more than 16 tokens \(max_position_embeddings\)"):
            model(tiny_ids(1, length), past_key_values=cache)
