"""How often a matrix product rounds differently because its operands lie differently in memory.

    python benchmarks/layout.py [--draws N]

Each draw is a product of random float32 matrices of random sizes, computed twice from equal numbers: with one operand
as a transposed view and as a contiguous copy, or with a weight at a multiple of 64 bytes and 4 bytes after one.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def size(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def strides() -> tuple[Tensor, Tensor]:
    """Scores of attention: the transposed keys as a view of keys (H, S, D), and copied to (H, D, S)."""
    length, keys, heads, width = size(1, 20), size(1, 20), size(1, 4), 2 * size(1, 8)
    query, key = torch.randn(heads, length, width), torch.randn(heads, keys, width)
    return query @ key.transpose(1, 2), query @ key.transpose(1, 2).contiguous()


def alignment() -> tuple[Tensor, Tensor]:
    """A linear layer whose weight is aligned, and not."""
    rows, inputs, outputs = size(1, 20), size(2, 64), size(1, 96)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    misaligned = torch.empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
    return F.linear(x, weight), F.linear(x, misaligned)


def differing(draw: Callable[[], tuple[Tensor, Tensor]], draws: int) -> int:
    torch.manual_seed(0)
    return sum(not torch.equal(*draw()) for _ in range(draws))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=6000, help="products of each kind (default: %(default)s)")
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}")
    for name, draw in {"other strides": strides, "other alignment": alignment}.items():
        print(f"{name}: {differing(draw, draws)} of {draws} products differ in some bit")


if __name__ == "__main__":
    main()
