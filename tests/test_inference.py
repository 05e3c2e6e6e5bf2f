"""Fast decoding: the loops compute what the model does on every processor, and never something else in silence."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad as fwd_ad
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_hook

from openllama import OpenLlamaForCausalLM, OpenLlamaTokenizer, compiler
from openllama.attention import register_backend, sdpa_attention
from openllama.cache import PreallocatedCache
from openllama.cli import main
from openllama.errors import BackendError, InputError
from openllama.generation import generate, stream
from openllama.generation.assisted import Pace
from openllama.inference import FastModel, fast, kernels, loops, prompts, quantize, structs, threshold
from openllama.inference.loops import Loops
from openllama.inference.prompts import LoopProducts, _many, linear, multiply, restore
from openllama.model import MLP, Inputs, RMSNorm
from openllama.products import FastProducts
from openllama.quantized.modules import QuantizedLinear, QuantizedMatrix
from openllama.quantized.rounding import restore_matrix, round_matrix
from tests.draw import examples
from tests.generating import make_model
from tests.sentencepieces import corpus

TINY = Path(__file__).parents[1] / "checkpoints" / "open-llama-tiny"

WEIGHTS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # and the numbers of their kinds


@pytest.fixture(autouse=True)
def _same_on_every_machine(monkeypatch):
    """Up to 16 tokens, and no prompts, which a machine measures."""
    monkeypatch.setattr(loops, "most_rows", lambda *_: 16)
    monkeypatch.setattr(loops, "prompt_products", lambda *_: FastProducts)


@pytest.fixture(scope="module")
def model() -> OpenLlamaForCausalLM:
    return make_model()


@pytest.fixture
def prompt() -> Tensor:
    return torch.tensor([[5, 9, 13, 2, 17, 8, 30, 4, 11]])


def passes(model: FastModel) -> list[tuple[int, ...]]:
    """The shapes of the tokens that the loops are given, from now on."""
    shapes: list[tuple[int, ...]] = []
    current: Any = model._current()
    run = current.run

    def recorded(x: Tensor, *arguments: Any) -> Tensor:
        shapes.append(tuple(x.shape[:2]))
        return run(x, *arguments)

    current.run = recorded
    return shapes


@torch.no_grad()
def cached(model: OpenLlamaForCausalLM, ids: Tensor, mask: Tensor | None, dtype: torch.dtype, room: int) -> Inputs:
    """``ids`` but the last tokens, computed by the model; what is left for the next pass has no tokens yet."""
    cache = PreallocatedCache(model.config, len(ids), room, dtype)
    if ids.shape[1]:
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return Inputs(ids, cache=cache, backend="sdpa")


# --- the numbers ------------------------------------------------------------------------------------


@examples(60)
@given(
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([4, 6, 16, 20, 64]),
    intermediate=st.integers(1, 90),
    layers=st.integers(1, 3),
    vocabulary=st.integers(20, 61),
    batch=st.integers(1, 3),
    past=st.integers(0, 40),
    length=st.integers(1, 5),
    padding=st.booleans(),
    scaling=st.sampled_from([None, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}]),
    stable=st.booleans(),
    shared=st.booleans(),
    threads=st.integers(1, 3),
)
@torch.no_grad()
def test_a_pass_has_the_logits_and_the_cache_of_the_model(
    heads, head_dim, intermediate, layers, vocabulary, batch, past, length, padding, scaling, stable, shared, threads
):
    torch.set_num_threads(threads)
    model = make_model(
        vocab_size=vocabulary,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        rope_scaling=scaling,
        max_position_embeddings=24,
        use_stable_embedding=stable,
        shared_input_output_embedding=shared,
    )
    ids = torch.randint(0, vocabulary, (batch, past + length))
    mask = torch.ones_like(ids)
    if padding:
        for row in range(batch):
            mask[row, : int(torch.randint(0, past + 1, ()))] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    results = []
    for computing in (model, fast(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lengths beyond training
            inputs = cached(model, ids[:, :past], mask[:, :past], torch.float32, past + length + 3)
        inputs = inputs._replace(tokens=ids[:, past:], mask=mask if padding else None, positions=positions)
        results.append(computing(inputs, logits_to_keep=0, return_dict=True))
    expected, found = results
    scale = expected.logits.abs().max().item() + 1
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5 * scale)
    for ours, theirs in zip(found.past_key_values, expected.past_key_values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * scale)


@torch.no_grad()
def test_every_processor_gets_loops_of_the_same_numbers(model, processor):
    ids = torch.randint(0, 40, (2, 14), generator=torch.Generator().manual_seed(3))
    expected = model(ids).logits[:, -2:]
    inputs = cached(model, ids[:, :12], None, torch.float32, 14)._replace(tokens=ids[:, 12:])
    torch.testing.assert_close(fast(model)(inputs, logits_to_keep=2).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_processor_multiplies_weights_of_every_kind_and_shape(processor, weights):
    """An error is relative to the largest number; inputs of integers have 16 bits, of bfloat16 maybe as many."""
    torch.manual_seed(3)
    for shape in ((8, 64), (12, 96), (7, 64), (8, 100), (1, 31), (13, 33), (66, 160), (35, 257)):
        for rows in (1, 2, 3, 5, 9):
            matrix, x = torch.randn(shape), torch.randn(rows, shape[1])
            found, expected = product(matrix, x, weights)
            narrow = rows >= 4 and weights == "bfloat16"
            limit = 1e-4 if weights in ("int8", "int4") else 1e-2 if narrow else 1e-5
            error = (found - expected).abs().max() / expected.abs().max()
            assert error <= limit, (shape, rows)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_bits_of_a_row_depend_neither_on_those_beside_it_nor_on_threads(processor, weights):
    """Of four rows or more, those of bfloat16 may be rounded to it, so these are compared with themselves, four times.

    Rows of the matrix are multiplied up to four at a time and integers in groups of 32, eight groups at a time.
    """
    for shape in ((1, 31), (2, 96), (13, 33), (25, 64), (14, 288)):
        matrix, x = torch.randn(shape), torch.randn(64, shape[1])
        alone, of_four = (
            torch.cat([product(matrix, row.repeat(rows, 1), weights, threads=1)[0][:1] for row in x]) for rows in (1, 4)
        )
        for rows, threads in itertools.product((0, 2, 3, 4, 5, 6, 7, 9, 13, 25, 64), (1, 3)):
            expected = of_four if weights == "bfloat16" and rows >= 4 else alone
            found = product(matrix, x[:rows], weights, threads)[0]
            assert torch.equal(found, expected[:rows]), (shape, rows, threads)


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_the_logits_of_a_sequence_do_not_depend_on_those_beside_it(processor, weights):
    """Products that are added to what is there, too; see above for bfloat16."""
    model = make_model(hidden_size=64, intermediate_size=288)
    if weights in ("int8", "int4"):
        model = quantize(model, weights)
    quick = fast(model.to(torch.bfloat16) if weights == "bfloat16" else model)
    shapes = passes(quick)

    def logits(ids: Tensor) -> Tensor:
        return quick(cached(quick, ids[:, :0], None, quick.dtype, 3)._replace(tokens=ids)).logits

    ids = torch.randint(0, 40, (9, 1))
    alone = torch.cat([logits(row[None]) for row in ids])
    for rows in (2, 3) if weights == "bfloat16" else (2, 3, 5, 9):
        assert torch.equal(logits(ids[:rows]), alone[:rows])
        assert shapes[-1] == (rows, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [20, 64])
@torch.no_grad()
def test_attention_of_a_sequence_does_not_depend_on_those_beside_it(processor, head_dim, dtype):
    """Keys are read four at a time, 4 + 4 + 3 here; padding on the left, in the last two rows all there is."""
    model = fast(make_model(hidden_size=2 * head_dim, num_attention_heads=2, num_hidden_layers=2).to(dtype))
    stored = torch.randn(2, 2, 3, 2, 10, head_dim).to(dtype)  # of each layer the keys and the values
    mask = torch.arange(11) >= torch.tensor([[0], [4], [11]])

    def logits(rows: slice, threads: int) -> Tensor:
        torch.set_num_threads(threads)
        cache = PreallocatedCache(model.config, len(mask[rows]), 12, dtype)
        for layer, (keys, values) in enumerate(stored):
            cache.append(layer, keys[rows], values[rows])
        inputs = Inputs(torch.tensor([[7], [8], [9]])[rows], cache=cache.advance_by(10), backend="sdpa")
        return model(inputs._replace(mask=mask[rows].long(), positions=torch.tensor([[10]]))).logits

    shapes = passes(model)
    together = logits(slice(3), 1)
    assert together.isfinite().all()
    assert torch.equal(logits(slice(3), 3), together)
    for row in range(3):
        assert torch.equal(logits(slice(row, row + 1), 2), together[row : row + 1])
    stored[:, :, 1, :, :4] = 1e4  # the padding of the row with some
    assert torch.equal(logits(slice(3), 1), together)
    assert shapes == [(3, 1), (3, 1), (1, 1), (1, 1), (1, 1), (3, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(2, 32), (130, 96), (129, 513), (3, 2048), (66, 1)])
def test_every_processor_multiplies_many_rows(processor, weights, shape):
    """Rows beside whole tiles of 6 and panels of 16, columns beside whole spans of 256."""
    matrix, x = torch.randn(shape), torch.randn(45, shape[1])
    if weights in ("int8", "int4"):
        weight, scale = round_matrix(matrix, weights)
        exact = x.double() @ restore_matrix(weight, scale, shape[1], torch.float64).T
        found, limit = multiply(x, weight, scale), 1e-4 if weights == "int8" else 1e-3
    else:
        weight = matrix.to(getattr(torch, weights))
        exact, limit = x.double() @ weight.double().T, 1e-6
        found = _many(kernels.library(), x, structs.Matrix(weight.data_ptr(), None, *shape, WEIGHTS[weights]))
    assert (found - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_multiplied_by_the_loops_where_they_are_faster(dtype, monkeypatch):
    weight, x = torch.randn(70, 96).to(dtype), torch.randn(2, 17, 96).to(dtype)
    with torch.no_grad(), LoopProducts():
        found = F.linear(x, weight)
    assert found.dtype == dtype
    exact = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(found, exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)  # a last bit

    calls: list[Any] = []
    monkeypatch.setattr(prompts, "_many", lambda *arguments: calls.append(arguments) or _many(*arguments))
    for pays in (False, True):
        monkeypatch.setattr(loops, "prompt_products", lambda *_, pays=pays: LoopProducts if pays else FastProducts)
        fast(make_model().to(dtype)).generate(torch.ones(1, 70, dtype=torch.long), max_new_tokens=1)
        assert bool(calls) is pays


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_many_rows_stay_in_the_room_that_they_asked_for(weights, threads, dtype):
    for rows, columns, n in ((1, 1, 1), (70, 300, 33), (600, 32, 7)):
        matrix = torch.randn(rows, columns)
        if weights in ("int8", "int4"):
            stored, scale = round_matrix(matrix, weights)
        else:
            stored, scale = matrix.to(getattr(torch, weights)), torch.empty(0)
        struct = structs.Matrix(stored.data_ptr(), scale.data_ptr(), rows, columns, WEIGHTS[weights])
        x, y, kind = torch.randn(n, columns).to(dtype), torch.empty(n, rows, dtype=dtype), structs.KINDS[dtype]
        many = kernels.library().openllama_many
        size = many(struct, None, None, kind, n, None, threads)
        room = torch.full((size + 1024,), 7.0)
        assert many(struct, x.data_ptr(), y.data_ptr(), kind, n, room.data_ptr(), threads) == size
        assert (room[size:] == 7).all()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_gives_no_numbers(quantization, value):
    weight, scale = round_matrix(torch.randn(4, 64), quantization)
    scale[1] = value
    found = multiply(torch.randn(33, 64), weight, scale)
    assert not found[:, 1].isfinite().any()
    assert found[:, ::2].isfinite().all()


def test_what_the_loops_do_not_multiply_is_left_to_torch():
    weight, x = torch.randn(70, 96), torch.randn(40, 96)
    with torch.no_grad():
        assert linear(x, weight) is not None
        assert linear(x[:31], weight) is None
        assert linear(x.bfloat16(), weight) is None
        assert linear(x.double(), weight.double()) is None
        assert linear(x, torch.randn(96, 70).T) is None
    assert linear(x, weight) is None, "gradients"
    for arguments in ((x, weight, torch.ones(70)), (x[:3], weight), (x, weight[0]), (x[:, :0], weight[:, :0])):
        expected = F.linear(*arguments)
        with torch.no_grad(), LoopProducts():
            assert F.linear(*arguments).equal(expected)
    with torch.no_grad(), LoopProducts():
        torch.testing.assert_close(F.linear(input=x, weight=weight), x @ weight.T)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            F.linear(x, weight[:, :5])
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16
        with fwd_ad.dual_level():
            assert fwd_ad.unpack_dual(F.linear(fwd_ad.make_dual(x, x), weight)).tangent is not None
    with LoopProducts():
        F.linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(weights):
    x = torch.randn(3, 96)
    x[1, 70] = torch.nan
    matrix = torch.randn(8, 96)
    found, expected = product(matrix, x, weights)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[::2], expected[::2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_largest_integers_do_not_overflow_and_what_is_not_finite_stays_so(quantization):
    weight, scale = round_matrix(torch.full((2, 2048), -1.0), quantization)
    x = torch.full((33, 2048), 3.0)
    x[1, 5], x[2, 7], x[3] = torch.nan, torch.inf, 0
    found = multiply(x, weight, scale)
    whole = torch.ones(33, dtype=torch.bool)
    whole[1:4] = False
    torch.testing.assert_close(found[whole], torch.full((30, 2), -6144.0), rtol=1e-3, atol=0)
    assert not found[1:3].isfinite().any()
    assert (found[3] == 0).all()


def test_what_the_loops_do_not_multiply_as_integers_is_left_to_others():
    weight, scale = round_matrix(torch.randn(4, 64), "int8")
    assert multiply(torch.randn(33, 64), weight, scale) is not None
    assert multiply(torch.randn(33, 64).double(), weight, scale) is None


def test_rows_multiplied_as_integers_may_lie_anywhere_and_keep_their_type():
    weight, scale = round_matrix(torch.randn(4, 64), "int8")
    x = torch.randn(64, 33).T
    found = multiply(x, weight, scale)
    assert torch.equal(found, multiply(x.contiguous(), weight, scale))
    narrow = multiply(x.bfloat16(), weight, scale)
    assert torch.equal(narrow, multiply(x.bfloat16().float(), weight, scale).bfloat16())


def test_the_largest_scales_of_int4_do_not_overflow():
    weight, scale = round_matrix(torch.full((4, 64), -1e36), "int4")
    found = multiply(torch.full((33, 64), 1e-3), weight, scale)
    torch.testing.assert_close(found, torch.full((33, 4), -6.4e34), rtol=5e-3, atol=0)


def product(matrix: Tensor, x: Tensor, weights: str, threads: int = 2) -> tuple[Tensor, Tensor]:
    """x @ matrix.T by the loops, which write nothing beside it, and in float64; the matrix is rounded to its kind."""
    if weights in ("int8", "int4"):
        stored, scale = round_matrix(matrix, weights)
        exact = restore_matrix(stored, scale, matrix.shape[1], torch.float32)
    else:
        stored, scale = matrix.to(getattr(torch, weights)), torch.empty(0)
        exact = stored
    struct = structs.Matrix(stored.data_ptr(), scale.data_ptr(), *matrix.shape, WEIGHTS[weights])
    size = len(x) * len(matrix)
    y = torch.full((size + 64,), 7.0)
    kernels.library().openllama_product(struct, x.data_ptr(), y.data_ptr(), len(x), threads)
    assert (y[size:] == 7).all()
    return y[:size].view(len(x), len(matrix)).double(), x.double() @ exact.double().T


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
@torch.no_grad()
def test_bfloat16_is_at_least_as_near_to_float32_as_the_model_is(rows):
    model = make_model(hidden_size=64, intermediate_size=96, vocab_size=400)
    ids = torch.randint(0, 400, (rows, 20), generator=torch.Generator().manual_seed(3))
    model.to(torch.bfloat16)
    exact = make_model(hidden_size=64, intermediate_size=96, vocab_size=400)
    exact.load_state_dict(model.state_dict())
    expected = exact(ids).logits[:, -1].softmax(-1)
    distances = []
    for computing in (model, fast(model)):
        inputs = cached(model, ids[:, :-1], None, torch.bfloat16, 20)._replace(tokens=ids[:, -1:])
        logits = computing(inputs, logits_to_keep=1, return_dict=True).logits[:, -1].float()
        distances.append((logits.softmax(-1) - expected).abs().mean().item())
    assert distances[1] <= distances[0] * 1.1


@torch.no_grad()
def test_on_held_out_text_the_loops_agree_with_float32_where_bfloat16_does():
    """The end of the corpus, which training did not see, token by token with the right tokens before."""
    lines = "\n".join(corpus("shakespeare.txt")[-40:])
    ids = torch.tensor([OpenLlamaTokenizer.from_pretrained(TINY).encode(lines)])[:, :300]
    exact = OpenLlamaForCausalLM.from_pretrained(TINY, dtype="float32")
    expected = exact(ids).logits[0].log_softmax(-1)
    quick = fast(OpenLlamaForCausalLM.from_pretrained(TINY))
    cache = PreallocatedCache(quick.config, 1, ids.shape[1], torch.bfloat16)
    found = []
    for token in ids[0]:
        found.append(quick(Inputs(token.view(1, 1), cache=cache, backend="sdpa"), logits_to_keep=1).logits[0, 0])
    logits = torch.stack(found).log_softmax(-1)
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.995
    assert F.kl_div(logits, expected, log_target=True, reduction="batchmean") < 1e-4


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(64, 96, 72), (40, 50, 41)])
@torch.no_grad()
def test_quantised_matrices_are_read_as_their_modules_read_them(quantization, rows, shared, sizes):
    """The inputs of products are rounded to 16 bits for a group, which costs a small part of what bfloat16 costs."""
    fields: dict[str, Any] = dict(zip(("hidden_size", "intermediate_size", "vocab_size"), sizes, strict=True))
    model = quantize(make_model(**fields, shared_input_output_embedding=shared), quantization)
    ids = torch.randint(0, sizes[2], (1, 10 + rows), generator=torch.Generator().manual_seed(3))
    results = []
    for computing in (model, fast(model)):
        inputs = cached(model, ids[:, :10], None, torch.float32, 30)._replace(tokens=ids[:, 10:])
        results.append(computing(inputs, logits_to_keep=0, return_dict=True).logits)
    exact, found = results
    narrow = model.to(torch.bfloat16)(ids).logits[:, -rows:].float()
    assert (found - exact).abs().mean() <= (narrow - exact).abs().mean() / 50


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (8, 64), (7, 100)])
def test_matrices_are_restored_for_prompts_in_the_same_bits(quantization, dtype, shape):
    weight, scale = round_matrix(torch.randn(shape), quantization)
    assert torch.equal(restore(weight, scale, shape[1], dtype), restore_matrix(weight, scale, shape[1], dtype))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_a_quantised_model_that_decodes_fast_works_in_torch_func_and_others_are_as_before(quantization):
    model, other = (quantize(make_model(), quantization) for _ in range(2))
    ids = torch.randint(0, 40, (3, 2, 7))
    expected = torch.stack([other(row).logits for row in ids])
    fast(model)
    for vmapped in (model, other):
        found = torch.func.vmap(lambda row, m=vmapped: m(row, use_cache=False).logits)(ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    matrices = [module for module in other.modules() if isinstance(module, QuantizedMatrix)]
    assert all(module.restore is restore_matrix for module in matrices)


# --- generation -------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "grouped beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "sampling": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 4},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without cache": {"use_cache": False},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_makes_the_same_ids(model, prompt, name):
    results = []
    for generating in (model, fast(model)):
        arguments = dict(STRATEGIES[name])
        if arguments.get("do_sample"):
            arguments["generator"] = torch.Generator().manual_seed(5)
        output = generating.generate(prompt, max_new_tokens=24, **arguments)
        results.append(output if isinstance(output, Tensor) else output.sequences)
    assert torch.equal(*results)


def test_prompts_of_different_lengths_make_the_same_ids(model):
    ids = torch.tensor([[0, 0, 0, 5, 9], [0, 7, 21, 3, 30], [4, 6, 8, 10, 12]])
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(fast(model).generate(ids, attention_mask=mask, max_new_tokens=20), expected)


def test_an_assistant_may_be_fast_and_so_may_the_model(prompt, monkeypatch):
    """Guesses do not change the ids, so those that were right are counted."""
    learnt: list[tuple[int, int]] = []
    monkeypatch.setattr(Pace, "learn", lambda pace, guessed, right: learnt.append((guessed, right)))
    counts = []
    for wrap, wrap_assistant in itertools.product((lambda model: model, fast), repeat=2):
        learnt.clear()
        model, assistant = wrap(make_model()), wrap_assistant(make_model())
        ids = model.generate(prompt, max_new_tokens=20, assistant_model=assistant)
        assert torch.equal(ids, make_model().generate(prompt, max_new_tokens=20))
        counts.append(list(learnt))
    assert counts == [[(3, 3)] * 5] * 4, "the assistant has the weights of the model"


@pytest.fixture
def defaults():
    """Sets torch's default type and device, until the test ends."""
    dtype = torch.get_default_dtype()

    def choose(chosen: torch.dtype, device: str) -> None:
        torch.set_default_dtype(chosen)
        torch.set_default_device(device)

    yield choose
    choose(dtype, "cpu")
    torch.set_default_device(None)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]
)
def test_the_defaults_of_torch_are_not_those_of_the_loops(prompt, defaults, dtype, device):
    model = quantize(make_model(hidden_size=64, intermediate_size=400), "int8")
    expected = model.generate(prompt, max_new_tokens=8)
    defaults(dtype, device)
    quick = fast(model)
    shapes = passes(quick)
    assert torch.equal(quick.generate(prompt, max_new_tokens=8), expected)
    assert len(shapes) == 8


