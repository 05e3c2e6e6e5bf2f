"""What the machine can do at the most, measured in a process of its own: reading memory, and products.

python limits.py --bytes N --size K --threads T
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from serving import Command, seconds, serve  # beside this file


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
        half = torch.ones(options.size, options.size, dtype=torch.bfloat16)
        whole = torch.ones(options.size, options.size, dtype=torch.int8)
        works: dict[str, Callable[[], object]] = {
            "sum": numbers.sum,
            "bf16": lambda: half @ half,
            "int8": lambda: torch._int_mm(whole, whole),
        }

        def measure() -> dict[str, Any]:
            return {"seconds": {name: seconds(work) for name, work in works.items()}}

        return {"measure": measure}, {"version": torch.__version__}

    serve(load)


if __name__ == "__main__":
    main()
