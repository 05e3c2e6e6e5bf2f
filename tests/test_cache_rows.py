"""Caches in use: many tokens at once, rows repeated, picked and reordered, ends cut off, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.cache import Cache, GrowingCache, PreallocatedCache
from openllama.checks import as_cache
from openllama.errors import InputError
from tests.draw import examples
from tests.parity.draws import chunkings, configs, padding_mask, randomise_norms, seeds
from tests.tiny import CONFIG, tiny_ids, tiny_model

BACKENDS = ("eager", "sdpa")
CACHES = ("growing", "preallocated")
STATIC = {"rope_scaling": None}  # under dynamic scaling cached keys keep the base of their time


def model_of(config: OpenLlamaConfig, seed: int, backend: str) -> OpenLlamaForCausalLM:
    torch.manual_seed(seed)
    return randomise_norms(OpenLlamaForCausalLM(config, attn_implementation=backend), seed).eval()


def empty(kind: str, config: OpenLlamaConfig, rows: int, length: int) -> Cache:
    return GrowingCache(()) if kind == "growing" else PreallocatedCache(config, rows, length)


def contents(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(key.clone(), value.clone()) for key, value in cache]


drawn = {
    "config": configs(**STATIC, initializer_range=0.2),
    "seed": seeds,
    "backend": st.sampled_from(BACKENDS),
    "kind": st.sampled_from(CACHES),
}


@examples(40)
@given(data=st.data(), **drawn, length=st.integers(2, 16), padding=st.sampled_from(("ones", "left")))
@torch.no_grad()
def test_many_tokens_at_once_continue_as_one_long_prompt(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, backend: str, kind: str, length: int, padding: str
) -> None:
    model = model_of(config, seed, backend)
    ids = torch.randint(config.vocab_size, (3, length))
    mask = padding_mask(padding, 3, length, torch.Generator().manual_seed(seed))
    cache, end, logits = empty(kind, config, 3, length), 0, []
    for count in data.draw(chunkings(length)):
        end += count
        out = model(ids[:, end - count : end], attention_mask=mask[:, :end].long(), past_key_values=cache)
        cache = out.past_key_values
        logits.append(out.logits)
    whole = model(ids, attention_mask=mask.long())
    torch.testing.assert_close(torch.cat(logits, 1)[mask], whole.logits[mask])
    for (key, value), (whole_key, whole_value) in zip(cache, whole.past_key_values, strict=True):
        seen = mask[:, None, :, None].expand_as(key)
        torch.testing.assert_close(key[seen], whole_key[seen])
        torch.testing.assert_close(value[seen], whole_value[seen])


@examples(40)
@given(**drawn, rows=st.lists(st.integers(0, 2), min_size=1, max_size=6), spare=st.integers(0, 3))
@torch.no_grad()
def test_rows_that_are_picked_go_on_as_the_rows_they_were(
    config: OpenLlamaConfig, seed: int, backend: str, kind: str, rows: list[int], spare: int
) -> None:
    model = model_of(config, seed, backend)
    ids = torch.randint(config.vocab_size, (3, 9))
    mask = padding_mask("left", 3, 5, torch.Generator().manual_seed(seed)).long()
    mask = torch.cat((mask, torch.ones(3, 4, dtype=torch.long)), 1)
    cache = model(
        ids[:, :5], attention_mask=mask[:, :5], past_key_values=empty(kind, config, 3, 9 + spare)
    ).past_key_values
    before = contents(cache)
    picked = cache.reorder(torch.tensor(rows))
    if kind == "growing":
        torch.testing.assert_close(contents(cache), before, rtol=0, atol=0)
    torch.testing.assert_close(contents(picked), [(key[rows], value[rows]) for key, value in before], rtol=0, atol=0)
    new = torch.randint(config.vocab_size, (len(rows), 4))
    out = model(new, attention_mask=mask[rows], past_key_values=picked)
    whole = model(torch.cat((ids[rows, :5], new), 1), attention_mask=mask[rows])
    torch.testing.assert_close(out.logits, whole.logits[:, 5:])


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_beams_reorder_step_by_step(kind: str) -> None:
    """One prompt, repeated for three beams, whose pasts change places after each token."""
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    texts = tiny_ids(1, 4)
    cache = model(texts, past_key_values=empty(kind, CONFIG, 1, 9)).past_key_values
    cache, texts = cache.reorder(torch.zeros(3, dtype=torch.long)), texts.repeat(3, 1)
    for _ in range(5):
        new = torch.randint(CONFIG.vocab_size, (3, 1), generator=generator)
        texts = torch.cat((texts, new), 1)
        out = model(new, past_key_values=cache)
        torch.testing.assert_close(out.logits, model(texts).logits[:, -1:])
        rows = torch.randint(3, (3,), generator=generator)
        cache, texts = out.past_key_values.reorder(rows), texts[rows]
    assert cache.get_seq_length() == 9


@examples(20)
@given(**drawn, length=st.integers(2, 9), kept=st.integers(0, 9), again=st.integers(1, 4))
@torch.no_grad()
def test_a_cache_cut_short_goes_on_as_if_the_rest_had_never_been(
    config: OpenLlamaConfig, seed: int, backend: str, kind: str, length: int, kept: int, again: int
) -> None:
    model = model_of(config, seed, backend)
    ids, new = torch.randint(config.vocab_size, (2, length)), torch.randint(config.vocab_size, (2, again))
    cache = model(ids, past_key_values=empty(kind, config, 2, length + again)).past_key_values.crop(kept)
    assert cache.get_seq_length() == min(kept, length)
    out = model(new, past_key_values=cache)
    whole = model(torch.cat((ids[:, :kept], new), 1)).logits
    torch.testing.assert_close(out.logits, whole[:, -again:])


def test_the_same_past_goes_on_twice_and_carries_gradients_of_both() -> None:
    model = tiny_model()
    ids, one, other = tiny_ids(2, 4), tiny_ids(2, 3, seed=1), tiny_ids(2, 2, seed=2)
    past = model(ids).past_key_values
    sum(model(new, past_key_values=past).logits.square().sum() for new in (one, other)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for new in (one, other):
        model(torch.cat((ids, new), 1)).logits[:, 4:].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-4)


def pairs(batch: int = 2, heads: int = 2, length: int = 4, width: int = 12, layers: int = 2, **options: Any) -> Any:
    shape = (batch, heads, length, width)
    return [(torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in range(layers)]


def moved(past: Any, which: int, **options: Any) -> Any:
    """The same with the last layer's key (0) or value (1) elsewhere or of another type."""
    *others, last = past
    return [*others, tuple(t.to(**options) if i == which else t for i, t in enumerate(last))]