def test_stream_yields_the_same_tokens(model, prompt):
    expected = model.generate(prompt, max_new_tokens=12)[0, prompt.shape[1] :]
    assert torch.equal(torch.cat(list(fast(model).stream(prompt, max_new_tokens=12))), expected)


def test_the_loops_take_every_token_after_the_prompt(model):
    quick, prompt = fast(model), torch.randint(0, 40, (1, 17))
    shapes = passes(quick)
    quick.generate(prompt, max_new_tokens=5)
    assert shapes == [(1, 1)] * 4
    quick.generate(prompt[:, :-1], max_new_tokens=2)
    assert shapes[4:] == [(1, 16), (1, 1)], "a short prompt is a pass of few tokens, too"


def test_a_cache_of_an_earlier_call_goes_on(model, prompt):
    quick = fast(model)
    cache = PreallocatedCache(model.config, 1, 40)
    whole = model.generate(prompt, max_new_tokens=20)
    first = quick.generate(prompt, max_new_tokens=8, past_key_values=cache)
    assert torch.equal(quick.generate(first, max_new_tokens=12, past_key_values=cache), whole)


def test_threads_may_generate_at_the_same_time():
    model = make_model(hidden_size=128, intermediate_size=256)
    quick = fast(model)
    prompts = [torch.randint(0, 40, (1, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [model.generate(prompt, max_new_tokens=60) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda prompt: quick.generate(prompt, max_new_tokens=60), prompts))
            assert all(map(torch.equal, found, expected))


def test_a_copy_and_what_was_pickled_decode_by_themselves(prompt):
    quick = fast(make_model())
    expected = quick.generate(prompt, max_new_tokens=8)
    for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        with torch.no_grad():
            other.model.lm_head.weight.zero_()
        assert not torch.equal(other.generate(prompt, max_new_tokens=8), expected)
        assert torch.equal(quick.generate(prompt, max_new_tokens=8), expected)


# --- what the loops do not compute ------------------------------------------------------------------


def test_a_hook_that_is_added_later_runs(model, prompt):
    quick, calls = fast(model), []
    quick.generate(prompt, max_new_tokens=2)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="run no hooks, and MLP has some"):
        ids = quick.generate(prompt, max_new_tokens=4)
    handle.remove()
    assert len(calls) == 4
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=4))
    shapes = passes(quick)
    quick.generate(prompt, max_new_tokens=3)
    assert len(shapes) >= 2, "without the hook the loops are back"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", ["", "lm_head", "model", "model.layers.0", "model.embedding.tokens"])
