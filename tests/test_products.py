"""Products of many rows: every way computes the same, and each is used where it is fast."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from openllama import losses, masks, products
from openllama.cache import PreallocatedCache
from openllama.inference import fast, loops, prompts
from openllama.inference.prompts import multiply, use_loops
from openllama.model import Inputs
from openllama.products import MANY, FastProducts, linear
from openllama.quantized.modules import QuantizedLinear
from openllama.recompute import keep_products
from tests.generating import make_model
from tests.tiny import tiny_ids, tiny_model

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


def test_what_f_linear_takes_besides_is_its_own(slow: bool) -> None:
    x, weight = torch.randn(MANY, 70).bfloat16(), torch.randn(23, 70).bfloat16()
    with FastProducts():
        torch.testing.assert_close(F.linear(input=x, weight=weight), F.linear(x, weight), rtol=0, atol=0)
        assert F.linear(x, weight[0]).shape == (MANY,)
        assert F.linear(x[:, :0], weight[:, :0]).shape == (MANY, 23)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            F.linear(x, weight[:, :5])
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(F.linear(forward_ad.make_dual(x, x), weight)).tangent is not None


def test_what_is_slow_does_not_depend_on_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(F, "linear", lambda x, weight: measured.append((x @ weight.T).dtype))
    with torch.autocast("cpu", torch.bfloat16):
        products._seconds(F.linear, torch.float32)
    assert set(measured) == {torch.float32}


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


def test_the_slow_ways_are_found_by_their_time_which_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: 5.0, torch.int8: 100.0}
    monkeypatch.setattr(products, "_seconds", lambda product, dtype: times[dtype])
    questions = products.bfloat16_is_slow, products.int8_is_slow
    monkeypatch.setattr(products, "_slow", {})
    assert [question() for question in questions] == [True, True]
    times |= {torch.bfloat16: 0.5, torch.int8: 0.25}
    assert [question() for question in questions] == [True, True]
    monkeypatch.setattr(products, "_slow", {})
    assert [question() for question in questions] == [False, False]


def test_the_measurement_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        seen.append((x.dtype, x.shape, weight.shape))
        return x

    assert products._seconds(product, torch.int8) > 0
    assert seen == [(torch.int8, (MANY, 512), (512, 512))] * 4


# --- training ---

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
Gradients = dict[str, Tensor]


def training_model(backend: str = "sdpa", seed: int = 0, **fields: Any) -> Any:
    """In bfloat16 and training mode."""
    fields = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128, **NO_DROPOUT, **fields}
    return tiny_model(attn_implementation=backend, seed=seed, **fields).train().bfloat16()


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {**found, "loss": loss.detach()}


def errors(found: Gradients, exact: Gradients) -> Tensor:
    """Of each gradient and the loss, relative to its norm."""
    assert found.keys() == exact.keys()
    return torch.stack([(found[name].float() - exact[name]).norm() / exact[name].norm() for name in exact])


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the products that are computed in float32, block by block."""
    sizes: list[int] = []
    multiply = products._multiply

    def spy(a: Tensor, b: Tensor, out: Tensor) -> None:
        sizes.append(len(a) * b.numel())
        multiply(a, b, out)

    monkeypatch.setattr(products, "_multiply", spy)
    return sizes


