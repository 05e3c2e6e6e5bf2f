"""Opens one file of weights, in safetensors or torch's format: every tensor is mapped, nothing is loaded.

The system reads a page of a file when its numbers are used. Writing to a tensor changes a private copy of the page,
never the file. Pickles are only opened with torch's ``weights_only=True``, which executes nothing.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from openllama.checkpoint.archives import MAGIC, MAX_PICKLE, Limited, load_archive, mapped, translated_errors
from openllama.checkpoint.pickles import check_tuples
from openllama.config import refuse_lfs_pointer
from openllama.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafePickleError,
    listed,
    warn,
)

Format = Literal["safetensors", "pickle"]
NESTING_KEYS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers nest the weights
DTYPES = {  # safetensors' names of the types this package reads
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 2**24  # bytes of a safetensors header, some 150,000 tensors; the format allows 100 MB
_LEGACY_PICKLES = 5  # in front of the numbers: magic number, version, system, the state dict, the storages
MAX_RANK = 64  # dimensions; torch computes with no more


def open_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, memory-mapped; the suffix tells the format."""
    if not path.is_file():  # a pipe or a device; opening a pipe may wait for ever
        raise CheckpointNotFoundError(f"{path} is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise CorruptCheckpointError(f"{path} is empty; copy or download it again")
    with path.open("rb") as file:
        start = file.read(40)
    refuse_lfs_pointer(path, start, CorruptCheckpointError)
    if format_of(path) == "safetensors":
        return _open_safetensors(path, size, start)
    if start.startswith(MAGIC):
        tensors = _open_archive(path)
    elif start.startswith(b"\x80"):
        tensors = _load_legacy(path, size)
    else:
        raise CorruptCheckpointError(f"{path} is not a file that torch.save wrote; copy or download it again")
    _check_views(tensors, path, size)
    return tensors


def format_of(path: Path) -> Format:
    return "safetensors" if path.suffix == ".safetensors" else "pickle"


# ---- safetensors: 8 bytes of header length, a JSON header, the numbers


def _open_safetensors(path: Path, size: int, start: bytes) -> dict[str, Tensor]:
    """Map the tensors of a file that the format's own library accepts.

    The library reads and checks the header: the tensors it lists, in the order of their numbers, fill the file without
    gap or overlap. The mapping is ours: that of the library for torch asks for as much memory as the file is long, and
    Linux refuses files larger than the machine's. Its mapping for numpy, which is only read, serves for the header.
    """
    length = int.from_bytes(start[:8], "little")
    if not 0 < length <= size - 8:
        raise CorruptCheckpointError(f"{path} is truncated or not a safetensors file: {size} bytes, header of {length}")
    if length > MAX_HEADER:
        raise CorruptCheckpointError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    mapping, tensors, offset = _map(path), {}, 8 + length
    with translated_errors(path), safe_open(path, "numpy") as file:
        for name in file.offset_keys():
            entry = file.get_slice(name)
            code, shape = entry.get_dtype(), entry.get_shape()
            if code not in DTYPES:
                raise CorruptCheckpointError(f"{path}: {name} is of type {code}, which is none of {', '.join(DTYPES)}")
            _check_rank(name, len(shape), path)
            tensors[name] = _view(mapping, offset, DTYPES[code], shape)
            offset += tensors[name].nbytes
        return with_aliases(tensors, file.metadata() or {}, path)


def with_aliases(tensors: dict[str, Tensor], metadata: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors, also by the names that ``metadata`` adds: {"lm_head.weight": "model.embed_tokens.weight"}.

    ``safetensors.torch.save_model`` stores a shared weight once and notes its other names there; for shards they are in
    the index. Raises ``CorruptCheckpointError`` for names that make more than twice of the file.
    """
    aliases = {
        alias: tensors[name]
        for alias, name in metadata.items()
        if isinstance(name, str) and name in tensors and alias not in tensors
    }
    if sum(tensor.nbytes for tensor in aliases.values()) > sum(tensor.nbytes for tensor in tensors.values()):
        raise CorruptCheckpointError(f"{path} gives its tensors {len(aliases):,} other names, to be larger than it is")
    return {**tensors, **aliases}


def _view(mapping: mmap.mmap, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def _check_rank(name: str, rank: int, path: Path) -> None:
    if rank > MAX_RANK:
        raise CorruptCheckpointError(f"{path}: {name} has {rank:,} dimensions; torch computes with {MAX_RANK}")


def _map(path: Path) -> mmap.mmap:
    """Map a file privately: writing changes a copy. Without MAP_NORESERVE, Linux refuses files larger than RAM."""
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 has no name for it
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


# ---- torch.save


def _open_archive(path: Path) -> dict[str, Tensor]:
    """Map the tensors of torch's zip format."""
    with translated_errors(path):
        loaded, records = load_archive(path)
        described, tensors, mapping = _plain_tensors(loaded, path), {}, _map(path)
        for name, tensor in described.items():
            try:
                tensors[name] = mapped(tensor, records, mapping)
            except (ValueError, RuntimeError) as error:
                raise CorruptCheckpointError(f"{path}: {name} is damaged: {error}") from error
    return tensors


def _load_legacy(path: Path, size: int) -> dict[str, Tensor]:
    """Load torch's format from before version 1.6, which cannot be memory-mapped."""
    warn(f"{path} is in torch's format from before 1.6 and is read into memory completely")
    storages: list[torch.UntypedStorage] = []
    sizes: list[int] = []
    left = size

    def filled(storage: Any, device: str) -> Any:
        nonlocal left
        storages.append(storage)
        sizes.append(storage.nbytes())
        left -= storage.nbytes()
        if left < 0:
            raise CorruptCheckpointError(f"{path} is truncated: its tensors need more than its {size} bytes")
        return storage.fill_(0xFF)  # NaN, should the file hold no numbers for this storage

    with translated_errors(path), path.open("rb") as file:
        limited = Limited(file, MAX_PICKLE)
        for _ in range(_LEGACY_PICKLES):
            check_tuples(limited)  # type: ignore[arg-type]
        file.seek(0)
        limited = Limited(file, MAX_PICKLE)
        loaded = torch.load(limited, map_location=filled, weights_only=True)  # type: ignore[arg-type]
        tensors = _plain_tensors(loaded, path)
    if [storage.nbytes() for storage in storages] != sizes:  # torch enlarges one that is too small for its tensor
        raise CorruptCheckpointError(f"{path} is damaged: a tensor is larger than its storage")
    addresses = {storage.data_ptr() for storage in storages}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() not in addresses:
            raise CorruptCheckpointError(f"{path}: {name} is damaged: the file holds no numbers for it")
    return tensors


def _plain_tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in the content of a file, also under some of ``NESTING_KEYS``."""
    for key in NESTING_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise UnsafePickleError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors")
    if odd := [_described(key, value) for key, value in loaded.items() if not _is_plain(key, value)]:
        raise UnsafePickleError(f"{path} holds more than plain tensors: {listed(odd)}")
    return {key: value.detach() for key, value in loaded.items()}


def _check_views(tensors: Mapping[str, Tensor], path: Path, size: int) -> None:
    """Raise ``CorruptCheckpointError`` for tensors that would be written out larger than the file is."""
    for key, tensor in tensors.items():
        _check_rank(key, tensor.dim(), path)
        if _overlaps_itself(tensor):
            raise CorruptCheckpointError(f"{path}: several numbers of {key} share a place in the file")
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > 2 * size:  # a tied table counts twice
        raise CorruptCheckpointError(f"{path} has {size:,} bytes; its tensors share them to be {total:,} bytes")


def _described(key: object, value: object) -> str:
    # The repr of a key or value may be exponentially long.
    return f"{key!r} is a {type(value).__name__}" if isinstance(key, (str, int)) else f"a key is a {type(key).__name__}"


def _is_plain(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_conj() or value.is_neg())
    )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two numbers of a tensor may lie at one place, as in an expanded one: it would be written out larger."""
    reach = 0  # places from the first number to the last, in the dimensions of smaller strides
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride <= reach:
                return True
            reach += stride * (length - 1)
    return False