def test_a_hook_that_is_added_while_a_text_is_made_runs(prompt, shared, where):
    model, calls = make_model(shared_input_output_embedding=shared), []
    quick = fast(model)
    tokens = quick.stream(prompt, max_new_tokens=6)
    next(tokens), next(tokens)
    model.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="not fast: the loops run no hooks"):
        list(tokens)
    assert len(calls) == 4


def test_an_adapter_that_is_added_later_counts(prompt):
    peft = pytest.importorskip("peft")
    model = make_model()
    quick = fast(model)
    quick.generate(prompt, max_new_tokens=2)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.warns(UserWarning, match=r"the model has peft\.tuners\.lora\.layer\.Linear in its place"):
        ids = quick.generate(prompt, max_new_tokens=12)
    assert torch.equal(ids, adapted.generate(input_ids=prompt, max_new_tokens=12))


def adapt(model: OpenLlamaForCausalLM, other: OpenLlamaForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()


def take_data(model: OpenLlamaForCausalLM, other: OpenLlamaForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj.weight.data = other.model.layers[1].mlp.down_proj.weight.data


CHANGES: dict[str, Callable[[OpenLlamaForCausalLM, OpenLlamaForCausalLM], Any]] = {
    "weights that are assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "data": take_data,
    "a linear layer": lambda model, other: setattr(
        model.model.layers[0].mlp, "up_proj", other.model.layers[0].mlp.up_proj
    ),
    "a norm": lambda model, other: setattr(model.model.layers[1], "mlp_norm", weak_norm()),
    "a layer": lambda model, other: setattr(model.model.layers, "1", other.model.layers[0]),
    "the table": lambda model, other: model.set_input_embeddings(other.get_input_embeddings()),
    "the eps of all norms": lambda model, other: set_eps(model, 2.0),
    "adapters": adapt,
    "numbers of quantised layers": lambda model, other: quantize(model, "int4"),
}


def weak_norm() -> RMSNorm:
    norm = RMSNorm(32, 1e-6)
    torch.nn.init.constant_(norm.weight, 0.1)
    return norm


def set_eps(model: OpenLlamaForCausalLM, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = eps


def continued(model: OpenLlamaForCausalLM | FastModel, change: Callable[[], Any], way: str) -> list[Tensor]:
    """What is made before and after a change, of a model that is called in a way without ``model.generate``."""
    ids, cache = torch.tensor([[5, 9, 13, 2]]), PreallocatedCache(model.config, 1, 40)
    if way == "while a text is made":
        tokens = stream(model, ids, max_new_tokens=12, past_key_values=cache)
        before = [next(tokens) for _ in range(4)]
        change()
        return before + list(tokens)
    before = [generate(model, ids, max_new_tokens=4, past_key_values=cache)]
    change()
    if way == "another text":
        return [*before, generate(model, ids, max_new_tokens=8)]
    return [*before, generate(model, before[0], max_new_tokens=8, past_key_values=cache)]


@pytest.mark.parametrize("way", ["another text", "a second turn", "while a text is made"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_replaced_counts_from_the_next_pass_on(name, way):
    results = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "decoding is not fast")  # with adapters
        for wrap in (lambda model: model, fast):
            model, other = make_model(), make_model(7)
            model.set_attn_implementation("sdpa")
            results.append(continued(wrap(model), lambda m=model, o=other: CHANGES[name](m, o), way))
    assert all(map(torch.equal, *results))
    unchanged = continued(make_model(), lambda: None, way)
    assert not all(map(torch.equal, results[0], unchanged)), "the change is one"


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_model_that_stays_as_it_is_is_read_once(prompt, quantization):
    model = make_model() if quantization is None else quantize(make_model(), quantization)
    quick = fast(model)
    read = quick._loops
    quick.generate(prompt, max_new_tokens=3)
    assert quick._loops is read


@pytest.mark.parametrize("change", ["in place", "loaded", "float64 and back"])
def test_weights_that_change_are_the_ones_that_count(prompt, change):
    model, other = make_model(), make_model(7)
    quick = fast(model)
    quick.generate(prompt, max_new_tokens=2)
    if change == "in place":
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
    elif change == "loaded":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        model.load_state_dict(other.state_dict())
        model.double().float()
    assert torch.equal(quick.generate(prompt, max_new_tokens=12), other.generate(prompt, max_new_tokens=12))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"hidden_act": "gelu"}, "silu"), ({"hidden_act": "relu"}, "the model has hidden_act 'relu'")],
)
def test_what_the_loops_cannot_compute_the_model_does_and_a_warning_says_so_once(prompt, fields, reason):
    model = make_model(**fields)
    with pytest.warns(UserWarning, match=f"decoding is not fast: .*{reason}"):
        quick = fast(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = quick.generate(prompt, max_new_tokens=8)
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=8))