@pytest.mark.parametrize(
    ("past", "said"),
    [
        (pairs(batch=3), ("(3, 2, 4, 12)", "(2, 2, 4, 12)")),
        (pairs(batch=1), ("(1, 2, 4, 12)", "(2, 2, 4, 12)")),
        (pairs(heads=1), ("(2, 1, 4, 12)", "(2, 2, 4, 12)")),
        (pairs(width=10), ("(2, 2, 4, 10)", "(2, 2, 4, 12)")),
        (pairs(layers=1), ("1 layers", "model 2")),
        ([pairs()[0], pairs(length=3)[0]], ("layer 1", "(2, 2, 3, 12)", "(2, 2, 4, 12)")),
        (pairs(dtype=torch.float64), ("float64", "float32")),
        (pairs(dtype=torch.bfloat16), ("bfloat16", "float32")),
        (moved(pairs(), 0, dtype=torch.float16), ("layer 1", "float16", "float32")),
        (moved(pairs(), 1, dtype=torch.float16), ("layer 1", "float16", "float32")),
        (pairs(device="meta"), ("on meta", "on cpu")),
        (moved(pairs(), 0, device="meta"), ("layer 1", "on meta", "on cpu")),
        (moved(pairs(), 1, device="meta"), ("layer 1", "on meta", "on cpu")),
        (PreallocatedCache(CONFIG, 3, 9), ("(3, 2, 0, 12)", "(2, 2, 0, 12)")),
        (PreallocatedCache(CONFIG, 2, 9, dtype=torch.float16), ("float16", "float32")),
        (PreallocatedCache(CONFIG, 2, 9, device="meta"), ("on meta", "on cpu")),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_before_any_layer_runs(past: Any, said: tuple[str, ...]) -> None:
    model = tiny_model()
    model.model.layers[0].register_forward_pre_hook(lambda module, args: pytest.fail("a layer ran"))
    with pytest.raises(InputError) as caught:
        model(tiny_ids(2, 1), past_key_values=past)
    assert [part for part in said if part not in str(caught.value)] == []


def test_where_no_device_is_named_any_will_do() -> None:
    assert as_cache(pairs(device="meta"), 2, CONFIG, torch.float32).get_seq_length() == 4
