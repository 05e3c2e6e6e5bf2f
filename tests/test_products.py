"""Products of many rows: every way computes the same, and each is used where it is fast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openllama import products
from openllama.cache import PreallocatedCache
from openllama.inference import fast, loops, prompts
from openllama.inference.prompts import multiply, use_loops
from openllama.model import Inputs
from openllama.products import MANY, FastProducts, linear
from openllama.quantized.modules import QuantizedLinear
from tests.generating import make_model

USERS = ("openllama.products", "openllama.quantized.modules", "openllama.inference.decoding")


@pytest.fixture(params=[True, False], ids=["no bfloat16", "bfloat16"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is one without instructions for bfloat16 and int8."""
    for user in USERS:
        for question in ("bfloat16_is_slow", "int8_is_slow"):
            monkeypatch.setattr(f"{user}.{question}", lambda: request.param, raising=False)
    return request.param


@pytest.mark.parametrize("shape", [(MANY, 70), (2, 40, 70), (3, 1, 50, 70)])
def test_many_rows_are_multiplied_to_the_nearest_bfloat16(
    shape: tuple[int, ...], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", 700)  # ten rows of the matrix at a time, and three at the end
    x, weight = torch.randn(shape).bfloat16(), torch.randn(23, 70).bfloat16()
    found, exact = linear(x, weight), x.double() @ weight.double().T
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(linear(strided, weight), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_slow_is_torch_s_own_product(dtype: torch.dtype, slow: bool) -> None:
    weight, bias = torch.randn(23, 70, dtype=dtype), torch.randn(23, dtype=dtype)
    few, many = torch.randn(2, MANY // 2 - 1, 70, dtype=dtype), torch.randn(MANY, 70, dtype=dtype)
    assert torch.equal(linear(few, weight), F.linear(few, weight))
    assert torch.equal(linear(many, weight, bias), F.linear(many, weight, bias))
    assert linear(few[:, :0], weight).shape == (2, 0, 23)
    if dtype == torch.float32 or not slow:
        assert torch.equal(linear(many, weight), F.linear(many, weight))


def test_modules_get_the_fast_product_where_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "linear", lambda x, weight, bias=None: torch.full((1,), 7.0))
    module = nn.Linear(3, 3, bias=False)
    with FastProducts():
        assert module(torch.ones(2, 3)) == 7
        assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    assert module(torch.ones(2, 3)).shape == (2, 3)


@torch.no_grad()
def test_a_prompt_of_a_fast_model_is_not_farther_from_float32(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "prompt_products", lambda *_: FastProducts)  # where libraries are faster than the loops
    ids = torch.randint(0, 72, (2, 100), generator=torch.Generator().manual_seed(2))
    exact = make_model(vocab_size=72)
    model = make_model(vocab_size=72).bfloat16()

    def logits(computing: object) -> Tensor:
        cache = PreallocatedCache(model.config, 2, 100, torch.bfloat16)
        return computing(Inputs(ids, cache=cache, backend="sdpa"), logits_to_keep=0).logits.float()  # type: ignore[operator]

    expected, own, found = exact(ids).logits, logits(model), logits(fast(model))
    if slow:
        assert not torch.equal(found, own)
        assert (found - expected).abs().mean() < 1.05 * (own - expected).abs().mean()
    else:
        assert torch.equal(found, own)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("by_loops", [False, True])
def test_quantised_matrices_multiply_many_rows_as_one_row(
    bits: int, by_loops: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = QuantizedLinear.of(nn.Linear(256, 64, bias=False), bits)
    calls: list[Tensor] = []
    monkeypatch.setattr(prompts, "multiply", lambda x, *matrix: calls.append(x) or multiply(x, *matrix))
    if by_loops:
        use_loops(module)
    x = torch.randn(2, MANY, 256).bfloat16()
    found, exact = module(x), x.float() @ module.dequantize().T
    assert found.dtype == torch.bfloat16
    error = (found.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error < (0.003 if slow else 0.015)).all()
    assert len(calls) == (by_loops and slow)


def test_the_slow_ways_are_found_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: 5.0, torch.int8: 100.0}
    monkeypatch.setattr(products, "_seconds", lambda product, dtype: times[dtype])
    questions = products.bfloat16_is_slow.__wrapped__, products.int8_is_slow.__wrapped__
    assert [question() for question in questions] == [True, True]
    times |= {torch.bfloat16: 0.5, torch.int8: 0.25}
    assert [question() for question in questions] == [False, False]


def test_the_measurement_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        seen.append((x.dtype, x.shape, weight.shape))
        return x

    assert products._seconds(product, torch.int8) > 0
    assert seen == [(torch.int8, (MANY, 512), (512, 512))] * 4
