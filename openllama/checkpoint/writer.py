"""Writes weights to safetensors files, in pieces, and compares what the disk holds with what was written.

Each tensor has a SHA-256, taken from the bytes on their way to the file, so that nothing is cast twice for the
comparison. Processors compute it faster than most disks write (1.8 GB/s here, BLAKE2b 0.9), it is computed outside of
Python's lock, and it is what people publish beside weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from openllama.checkpoint.files import DTYPES
from openllama.checkpoint.folders import check_space, write_whole
from openllama.checkpoint.pieces import Computed, Source, ahead, as_bytes, count_nonfinite, count_subnormal, pieces
from openllama.checkpoint.progress import Progress
from openllama.checkpoint.reader import ALIGNMENT, SAFETENSORS_FILE, SAFETENSORS_INDEX
from openllama.config import CONFIG_FILE, NATIVE_TYPE, read_json, write_json
from openllama.errors import CheckpointError, CorruptCheckpointError, InputError, listed

CODES = {dtype: code for code, dtype in DTYPES.items()}
RECORD_FILE = "conversion.json"
OURS = (CONFIG_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX, "model-?????-of-?????.safetensors", RECORD_FILE)
SHARD_SIZE = "5GB"  # of the largest file, unless another size is asked for
CHUNK = 2**20  # bytes that are read back at once
SYNCED = 2**27  # bytes after which the disk is made to write
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(size: int | str) -> int:
    """Bytes in "5GB", "500 MiB" or a plain number; raises ``InputError`` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise InputError(f"{size!r} is not a size; write 5GB, 500MiB or a number of bytes")
    return count


