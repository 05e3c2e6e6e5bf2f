"""Opens one file of weights, in safetensors or torch's format: every tensor is mapped, nothing is loaded.

The system reads a page of a file when its numbers are used. Writing to a tensor changes a private copy of the page,
never the file. Pickles are only opened with torch's ``weights_only=True``, which executes nothing.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openllama.errors import CheckpointError, CorruptCheckpointError, UnsafePickleError, warn

Format = Literal["safetensors", "pickle"]
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers nest the weights
WRAPPED_PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel and torch.compile
DTYPES = {  # safetensors' names of the types this package reads
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def open_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, memory-mapped; the suffix tells the format."""
    size = path.stat().st_size
    if size == 0:
        raise CorruptCheckpointError(f"{path} is empty; copy or download it again")
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if format_of(path) == "safetensors":
        return _open_safetensors(path, size)
    if start.startswith(b"PK\x03\x04"):
        return _plain_tensors(_load_zip(path, size), path)
    if start.startswith(b"\x80"):
        return _plain_tensors(_load_legacy(path), path)
    raise CorruptCheckpointError(f"{path} is not a file that torch.save wrote; copy or download it again")


def format_of(path: Path) -> Format:
    return "safetensors" if path.suffix == ".safetensors" else "pickle"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{', '.join(sorted({key for key in keys if keys.count(key) > 1}))} given twice")
    return result


# ---- safetensors: 8 bytes of header length, a JSON header, the numbers


def _open_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    mapping = _map(path)
    length = struct.unpack("<Q", mapping[:8])[0] if size >= 8 else size
    if not 0 < length <= min(size - 8, MAX_HEADER):
        raise CorruptCheckpointError(f"{path} is truncated or not a safetensors file: {size} bytes, header of {length}")
    try:
        header = json.loads(mapping[8 : 8 + length], object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        return {name: _view(mapping, 8 + length, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged or not a file of weights: {error}") from error


def _view(mapping: mmap.mmap, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    """The tensor that one entry of a header describes; raises ValueError or TypeError for a bad entry."""
    if dtype not in DTYPES:
        raise ValueError(f"type {dtype!r} is not one of {', '.join(DTYPES)}")
    begin, end = data_offsets
    count = math.prod(shape)
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape} and offsets {data_offsets} must be non-negative integers")
    if end - begin != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape} of type {dtype}")
    if start + end > len(mapping):
        raise ValueError(f"the file has {len(mapping)} bytes, its header needs {start + end}")
    if count == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(mapping, dtype=DTYPES[dtype], count=count, offset=start + begin).view(shape)


def _map(path: Path) -> mmap.mmap:
    """Map a file privately: writing changes a copy. Without MAP_NORESERVE, Linux refuses files larger than RAM."""
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 has no name for it
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


# ---- torch.save


def _load_zip(path: Path, size: int) -> Any:
    """Load torch's zip format with memory-mapped tensors."""
    _check_zip(path)
    with _translated_errors(path):
        if size < _memory():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _load_zip_beyond_memory(path)


def _load_legacy(path: Path) -> Any:
    """Load torch's format from before version 1.6, which cannot be memory-mapped."""
    warn(f"{path} is in torch's format from before 1.6 and is read into memory completely")
    with _translated_errors(path):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _translated_errors(path: Path) -> Iterator[None]:
    """Turn the errors of ``torch.load`` into this package's errors."""
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's message advises to switch off the check
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is not what torch.save writes"
        raise UnsafePickleError(f"{path} holds more than plain tensors and was not executed: {what}") from error
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file can cause any error in the parser
        first_line = str(error).partition("\n")[0]
        raise CorruptCheckpointError(f"{path} is truncated or damaged: {first_line or repr(error)}") from error


def _check_zip(path: Path) -> None:
    """Raise if the records of an archive cannot be mapped, or if it holds code."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error) as error:
        raise CorruptCheckpointError(f"{path} is truncated or damaged: {error}") from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise UnsafePickleError(
            f"{path} is a TorchScript archive, which holds code; save the model's state_dict instead"
        )
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise CorruptCheckpointError(f"{path} was compressed after torch.save wrote it ({packed[0]}); unpack it first")


def _load_zip_beyond_memory(path: Path) -> Any:
    """Load a file larger than memory, which torch itself cannot map on Linux.

    torch builds the tensors without data and records the offset of each storage in the file.
    """
    mapping = _map(path)

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None:
            raise CheckpointError(f"{path} is larger than this machine's memory; reading it needs a newer torch")
        data = torch.frombuffer(mapping, dtype=torch.uint8, count=storage.nbytes(), offset=offset)
        return data.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())

    return fill(torch.load(path, map_location="meta", weights_only=True))


def _memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def _plain_tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in the content of a file, also under one of ``WRAPPERS``, without ``WRAPPED_PREFIXES``."""
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise UnsafePickleError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors")
    tensors = dict(loaded)
    for prefix in WRAPPED_PREFIXES:
        if tensors and all(isinstance(key, str) and key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    odd = [f"{key!r} is a {type(value).__name__}" for key, value in tensors.items() if not _is_plain(key, value)]
    if odd:
        raise UnsafePickleError(f"{path} holds more than plain tensors: {', '.join(odd)}")
    return {key: value.detach() for key, value in tensors.items()}


def _is_plain(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
