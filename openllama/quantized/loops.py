"""Rounds by the loops of ``rounding.cpp``, which compute the bits of ``rounding`` in a small part of its time.

Nothing is computed differently where there is no compiler, so nothing is said there. What comes back is None where
torch is to compute: for few numbers, as compiling takes seconds, and for what has no memory on this CPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from openllama import compiler
from openllama.checks import has_numbers
from openllama.errors import BackendError

SOURCE = Path(__file__).with_name("rounding.cpp")
FLAGS = ("-ffp-contract=off",)  # a product is rounded before it is added
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOAD, BUILD = 2**20, 2**26  # numbers for which torch takes as long as loading the loops, and as compiling them
_asked = 0  # numbers of this process: a model is many matrices, of which none may be large, or pieces of them


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("kind", "rows", "columns", "stride"))]


class Format(ctypes.Structure):
    _fields_ = [("divisors", POINTER(c_float)), ("count", c_int64), ("low", c_float), ("high", c_float)]


def round_matrix(
    weight: Tensor, stored: Tensor, scales: Tensor, divisors: Sequence[float], low: int, high: int
) -> bool | None:
    """Write the integers and scales of ``weight``; whether all its numbers are finite. None where torch is to do it."""
    found = _loops_for(weight)
    if found is None:
        return None
    form = Format((c_float * len(divisors))(*divisors), len(divisors), low, high)
    part = found.openllama_round_rows if stored.dtype == torch.int8 else found.openllama_round_groups
    return bool(part(_matrix(weight), form, stored.data_ptr(), scales.data_ptr(), torch.get_num_threads()))


def is_finite(weight: Tensor) -> bool | None:
    """Whether all numbers of ``weight`` are finite; None where torch is to find out."""
    found = _loops_for(weight)
    return None if found is None else bool(found.openllama_is_finite(_matrix(weight), torch.get_num_threads()))


def _matrix(weight: Tensor) -> Matrix:
    return Matrix(weight.data_ptr(), KINDS[weight.dtype], *weight.shape, weight.stride(0))


def _loops_for(weight: Tensor) -> ctypes.CDLL | None:
    """The loops, where ``weight`` has rows of numbers in memory of this CPU and so many were asked for that it pays."""
    global _asked
    if torch.compiler.is_compiling() or not has_numbers(weight):
        return None
    if weight.dtype not in KINDS or weight.is_neg() or not weight.numel() or weight.stride(1) != 1:
        return None
    _asked += weight.numel()
    return _library() if _asked >= BUILD or (_asked >= LOAD and _is_built()) else None


@functools.cache
def _is_built() -> bool:
    return compiler.is_built(SOURCE, *FLAGS)


def _library() -> ctypes.CDLL | None:
    try:
        return compiler.library(SOURCE, _declare, *FLAGS)
    except BackendError:
        return None


def _declare(loops: ctypes.CDLL) -> None:
    loops.openllama_is_finite.argtypes = [POINTER(Matrix), c_int64]
    for part in (loops.openllama_round_rows, loops.openllama_round_groups):
        part.argtypes = [POINTER(Matrix), POINTER(Format), c_void_p, c_void_p, c_int64]
    for function in (loops.openllama_is_finite, loops.openllama_round_rows, loops.openllama_round_groups):
        function.restype = c_int64
