"""The compiled loops that round matrices: the bits of torch's operations on every processor, and when they are used."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaForCausalLM, compiler
from openllama.checkpoint import convert
from openllama.config import QUANTIZATIONS
from openllama.errors import BackendError, InputError
from openllama.quantized import loops, quantize, rounding
from openllama.quantized.rounding import round_matrix
from tests.draw import examples
from tests.tiny import tiny_model

TINY = Path(__file__).parents[1] / "checkpoints" / "open-llama-tiny"
both = pytest.mark.parametrize("quantization", QUANTIZATIONS)
LARGEST = torch.finfo(torch.float32).max


@contextlib.contextmanager
def by_loops() -> Iterator[list[Any]]:
    """However few numbers there are, the loops compute; a list of what was given to them."""
    given: list[Any] = []
    matrix = loops._matrix
    with (
        patch.object(loops, "BUILD", 0),
        patch.object(loops, "_matrix", lambda weight: given.append(weight) or matrix(weight)),
    ):
        yield given


def by_torch() -> Any:
    """However many numbers there are, torch computes."""
    return patch.object(loops, "_loops_for", lambda weight: None)


def bits(stored: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return stored, scale.view(torch.int16 if scale.dtype == torch.bfloat16 else torch.int32)


def check_same_bits(matrix: Tensor, threads: int = 1) -> None:
    for quantization in QUANTIZATIONS:
        with by_torch():
            expected = bits(*round_matrix(matrix, quantization))
        torch.set_num_threads(threads)
        with by_loops() as given:
            found = bits(*round_matrix(matrix, quantization))
        torch.set_num_threads(1)
        assert len(given) == (matrix.numel() > 0), "computed by the loops"
        assert all(map(torch.equal, found, expected)), quantization


# --- the numbers ---


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Matrices of every kind that torch rounds, as whole tensors or as some columns of wider ones."""
    rows, columns, beside = draw(st.integers(0, 4)), draw(st.integers(1, 600)), draw(st.integers(0, 3))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    shape, generator = (rows, columns + beside), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(("normal", "tails", "sparse", "ties", "constant", "negative peak", "zeros")))
    drawn = torch.randn(shape, generator=generator)
    if kind == "tails":
        drawn = drawn**7
    elif kind == "sparse":
        drawn = drawn * (torch.rand(shape, generator=generator) < 0.03)
    elif kind == "ties":  # between integers where the largest number is 8, 7 or 127
        drawn = torch.randint(-16, 17, shape, generator=generator) / 2
        drawn[:, ::32] = draw(st.sampled_from((8.0, -8.0, 7.0, 127.0)))
    elif kind == "constant":
        drawn = drawn[:, :1].expand(shape).clone()
    elif kind == "negative peak":
        drawn[:, ::17] = -9.0
    elif kind == "zeros":
        drawn = drawn.sign() * 0.0  # of both signs
    size = draw(st.sampled_from((1.0, 1e-3, 1e4, 1e-20, 1e-37, 1e-38, 1e-39, 1e-41, LARGEST)))
    limit = torch.finfo(dtype).max
    return (drawn * size).clamp(-limit, limit).to(dtype)[:, beside:]


@examples(60)
@given(matrices(), st.integers(1, 2))
def test_the_loops_compute_the_bits_of_torch(matrix: Tensor, threads: int) -> None:
    check_same_bits(matrix, threads)


@examples(12)
@given(matrices())
def test_every_processor_computes_the_bits_of_torch(processor: str, matrix: Tensor) -> None:
    check_same_bits(matrix)