class Doubled(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Marked(Tensor):
    """A tensor of another type, whose numbers may be anywhere."""


def transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def replace_forward(model: OpenLlamaForCausalLM) -> None:
    forward = model.forward
    model.forward = lambda *ids, **named: replace(output := forward(*ids, **named), logits=-output.logits)


def mlp(model: OpenLlamaForCausalLM) -> Any:
    return model.model.layers[1].mlp


OTHERS: dict[str, tuple[Callable[[OpenLlamaForCausalLM], Any], str]] = {
    "a bias": (lambda model: setattr(mlp(model).up_proj, "bias", Parameter(torch.ones(48))), "add no bias"),
    "a layer with a bias": (lambda model: setattr(mlp(model), "down_proj", torch.nn.Linear(48, 32)), "add no bias"),
    "another layer": (
        lambda model: setattr(mlp(model), "up_proj", Doubled(32, 48, bias=False)),
        "Doubled in its place",
    ),
    "an activation": (lambda model: setattr(mlp(model), "act", torch.relu), "compute silu, .* has .*relu.* in an MLP"),
    "an eps": (lambda model: setattr(model.model.layers[0].mlp_norm, "eps", 2.0), r"one eps .*\(.*, 2\.0\)"),
    "a norm's type": (lambda model: model.model.norm.bfloat16(), r"bfloat16, 1e-06\) and \(torch\.float32"),
    "a forward": (replace_forward, "a forward of its own"),
    "a layer's forward": (
        lambda model: setattr(mlp(model), "forward", lambda x: x),
        "compute MLP, .*forward of its own",
    ),
    "a wider MLP": (
        lambda model: setattr(model.model.layers[1], "mlp", MLP(replace(model.config, intermediate_size=4096)).eval()),
        r"config says \(48, 32\) of a weight, the model has \(4096, 32\)",
    ),
    "fewer layers": (lambda model: setattr(model.model, "layers", model.model.layers[:1]), "says 2 layers, .* has 1"),
    "more layers": (lambda model: model.model.layers.append(model.model.layers[0]), "says 2 layers, the model has 3"),
    "another type of tensor": (
        lambda model: setattr(mlp(model).up_proj, "weight", Parameter(mlp(model).up_proj.weight.as_subclass(Marked))),
        "read plain tensors, the model has Marked",
    ),
    "other strides": (
        lambda model: setattr(mlp(model).up_proj, "weight", Parameter(transposed(mlp(model).up_proj.weight))),
        r"contiguous .* weight \(48, 32\) with strides \(1, 48\)",
    ),
    "other strides of the same memory": (
        lambda model: setattr(
            model.model.layers[0].attention.q_proj.weight,
            "data",
            model.model.layers[0].attention.q_proj.weight.data.t(),
        ),
        r"contiguous .* weight \(32, 32\) with strides \(1, 32\)",
    ),
    "other strides of quantised weights": (
        lambda model: setattr(mlp(quantize(model, "int8")).up_proj, "weight", transposed(mlp(model).up_proj.weight)),
        r"contiguous .* weight \(48, 32\) with strides \(1, 48\)",
    ),
    "inputs": (
        lambda model: setattr(
            model, "prepare_inputs_for_generation", partial(type(model).prepare_inputs_for_generation, model)
        ),
        "its prepare_inputs_for_generation is replaced",
    ),
}


def test_a_class_that_gets_another_forward_is_computed_by_it(prompt, monkeypatch):
    model = make_model()
    quick, forward = fast(model), MLP.forward
    own = quick.generate(prompt, max_new_tokens=12)
    monkeypatch.setattr(MLP, "forward", lambda self, x: -forward(self, x))
    with pytest.warns(UserWarning, match="the forward of MLP, which has been replaced"):
        patched = quick.generate(prompt, max_new_tokens=12)
    assert torch.equal(patched, model.generate(prompt, max_new_tokens=12))
    assert not torch.equal(patched, own)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_becomes_another_than_the_loops_compute_is_computed_by_its_modules(prompt, name):
    model = make_model()
    quick, (change, reason) = fast(model), OTHERS[name]
    change(model)
    with pytest.warns(UserWarning, match=f"decoding is not fast: .*{reason}"):
        ids = generate(quick, prompt, max_new_tokens=8)
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=8))
    with pytest.warns(UserWarning, match=f"decoding is not fast: .*{reason}"):
        fast(model)


