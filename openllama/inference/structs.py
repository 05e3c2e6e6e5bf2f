"""The structs of ``kernels.cpp``, field by field; shapes and meanings are there."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch

KINDS = {torch.float32: 0, torch.bfloat16: 1}  # of weights, norms and caches
QUANTIZED = {"int8": 2, "int4": 3}  # by the names of ``quantized.rounding.FORMATS``


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("columns", c_int64), ("kind", c_int64)]


class Layer(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class Model(Structure):
    _fields_ = [
        ("layers", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Matrix),
        *(
            (name, c_int64)
            for name in ("count", "size", "intermediate", "heads", "head_dim", "norm_kind", "cache_kind")
        ),
        ("eps", c_float),
    ]


class Pass(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "past", "room", "keep", "threads")),
        *((name, c_void_p) for name in ("cos", "sin", "mask", "x", "logits", "work")),
    ]