def plan_shards(tensors: Mapping[str, Source], max_bytes: int) -> dict[str, list[str]]:
    """File name -> its weights, in order; a file exceeds ``max_bytes`` only if a single tensor does."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if groups[-1] and used + tensor.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += tensor.nbytes
    if len(groups) == 1:
        return {SAFETENSORS_FILE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


class Written(NamedTuple):
    """What is in the file of one tensor."""

    sha256: str  # of its bytes, in hexadecimal
    not_finite: int  # numbers that are NaN or infinite
    subnormal: int  # numbers too small for the full precision of the type that they were cast to


Files: TypeAlias = "dict[str, dict[str, Written]]"  # by file and tensor


@dataclass(frozen=True)
class Resume:
    """Where it is recorded which files are verified, and what they were made from (JSON): source, types, settings."""

    record: Path
    made_from: object

    def files(self) -> Files:
        """Sums of the files that an earlier run wrote from the same source and verified."""
        try:
            record = read_json(self.record, CorruptCheckpointError)
            files = {
                file: {name: Written(*of) for name, of in tensors.items()} for file, tensors in record["files"].items()
            }
            return files if record["made_from"] == json.loads(json.dumps(self.made_from)) else {}
        except (CorruptCheckpointError, KeyError, TypeError, AttributeError):
            return {}

    def write(self, files: Files) -> None:
        write_whole(self.record, json.dumps({"made_from": self.made_from, "files": files}))


def write_weights(
    folder: Path,
    tensors: Mapping[str, Source],
    *,
    max_shard_size: int | str = SHARD_SIZE,
    progress: Progress | None = None,
    read: Callable[[Tensor], Tensor] = lambda part: part,
    file_format: str = NATIVE_TYPE,
    resume: Resume | None = None,
) -> dict[str, Written]:
    """Write ``tensors`` into ``folder``; each file is read back from the disk and compared before the next is begun.

    Returns what was written of each tensor. ``read`` gives the numbers of a part of a tensor. ``file_format`` is stored
    in the header: transformers reads "pt" alone, and would give weights whose names it does not know random values.
    With ``resume``, files in ``folder`` that the record names are compared with it and kept, and other files of
    weights are removed.

    Raises ``OSError`` if the disk is full, ``CheckpointError`` if a number does not fit the type it is cast to,
    ``CorruptCheckpointError`` if a file differs when it is read again.
    """
    progress = progress or Progress()
    shards = plan_shards(tensors, parse_size(max_shard_size))
    total = sum(tensor.nbytes for tensor in tensors.values())
    verified = _find_verified(folder, shards, resume)
    check_space(folder, total - sum((folder / file).stat().st_size for file in verified))
    written: dict[str, Written] = {}
    with closing(progress):
        for file, names in shards.items():
            job = _File(folder / file, {name: tensors[name] for name in names}, file_format, progress)
            if file not in verified or not job.is_kept(verified[file]):
                verified[file] = job.write_and_compare(read)
                if resume:
                    resume.write(verified)
            written |= verified[file]
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / SAFETENSORS_INDEX, index)
    return written


def _find_verified(folder: Path, shards: Mapping[str, object], resume: Resume | None) -> Files:
    """Files that ``resume`` names and that may be kept; other files of weights are removed."""
    if resume is None:
        return {}
    found = {file.name for file in folder.glob("*.safetensors")}
    verified = {file: tensors for file, tensors in resume.files().items() if file in found and file in shards}
    for file in found - verified.keys():
        (folder / file).unlink()
    return verified


class _File:
    """One safetensors file that is written, or was written by an earlier run, and is compared."""

    def __init__(self, path: Path, tensors: Mapping[str, Source], file_format: str, progress: Progress) -> None:
        # There are no gaps between tensors. In this order each offset is a multiple of the largest power of two that
        # divides the tensor's size, up to ALIGNMENT, and therefore of its element size.
        names = sorted(tensors, key=lambda name: -math.gcd(tensors[name].nbytes, ALIGNMENT))
        self.path = path
        self.tensors = {name: tensors[name] for name in names}
        self.header = _header(self.tensors, file_format)
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.progress = progress

    def write_and_compare(self, read: Callable[[Tensor], Tensor]) -> dict[str, Written]:
        """Write the file and read it again; after an error there is no file."""
        try:
            written = self._write(read)
            self.compare(written)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return written

    def _write(self, read: Callable[[Tensor], Tensor]) -> dict[str, Written]:
        """Write the file; the disk has it when this returns.

        One thread reads and casts, this one hashes and writes, a third waits for the disk.
        """
        self.progress.begin("write", self.path.name, self.nbytes)
        hashes = {name: hashlib.sha256() for name in self.tensors}
        not_finite: Counter[str] = Counter()
        subnormal: Counter[str] = Counter()
        try:
            with self.path.open("wb") as file, _Disk(file) as disk:
                file.write(self.header)
                for name, piece, counts in ahead(self._pieces(read)):
                    file.write(_raw(piece))
                    hashes[name].update(_raw(piece))
                    not_finite[name] += counts[0]
                    subnormal[name] += counts[1]
                    disk.wrote(piece.nbytes)
                    self.progress.tick(piece.nbytes)
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a failed write does not name its file
            raise
        return {name: Written(of.hexdigest(), not_finite[name], subnormal[name]) for name, of in hashes.items()}

    def _pieces(self, read: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
        """Each tensor's name and pieces, and how many numbers are not finite or, after a cast, subnormal."""
        for name, tensor in self.tensors.items():
            is_cast = isinstance(tensor, Computed)
            for piece in pieces(tensor, read):
                not_finite = count_nonfinite(piece)
                if is_cast and piece.dtype == torch.float16 and not_finite and piece.isinf().any():
                    raise CheckpointError(f"{name} holds numbers too large for float16 (above 65504); use bfloat16")
                yield name, piece, (not_finite, count_subnormal(piece) if is_cast else 0)

    def is_kept(self, written: Mapping[str, Written]) -> bool:
        """Whether the file that an earlier run wrote is whole."""
        try:
            self.compare(written)
        except CorruptCheckpointError:
            return False
        self.progress.skip(self.nbytes)
        return True

    def compare(self, written: Mapping[str, Written]) -> None:
        """Read the file again and raise ``CorruptCheckpointError`` unless it has the header and the SHA-256 sums."""
        self.progress.begin("compare", self.path.name, self.nbytes)
        hashes = {name: hashlib.sha256() for name in self.tensors}
        with self.path.open("rb", buffering=0) as file:
            forget(file.fileno())
            if file.read(len(self.header)) != self.header or file.seek(0, 2) != len(self.header) + self.nbytes:
                raise CorruptCheckpointError(f"{self.path}: header or size differ when read again")
            file.seek(len(self.header))
            for name, data in ahead(self._read_back(file)):
                hashes[name].update(data)
                self.progress.tick(len(data))
        if wrong := [name for name, of in hashes.items() if name not in written or of.hexdigest() != written[name][0]]:
            raise CorruptCheckpointError(
                f"{self.path}: {listed(wrong)} differs when read again; is the disk or memory failing?"
            )

    def _read_back(self, file: FileIO) -> Iterator[tuple[str, bytes]]:
        for name, tensor in self.tensors.items():
            left = tensor.nbytes
            while left and (data := file.read(min(left, CHUNK))):
                left -= len(data)
                yield name, data


class _Disk:
    """Makes the disk write a file while it grows, so that little is left to wait for at the end."""

    def __init__(self, file: BufferedWriter) -> None:
        self.file = file
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.unsynced = 0

    def wrote(self, nbytes: int) -> None:
        self.unsynced += nbytes
        if self.unsynced >= SYNCED:
            self.sync()

    def sync(self) -> None:
        """Begin to write to the disk what was written so far; wait for what was begun before."""
        self.file.flush()
        if self.pending is not None:
            self.pending.result()
        self.pending = self.thread.submit(os.fsync, self.file.fileno())
        self.unsynced = 0

    def __enter__(self) -> _Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.sync()
                if self.pending is not None:
                    self.pending.result()
        finally:
            self.thread.shutdown(cancel_futures=True)


def forget(descriptor: int) -> None:
    """Drop a file from the memory of the system, where it can be asked to: what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _header(tensors: Mapping[str, Source], file_format: str) -> bytes:
    """The start of the file: the header's length, the header, spaces up to a multiple of ``ALIGNMENT``."""
    entries: dict[str, object] = {"__metadata__": {"format": file_format}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _raw(piece: Tensor) -> memoryview:
    return as_bytes(piece).numpy().data
