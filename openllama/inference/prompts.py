"""Matrices of prompts by ``kernels.cpp``: multiplied by many rows at a time, or restored to the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openllama.checks import has_numbers
from openllama.errors import BackendError
from openllama.inference.kernels import library
from openllama.inference.structs import KINDS, QUANTIZED, Matrix
from openllama.products import FastProducts, is_large
from openllama.quantized.modules import QuantizedMatrix
from openllama.quantized.rounding import restore_matrix


def use_loops(model: nn.Module) -> None:
    """From now on the quantised modules of ``model`` restore and multiply by the loops."""
    for module in model.modules():
        if isinstance(module, QuantizedMatrix):
            module.restore, module.multiply = restore, multiply


def restore(weight: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """As ``quantized.rounding.restore_matrix``, which it calls for what has no memory on this CPU.

    So it does where the loops cannot be built: a model may have been pickled on another machine.
    """
    loops = _loops_for(weight, scale) if dtype in KINDS else None
    if loops is None:
        return restore_matrix(weight, scale, columns, dtype)
    matrix, out = _matrix(weight, scale, columns), weight.new_empty(len(weight), columns, dtype=dtype)
    loops.openllama_restore(matrix, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
    return out


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
    """x (N, K) @ matrix.T, both rounded to 16 bits with a scale for each 256 columns of a row; None where the loops do
    not compute it.

    Inputs are rounded to 15 bits and a sign, for int4 to 12; the numbers of int4, times their scales, to 11.
    """
    if x.dtype not in KINDS:
        return None
    x = x.contiguous()
    loops = _loops_for(x, weight, scale)
    if loops is None:
        return None
    return _many(loops, x, _matrix(weight, scale, x.shape[1]))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear`` of input (..., K) and weight (M, K) without gradients, both float32 or bfloat16, computed in float32
    and rounded to their type; None where the loops do not compute it."""
    if bias is not None or torch.is_grad_enabled() or not is_large(input, weight):
        return None
    if not input.dtype == weight.dtype in KINDS or not has_numbers(input) or torch.is_autocast_enabled("cpu"):
        return None
    flat = input.reshape(-1, weight.shape[1]).contiguous()
    loops = _loops_for(flat, weight)
    if loops is None:
        return None
    matrix = Matrix(weight.data_ptr(), None, *weight.shape, KINDS[weight.dtype])
    return _many(loops, flat, matrix).view(*input.shape[:-1], len(weight))


class LoopProducts(FastProducts):
    """Modules that call ``F.linear`` get ``linear``, and what else ``FastProducts`` gives."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = linear(*args, **(kwargs or {})) if func is F.linear else None
        return super().__torch_function__(func, types, args, kwargs) if product is None else product


def _many(loops: ctypes.CDLL, x: Tensor, matrix: Matrix) -> Tensor:
    """x (N, K) @ matrix.T, in the type of x."""
    product, kind, threads = x.new_empty(len(x), matrix.rows), KINDS[x.dtype], torch.get_num_threads()
    floats = loops.openllama_many(matrix, None, None, kind, len(x), None, threads)
    room = x.new_empty(floats, dtype=torch.float32)
    loops.openllama_many(matrix, x.data_ptr(), product.data_ptr(), kind, len(x), room.data_ptr(), threads)
    return product


def _matrix(weight: Tensor, scale: Tensor, columns: int) -> Matrix:
    kind = QUANTIZED["int8" if weight.dtype == torch.int8 else "int4"]
    return Matrix(weight.data_ptr(), scale.data_ptr(), len(weight), columns, kind)


def _loops_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The loops, where they can be built and all tensors are in memory of this CPU, one number after the other."""
    if torch.compiler.is_compiling() or not all(has_numbers(tensor) and tensor.is_contiguous() for tensor in tensors):
        return None
    try:
        return library()
    except BackendError:
        return None
