"""Tensors larger than memory, a piece at a time.

``Computed`` is a tensor that does not exist yet: a cast, or a function of rows, of one that is mapped from a file. Both
kinds are read as pieces, so that writing a model takes the memory of one piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from openllama.checkpoint.gather import Spread

PIECE = 2**21  # numbers in a piece: 8 MiB in float32, which a cache holds
T = TypeVar("T")
Tick = Callable[[int], object]  # called with the number of bytes done
Read = Callable[[Tensor], Tensor]  # gives the numbers of a part of a tensor


@dataclass(frozen=True)
class Computed:
    """``function`` of each row of ``source``, in ``dtype``; without a function, a cast.

    ``row``: the shape of a row of the result, None for that of the source.
    """

    source: Tensor
    dtype: torch.dtype
    function: Callable[[Tensor], Tensor] | None = None
    row: tuple[int, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.source.shape if self.row is None else torch.Size((self.source.shape[0], *self.row))

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def of(self, piece: Tensor) -> Tensor:
        return (piece if self.function is None else self.function(piece)).to(self.dtype)

    def pieces(self, read: Read) -> Iterator[Tensor]:
        """What becomes of each piece of the source, which ``read`` gives."""
        return (self.of(piece).contiguous() for piece in pieces(self.source, read))


Source: TypeAlias = "Tensor | Computed"


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Source]:
    """The tensors in ``dtype``, cast when they are read; None changes nothing."""
    return {name: tensor if dtype is None else as_dtype(tensor, dtype) for name, tensor in tensors.items()}


def as_dtype(source: Source, dtype: torch.dtype) -> Source:
    """``source`` in ``dtype``, cast or rounded when it is read."""
    if source.dtype == dtype:
        return source
    return replace(source, dtype=dtype) if isinstance(source, Computed) else Computed(source, dtype)


def pieces(source: Source, read: Read = lambda part: part) -> Iterator[Tensor]:
    """Consecutive parts of at most ``PIECE`` numbers, on the CPU and contiguous; whole rows where a row is smaller.

    ``read`` gives the numbers of a part of the source.
    """
    if isinstance(source, Computed):
        yield from source.pieces(read)
    else:
        for part in _parts(source.gather() if isinstance(source, Spread) else source):
            yield read(part.detach()).to("cpu").contiguous()


def ahead(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """The same items, made by another thread while earlier ones are used; at most ``count`` are waiting."""
    end: Any = object()
    # This thread does not share its work with torch's others: they have the other part of the work.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


def is_copy(copy: Tensor, original: Source, tick: Tick = lambda done: None) -> bool:
    """Whether ``copy`` has the shape and the bits of ``original``: NaN equals NaN, 0 differs from -0."""
    if copy.shape != original.shape or copy.dtype != original.dtype:
        return False
    for mine, theirs in zip(pieces(copy), pieces(original), strict=True):
        if not torch.equal(as_bytes(mine), as_bytes(theirs)):
            return False
        tick(theirs.nbytes)
    return True


def count_nonfinite(piece: Tensor) -> int:
    """How many numbers of a piece are NaN or infinite."""
    # Fast where there are none: a sum with one of them is not finite. A finite piece may overflow, so then count.
    if not piece.is_floating_point() or piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32)).isfinite():
        return 0
    return piece.numel() - int(piece.isfinite().sum())


def count_subnormal(piece: Tensor) -> int:
    """Numbers too small for the full precision of their type, but not zero; integers are none."""
    if not piece.is_floating_point():
        return 0
    size, tiny = piece.abs(), torch.finfo(piece.dtype).tiny
    if not piece.numel() or size.min() >= tiny:  # most pieces; counting takes ten times as long
        return 0
    return int(((size < tiny) & (size != 0)).count_nonzero())


def as_bytes(piece: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, with a last dimension for those of one number."""
    # view needs a last stride of 1: a new dimension has it, an old one may not.
    return piece.unsqueeze(-1).view(torch.uint8)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most ``PIECE`` numbers; where they are split depends on the shape alone."""
    if tensor.numel() <= PIECE:
        yield tensor
    elif tensor[0].numel() > PIECE:
        for row in tensor:
            yield from _parts(row)
    else:
        yield from tensor.split(PIECE // tensor[0].numel())
