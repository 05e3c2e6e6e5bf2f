"""Quantised matrices of prompts by ``kernels.cpp``: restored to the same bits, or multiplied as integers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from openllama.checks import PLAIN, is_transformed
from openllama.errors import BackendError
from openllama.inference.compiler import library
from openllama.inference.structs import KINDS, QUANTIZED, Matrix
from openllama.quantized.modules import QuantizedMatrix
from openllama.quantized.rounding import GROUP, restore_matrix


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
    """x (N, K) @ matrix.T in float32, both rounded to 16 bits with a scale for each 2048 columns of a row; None where
    the loops do not compute it.

    Inputs are rounded to 15 bits and a sign, for int4 to 12; the numbers of int4, times their scales, to 11.
    """
    loops = _loops_for(x, weight, scale)
    if loops is None or x.shape[1] % GROUP or len(weight) % 2 or x.dtype != torch.float32:
        return None
    product = x.new_empty(len(x), len(weight))
    matrix = _matrix(weight, scale, x.shape[1])
    loops.openllama_many(matrix, x.data_ptr(), product.data_ptr(), len(x), torch.get_num_threads())
    return product


def _matrix(weight: Tensor, scale: Tensor, columns: int) -> Matrix:
    kind = QUANTIZED["int8" if weight.dtype == torch.int8 else "int4"]
    return Matrix(weight.data_ptr(), scale.data_ptr(), len(weight), columns, kind)


def _loops_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The loops, where they can be built and all tensors are in memory of this CPU, one number after the other."""
    if torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if not (tensor.is_cpu and type(tensor) in PLAIN and not is_transformed(tensor) and tensor.is_contiguous()):
            return None
    try:
        return library()
    except BackendError:
        return None
