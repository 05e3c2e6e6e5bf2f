"""Pieces: tensors larger than memory, cast or computed while they are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.checkpoint import pieces as module
from openllama.checkpoint.pieces import Computed, cast, is_copy, pieces
from tests.draw import examples


@examples(100)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    size=st.integers(1, 60),
    transposed=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float16)),
)
def test_pieces_are_small_and_complete(shape: list[int], size: int, transposed: bool, dtype: torch.dtype) -> None:
    tensor = torch.randn(shape)
    if transposed and shape:
        tensor = tensor.transpose(0, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        parts = list(pieces(Computed(tensor, dtype)))
        assert is_copy(tensor.to(dtype), Computed(tensor, dtype))
    assert all(part.numel() <= size and part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat([part.flatten() for part in parts]), tensor.to(dtype).flatten())


@examples(30)
@given(rows=st.integers(1, 9), width=st.integers(1, 5), size=st.integers(5, 30))
def test_a_function_of_rows_sees_whole_rows(rows: int, width: int, size: int) -> None:
    tensor = torch.randn(rows, width)
    normalised = Computed(tensor, torch.float32, lambda x: x / x.norm(dim=-1, keepdim=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        found = torch.cat(list(pieces(normalised)))
    assert torch.equal(found, tensor / tensor.norm(dim=-1, keepdim=True))
    assert normalised.shape == tensor.shape
    assert normalised.nbytes == tensor.nbytes


def test_a_cast_to_the_own_type_is_none() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2).half()}
    cast_to_half = cast(tensors, torch.float16)
    assert isinstance(cast_to_half["a"], Computed)
    assert cast_to_half["b"] is tensors["b"]
    assert cast(tensors, None) == tensors


def test_copies_are_told_by_their_bits() -> None:
    original = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    assert is_copy(original.clone(), original)
    assert is_copy(original.bfloat16(), Computed(original, torch.bfloat16))
    assert not is_copy(original.bfloat16(), original)
    assert is_copy(original.t().contiguous().t(), original)
    assert not is_copy(original.t(), original)
    assert not is_copy(original.flatten(), original)
    assert not is_copy(-original.nan_to_num(), original.nan_to_num())
    assert not is_copy(torch.tensor([-0.0]), torch.tensor([0.0]))
