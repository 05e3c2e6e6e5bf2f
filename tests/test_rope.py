"""Rotary positions: laws of rotation, and the two ways to stretch them."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama.rope import cos_sin, frequencies, rotate
from tests.draw import examples
from tests.parity.draws import seeds

head_dims = st.integers(1, 12).map(lambda half: 2 * half)
positions = st.integers(0, 3000)


def turned(x: Tensor, position: int, scaling: dict[str, Any] | None = None) -> Tensor:
    """One head vector (D,) at a position, in float64."""
    ids = torch.tensor([[position]])
    cos, sin = cos_sin(ids, x.shape[-1], scaling, 4096, 1, torch.float64)
    return rotate(x.view(1, 1, 1, -1), cos, sin).flatten()


def vectors(head_dim: int, seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@examples(60)
@given(head_dim=head_dims, position=positions, seed=seeds)
def test_it_is_the_complex_product_of_the_paper(head_dim: int, position: int, seed: int) -> None:
    (x,) = vectors(head_dim, seed, 1)
    half = head_dim // 2
    expected = []
    for d in range(half):
        pair = complex(x[d], x[d + half]) * cmath.exp(1j * position * 10000 ** (-2 * d / head_dim))
        expected.append(pair)
    found = turned(x, position)
    wanted = torch.tensor([pair.real for pair in expected] + [pair.imag for pair in expected], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)  # float32 angles: 3000 radians to 1e-4


@examples(60)
@given(head_dim=head_dims, at=positions, distance=st.integers(0, 50), shift=st.integers(0, 500), seed=seeds)
def test_products_depend_on_the_distance_alone(head_dim: int, at: int, distance: int, shift: int, seed: int) -> None:
    query, key = vectors(head_dim, seed)
    here = turned(query, at + distance) @ turned(key, at)
    there = turned(query, at + shift + distance) @ turned(key, at + shift)
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-2)


@examples(60)
@given(head_dim=head_dims, position=positions, seed=seeds)
def test_no_vector_changes_its_length_and_position_zero_changes_nothing(
    head_dim: int, position: int, seed: int
) -> None:
    (x,) = vectors(head_dim, seed, 1)
    torch.testing.assert_close(turned(x, position).norm(), x.norm(), rtol=1e-6, atol=1e-6)
    assert torch.equal(turned(x, 0), x)


@examples(40)
@given(head_dim=head_dims, first=st.integers(0, 100), second=st.integers(0, 100), seed=seeds)
def test_turning_twice_adds_the_positions(head_dim: int, first: int, second: int, seed: int) -> None:
    (x,) = vectors(head_dim, seed, 1)
    torch.testing.assert_close(turned(turned(x, first), second), turned(x, first + second), rtol=1e-4, atol=1e-4)


def test_every_token_of_every_row_is_at_its_own_position() -> None:
    ids = torch.tensor([[0, 5, 2], [7, 7, 1]])
    cos, sin = cos_sin(ids, 6, None, 16, 3, torch.float32)
    assert cos.shape == sin.shape == (2, 3, 1, 6)
    x = torch.randn(2, 3, 4, 6)
    together = rotate(x, cos, sin)
    for row in range(2):
        for t in range(3):
            one = cos_sin(ids[row : row + 1, t : t + 1], 6, None, 16, 3, torch.float32)
            assert torch.equal(together[row, t], rotate(x[row : row + 1, t : t + 1], *one)[0, 0])


@examples(40)
@given(head_dim=head_dims, position=positions, factor=st.floats(1.01, 16))
def test_linear_scaling_divides_the_positions(head_dim: int, position: int, factor: float) -> None:
    scaling = {"type": "linear", "factor": factor}
    ids = torch.tensor([[position]])
    cos, sin = cos_sin(ids, head_dim, scaling, 16, 1, torch.float64)
    angles = position / factor * 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    torch.testing.assert_close(cos.flatten(), angles.cos().repeat(2), rtol=0, atol=2e-3)
    torch.testing.assert_close(sin.flatten(), torch.cat((-angles.sin(), angles.sin())), rtol=0, atol=2e-3)


def test_linear_scaling_by_two_puts_token_eight_where_token_four_was() -> None:
    scaled = cos_sin(torch.tensor([[8]]), 8, {"type": "linear", "factor": 2.0}, 16, 9, torch.float32)
    plain = cos_sin(torch.tensor([[4]]), 8, None, 16, 5, torch.float32)
    assert torch.equal(scaled[0], plain[0])
    assert torch.equal(scaled[1], plain[1])


@examples(60)
@given(
    head_dim=st.integers(2, 12).map(lambda half: 2 * half),
    factor=st.floats(1.01, 16),
    trained=st.integers(1, 64),
    beyond=st.integers(-64, 300),
)
def test_dynamic_scaling_sets_in_beyond_the_trained_context_and_spares_the_fastest_pair(
    head_dim: int, factor: float, trained: int, beyond: int
) -> None:
    length = max(1, trained + beyond)
    plain = frequencies(head_dim, None, trained, length)
    stretched = frequencies(head_dim, {"type": "dynamic", "factor": factor}, trained, length)
    if length <= trained:
        assert torch.equal(stretched, plain)
        return
    assert stretched[0] == plain[0] == 1
    assert bool((stretched[1:] < plain[1:]).all())
    # the slowest pair turns (factor * length / trained - (factor - 1)) times slower: the formula's whole point
    expected = plain[-1].double() / (factor * length / trained - (factor - 1))
    torch.testing.assert_close(stretched[-1].double(), expected, rtol=1e-5, atol=0)


def test_dynamic_scaling_depends_on_this_call_s_length_only() -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    short = frequencies(8, scaling, 16, 10)
    frequencies(8, scaling, 16, 1000)
    assert torch.equal(frequencies(8, scaling, 16, 10), short)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_after_the_angles(dtype: torch.dtype) -> None:
    ids = torch.tensor([[2047, 2048]])  # in bfloat16 these are one number
    cos, sin = cos_sin(ids, 16, None, 4096, 2, dtype)
    wide_cos, wide_sin = cos_sin(ids, 16, None, 4096, 2, torch.float32)
    assert cos.dtype == sin.dtype == dtype
    assert torch.equal(cos, wide_cos.to(dtype))
    assert torch.equal(sin, wide_sin.to(dtype))
    assert not torch.equal(cos[:, 0], cos[:, 1])


def test_float64_is_float64_throughout() -> None:
    ids = torch.arange(3000)[None]
    exact = ids[0, :, None].double() * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    cos, sin = cos_sin(ids, 16, None, 4096, 3000, torch.float64)
    torch.testing.assert_close(cos[0, :, 0], exact.cos().repeat(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(sin[0, :, 0], torch.cat((-exact.sin(), exact.sin()), dim=-1), rtol=0, atol=1e-12)
