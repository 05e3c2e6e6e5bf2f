"""Products of many rows on a CPU, in the way that is fast on the processor at hand.

Without instructions for bfloat16 a processor multiplies it several times slower than float32, and torch's products in a
backward pass a hundred times; it multiplies int8 there by a plain loop, a hundred times slower, too. So it is measured,
once in a process, by products of milliseconds.

    with FastProducts():
        model.loss(ids, ids).backward()
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from openllama.attention import recomputed
from openllama.checks import has_numbers

MANY = 32  # rows from which another way is worth its preparation
BLOCK = 2**22  # numbers of a matrix that are converted at a time: what a cache holds

_slow: dict[torch.dtype, bool] = {}  # what was measured; not functools.cache, through which torch.compile looks


def bfloat16_is_slow() -> bool:
    """Whether torch needs half as long again for a product of bfloat16 as for one of float32."""
    if torch.bfloat16 not in _slow:
        if torch.compiler.is_compiling():  # where nothing can be measured
            return False
        _slow[torch.bfloat16] = _seconds(F.linear, torch.bfloat16) > 1.5 * _seconds(F.linear, torch.float32)
    return _slow[torch.bfloat16]


def int8_is_slow() -> bool:
    """Whether torch needs longer for a product of int8 than for one of float32."""
    if torch.int8 not in _slow:
        _slow[torch.int8] = _seconds(torch._int_mm, torch.int8) > _seconds(F.linear, torch.float32)
    return _slow[torch.int8]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of input (..., K) and weight (M, K); in float32 where that is faster, and rounded to their type.

    The gradients are computed in the same way.
    """
    if bias is not None or not is_large(input, weight) or not _by_float32(input, weight):
        return F.linear(input, weight, bias)
    return _mm(input.reshape(-1, weight.shape[1]), weight.T).view(*input.shape[:-1], len(weight))


def is_large(input: Tensor, weight: Tensor) -> bool:
    """Whether these are ``MANY`` rows or more and a matrix that fits to them."""
    fits = weight.ndim == 2 and input.ndim and input.shape[-1] == weight.shape[1]
    return bool(fits and input.numel() >= MANY * max(1, weight.shape[1]))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.mm`` of a (N, K) and b (K, M), for gradients, which torch's product of bfloat16 may take longest for.

    In float32 where that is faster, and rounded to the type of a.
    """
    if not _by_float32(a, b):
        return torch.mm(a, b, out=out)
    return _mm(a, b) if out is None else out.copy_(_mm(a, b))


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *settings: Any, **named: Any
) -> Tensor:
    """torch's function; where a backward pass is to come, in float32 if that is faster."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if not (trains and _by_float32(query, key, value)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *settings, **named)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    wide = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, *settings, **named)
    return wide.to(query.dtype)


class FastProducts(TorchFunctionMode):
    """A context in which models in bfloat16 train on processors that have no instructions for it.

    Products of ``F.linear``, which ``nn.Linear`` calls, and their gradients are computed in float32, a part of the
    matrix at a time, and rounded once; so is sdpa's attention where it has a backward pass. The results are as near to
    those of float32 as torch's own, or nearer. It is measured whether bfloat16 is slow; if not, and on GPUs, in other
    types, under ``torch.func`` and for tensors that are distributed, nothing changes. ``model.loss`` computes its own
    products, those with the head, in this way without being told.

    The context is that of one thread, as with every mode of torch. The backward pass may be outside of it. Where layers
    are computed again by ``torch.utils.checkpoint`` in another way than ``gradient_checkpointing_enable``, it must be
    inside.
    """

    def __init__(self) -> None:
        super().__init__()
        bfloat16_is_slow()  # measured before anything is compiled

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is recomputed:
            return _with_fast_products(func(*args, **(kwargs or {})))
        if func is F.linear:
            func = linear
        elif func is F.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _with_fast_products(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with FastProducts():
            return function(*args, **kwargs)

    return run


def _by_float32(*tensors: Tensor) -> bool:
    """Whether products of these tensors are faster in float32 than as torch computes them."""
    narrow = all(tensor.dtype == torch.bfloat16 and has_numbers(tensor) for tensor in tensors)
    return narrow and bfloat16_is_slow()


# An operator, not an autograd.Function: torch.compile and ``recompute.keep_products`` see one product, not its blocks.
# It keeps what torch.mm keeps, in the same order, so a layer may be computed again with one in place of the other.
# Not by torch.library.custom_op, whose first call imports torch's compiler: 75 MiB and seconds.
_LIBRARY = torch.library.Library("openllama", "FRAGMENT")
_LIBRARY.define("mm(Tensor a, Tensor b) -> Tensor")
_mm = torch.ops.openllama.mm.default


def _mm_cpu(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M) in float32, rounded to the type of a."""
    product = a.new_empty(len(a), b.shape[1])
    if len(a) <= b.shape[1]:
        _multiply(a, b, product)
    else:
        _multiply(b.T, a.T, product.T)
    return product


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a (N, K) @ b (K, M) to ``out``: all of a in float32, and a few columns of b at a time."""
    a, step = a.float(), max(1, BLOCK // max(1, len(b)))
    block = torch.empty_like(b[:, :step], dtype=torch.float32)  # one, as new memory is slow
    for start in range(0, b.shape[1], step):
        part = b[:, start : start + step]
        out[:, start : start + step] = torch.mm(a, block[:, : part.shape[1]].copy_(part))


def _mm_meta(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    a, b = inputs
    ctx.save_for_backward(b if ctx.needs_input_grad[0] else None, a if ctx.needs_input_grad[1] else None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of a and b; products of the same kind, so they have gradients, too."""
    b, a = ctx.saved_tensors
    return None if b is None else _mm(grad, b.T), None if a is None else _mm(grad.T, a).T


_LIBRARY.impl("mm", _mm_cpu, "CPU")
_LIBRARY.impl("mm", _mm_meta, "Meta")  # not by register_fake, which reads source files for 15 ms
torch.library.register_autograd("openllama::mm", _gradients, setup_context=_keep, lib=_LIBRARY)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    """The least time of three small products, after one that prepares."""
    x, weight = (torch.ones(rows, 512, dtype=dtype, device="cpu") for rows in (MANY, 512))
    times = []
    with torch.autocast("cpu", enabled=False):
        for _ in range(4):
            start = time.perf_counter()
            product(x, weight)
            times.append(time.perf_counter() - start)
    return min(times[1:])
