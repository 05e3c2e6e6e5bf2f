"""The zip archives of ``torch.save``: a table of records, and a pickle that says which tensor lies in which record.

    x/data.pkl         {"a": tensor of 2 x 3 numbers, float32, in storage "0", ...}
    x/byteorder        little
    x/data/0           the 24 bytes of a

Other programs write such archives too, and strangers do. So one reader finds the records, torch only reads the pickle
(with ``weights_only=True``, which executes nothing), and the storage of a tensor is exactly its record.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from openllama.checkpoint.pickles import check_tuples
from openllama.errors import CheckpointError, CorruptCheckpointError, UnsafePickleError, listed, warn

MAGIC = b"PK\x03\x04"
MAX_TABLE = 2**22  # bytes of the table of records: some 50,000 storages
MAX_PICKLE = 2**20  # bytes of data.pkl: some 7,000 tensors
CHUNK = 2**20  # bytes summed at a time
_LOCAL = struct.Struct("<4s2x2H4x3I2H")  # start of a local header: magic, flags, method, CRC, two sizes, two lengths
_DESCRIPTOR, _UTF8 = 0x8, 0x800  # flags: sizes and CRC follow the data; the name is UTF-8
_IN_EXTRA = 0xFFFFFFFF  # a size that needs 64 bits


@dataclass(frozen=True)
class Record:
    """Where the bytes of a record are in the file, and their CRC-32."""

    offset: int
    size: int
    crc: int


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Turn the errors of the formats' parsers into this package's errors."""
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's message advises to switch off the check
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is not what torch.save writes"
        raise UnsafePickleError(f"{path} holds more than plain tensors and was not executed: {what}") from error
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged file can cause any error in the parser, MemoryError too
        first_line = str(error).partition("\n")[0]
        raise CorruptCheckpointError(f"{path} is truncated or damaged: {first_line or repr(error)}") from error