@pytest.mark.parametrize("rows", [1, 3, 21])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 256, 1000, 4097])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_are_those_of_torch_for_every_shape(rows: int, columns: int, threads: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_same_bits(torch.randn(rows, columns).to(dtype), threads)


def test_every_number_of_16_bits_is_read_as_torch_reads_it() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = patterns.view(dtype)
        numbers = numbers[numbers.isfinite()]
        check_same_bits(numbers[:, None])
        check_same_bits(numbers[None])


def test_one_row_for_all_and_columns_of_one_number_are_read_by_their_strides() -> None:
    check_same_bits(torch.randn(1, 70).expand(5, 70))
    check_same_bits(torch.randn(5, 70, dtype=torch.float16)[::2])


@both
def test_numbers_whose_scale_has_no_inverse_become_zero(quantization: str) -> None:
    """1e-38 / 127 and 1e-38 / 8 do: zeros times infinity would be no numbers."""
    matrix = torch.zeros(2, 40)
    matrix[0, 0], matrix[0, 3], matrix[1, 1] = 1e-38, -5e-39, 1.0
    nothing = 8 | 8 << 4 if quantization == "int4" else 0
    for computing in (by_torch, by_loops):
        with computing():
            stored, scale = round_matrix(matrix, quantization)
        assert (stored[0] == nothing).all()
        assert (stored[1] != nothing).sum() == 1
        assert scale.isfinite().all()


# --- what is refused ---


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_in_the_same_words(quantization: str, dtype: torch.dtype, value: float) -> None:
    matrix = torch.ones(5, 70, dtype=dtype)
    matrix[4, 69] = value
    said = set()
    for computing in (by_torch, by_loops):
        for refuses in (lambda: round_matrix(matrix, quantization), lambda: rounding.check_finite(matrix)):
            with computing(), pytest.raises(InputError, match="NaN or infinity") as caught:
                refuses()
            said.add(str(caught.value))
    assert len(said) == 1


def test_the_largest_numbers_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with by_loops() as given:
            rounding.check_finite(torch.full((2, 3), torch.finfo(dtype).min, dtype=dtype))
        assert len(given) == 1


# --- when the loops are used ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No number was rounded yet by this process; what is asked of the compiler, which has built nothing."""
    calls: list[str] = []

    def library(*_: Any) -> None:
        calls.append("build")
        raise BackendError("there is no compiler")

    monkeypatch.setattr(loops, "_asked", 0)
    monkeypatch.setattr(loops, "LOAD", 1000)
    monkeypatch.setattr(loops, "BUILD", 10_000)
    monkeypatch.setattr(compiler, "is_built", lambda *_: bool(calls.append("is built")))
    monkeypatch.setattr(compiler, "library", library)
    loops._is_built.cache_clear()
    yield calls
    loops._is_built.cache_clear()


def test_for_few_numbers_nothing_is_loaded_and_for_some_nothing_is_built(asked: list[str]) -> None:
    round_matrix(torch.ones(9, 100), "int8")
    assert asked == []
    round_matrix(torch.ones(1, 100), "int8")
    round_matrix(torch.ones(1, 100), "int8")
    assert asked == ["is built"]


def test_loops_that_are_built_are_used_for_some_numbers(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "is_built", lambda *_: True)
    round_matrix(torch.ones(10, 100), "int8")
    assert asked == ["build"]


def test_one_large_matrix_or_many_small_ones_are_worth_building(asked: list[str]) -> None:
    round_matrix(torch.ones(100, 100), "int8")
    assert asked == ["build"]
    asked.clear()
    loops._asked = 0
    for _ in range(100):
        round_matrix(torch.ones(1, 100), "int8")
    assert asked == ["is built", "build"]


def test_without_a_compiler_torch_computes_and_nothing_is_said(asked: list[str]) -> None:
    matrix = torch.randn(200, 100)
    with by_torch():
        expected = round_matrix(matrix, "int4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = round_matrix(matrix, "int4")
    assert asked == ["build"]
    assert all(map(torch.equal, found, expected))


def test_what_the_loops_cannot_read_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(40, 50)
    negated = torch.view_as_complex(torch.randn(40, 50, 2)).conj().imag[:, :1]
    assert negated.is_neg()
    others = (matrix.double(), matrix.T, matrix.to("meta"), negated, matrix[:0])
    with by_loops() as given:
        for other in others:
            round_matrix(other, "int8")
            rounding.check_finite(other)
        torch.func.vmap(lambda of: of * (loops.is_finite(of) is None))(torch.randn(2, 40, 50))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        round_matrix(matrix, "int8")
    assert given == []


# --- what is made of whole models ---


def digest(folder: Path) -> dict[str, str]:
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@both
def test_a_converted_folder_is_the_same_in_every_byte(quantization: str, tmp_path: Path) -> None:
    with by_loops() as given:
        convert(TINY, tmp_path / "loops", quantize=quantization, progress=False)
    assert given
    with by_torch():
        convert(TINY, tmp_path / "torch", quantize=quantization, progress=False)
    assert len(digest(tmp_path / "torch")) == 2
    assert digest(tmp_path / "loops") == digest(tmp_path / "torch")


@both
def test_a_model_is_the_same_in_every_bit_from_a_folder_or_in_memory(quantization: str) -> None:
    with by_torch():
        expected = OpenLlamaForCausalLM.from_pretrained(TINY, quantize=quantization).state_dict()
    with by_loops() as given:
        found = OpenLlamaForCausalLM.from_pretrained(TINY, quantize=quantization).state_dict()
        matrices = len(given)
        again = quantize(OpenLlamaForCausalLM.from_pretrained(TINY), quantization).state_dict()
    assert matrices
    assert len(given) == 3 * matrices, "each is checked and rounded"
    for other in (found, again):
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[name], expected[name]) for name in expected)


def test_a_model_that_is_refused_is_as_before() -> None:
    model = tiny_model()
    last = model.model.layers[-1].mlp.down_proj
    with torch.no_grad():
        last.weight[3, 5] = float("nan")
    with by_loops(), pytest.raises(InputError, match=r"layers.\d+.mlp.down_proj.weight: .*NaN or infinity"):
        quantize(model, "int4")
    assert model.config.quantization is None
    assert model.model.layers[-1].mlp.down_proj is last
