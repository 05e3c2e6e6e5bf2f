"""Restores quantised matrices by ``kernels.cpp``, for prompts: the same bits, several times as fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openllama.checks import PLAIN, is_transformed
from openllama.errors import BackendError
from openllama.inference.compiler import library
from openllama.inference.structs import KINDS, QUANTIZED, Matrix
from openllama.quantized.modules import QuantizedMatrix
from openllama.quantized.rounding import restore_matrix


def restore_by_loops(model: nn.Module) -> None:
    """From now on the quantised modules of ``model`` restore by the loops."""
    for module in model.modules():
        if isinstance(module, QuantizedMatrix):
            module.restore = restore


def restore(weight: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """As ``quantized.rounding.restore_matrix``, which it calls for what has no memory on this CPU.

    So it does where the loops cannot be built: a model may have been pickled on another machine.
    """
    if torch.compiler.is_compiling() or dtype not in KINDS or not (_is_here(weight) and _is_here(scale)):
        return restore_matrix(weight, scale, columns, dtype)
    try:
        loops = library()
    except BackendError:
        return restore_matrix(weight, scale, columns, dtype)
    kind = QUANTIZED[8 if weight.dtype == torch.int8 else 4]
    matrix = Matrix(weight.data_ptr(), scale.data_ptr(), len(weight), columns, kind)
    out = weight.new_empty(len(weight), columns, dtype=dtype)
    loops.openllama_restore(matrix, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
    return out


def _is_here(tensor: Tensor) -> bool:
    """Whether the numbers are in memory of this CPU, one after the other."""
    return tensor.is_cpu and type(tensor) in PLAIN and not is_transformed(tensor) and tensor.is_contiguous()
