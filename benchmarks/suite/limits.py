"""What the machine can do at the most, measured in a process of its own: reading memory, and products.

python limits.py --bytes N --size K --threads T

A product of bfloat16 is computed in bfloat16 or float32, one of int8 in any of the three: in what is fastest here. A
processor without instructions for a type may need a hundred times as long for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from serving import Command, seconds, serve  # beside this file
from torch import Tensor

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ALLOWED = {"bf16": ("float32", "bfloat16"), "int8": ("float32", "bfloat16", "int8")}
TRIED = 512  # rows and columns of the products that choose


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, required=True, help="memory to sum up")
    parser.add_argument("--size", type=int, required=True, help="rows and columns of the product")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    def load() -> tuple[dict[str, Command], dict[str, Any]]:
        torch.set_num_threads(options.threads)
        torch.set_grad_enabled(False)
        numbers = torch.ones(options.bytes // 4)
        types = {name: fastest(allowed) for name, allowed in ALLOWED.items()}
        products = {name: product(of, options.size) for name, of in types.items()}
        works: dict[str, Callable[[], object]] = {"sum": numbers.sum, **products}

        def measure() -> dict[str, Any]:
            return {"seconds": {name: seconds(work) for name, work in works.items()}}

        return {"measure": measure}, {"version": torch.__version__, "types": types}

    serve(load)


def fastest(types: tuple[str, ...]) -> str:
    return min(types, key=lambda name: min(seconds(product(name, TRIED)) for _ in range(3)))


def product(name: str, size: int) -> Callable[[], Tensor]:
    matrix = torch.ones(size, size, dtype=TYPES[name])
    return lambda: torch._int_mm(matrix, matrix) if name == "int8" else matrix @ matrix


if __name__ == "__main__":
    main()