def test_a_head_that_shares_the_table_of_another_model_is_left_to_it(prompt):
    model, other = (make_model(seed, shared_input_output_embedding=True) for seed in (1, 7))
    model.lm_head = other.lm_head
    with pytest.warns(UserWarning, match="its lm_head shares that of another"):
        quick = fast(model)
    assert torch.equal(quick.generate(prompt, max_new_tokens=8), model.generate(prompt, max_new_tokens=8))


def test_dropout_that_is_switched_on_is_left_to_the_model(prompt):
    model = make_model()
    quick = fast(model)
    model.model.layers[1].mlp.train()
    with pytest.warns(UserWarning, match=r"no dropout; call model\.eval\(\)"):
        quick.generate(prompt, max_new_tokens=2)


def test_a_subclass_with_a_forward_of_its_own_gets_its_arguments_by_name(prompt):
    class Negated(OpenLlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, **named):
            assert isinstance(input_ids, Tensor)
            output = super().forward(input_ids, attention_mask, **named)
            return replace(output, logits=-output.logits)

    model = Negated(make_model().config, attn_implementation="eager").eval()
    with pytest.warns(UserWarning, match="compute OpenLlamaForCausalLM, the model has Negated in its place"):
        quick = fast(model)
    assert torch.equal(quick.generate(prompt, max_new_tokens=8), model.generate(prompt, max_new_tokens=8))


