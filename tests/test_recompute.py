"""``recomputed(f, x)`` is ``f(x)`` for every kind of derivative, and remembers less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openllama.model import _ACTIVATIONS
from openllama.recompute import recomputed
from tests.tiny import tiny_ids, tiny_model


def gate(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * y


def scaled_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * torch.nn.functional.rms_norm(x.float(), weight.shape, eps=1e-6).to(x.dtype)


def remembering(x: Tensor, y: Tensor) -> Tensor:
    return recomputed(gate, x, y)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


@given(
    act=st.sampled_from(sorted(_ACTIVATIONS)),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_value_and_gradients_are_bit_for_bit_those_of_a_direct_call(act, seed, rows, dtype):
    def function(x: Tensor, y: Tensor) -> Tensor:
        return scaled_norm(_ACTIVATIONS[act](x) * x, y)

    inputs = draw(rows, 8, seed=seed, dtype=dtype), draw(8, seed=seed + 1, dtype=dtype)
    found, expected = recomputed(function, *inputs), function(*inputs)
    upstream = torch.randn(rows, 8).to(dtype)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert torch.equal(one, other)


def test_only_the_inputs_are_remembered():
    x, y = draw(4, 8), draw(4, 8)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        recomputed(gate, x, y)
    assert kept == [x.data_ptr(), y.data_ptr()]


def test_derivatives_of_second_order_and_forward_mode_are_those_of_differences():
    inputs = draw(3, 4, dtype=torch.float64), draw(3, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(remembering, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(remembering, inputs)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.jacrev])
def test_function_transforms_go_through(transform: Callable):
    x, y = draw(4).detach(), draw(4, seed=1).detach()
    found = transform(lambda x: remembering(x, y).sum())(x)
    torch.testing.assert_close(found, transform(lambda x: gate(x, y).sum())(x))


def test_gradients_of_every_sample_of_a_batch_come_from_vmap():
    model = tiny_model()
    ids = tiny_ids(3, 6)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (row[None],), {"labels": row[None]}).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for number, row in enumerate(ids):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad, msg=name)


@pytest.mark.parametrize(
    "hooks",
    [
        torch.autograd.graph.save_on_cpu,
        torch.autograd.graph.allow_mutation_on_saved_tensors,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ],
)
def test_hooks_on_saved_tensors_may_be_there_in_the_backward_pass_too(hooks: Callable):
    found, expected = tiny_model(), tiny_model()
    with hooks():
        found(tiny_ids(), labels=tiny_ids()).loss.backward()
    expected(tiny_ids(), labels=tiny_ids()).loss.backward()
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_penalty_on_gradients_can_be_recomputed_itself():
    model, embedded = tiny_model(), torch.randn(2, 7, 24, requires_grad=True)

    def penalty(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(model(inputs_embeds=x, labels=tiny_ids()).loss, x, create_graph=True)
        return slope.square().sum()

    (expected,) = torch.autograd.grad(penalty(embedded), embedded)
    (found,) = torch.autograd.grad(checkpoint(penalty, embedded, use_reentrant=False), embedded)
    assert expected.any()
    torch.testing.assert_close(found, expected)


def test_what_is_frozen_gets_no_gradient_and_costs_none():
    x, y = draw(4, 8), draw(4, 8).detach()
    recomputed(gate, x, y).sum().backward()
    assert y.grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(gate(x, y).sum(), x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_backward_pass_rounds_as_the_forward_pass_did(dtype):
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ y)

    inputs = draw(4, 4, dtype=dtype), draw(4, 4, seed=1, dtype=dtype)
    gradients = []
    for result in (recomputed, lambda function, *inputs: function(*inputs)):
        with torch.autocast("cpu", torch.bfloat16):
            out = result(function, *inputs)
        assert out.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(out.float().sum(), inputs))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_without_gradients_it_is_a_plain_call():
    with torch.no_grad():
        assert recomputed(gate, draw(2), draw(2)).grad_fn is None
    with torch.inference_mode():
        assert recomputed(gate, draw(2), draw(2)).is_inference()