@pytest.mark.parametrize("shape", [(MANY, 70), (2, 40, 70), (3, 1, 50, 70)])
def test_gradients_are_the_nearest_bfloat16(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
    monkeypatch.setattr(products, "BLOCK", 700)
    x, weight = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(23, 70).bfloat16().requires_grad_()
    grad = torch.randn(*shape[:-1], 23).bfloat16()
    found = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    exact = torch.autograd.grad(F.linear(x, weight), (x, weight), grad.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-4)


def test_a_second_derivative_is_that_of_torch_s_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
    tensors = torch.randn(MANY, 7).bfloat16(), torch.randn(5, 7).bfloat16()
    found = []
    for product, kind in ((linear, torch.bfloat16), (F.linear, torch.float64)):
        x, weight = (tensor.to(kind).requires_grad_() for tensor in tensors)
        (first,) = torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)
        found.append([part.double() for part in torch.autograd.grad(first.square().sum(), (x, weight))])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_no_more_is_kept_for_the_backward_pass_than_by_torch(
    trained: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch, count: list[int]
) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
    x, weight = torch.randn(2, 40, 70).bfloat16(), torch.randn(23, 70).bfloat16()
    kept: list[list[Any]] = []
    for product in (linear, F.linear):
        inputs = [tensor.clone().requires_grad_(needed) for tensor, needed in zip((x, weight), trained, strict=True)]
        seen: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append((t.shape, t.dtype)) or t, lambda t: t):  # noqa: B023
            product(*inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == list(trained)
        kept.append(seen)
    assert kept[0] == kept[1]  # in the same order: either may be computed again in place of the other
    assert len(count) == 1 + sum(trained)


def test_the_operator_keeps_to_what_it_declares() -> None:
    tensors = torch.randn(3, 5).bfloat16().requires_grad_(), torch.randn(4, 5).bfloat16().requires_grad_()
    torch.library.opcheck(products._mm, (tensors[0], tensors[1].T))


def test_no_compiler_is_imported_for_a_product_and_its_gradients() -> None:
    code = f"""
import sys, torch
from openllama import products
products.bfloat16_is_slow = lambda: True
x, weight = torch.ones({MANY}, 4).bfloat16().requires_grad_(), torch.ones(3, 4).bfloat16().requires_grad_()
with products.FastProducts():
    torch.nn.functional.linear(x, weight).sum().backward()
print(weight.grad.sum().item(), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(float(12 * MANY)), "False"]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("chunked", [True, False])
def test_loss_and_gradients_are_not_farther_from_float32(
    backend: str, chunked: bool, monkeypatch: pytest.MonkeyPatch, count: list[int]
) -> None:
    own, fast_errors = torch.zeros(()), torch.zeros(())
    for seed in range(8):
        model, ids = training_model(backend, seed), tiny_ids(2, 100, seed)
        exact = copy.deepcopy(model).float()

        def loss(model: Any, ids: Tensor = ids) -> Tensor:
            return model.loss(ids, ids) if chunked else model(ids, labels=ids).loss

        expected = gradients(exact, loss(exact))
        monkeypatch.setattr(products, "bfloat16_is_slow", lambda: False)
        with FastProducts():
            plain = gradients(model, loss(model))
        assert not count
        monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
        with FastProducts():
            found = gradients(model, loss(model))
        assert len(count) == 3 * (2 * 7 + 1)  # layers, matrices of a layer, and the head
        count.clear()
        own, fast_errors = own + errors(plain, expected), fast_errors + errors(found, expected)
    assert fast_errors.mean() < 1.02 * own.mean()
    assert (fast_errors < 1.5 * own).all()


def test_where_bfloat16_is_not_slow_training_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: False)
    model, ids = training_model(), tiny_ids(2, 100)
    expected = gradients(model, model.loss(ids, ids))
    with FastProducts():
        found = gradients(model, model.loss(ids, ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_in_float32_are_left_to_torch(
    autocast: bool, monkeypatch: pytest.MonkeyPatch, count: list[int]
) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
    model, ids, found = training_model().float(), tiny_ids(2, 100), []
    for mode in (nullcontext(), FastProducts()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), mode:
            loss = model(ids, labels=ids).loss
        found.append(gradients(model, loss))
    if not autocast:  # which computes attention in bfloat16
        torch.testing.assert_close(*found, rtol=0, atol=0)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.01)
    assert not count


def test_function_transforms_are_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
    model, ids = training_model(), tiny_ids(1, 40)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: Gradients) -> Tensor:
        return torch.func.functional_call(model, weights, (ids,), {"labels": ids}).loss

    expected = torch.func.grad(loss)(weights)
    with FastProducts():
        torch.testing.assert_close(torch.func.grad(loss)(weights), expected, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backward", [FastProducts, nullcontext])
@pytest.mark.parametrize("arguments", [{}, {"context_fn": keep_products}], ids=["layers", "products kept"])
def test_layers_are_computed_again_in_the_way_of_the_forward_pass(
    padded: bool,
    backward: Callable[[], AbstractContextManager[Any]],
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    count: list[int],
) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda: True)
    monkeypatch.setattr(masks, "BLOCK", 64)  # a padded text is computed in two blocks, each again in the backward pass
    model, ids = training_model(), tiny_ids(2, 100)
    mask = (torch.arange(100) >= torch.tensor([[5], [0]])).long() if padded else None
    with FastProducts():
        expected = gradients(model, model.loss(ids, ids, attention_mask=mask))
    assert len(count) == 3 * 15
    model.gradient_checkpointing_enable(arguments)
    with FastProducts():
        loss = model.loss(ids, ids, attention_mask=mask)
    with backward():
        torch.testing.assert_close(gradients(model, loss), expected, rtol=0, atol=0)
    again = 0 if arguments else 2 * 7
    assert len(count) == 2 * 3 * 15 + again


def test_the_loss_multiplies_fast_without_being_told(monkeypatch: pytest.MonkeyPatch, count: list[int]) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1000)
    monkeypatch.setattr(losses, "KEPT_LOGITS", 0)
    hidden, weight = torch.randn(1, 101, 8).bfloat16().requires_grad_(), torch.randn(25, 8).bfloat16().requires_grad_()
    labels = torch.randint(25, (1, 101))
    for is_slow in (False, True):
        monkeypatch.setattr(products, "bfloat16_is_slow", lambda is_slow=is_slow: is_slow)
        losses.chunked_causal_lm_loss(hidden, labels, weight).backward()
        columns = [size // 800 for size in count]
        assert sum(columns) == (4 * 25 if is_slow else 0)  # the logits twice, and two gradients


@pytest.mark.parametrize("is_slow", [True, False])
def test_compiled_layers_multiply_fast_too(is_slow: bool, monkeypatch: pytest.MonkeyPatch, count: list[int]) -> None:
    monkeypatch.setattr(products, "_slow", {torch.bfloat16: is_slow})
    model, ids = training_model(), tiny_ids(2, 100)
    with FastProducts():
        expected = gradients(model, model.loss(ids, ids))
        once = len(count)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(model, model.loss(ids, ids)), expected, rtol=0, atol=0)
    assert len(count) == 2 * once == (2 * 3 * 15 if is_slow else 0)


def test_what_was_not_measured_is_not_measured_while_torch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_slow", {})
    model, ids = training_model(), tiny_ids(2, 100)
    loss = torch.compile(lambda: model.loss(ids, ids), backend="aot_eager", fullgraph=True)()
    assert loss.isfinite()
    assert products._slow == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_in_fast_products(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch, count: list[int]
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it is part of the test extra where it can be")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=64, init_lora_weights=False)
    torch.manual_seed(0)
    adapted, ids = peft.get_peft_model(training_model(), settings).bfloat16().train(), tiny_ids(2, 100)
    exact = copy.deepcopy(adapted).float()
    expected = gradients(exact, exact(input_ids=ids, labels=ids).loss)
    if checkpointing:
        adapted.get_base_model().gradient_checkpointing_enable()
        adapted.get_base_model().enable_input_require_grads()
    found = []
    for is_slow in (False, True):
        monkeypatch.setattr(products, "bfloat16_is_slow", lambda is_slow=is_slow: is_slow)
        with FastProducts():
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        found.append(errors(gradients(adapted, loss), expected))
    assert count
    assert found[1].mean() < 1.1 * found[0].mean()