def test_weights_that_are_elsewhere_are_an_error_of_torch_and_no_crash():
    model = make_model()
    quick = fast(model)
    model.model.layers[1].to("meta")
    with pytest.warns(UserWarning, match="contiguous weights on a CPU, .* on meta"), pytest.raises(RuntimeError):
        quick.generate(torch.tensor([[5]]), max_new_tokens=3)


def test_heads_of_other_dimensions_than_the_config_says_are_an_error_as_they_are_of_the_model(prompt):
    model = make_model()
    quick = fast(model)
    model.config = replace(model.config, num_attention_heads=2)
    with pytest.warns(UserWarning, match="heads of 16 dimensions, the model has 8"), pytest.raises(RuntimeError):
        quick.generate(prompt, max_new_tokens=3)


def test_a_hook_of_all_modules_runs(model, prompt):
    quick, calls = fast(model), []
    tokens = stream(quick, prompt, max_new_tokens=6)
    next(tokens), next(tokens)
    handle = register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        with pytest.warns(UserWarning, match="not fast: the loops run no hooks, and there are some for all modules"):
            list(tokens)
    finally:
        handle.remove()
    assert calls.count(model.model.norm) == 4


def test_a_cache_of_another_class_is_written_by_its_methods(model, prompt):
    class Counting(PreallocatedCache):
        appended = 0

        def append(self, *arguments: Any) -> Any:
            self.appended += 1
            return super().append(*arguments)

    cache = Counting(model.config, 1, 30)
    ids = fast(model).generate(prompt, max_new_tokens=5, past_key_values=cache)
    assert cache.appended == 5 * model.config.num_hidden_layers
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=5))


def test_float16_is_left_to_the_model(prompt):
    with pytest.warns(UserWarning, match=r"float32 and bfloat16, the model has torch\.float16"):
        fast(make_model().half())


def test_a_registered_backend_is_not_passed_over(prompt):
    calls: list[int] = []

    def counting(query, key, value, mask, dropout, layer):
        calls.append(layer)
        return sdpa_attention(query, key, value, mask, dropout)

    register_backend("counting", counting)
    model = make_model()
    model.set_attn_implementation("counting")
    with pytest.warns(UserWarning, match="registered backend 'counting'"):
        fast(model).generate(prompt, max_new_tokens=3)
    assert len(calls) == 6


def test_gradients_come_from_the_model(model, prompt):
    fast(model)(prompt, labels=prompt).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    model.zero_grad()


def test_a_full_cache_is_an_error_before_anything_is_written(model, prompt):
    inputs = cached(model, prompt, None, torch.float32, prompt.shape[1])._replace(tokens=prompt[:, :1])
    with torch.no_grad(), pytest.raises(InputError, match="room for 9 tokens, 9 are in it, 1 are new"):
        fast(model)(inputs, logits_to_keep=1)


def test_only_a_causal_language_model_can_be_fast(model):
    with pytest.raises(BackendError, match="for OpenLlamaForCausalLM, got OpenLlamaModel"):
        fast(model.model)
    assert fast(quick := fast(model)) is quick


# --- the model around the loops ---------------------------------------------------------------------


def test_what_is_assigned_and_what_returns_the_model_is_as_of_the_model(prompt):
    model = make_model()
    quick = fast(model)
    for method in (
        quick.eval,
        quick.float,
        quick.bfloat16,
        lambda: quick.to("cpu"),
        lambda: quick.requires_grad_(False),
    ):
        assert method() is quick
    assert model.dtype == torch.bfloat16
    assert quick.base_model is model.model
    quick.config = config = replace(model.config, num_labels=5)
    quick.generation_config = replace(model.generation_config, max_new_tokens=3)
    assert model.config is model.model.config is config
    assert model.generation_config.max_new_tokens == 3
    assert quick.generate(prompt).shape[1] == prompt.shape[1] + 3
    with pytest.raises(AttributeError, match="model"):
        quick.model = make_model(7)
    assert quick.model is model


def test_quantising_what_is_no_module_is_an_error_that_changes_nothing(prompt):
    model = make_model()
    quick, expected = fast(model), model.generate(prompt, max_new_tokens=6)
    with pytest.raises(InputError, match=r"got FastModel; give the model itself, .* its \.model"):
        quantize(quick, "int8")
    assert model.config.quantization is None
    assert torch.equal(quick.generate(prompt, max_new_tokens=6), expected)
    quantize(quick.model, "int8")
    assert torch.equal(quick.generate(prompt, max_new_tokens=6), model.generate(prompt, max_new_tokens=6))


@torch.no_grad()
def test_a_pass_without_a_number_of_logits_has_all_and_what_does_not_go_with_it_is_refused(model, prompt):
    quick, inputs = fast(model), cached(model, prompt[:, :5], None, torch.float32, 30)._replace(tokens=prompt[:, 5:8])
    shapes = passes(quick)
    logits = quick(inputs).logits
    assert shapes == [(1, 3)]
    torch.testing.assert_close(logits, model(prompt[:, :8]).logits[:, 5:], rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="Inputs hold all arguments"):
        quick(inputs, torch.ones(1, 8))
    with pytest.raises(InputError, match="got -1"):
        quick(inputs, logits_to_keep=-1)
    assert quick(inputs, labels=prompt[:, 5:8]).loss is not None


@torch.no_grad()
def test_a_registered_backend_that_one_pass_asks_for_is_called(model, prompt):
    register_backend("raising", lambda *_: 1 / 0)
    inputs = cached(model, prompt[:, :5], None, torch.float32, 30)._replace(tokens=prompt[:, 5:6], backend="raising")
    with pytest.raises(ZeroDivisionError):
        fast(model)(inputs)


