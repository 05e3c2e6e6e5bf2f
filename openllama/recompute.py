"""Training memory: cheap functions keep their inputs for the backward pass and are computed again there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openllama.modes import is_traced


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which autograd keeps the inputs and none of the values between.

    The derivatives are bit for bit those of calling it directly, except that an input's is one sum before
    what other uses of the input contribute is added. ``function`` must be deterministic.
    """
    if torch.is_grad_enabled() and not is_traced(*inputs):  # whoever traces chooses what to keep
        return _Recomputed.apply(function, *inputs)
    return function(*inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.autocast = _autocast_now(output.device.type)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()  # for a second derivative
        if not again:
            inputs = [x.detach().requires_grad_(one) for x, one in zip(inputs, needed, strict=True)]
        with ctx.autocast, torch.enable_grad():
            output = ctx.function(*inputs)
        wanted = [x for x, one in zip(inputs, needed, strict=True) if one]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=again))
        return None, *(next(grads) if one else None for one in needed)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Tensor:
        with ctx.autocast:  # the transpose of the transpose, as forward mode cannot be nested
            value, pull_back = torch.func.vjp(ctx.function, *ctx.saved_tensors)  # type: ignore[misc]
            return torch.func.vjp(pull_back, torch.zeros_like(value))[1](tangents)[0]


def _autocast_now(device: str) -> contextlib.AbstractContextManager[Any]:
    """What autocast does in the forward pass, for the backward pass, which runs outside of it."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
