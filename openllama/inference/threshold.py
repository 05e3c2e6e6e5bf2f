"""Which products the loops compute faster than libraries do, which is measured once on a machine.

Those of a few tokens are measured against the modules of the weights: plain matrices, or quantised ones, which are
restored or multiplied as integers. Those of a prompt are measured against ``products.linear``.
What was found is kept beside the loops, so that a model computes the same way each time. To measure again, remove the
file ``kernels-*.json`` from their folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from openllama import products
from openllama.inference.kernels import library
from openllama.inference.prompts import LoopProducts, linear, use_loops
from openllama.inference.structs import KINDS, QUANTIZED, Matrix
from openllama.products import FastProducts
from openllama.quantized.modules import QuantizedLinear
from openllama.quantized.rounding import FORMATS

ALWAYS, NEVER = 2, 64  # tokens that the loops take unmeasured, and above which they take none
SHAPE = 11008, 2048  # of the matrix: more than most caches hold
PROMPT = 128  # tokens
TURNS = 5


@functools.cache
def most_rows(kind: int, dtype: torch.dtype, threads: int) -> int:
    """The number of tokens from ``ALWAYS`` to ``NEVER`` up to which the loops are faster.

    ``kind`` of the weights as in ``structs``, ``dtype`` of the model, which with plain weights is theirs.
    """
    return _kept(_name(kind, dtype, threads), lambda: _measure(kind, dtype, threads))


@functools.cache
def prompt_products(dtype: torch.dtype, threads: int) -> type[FastProducts]:
    """What multiplies the plain matrices of a prompt in ``dtype``: the loops where they are faster, or libraries."""
    name = "prompts, " + _name(KINDS[dtype], dtype, threads)
    return LoopProducts if _kept(name, lambda: _measure_prompt(dtype)) else FastProducts


def _kept(name: str, measure: Callable[[], int]) -> int:
    """What was measured under this name, now or by an earlier process."""
    path = Path(library()._name).with_suffix(".json")
    known = _known(path)
    if name not in known:
        number = measure()
        known = _known(path) | {name: number}  # measuring may have kept something itself
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as work:
            written = Path(work, path.name)
            written.write_text(json.dumps(known), encoding="utf-8")
            written.replace(path)
    return known[name]


def _name(kind: int, dtype: torch.dtype, threads: int) -> str:
    weights = _quantization(kind) or "plain"
    return f"{weights} in {str(dtype).removeprefix('torch.')}, {threads} threads, torch {torch.__version__}"


def _quantization(kind: int) -> str | None:
    return next((name for name, number in QUANTIZED.items() if number == kind), None)


def _known(path: Path) -> dict[str, int]:
    """What earlier processes measured; a file that says nothing of the kind is replaced."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: rows for name, rows in entries if isinstance(rows, int)}


@torch.no_grad()
def _measure(kind: int, dtype: torch.dtype, threads: int) -> int:
    """The last of 2, 4, ... 64 rows that the loops multiply by a large matrix faster than its module."""
    module, loops, best = _module(kind, dtype), library(), ALWAYS
    scale = module.scale.data_ptr() if isinstance(module, QuantizedLinear) else None
    matrix = Matrix(module.weight.data_ptr(), scale, *SHAPE, kind)
    for rows in (4, 8, 16, 32, NEVER):
        x = torch.ones(rows, SHAPE[1], dtype=torch.float32, device="cpu")
        y, narrow = x.new_empty(rows, SHAPE[0]), x.to(dtype)
        ways = (
            lambda x=x, y=y, rows=rows: loops.openllama_product(matrix, x.data_ptr(), y.data_ptr(), rows, threads),
            lambda narrow=narrow: module(narrow),
        )
        with prompt_products(dtype, threads)():
            ours, theirs = _fastest(ways)
        if ours > theirs:
            break
        best = rows
    return best


@torch.no_grad()
def _measure_prompt(dtype: torch.dtype) -> int:
    """1 where the loops are faster than ``products.linear``, else 0."""
    x, weight = (torch.ones(rows, SHAPE[1], dtype=dtype, device="cpu") for rows in (PROMPT, SHAPE[0]))
    ours, theirs = _fastest((lambda: linear(x, weight), lambda: products.linear(x, weight)))
    return int(ours < theirs)


def _module(kind: int, dtype: torch.dtype) -> QuantizedLinear | nn.Linear:
    """What multiplies weights of this kind in a model; its numbers do not matter."""
    rows, columns = SHAPE
    quantization = _quantization(kind)
    if quantization is None:
        linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
        nn.init.ones_(linear.weight)
        return linear
    module = QuantizedLinear(columns, rows, FORMATS[quantization].bits, "cpu")
    use_loops(module)
    return module


def _fastest(ways: tuple[Callable[[], object], ...]) -> list[float]:
    """The seconds of each way, the least of several, which take turns."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS):
        for way, seconds in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in times]
