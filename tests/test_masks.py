"""Masks against their definition, written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama.errors import InputError
from openllama.masks import (
    Mask,
    additive_mask,
    boolean_mask,
    causal_mask,
    pack_documents,
    positions_from_mask,
)
from tests.draw import examples
from tests.parity.draws import seeds
from tests.tiny import tiny_ids, tiny_model

LOWEST = torch.finfo(torch.float32).min
lengths = st.integers(1, 7)


def hidden(batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(batch, 1, 4, dtype=dtype)


def may_see(padding: Tensor | None, row: int, t: int, s: int, cached: int) -> bool:
    """The definition: nothing later than itself, and no padding."""
    return s <= t + cached and (padding is None or bool(padding[row, s]))


def by_definition(padding: Tensor | None, batch: int, length: int, key_length: int) -> Tensor:
    cached = key_length - length
    rows = [
        [[may_see(padding, row, t, s, cached) for s in range(key_length)] for t in range(length)]
        for row in range(batch)
    ]
    return torch.tensor(rows)[:, None]


@st.composite
def paddings(draw: st.DrawFn) -> tuple[Tensor | None, int, int, int]:
    """A padding mask, perhaps None, and batch, length and key length."""
    batch, length, cached = draw(st.integers(1, 3)), draw(lengths), draw(st.integers(0, 4))
    padding = torch.rand(batch, length + cached, generator=torch.Generator().manual_seed(draw(seeds))) < 0.6
    return draw(st.sampled_from((padding, padding.long(), padding.float(), None))), batch, length, length + cached


def visible(mask: Mask, batch: int, length: int, key_length: int) -> Tensor:
    """What a fused kernel makes of a mask."""
    if mask.tensor is not None:
        return mask.tensor.expand(batch, 1, length, key_length)
    everything = torch.ones(batch, 1, length, key_length, dtype=torch.bool)
    return everything.tril() if mask.causal else everything


def test_two_tokens_padded_to_three_are_as_the_docstring_draws_them() -> None:
    mask = boolean_mask(torch.tensor([[0, 1, 1]]), 3, 3, hidden())
    assert mask.tensor is not None
    assert mask.tensor[0, 0].int().tolist() == [[1, 1, 1], [0, 1, 0], [0, 1, 1]]  # nothing to see: everything
    assert causal_mask(2, 3, torch.device("cpu")).int().tolist() == [[1, 1, 0], [1, 1, 1]]


@examples(80)
@given(drawn=paddings())
def test_the_additive_mask_is_the_definition(drawn: tuple[Tensor | None, int, int, int]) -> None:
    padding, batch, length, key_length = drawn
    expected = by_definition(padding, batch, length, key_length)
    mask = additive_mask(padding, length, key_length, hidden(batch))
    assert not mask.causal
    if mask.tensor is None:
        assert bool(expected.all())
        return
    found = mask.tensor.expand(batch, 1, length, key_length)
    assert torch.equal(found == 0, expected)
    assert bool((found[~expected] <= LOWEST).all())


@examples(80)
@given(drawn=paddings())
def test_the_boolean_mask_is_the_definition_but_for_rows_that_see_nothing(
    drawn: tuple[Tensor | None, int, int, int],
) -> None:
    padding, batch, length, key_length = drawn
    expected = by_definition(padding, batch, length, key_length)
    found = visible(boolean_mask(padding, length, key_length, hidden(batch)), batch, length, key_length)
    blind = ~expected.any(-1, keepdim=True)
    assert torch.equal(found, expected | blind)
    assert bool(found.any(-1).all())


def test_without_padding_no_tensor_is_made() -> None:
    assert boolean_mask(None, 5, 5, hidden(2)) == Mask(causal=True)
    assert boolean_mask(None, 1, 5, hidden(2)) == Mask()


@examples(30)
@given(drawn=paddings())
def test_the_mask_that_is_given_is_not_changed(drawn: tuple[Tensor | None, int, int, int]) -> None:
    padding, batch, length, key_length = drawn
    before = None if padding is None else padding.clone()
    additive_mask(padding, length, key_length, hidden(batch))
    boolean_mask(padding, length, key_length, hidden(batch))
    assert padding is None or torch.equal(padding, before)


def test_a_bool_mask_of_four_dimensions_is_used_as_it_is() -> None:
    given_mask = torch.rand(2, 3, 4, 5) < 0.5
    given_mask[0, 0, 0] = False
    additive = additive_mask(given_mask, 4, 5, hidden(2)).tensor
    assert additive is not None
    assert torch.equal(additive == 0, given_mask)
    assert torch.equal(additive == LOWEST, ~given_mask)
    seen = boolean_mask(given_mask, 4, 5, hidden(2)).tensor
    assert seen is not None
    assert bool(seen[0, 0, 0].all())
    assert torch.equal(seen.flatten(0, 2)[1:], (given_mask | ~given_mask.any(-1, keepdim=True)).flatten(0, 2)[1:])


def test_an_additive_mask_of_four_dimensions_is_used_as_it_is_but_finite() -> None:
    given_mask = torch.randn(2, 1, 4, 5)
    given_mask[0, 0, 1] = -torch.inf
    additive = additive_mask(given_mask, 4, 5, hidden(2)).tensor
    fused = boolean_mask(given_mask, 4, 5, hidden(2)).tensor
    assert additive is not None
    assert fused is not None
    assert torch.equal(additive, given_mask)
    assert torch.equal(fused, given_mask.clamp(min=LOWEST))
    assert additive_mask(given_mask, 4, 5, hidden(2, torch.float64)).tensor.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_additive_mask_is_of_the_type_of_the_scores(dtype: torch.dtype) -> None:
    tensor = additive_mask(torch.tensor([[0, 1]]), 1, 2, hidden(dtype=dtype)).tensor
    assert tensor is not None
    assert tensor.dtype == dtype
    assert tensor.flatten().tolist() == [torch.finfo(dtype).min, 0.0]


# --- positions ---


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])
    assert positions_from_mask(mask).tolist() == [[1, 1, 0, 1], [0, 1, 1, 2]]
    assert positions_from_mask(mask.bool()).tolist() == [[1, 1, 0, 1], [0, 1, 1, 2]]


# --- documents end to end ---


@examples(25)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=seeds, fused=st.booleans())
@torch.no_grad()
def test_a_packed_document_gets_the_numbers_it_would_get_alone(lengths: list[int], seed: int, fused: bool) -> None:
    model = tiny_model(attn_implementation="sdpa" if fused else "eager")
    ids = tiny_ids(1, sum(lengths), seed)
    mask, positions = pack_documents(lengths)
    packed = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)


def test_documents_are_as_the_docstring_draws_them() -> None:
    mask, positions = pack_documents([2, 1])
    assert mask.shape == (1, 1, 3, 3)
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("wrong", [[], [0], [3, -1]])
def test_documents_have_at_least_one_token(wrong: list[int]) -> None:
    with pytest.raises(InputError, match="positive") as caught:
        pack_documents(wrong)
    assert str(wrong) in str(caught.value)
