"""Products of many rows on a CPU, in the way that is fast on the processor at hand.

Without instructions for bfloat16 a processor multiplies it several times slower than float32, and torch multiplies int8
there by a plain loop, a hundred times slower. So it is measured, once in a process, by products of milliseconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MANY = 32  # rows from which another way is worth its preparation
BLOCK = 2**22  # numbers of a matrix that are converted at a time: what a cache holds


@functools.cache
def bfloat16_is_slow() -> bool:
    """Whether torch needs half as long again for a product of bfloat16 as for one of float32."""
    return _seconds(F.linear, torch.bfloat16) > 1.5 * _seconds(F.linear, torch.float32)


@functools.cache
def int8_is_slow() -> bool:
    """Whether torch needs longer for a product of int8 than for one of float32."""
    return _seconds(torch._int_mm, torch.int8) > _seconds(F.linear, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of x (..., K) and weight (M, K); in float32 where that is faster, and rounded to the type of x."""
    rows = x.numel() // max(1, x.shape[-1])
    narrow = x.is_cpu and x.dtype == weight.dtype == torch.bfloat16
    if bias is not None or not (narrow and rows >= MANY and bfloat16_is_slow()):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1]).float()
    product = x.new_empty(rows, len(weight))
    step = max(1, BLOCK // weight.shape[1])
    block = torch.empty(step, weight.shape[1], dtype=torch.float32, device="cpu")  # one, as new memory is slow
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        product[:, start : start + step] = F.linear(flat, block[: len(part)].copy_(part))
    return product.view(*x.shape[:-1], len(weight))


class FastProducts(TorchFunctionMode):
    """Modules that call ``F.linear`` get ``linear``."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))


def _seconds(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    """The least time of three small products, after one that prepares."""
    x, weight = (torch.ones(rows, 512, dtype=dtype, device="cpu") for rows in (MANY, 512))
    product(x, weight)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)
