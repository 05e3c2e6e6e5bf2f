"""Caches: the growing one is a value, the preallocated one a place; both hold the same numbers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.cache import GrowingCache, PreallocatedCache
from openllama.checks import as_cache
from openllama.errors import InputError
from tests.draw import examples
from tests.parity.draws import (
    Batch,
    batches,
    chunkings,
    chunks_of,
    configs,
    in_float64,
    length_of,
    randomise_norms,
    seeds,
)
from tests.tiny import CONFIG, tiny_ids, tiny_model


def pairs(length: int, batch: int = 2, layers: int = 2, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Random keys and values as the tiny model has them."""
    shape = (batch, CONFIG.num_attention_heads, length, CONFIG.head_dim)
    return [(torch.randn(shape, **options), torch.randn(shape, **options)) for _ in range(layers)]


def filled(cache: Any, new: list[tuple[Tensor, Tensor]]) -> Any:
    """The cache after a forward pass in which each layer made these keys and values."""
    return cache.advance([cache.append(layer, *pair) for layer, pair in enumerate(new)])


def assert_holds(cache: Any, expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(cache) == len(expected)
    for found, wanted in zip(cache, expected, strict=True):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    for layer, wanted in enumerate(expected):
        assert torch.equal(cache[layer][0], wanted[0])
        assert torch.equal(cache[layer][1], wanted[1])


def joined(parts: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Layer by layer, everything in one."""
    layers = zip(*parts, strict=True)
    return [(torch.cat([k for k, _ in layer], 2), torch.cat([v for _, v in layer], 2)) for layer in layers]


# --- contents ---


@examples(30)
@given(steps=st.lists(st.integers(1, 4), min_size=1, max_size=4), spare=st.integers(0, 3), seed=seeds)
def test_both_caches_hold_what_was_appended_in_order(steps: list[int], spare: int, seed: int) -> None:
    torch.manual_seed(seed)
    parts = [pairs(length) for length in steps]
    growing = GrowingCache(())
    place = PreallocatedCache(CONFIG, 2, sum(steps) + spare)
    for count, part in enumerate(parts, start=1):
        growing, place = filled(growing, part), filled(place, part)
        assert growing.get_seq_length() == place.get_seq_length() == sum(steps[:count])
        assert_holds(growing, joined(parts[:count]))
        assert_holds(place, joined(parts[:count]))


def test_lengths_are_as_the_docstring_counts_them() -> None:
    for cache in (GrowingCache(()), PreallocatedCache(CONFIG, 2, 4)):
        lengths = [cache.get_seq_length()]
        for new in (3, 1):
            cache = filled(cache, pairs(new))
            lengths.append(cache.get_seq_length())
        assert lengths == [0, 3, 4]


def test_a_growing_cache_is_hf_s_tuple_of_pairs() -> None:
    cache = tiny_model()(tiny_ids()).past_key_values
    assert isinstance(cache, tuple)
    assert isinstance(cache[0], tuple)
    key, value = cache[0]
    assert key.shape == value.shape == (2, 2, 7, 12)
    assert len(cache) == 2
    again = pickle.loads(pickle.dumps(cache))
    assert isinstance(again, GrowingCache)
    assert_holds(again, list(cache))


# --- growing changes nothing ---


def test_growing_leaves_the_past_as_it_is_so_that_it_can_be_continued_twice() -> None:
    model = tiny_model()
    past = model(tiny_ids(2, 4)).past_key_values
    before = [(key.clone(), value.clone()) for key, value in past]
    one, other = tiny_ids(2, 3, seed=1), tiny_ids(2, 3, seed=2)
    first = model(one, past_key_values=past)
    second = model(other, past_key_values=past)
    assert_holds(past, before)
    assert past.get_seq_length() == 4
    assert first.past_key_values.get_seq_length() == second.past_key_values.get_seq_length() == 7
    assert torch.equal(model(one, past_key_values=past).logits, first.logits)
    assert not torch.equal(first.logits, second.logits)


def test_gradients_flow_through_a_growing_cache() -> None:
    model = tiny_model()
    embeds = torch.randn(1, 3, CONFIG.hidden_size, requires_grad=True)
    past = model(inputs_embeds=embeds).past_key_values
    model(tiny_ids(1, 2), past_key_values=past).logits.sum().backward()
    assert embeds.grad is not None
    assert bool((embeds.grad.norm(dim=-1) > 0).all())


# --- as models use them ---


@examples(40)
@given(data=st.data(), config=configs(), seed=seeds, spare=st.integers(0, 5))
@torch.no_grad()
def test_preallocated_equals_growing(data: st.DataObject, config: OpenLlamaConfig, seed: int, spare: int) -> None:
    batch: Batch = in_float64(data.draw(batches(config)))
    torch.manual_seed(seed)
    model = randomise_norms(OpenLlamaForCausalLM(config, attn_implementation="eager"), seed).eval().double()
    growing = None
    place = PreallocatedCache(config, len(batch["labels"]), length_of(batch) + spare, torch.float64)
    for piece in chunks_of(batch, data.draw(chunkings(length_of(batch)))):
        wanted = model(**piece, past_key_values=growing)
        found = model(**piece, past_key_values=place)
        growing = wanted.past_key_values
        assert found.past_key_values is place
        torch.testing.assert_close(found.logits, wanted.logits)
        for pair, wanted_pair in zip(place, growing, strict=True):
            torch.testing.assert_close(pair, wanted_pair)


@torch.no_grad()
def test_without_use_cache_a_preallocated_cache_stays_as_it_was() -> None:
    model, place = tiny_model(), PreallocatedCache(CONFIG, 2, 10)
    model(tiny_ids(2, 4), past_key_values=place)
    before = [(key.clone(), value.clone()) for key, value in place]
    out = model(tiny_ids(2, 3), past_key_values=place, use_cache=False)
    assert out.past_key_values is None
    assert place.get_seq_length() == 4
    assert_holds(place, before)


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, place = tiny_model(), PreallocatedCache(CONFIG, 2, 6)
    first = model(tiny_ids(2, 4), past_key_values=place).past_key_values
    before = [(key.clone(), value.clone()) for key, value in first]
    with pytest.raises(InputError, match="room for 6 tokens, 4 are in it, 3 are new"):
        model(tiny_ids(2, 3), past_key_values=place)
    assert_holds(place, before)
    assert model(tiny_ids(2, 2), past_key_values=place).past_key_values.get_seq_length() == 6


@pytest.mark.parametrize("trained", ["all", "q_proj", "v_proj"])
def test_a_preallocated_cache_refuses_gradients_wherever_they_come_from(trained: str) -> None:
    model = tiny_model(num_hidden_layers=1)
    place = PreallocatedCache(model.config, 2, 10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or trained in name)
    if trained == "q_proj":  # neither keys nor values of one layer depend on its queries
        assert model(tiny_ids(), past_key_values=place).past_key_values.get_seq_length() == 7
        return
    with pytest.raises(InputError, match=r"gradients.*no_grad"):
        model(tiny_ids(), past_key_values=place)
    assert place.get_seq_length() == 0
    with torch.no_grad():
        model(tiny_ids(), past_key_values=place)
    assert not place[0][1].requires_grad


# --- rows and lengths ---


@examples(30)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=5), seed=seeds)
def test_reorder_picks_rows_in_both(rows: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    new = pairs(4, batch=3)
    expected = [(key[rows], value[rows]) for key, value in new]
    growing = filled(GrowingCache(()), new)
    place = filled(PreallocatedCache(CONFIG, 3, 6), new)
    picked = growing.reorder(torch.tensor(rows))
    assert_holds(picked, expected)
    assert_holds(growing, new)
    assert_holds(place.reorder(torch.tensor(rows)), expected)
    more = pairs(2, batch=len(rows))
    assert_holds(filled(place, more), joined([expected, more]))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 9])
def test_crop_keeps_the_beginning(length: int) -> None:
    new = pairs(4)
    expected = [(key[:, :, :length], value[:, :, :length]) for key, value in new]
    growing = filled(GrowingCache(()), new)
    assert_holds(growing.crop(length), expected)
    assert_holds(growing, new)
    place = filled(PreallocatedCache(CONFIG, 2, 6), new).crop(length)
    assert place.get_seq_length() == min(length, 4)
    assert_holds(place, expected)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: None, lambda: PreallocatedCache(CONFIG, 2, 7)])
def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer(make: Any) -> None:
    model, ids = tiny_model(), tiny_ids(2, 7)
    cache = model(ids, past_key_values=make()).past_key_values.crop(4)
    again = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids).logits[:, 4:])


@pytest.mark.parametrize("cache", [GrowingCache(()), PreallocatedCache(CONFIG, 2, 7)])
def test_no_cache_is_cropped_to_less_than_nothing(cache: Any) -> None:
    with pytest.raises(InputError, match="-1"):
        filled(cache, pairs(4)).crop(-1)


# --- what callers may pass ---


def test_nothing_a_tuple_a_list_and_both_caches_are_accepted() -> None:
    assert as_cache(None, 2, CONFIG, torch.float32).get_seq_length() == 0
    assert as_cache((), 2, CONFIG, torch.float32).get_seq_length() == 0
    place = PreallocatedCache(CONFIG, 2, 5)
    assert as_cache(place, 2, CONFIG, torch.float32) is place
    new = pairs(4)
    for past in (tuple(new), new, GrowingCache(new)):
        cache = as_cache(past, 2, CONFIG, torch.float32)
        assert isinstance(cache, GrowingCache)
        assert_holds(cache, new)


@pytest.mark.parametrize(
    ("past", "said"),
    [
        (pairs(4, layers=3), ("3 layers", "model 2")),
        (pairs(4, batch=3), ("layer 0", "(3, 2, 4, 12)", "(2, 2, 4, 12)")),
        (torch.zeros(2, 2, 2, 4, 12), ("layer 0", "two tensors", "a Tensor")),
        (torch.zeros(2, 3, 2, 2, 4, 12), ("layer 0", "two tensors", "3: (2, 2, 4, 12), (2, 2, 4, 12), (2, 2, 4, 12)")),
        ([(*pair, 0) for pair in pairs(4)], ("layer 0", "two tensors", "3: (2, 2, 4, 12), (2, 2, 4, 12), int")),
        ([(None, None)] * 2, ("layer 0", "two tensors", "2: NoneType, NoneType")),
        ([(key[0], value[0]) for key, value in pairs(4)], ("4 dimensions", "(2, 4, 12)")),
        ("ab", ("two tensors", "a str")),
        ([pairs(4)[0], pairs(3)[0]], ("layer 1", "(2, 2, 3, 12)", "(2, 2, 4, 12)")),
        ([(key, value[..., :-1]) for key, value in pairs(4)], ("(2, 2, 4, 11)", "(2, 2, 4, 12)")),
        ([(key[:, :1], value[:, :1]) for key, value in pairs(4)], ("(2, 1, 4, 12)", "(2, 2, 4, 12)")),
        (pairs(4, dtype=torch.float64), ("float64", "float32")),
        (pairs(4, device="meta"), ("layer 0", "meta", "cpu")),
        (PreallocatedCache(CONFIG, 3, 5), ("(3, 2, 0, 12)", "(2, 2, 0, 12)")),
        (PreallocatedCache(CONFIG, 2, 5, dtype=torch.bfloat16), ("bfloat16", "float32")),
    ],
)
def test_a_past_of_another_model_is_refused(past: Any, said: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        tiny_model()(tiny_ids(2, 1), past_key_values=past)
    assert [part for part in said if part not in str(caught.value)] == []


def test_a_preallocated_cache_lives_where_it_is_told() -> None:
    place = PreallocatedCache(CONFIG, 2, 5, dtype=torch.bfloat16, device="meta")
    assert place.max_length == 5
    assert place[0][0].dtype == torch.bfloat16
    assert place[0][0].device.type == "meta"


@pytest.mark.parametrize("form", [
    lambda pair: torch.stack(pair),  # as prefix tuning has it
    lambda pair: (*pair, None),  # as a cache of transformers 5 is iterated
    list,
])  # fmt: skip
def test_a_past_in_another_form_is_the_same_past(form: Any) -> None:
    model, ids = tiny_model(), tiny_ids(2, 6)
    past = model(ids[:, :4]).past_key_values
    given = tuple(form(pair) for pair in past)
    assert torch.equal(model(ids[:, 4:], past_key_values=given).logits, model(ids[:, 4:], past_key_values=past).logits)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3}
    assert torch.equal(model.generate(ids, past_key_values=given, **settings), model.generate(ids, **settings))
