"""Writes checkpoints: safetensors, in pieces, to a folder that appears only when it is complete.

All files are written to a temporary folder first, read again and compared with the source; only then
is the folder renamed. An error, a full disk or Ctrl-C leaves the destination unchanged.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from openllama.checkpoint.reader import ALIGNMENT, DTYPES, SAFETENSORS_FILE, SAFETENSORS_INDEX, open_file
from openllama.config import CONFIG_FILE
from openllama.errors import CheckpointError, CorruptCheckpointError, DestinationExistsError, InputError

CHUNK = 32 * 2**20  # bytes of a tensor handled at a time
CODES = {dtype: code for code, dtype in DTYPES.items()}
OURS = (CONFIG_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX, "model-?????-of-?????.safetensors")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
Tick = Callable[[int], object]  # called with the number of bytes done


def parse_size(size: int | str) -> int:
    """Bytes in "5GB", "500 MiB" or a plain number; raises ``InputError`` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise InputError(f"{size!r} is not a size; write 5GB, 500MiB or a number of bytes")
    return count


def plan_shards(tensors: Mapping[str, Tensor], max_bytes: int, dtype: torch.dtype | None) -> dict[str, list[str]]:
    """File name -> its weights, in order; a file exceeds ``max_bytes`` only if a single tensor does."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = _size(tensor, dtype)
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {SAFETENSORS_FILE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    tick: Tick = lambda done: None,
) -> None:
    """Write ``tensors`` (cast to ``dtype`` if given) into ``folder``, then read and compare every byte.

    ``tick`` is called with the bytes of each piece written and of each piece compared. Raises ``OSError``
    if the disk is full, ``CheckpointError`` if a number does not fit ``dtype``.
    """
    shards = plan_shards(tensors, parse_size(max_shard_size), dtype)
    total = sum(_size(tensor, dtype) for tensor in tensors.values())
    if total > (free := shutil.disk_usage(folder).free):
        needed = f"No space left: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, needed, str(folder))
    for file, names in shards.items():
        try:
            _write_file(folder / file, {name: tensors[name] for name in names}, dtype, tick)
        except OSError as error:
            error.filename = error.filename or str(folder / file)  # a failed write does not name its file
            raise
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in shards.items():
        _compare_file(folder / file, {name: tensors[name] for name in names}, dtype, tick)


def pieces(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Split a tensor by rows into pieces of about ``CHUNK`` bytes: on the CPU, contiguous, cast to ``dtype``."""
    row = max(1, tensor[:1].numel() * tensor.element_size())
    for piece in tensor.detach().split(max(1, CHUNK // row)):
        yield piece.to("cpu", dtype or tensor.dtype).contiguous()


def _write_file(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, tick: Tick) -> None:
    """Write one safetensors file; the disk has it when this returns."""
    # There are no gaps between tensors. In this order each offset is a multiple of the largest power of two that
    # divides the tensor's size, up to ALIGNMENT, and therefore of its element size.
    names = sorted(tensors, key=lambda name: -math.gcd(_size(tensors[name], dtype), ALIGNMENT))
    with path.open("wb") as file:
        file.write(_header({name: tensors[name] for name in names}, dtype))
        for name in names:
            for piece in pieces(tensors[name], dtype):
                if dtype == torch.float16 and piece.isinf().any():
                    raise CheckpointError(f"{name} holds numbers too large for float16 (above 65504); use bfloat16")
                file.write(_raw(piece))
                tick(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> bytes:
    """The start of the file: the header's length, the header, spaces up to a multiple of ``ALIGNMENT``."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _size(tensor, dtype)
        code = CODES[dtype or tensor.dtype]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _compare_file(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, tick: Tick) -> None:
    """Read ``path`` again and raise ``CorruptCheckpointError`` unless it has the same bits as ``tensors``."""
    written = open_file(path)
    for name, tensor in tensors.items():
        if written[name].dtype != (dtype or tensor.dtype) or not is_copy(written[name], tensor, tick):
            raise CorruptCheckpointError(f"{path}: {name} differs when read again; is the disk or memory failing?")


def is_copy(copy: Tensor, original: Tensor, tick: Tick = lambda done: None) -> bool:
    """Whether ``copy`` equals ``original`` cast to its type, bit for bit: NaN equals NaN, 0 differs from -0."""
    if copy.shape != original.shape:
        return False
    start = 0
    for piece in pieces(original, copy.dtype):
        rows = copy[start : start + len(piece)].contiguous()
        if not torch.equal(_bytes(rows), _bytes(piece)):
            return False
        start += len(piece)
        tick(piece.nbytes)
    return True


def _raw(piece: Tensor) -> memoryview:
    return _bytes(piece).numpy().data


def _bytes(piece: Tensor) -> Tensor:
    # Each number becomes a row of bytes. view needs a last stride of 1: a new dimension has it, an old one may not.
    return piece.unsqueeze(-1).view(torch.uint8)


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


# ---- folders


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` if ``destination`` exists and may not be replaced."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not destination.is_dir():
        raise DestinationExistsError(f"{destination} is a file; choose a folder")
    if not overwrite:
        raise DestinationExistsError(f"{destination} exists; choose another folder, or pass overwrite (--overwrite)")


@contextmanager
def finished_folder(destination: Path, replaced: Collection[str]) -> Iterator[Path]:
    """A temporary folder; its files are moved to ``destination`` if the block raises no error.

    A new destination is created by one rename. In an existing one, files whose names match a pattern of
    ``replaced`` are removed and all others stay; config.json is moved last, because a folder without it
    is not read.
    """
    exists = destination.is_dir()
    parent = destination if exists else destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{destination.name}.{secrets.token_hex(4)}.incomplete"
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if exists:
            _move_in(temporary, destination, replaced)
        else:
            temporary.rename(destination)
        _sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_in(temporary: Path, destination: Path, replaced: Collection[str]) -> None:
    """Replace files of ``destination`` with those of ``temporary``: all of them, or none if there is an error."""
    patterns = (*replaced, *(path.name for path in temporary.iterdir()))
    old = [p for p in destination.iterdir() if p.is_file() and any(fnmatch(p.name, pattern) for pattern in patterns)]
    backup = temporary.with_suffix(".replaced")
    backup.mkdir()
    moves = [(path, backup / path.name) for path in sorted(old, key=_config_first)]
    moves += [(path, destination / path.name) for path in sorted(temporary.iterdir(), key=_config_first, reverse=True)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            done.append((source, target))
            source.rename(target)
    except BaseException:
        for source, target in reversed(done):
            if not source.exists():
                target.rename(source)
        backup.rmdir()
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _config_first(path: Path) -> bool:
    return path.name != CONFIG_FILE


def _sync(path: Path) -> None:
    """Make the system write a file or a folder to the disk."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