def test_the_reason_is_that_of_now_and_each_time_there_is_one_a_warning_gives_it(model, prompt):
    quick = fast(model)
    assert quick.reason == ""
    for _ in range(2):
        handle = model.model.norm.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="decoding is not fast: the loops run no hooks, and RMSNorm has some"):
            quick.generate(prompt, max_new_tokens=3)
        assert quick.reason == "the loops run no hooks, and RMSNorm has some"
        handle.remove()
        shapes = passes(quick)
        quick.generate(prompt, max_new_tokens=3)
        assert shapes == [(1, 9), (1, 1), (1, 1)]
        assert quick.reason == ""


def test_another_thread_may_find_a_reason_at_any_time(model, prompt, monkeypatch):
    quick = fast(model)
    take = Loops.take

    def taken(loops: Loops, rows: int) -> bool:
        quick._loops = None
        return take(loops, rows)

    expected = quick.generate(prompt, max_new_tokens=6)
    monkeypatch.setattr(Loops, "take", taken)
    assert torch.equal(quick.generate(prompt, max_new_tokens=6), expected)


# --- the compiler -----------------------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing is built yet. Loops are built without -O3, in a third of the time."""
    monkeypatch.setattr(compiler, "FLAGS", tuple(flag for flag in compiler.FLAGS if flag != "-O3"))
    monkeypatch.setenv("OPENLLAMA_CACHE", str(tmp_path / "cache"))
    compiler.library.cache_clear()
    yield tmp_path / "cache"
    compiler.library.cache_clear()


def test_without_a_compiler_the_model_decodes_and_a_warning_says_so(model, prompt, anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"not fast: .*need a C\+\+ compiler, .*\(no-such-compiler\); install one"):
        quick = fast(model)
    assert torch.equal(quick.generate(prompt, max_new_tokens=5), model.generate(prompt, max_new_tokens=5))


def test_a_quantised_model_that_was_pickled_where_there_is_a_compiler_is_used_where_there_is_none(monkeypatch):
    def none() -> None:
        raise BackendError("no compiler")

    model = quantize(make_model(), "int8")
    fast(model)
    pickled, ids = pickle.dumps(model), torch.arange(40)[None]
    monkeypatch.setattr(prompts, "library", none)
    assert torch.equal(pickle.loads(pickled)(ids).logits, quantize(make_model(), "int8")(ids).logits)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(model, anew, monkeypatch):
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "--no-such-flag"))
    with pytest.warns(UserWarning, match="could not compile the loops.*no-such-flag.*; set CXX"):
        fast(model)
    assert list(anew.iterdir()) == []


def test_a_library_that_cannot_be_loaded_names_the_file(model, anew, monkeypatch):
    anew.mkdir()
    monkeypatch.setattr(compiler, "_build", lambda command, path: path.write_bytes(b"not a library"))
    with pytest.warns(UserWarning, match=r"kernels-\w+\.so cannot be loaded: .*; remove it"):
        fast(model)


def test_a_folder_that_cannot_be_written_is_a_warning(model, anew):
    anew.write_text("a file")
    with pytest.warns(UserWarning, match=r"could not be built in .*cache.*; set OPENLLAMA_CACHE"):
        fast(model)


def test_a_compiler_that_failed_is_tried_again_only_when_another_is_named(model, prompt, anew, monkeypatch):
    tried = []
    build = compiler._build

    def failing(command: list[str], path: Path) -> None:
        tried.append(command[0])
        raise BackendError("it cannot")

    monkeypatch.setattr(compiler, "_build", failing)
    monkeypatch.setenv("CXX", "g++")
    with pytest.warns(UserWarning, match="it cannot"):
        quick = fast(model)
    quick.generate(prompt, max_new_tokens=3)
    with pytest.warns(UserWarning, match="it cannot"):
        fast(model)
    assert tried == ["g++"]
    monkeypatch.setattr(compiler, "_build", build)
    monkeypatch.setenv("CXX", "c++")
    assert quick.reason == ""


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """No folder is named, and that of the user cannot be made; the private folder is returned."""
    monkeypatch.delenv("OPENLLAMA_CACHE", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"openllama-{os.getuid()}"


def test_without_a_folder_that_can_be_written_a_private_one_is_made(no_cache):
    for _ in range(2):
        assert compiler.folder("kernels.so") == no_cache
    assert no_cache.stat().st_mode & 0o777 == 0o700


def test_without_a_home_a_private_folder_is_made(no_cache, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert compiler.folder("kernels.so") == no_cache


def test_loops_that_somebody_built_are_used_where_nothing_can_be_written(no_cache, monkeypatch, tmp_path):
    usual = tmp_path / "cache" / "openllama"
    usual.mkdir(parents=True)
    (usual / "kernels.so").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(usual.parent))

    def read_only(dir: Path) -> None:
        raise PermissionError(dir)

    monkeypatch.setattr("tempfile.TemporaryDirectory", read_only)
    assert compiler.folder("kernels.so") == usual
    assert compiler.folder("others.so") == no_cache


@pytest.mark.parametrize("found", ["a link", "open to others", "of somebody else"])
def test_a_private_folder_that_is_not_private_is_refused(no_cache, found, monkeypatch, tmp_path):
    if found == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        no_cache.symlink_to(tmp_path / "elsewhere")
    elif found == "open to others":
        no_cache.mkdir()
        no_cache.chmod(0o770)
    else:
        compiler.folder("kernels.so")
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        no_cache.rename(tmp_path / f"openllama-{user + 1}")
    with pytest.raises(BackendError, match=r"openllama-\d+ must be a folder of user \d+ .*; remove it, or set"):
        compiler.folder("kernels.so")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ('g++ "x', 'CXX is no command: g\\+\\+ "x'),
        ("{program}", "cannot be run"),
        ("false", "ended with code 1"),
        ("true", "wrote no file"),
    ],
)
def test_a_command_that_is_no_compiler_is_a_reason(model, anew, tmp_path, monkeypatch, command, reason):
    program = tmp_path / "program"
    program.write_text("hello")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", command.format(program=program))
    with pytest.warns(UserWarning, match=f"decoding is not fast: .*{reason}"):
        fast(model)


def test_a_library_that_has_no_loops_is_a_reason(model, anew, monkeypatch):
    def build(command: list[str], path: Path) -> None:
        path.parent.mkdir()
        command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
        subprocess.run(command, input="int nothing;", text=True, check=True)

    monkeypatch.setattr(compiler, "_build", build)
    with pytest.warns(UserWarning, match=r"cannot be loaded: .*openllama_product; remove it"):
        fast(model)


def test_it_is_built_once_for_all_processes(model, anew):
    def files() -> dict[str, int]:
        return {file.suffix: file.stat().st_mtime_ns for file in anew.iterdir()}

    fast(model)
    before = files()
    assert set(before) == {".so", ".sha256"}
    compiler.library.cache_clear()
    fast(model)
    assert files() == before