def is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_records(path: Path) -> dict[str, Record]:
    """The records of an archive by name, without the folder that all are in.

    Raises ``CorruptCheckpointError`` unless each name occurs once and each record is stored as it is, described
    alike in the table and before its data, and apart from all others.
    """
    with translated_errors(path), path.open("rb") as file, zipfile.ZipFile(Limited(file, MAX_TABLE)) as archive:
        entries = archive.infolist()
        places = [(entry.header_offset, _data_offset(file, entry)) for entry in entries]
        end = archive.start_dir
    spans = [(start, offset + entry.file_size) for (start, offset), entry in zip(places, entries, strict=True)]
    if any(after < stop for (_, stop), (after, _) in pairwise([*sorted(spans), (end, end)])):
        raise CorruptCheckpointError(f"{path} is damaged: its records overlap")
    records = {
        entry.filename.partition("/")[2]: Record(offset, entry.file_size, entry.CRC)
        for (_, offset), entry in zip(places, entries, strict=True)
    }
    if len(records) < len(entries) or len({entry.filename.partition("/")[0] for entry in entries}) > 1:
        raise CorruptCheckpointError(f"{path} is not what torch.save writes: a record is given twice")
    return records


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the data of an entry of the table begins; raises ValueError if it cannot be mapped."""
    name = entry.orig_filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{name} was compressed after torch.save wrote it; unpack it first")
    if entry.flag_bits & ~(_DESCRIPTOR | _UTF8):
        raise ValueError(f"{name} is encrypted or not plain data (flags {entry.flag_bits:#x})")
    file.seek(entry.header_offset)
    magic, flags, method, crc, *sizes, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    local_name = file.read(name_length).decode("utf-8" if flags & _UTF8 else "cp437")
    later = (0,) if flags & _DESCRIPTOR else ()
    if (
        magic != MAGIC
        or (flags, method, local_name) != (entry.flag_bits, entry.compress_type, name)
        or crc not in (entry.CRC, *later)
        or any(size not in (entry.file_size, _IN_EXTRA, *later) for size in sizes)
    ):
        raise ValueError(f"{name} is described in two different ways")
    return entry.header_offset + _LOCAL.size + name_length + extra_length


class Limited(io.RawIOBase):
    """A file for a parser that trusts every length it reads: ``read`` gives ``budget`` bytes in all, then raises."""

    def __init__(self, file: BinaryIO, budget: int) -> None:
        self.file, self.budget = file, budget

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        return self._paid(self.file.read(self.budget + 1 if size < 0 else min(size, self.budget + 1)))

    def readline(self, size: int | None = -1) -> bytes:
        return self._paid(self.file.readline(self.budget + 1))

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer)  # type: ignore[attr-defined]  # the caller has the memory

    def _paid(self, content: bytes) -> bytes:
        self.budget -= len(content)
        if self.budget < 0:
            raise ValueError("what describes its tensors is too long")
        return content


def load_archive(path: Path) -> tuple[Any, dict[int, Record]]:
    """What an archive holds, with tensors on the meta device, and the record of each ``_checkpoint_offset``.

    torch is given an archive in memory: the pickle of this one, and empty records of the same names. Their offsets,
    which torch notes at the storages, tell which record a storage stands for. Raises any error for a damaged pickle.
    """
    records = read_records(path)
    if "constants.pkl" in records:
        raise UnsafePickleError(
            f"{path} is a TorchScript archive, which holds code; save the model's state_dict instead"
        )
    with path.open("rb") as file:
        if _content(file, records, "byteorder", path) == b"big":
            raise CorruptCheckpointError(f"{path} was written by a big-endian processor; save it again as safetensors")
        pickled = _content(file, records, "data.pkl", path)
    if pickled is None:
        raise CorruptCheckpointError(f"{path} is not what torch.save writes: it has no data.pkl")
    check_tuples(io.BytesIO(pickled))
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("x/version", b"3")
        archive.writestr("x/data.pkl", pickled)
        for name in records:
            if name.startswith("data/"):
                archive.writestr(f"x/{name}", b"")
        offsets = {_data_offset(empty, entry): entry.filename.removeprefix("x/") for entry in archive.infolist()}
    empty.seek(0)
    loaded = torch.load(empty, map_location="meta", weights_only=True)
    return loaded, {offset: records[name] for offset, name in offsets.items()}


def mapped(tensor: Tensor, records: Mapping[int, Record], mapping: mmap.mmap) -> Tensor:
    """The tensor of ``load_archive`` with its numbers, from the mapped file; raises ValueError if it has none."""
    storage = tensor.untyped_storage()
    record = records.get(getattr(storage, "_checkpoint_offset", -1))
    if record is None:
        raise ValueError("the file holds no numbers for it")
    if record.size != storage.nbytes():
        raise ValueError(f"its record has {record.size} bytes, it needs {storage.nbytes()}")
    if not record.size:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    data = torch.frombuffer(mapping, dtype=torch.uint8, count=record.size, offset=record.offset)
    return data.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _content(file: BinaryIO, records: Mapping[str, Record], name: str, path: Path) -> bytes | None:
    """The bytes of a small record, checked; None if there is none."""
    record = records.get(name)
    if record is None:
        return None
    if record.size > MAX_PICKLE:
        raise CorruptCheckpointError(f"{path}: {name} has {record.size:,} bytes, at most {MAX_PICKLE:,} are read")
    file.seek(record.offset)
    content = file.read(record.size)
    if record.crc not in (0, zlib.crc32(content)):  # 0: torch.save was told not to compute sums
        raise CorruptCheckpointError(f"{path}: {name} is damaged: its bytes do not have the CRC-32 of the archive")
    return content


def checked_sha256(path: Path, go_on: Callable[[], bool] = lambda: True) -> str:
    """The SHA-256 of a file; ``check_sums`` is done in the same pass. Time: 1 s per GB."""
    whole = hashlib.sha256()
    check_sums(path, go_on, whole.update)
    return whole.hexdigest()


def check_sums(
    path: Path, go_on: Callable[[], bool] = lambda: True, use: Callable[[bytes], object] = lambda chunk: None
) -> None:
    """Read a file and compare the archives of ``torch.save`` with their own CRC-32.

    Raises ``CorruptCheckpointError`` if one is wrong: one flipped bit is found. Safetensors and torch's format from
    before 1.6 hold no sums. ``use`` is given all bytes, in order; the reading stops where ``go_on`` says so. Memory:
    ``CHUNK`` bytes; time: that of reading the file once, and 0.5 s per GB.
    """
    records = read_records(path) if is_archive(path) else {}
    summed = records if any(record.crc for record in records.values()) else {}
    if records and not summed:
        warn(f"{path} holds no checksums (torch.save was told not to compute them); damage to it cannot be seen")
    wrong = []
    with path.open("rb", buffering=0) as file:

        def following(size: int) -> Iterator[bytes]:
            while size and go_on() and (chunk := file.read(min(CHUNK, size))):
                use(chunk)
                size -= len(chunk)
                yield chunk

        def skip_to(offset: int) -> None:
            for _ in following(offset - file.tell()):
                pass

        for name, record in sorted(summed.items(), key=lambda item: item[1].offset):
            skip_to(record.offset)
            if reduce(lambda total, chunk: zlib.crc32(chunk, total), following(record.size), 0) != record.crc:
                wrong.append(name)
        skip_to(path.stat().st_size)
    if wrong:
        raise CorruptCheckpointError(f"{path} is damaged: the CRC-32 of {listed(wrong)} differs; copy it again")
