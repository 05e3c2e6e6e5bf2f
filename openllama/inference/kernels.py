"""Loads the loops of ``kernels.cpp``."""

from __future__ import annotations

import ctypes
from pathlib import Path

from openllama import compiler
from openllama.inference.structs import Matrix, Model, Pass

SOURCE = Path(__file__).with_name("kernels.cpp")


def library() -> ctypes.CDLL:
    """The loops; raises ``BackendError`` where they cannot be built."""
    return compiler.library(SOURCE, _declare, "-ffp-contract=fast")


def _declare(loops: ctypes.CDLL) -> None:
    loops.openllama_product.restype = None
    loops.openllama_product.argtypes = [ctypes.POINTER(Matrix), *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2]
    loops.openllama_many.restype = ctypes.c_int64
    loops.openllama_many.argtypes = [
        ctypes.POINTER(Matrix), *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int64
    ]  # fmt: skip
    loops.openllama_restore.restype = None
    loops.openllama_restore.argtypes = [ctypes.POINTER(Matrix), ctypes.c_void_p, *[ctypes.c_int64] * 2]
    loops.openllama_room.restype = ctypes.c_int64
    loops.openllama_room.argtypes = [ctypes.POINTER(Model), *[ctypes.c_int64] * 4]
    loops.openllama_forward.restype = None
    loops.openllama_forward.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Pass)]