def test_a_library_that_was_cut_is_built_again(anew):
    kernels.library()
    [library] = anew.glob("*.so")
    content = library.read_bytes()
    library.unlink()  # this process has it in memory
    library.write_bytes(content[: len(content) // 2])
    code = f"from openllama import compiler; compiler.FLAGS = {compiler.FLAGS}\n"
    code += "from openllama.inference.kernels import library; library()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "SIGBUS would be -7"
    assert compiler._is_whole(library)
    library.with_suffix(".sha256").write_bytes(b"\xff")
    assert not compiler._is_whole(library)


def test_a_folder_is_named_from_that_of_the_user_or_where_the_process_is(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, expected in (("~/loops", tmp_path / "loops"), (".", tmp_path)):
        monkeypatch.setenv("OPENLLAMA_CACHE", name)
        assert compiler.folder("kernels.so") == expected
    monkeypatch.setenv("OPENLLAMA_CACHE", "~no-such-user/loops")
    with pytest.raises(BackendError, match=r"OPENLLAMA_CACHE is no folder: ~no-such-user/loops \("):
        compiler.folder("kernels.so")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A matrix that is multiplied in no time; what was measured before is forgotten, and is kept in another folder."""
    product = kernels.library().openllama_product
    built = SimpleNamespace(_name=str(tmp_path / "kernels-1.so"), openllama_product=product)
    monkeypatch.setattr(threshold, "library", lambda: built)
    monkeypatch.setattr(threshold, "SHAPE", (70, 96))
    kept = threshold.most_rows, threshold.prompt_products
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_the_number_of_tokens_is_measured_once_for_all_processes(small, defaults, kind, dtype, monkeypatch, tmp_path):
    defaults(torch.float64, "meta")
    number = structs.KINDS[dtype] if kind == "plain" else WEIGHTS[kind]
    found = threshold.most_rows(number, dtype, 2)
    assert found in (2, 4, 8, 16, 32, 64)
    monkeypatch.setattr(threshold, "_measure", lambda *_: 5)
    monkeypatch.setattr(threshold, "_measure_prompt", lambda *_: 1)

    def by_another_process(threads: int = 2) -> int:
        threshold.most_rows.cache_clear()
        return threshold.most_rows(number, dtype, threads)

    assert by_another_process() == found
    assert by_another_process(1) == 5, "other threads, another number"
    assert threshold.most_rows({2: 3}.get(number, 2), dtype, 2) == 5, "other weights, another number"
    [kept] = tmp_path.iterdir()
    assert f"{kind} in {str(dtype).removeprefix('torch.')}, 2 threads, torch {torch.__version__}" in kept.read_text()
    prompts_too = f"prompts, plain in {str(dtype).removeprefix('torch.')}, 2 threads, torch {torch.__version__}"
    assert prompts_too in json.loads(kept.read_text()), "the measurement of one asks for the other"
    of_another_kind = json.dumps(dict.fromkeys(json.loads(kept.read_text()), "many"))
    for broken in ("[broken", "[]", of_another_kind):
        kept.write_text(broken)
        assert by_another_process() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("faster", [LoopProducts, FastProducts])
def test_prompts_go_the_way_that_was_measured_to_be_faster(small, dtype, faster, monkeypatch, tmp_path):
    def fastest(ways: tuple[Callable[[], Tensor], ...]) -> tuple[float, float]:
        ours, theirs = (way() for way in ways)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)
        return (1.0, 2.0) if faster is LoopProducts else (2.0, 1.0)

    monkeypatch.setattr(threshold, "_fastest", fastest)
    assert threshold.prompt_products(dtype, 2) is faster
    threshold.prompt_products.cache_clear()
    monkeypatch.delattr(threshold, "_measure_prompt")  # another process finds what was kept
    assert threshold.prompt_products(dtype, 2) is faster


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_loops_are_measured_against_the_modules_that_would_multiply_these_weights(small, kind, monkeypatch):
    asked: list[int] = []

    def fastest(ways: tuple[Callable[[], Any], ...]) -> tuple[float, float]:
        loops, module = ways
        loops()
        asked.append(len(module()))
        return (1.0, 2.0) if len(asked) < 3 else (2.0, 1.0)

    monkeypatch.setattr(threshold, "_fastest", fastest)
    monkeypatch.setattr(threshold, "prompt_products", lambda *_: FastProducts)
    monkeypatch.setattr(QuantizedLinear, "forward", lambda module, x: x if module.bits == int(kind[3:]) else None)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    assert threshold._measure(WEIGHTS[kind], dtype, 1) == 8
    assert asked == [4, 8, 16]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_loops_take_what_was_measured_for_their_weights_and_never_more_than_64_tokens(small, kind, monkeypatch):
    measured: list[tuple[Any, ...]] = []
    monkeypatch.setattr(loops, "most_rows", threshold.most_rows)
    monkeypatch.setattr(threshold, "_known", lambda path: {})
    monkeypatch.setattr(threshold, "_measure", lambda *asked: measured.append(asked) or 8)
    model = make_model().to(torch.float32 if kind == "float32" else torch.bfloat16)
    quick = fast(quantize(model, kind) if kind in ("int8", "int4") else model)
    assert [quick._loops.take(rows) for rows in (1, 2, 65, 1000)] == [True, True, False, False]
    assert not measured
    assert [quick._loops.take(rows) for rows in (3, 8, 9, 64)] == [True, True, False, False]
    assert measured == [(WEIGHTS[kind], model.dtype, torch.get_num_threads())]
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        assert quick._loops.take(5)
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert len(measured) == 2, "another number of threads is another measurement"


def test_subnormal_numbers_stay_after_the_loops_are_loaded():
    """Libraries built with -ffast-math would set a flag of the processor."""
    code = "import torch; from openllama.inference.kernels import library as f; f(); print(torch.tensor(1e-40) * 1 > 0)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "tensor(True)\n"


# --- the command line -------------------------------------------------------------------------------


def test_generate_fast_prints_what_generate_prints(capsys):
    arguments = [
        "generate",
        str(TINY),
        "--prompt",
        "The king",
        "--greedy",
        "--dtype",
        "float32",
        "--max-new-tokens",
        "20",
    ]
    texts = []
    for extra in ([], ["--fast"]):
        assert main([*arguments, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_what_is_measured_on_a_machine_is_no_part_of_the_speed_that_is_printed(capsys, monkeypatch):
    events = []
    monkeypatch.setattr(loops, "most_rows", lambda *_: events.append("measured") or 16)
    monkeypatch.setattr("openllama.cli.generate._print_continuation", lambda *_: events.append("text") or 1)
    assert main(["generate", str(TINY), "--prompt", "The king", "--fast", "--assistant", str(TINY)]) == 0
    assert events == ["measured", "measured", "text"], "the model and its assistant"
