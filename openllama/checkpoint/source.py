"""Reads mapped tensors through the file instead of the mapping.

Pages that a file no longer has cannot be read: through a mapping the system ends the process with SIGBUS, while a plain
read returns fewer bytes, which becomes an error. Plain reads are faster too.
"""

from __future__ import annotations

import os
import re
from bisect import bisect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from openllama.checkpoint.pieces import as_bytes
from openllama.errors import CorruptCheckpointError

MAPS = Path("/proc/self/maps")  # Linux's list of what is mapped where


class _Region(NamedTuple):
    start: int  # addresses
    end: int
    offset: int  # in the file
    file: int  # its number in ``SourceFiles.files``


class SourceFiles:
    """Files of weights whose tensors are mapped in this process and have not been changed there."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.opened = [os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)) for file in self.files]
        self.states = self._states()
        self.regions = sorted(self._regions())
        self.starts = [region.start for region in self.regions]

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self.opened:
            os.close(descriptor)

    def identity(self) -> list[list[str | int]]:
        """Path, size and time of the last change of each file when it was opened."""
        return [[str(file.resolve()), *state] for file, state in zip(self.files, self.states, strict=True)]

    def check_unchanged(self) -> None:
        """Raise ``CorruptCheckpointError`` if a file is not the one that was opened, or was changed since."""
        for file, descriptor, before, now in zip(self.files, self.opened, self.states, self._states(), strict=True):
            if before != now or not os.path.samestat(os.fstat(descriptor), os.stat(file)):
                raise CorruptCheckpointError(
                    f"{file} was changed while it was read ({before[0]} bytes at first, {now[0]} now); try again when "
                    "nothing writes to it"
                )

    def read(self, part: Tensor) -> Tensor:
        """The numbers of ``part``, read from the file that it is mapped from; itself if it is not.

        Without /proc, and for a view that is not contiguous, the numbers come through the mapping, after a look at
        the sizes of the files. Raises ``CorruptCheckpointError`` if a file is shorter than it was.
        """
        at = part.data_ptr()
        region = self.regions[i] if (i := bisect(self.starts, at) - 1) >= 0 else None
        if region is None or at + part.nbytes > region.end or not part.is_contiguous() or not part.nbytes:
            if self._states() != self.states:
                self.check_unchanged()
            return part
        copy = torch.empty_like(part, memory_format=torch.contiguous_format)
        target = as_bytes(copy).numpy().reshape(-1).data
        offset = region.offset + at - region.start
        while target:
            if not (count := os.preadv(self.opened[region.file], [target], offset)):
                raise CorruptCheckpointError(f"{self.files[region.file]} became shorter while it was read")
            target, offset = target[count:], offset + count
        return copy

    def _states(self) -> list[tuple[int, int]]:
        return [(state.st_size, state.st_mtime_ns) for state in map(os.fstat, self.opened)]

    def _regions(self) -> Iterator[_Region]:
        """Where the files are mapped; a file that was replaced since has another inode and is not among them."""
        if not MAPS.exists() or not hasattr(os, "preadv"):
            return
        known = {
            (str(file.resolve()), os.fstat(descriptor).st_ino): i
            for i, (file, descriptor) in enumerate(zip(self.files, self.opened, strict=True))
        }
        for line in MAPS.read_text(errors="replace").splitlines():
            found = re.match(r"(\w+)-(\w+) \S+ (\w+) \S+ (\d+) +(/.*)", line)
            if found and (file := known.get((found[5], int(found[4])))) is not None:
                yield _Region(int(found[1], 16), int(found[2], 16), int(found[3], 16), file)
