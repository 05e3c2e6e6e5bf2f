"""Writes weights to safetensors files, in pieces, and compares what was written with its source."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from openllama.checkpoint.files import DTYPES, open_file
from openllama.checkpoint.pieces import Computed, Source, Tick, as_bytes, is_copy, pieces
from openllama.checkpoint.reader import ALIGNMENT, SAFETENSORS_FILE, SAFETENSORS_INDEX
from openllama.config import CONFIG_FILE, NATIVE_TYPE
from openllama.errors import CheckpointError, CorruptCheckpointError, InputError

CODES = {dtype: code for code, dtype in DTYPES.items()}
OURS = (CONFIG_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX, "model-?????-of-?????.safetensors")
Look: TypeAlias = "Callable[[str, Tensor], object]"  # called with a weight's name and a piece of it
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


def write_weights(
    folder: Path,
    tensors: Mapping[str, Source],
    *,
    max_shard_size: int | str = "5GB",
    file_format: str = NATIVE_TYPE,
    tick: Tick = lambda done: None,
    look: Look = lambda name, piece: None,
) -> None:
    """Write ``tensors`` into ``folder``, then read and compare every byte.

    ``tick`` is called with the bytes of each piece written and of each piece compared, ``look`` with each piece before
    it is written. ``file_format`` is stored in the header: transformers reads "pt" alone, and would give weights whose
    names it does not know random values. Raises ``OSError`` if the disk is full, ``CheckpointError`` if a number does
    not fit the type it is cast to.
    """
    shards = plan_shards(tensors, parse_size(max_shard_size))
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > (free := shutil.disk_usage(folder).free):
        needed = f"No space left: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, needed, str(folder))
    for file, names in shards.items():
        try:
            _write_file(folder / file, {name: tensors[name] for name in names}, tick, file_format, look)
        except OSError as error:
            error.filename = error.filename or str(folder / file)  # a failed write does not name its file
            raise
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in shards.items():
        _compare_file(folder / file, {name: tensors[name] for name in names}, tick)


def _write_file(path: Path, tensors: Mapping[str, Source], tick: Tick, file_format: str, look: Look) -> None:
    """Write one safetensors file; the disk has it when this returns."""
    # There are no gaps between tensors. In this order each offset is a multiple of the largest power of two that
    # divides the tensor's size, up to ALIGNMENT, and therefore of its element size.
    names = sorted(tensors, key=lambda name: -math.gcd(tensors[name].nbytes, ALIGNMENT))
    with path.open("wb") as file:
        file.write(_header({name: tensors[name] for name in names}, file_format))
        for name in names:
            for piece in pieces(tensors[name]):
                if isinstance(tensors[name], Computed) and piece.dtype == torch.float16 and piece.isinf().any():
                    raise CheckpointError(f"{name} holds numbers too large for float16 (above 65504); use bfloat16")
                look(name, piece)
                file.write(_raw(piece))
                tick(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())


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


def _compare_file(path: Path, tensors: Mapping[str, Source], tick: Tick) -> None:
    """Read ``path`` again and raise ``CorruptCheckpointError`` unless it has the same bits as ``tensors``."""
    written = open_file(path)
    for name, tensor in tensors.items():
        if not is_copy(written[name], tensor, tick):
            raise CorruptCheckpointError(f"{path}: {name} differs when read again; is the disk or memory failing?")
