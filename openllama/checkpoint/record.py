"""``conversion.json``: what a folder was made from, what was left out, and the SHA-256 of each weight in it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import openllama
from openllama.checkpoint.archives import checked_sha256
from openllama.checkpoint.names import dtype_name
from openllama.checkpoint.pieces import Source, as_bytes, pieces
from openllama.checkpoint.writer import RECORD_FILE, Written
from openllama.config import read_json, write_json
from openllama.errors import CorruptCheckpointError, listed


@dataclass(frozen=True)
class Record:
    """One conversion. Files are named without their folders: a record tells nothing about the machine."""

    to: str
    dtype: str | None  # the type that weights were cast to; None: each has kept its own
    quantization: str | None = None  # of matrices
    left_out: dict[str, str] = field(default_factory=dict)  # name in the source -> why
    warnings: list[str] = field(default_factory=list)

    def about(self, source: Path) -> Record:
        """The same, with the name of the folder ``source`` in place of its full path in the warnings."""
        if not source.is_absolute():
            return self
        return replace(self, warnings=[text.replace(str(source), source.name) for text in self.warnings])

    def write(
        self,
        folder: Path,
        source: Mapping[str, Mapping[str, int | str | None]],
        tensors: Mapping[str, Source],
        written: Mapping[str, Written],
    ) -> None:
        """Write conversion.json; ``source``: as of ``SourceSums.results``, ``written``: as of ``write_weights``."""
        versions = {"openllama": openllama.__version__, "torch": torch.__version__, "python": platform.python_version()}
        weights = {
            name: _entry(tensor, written[name].sha256) | _counts(written[name]) for name, tensor in tensors.items()
        }
        write_json(
            folder / RECORD_FILE, {"versions": versions, **asdict(self), "source": dict(source), "weights": weights}
        )


def _entry(tensor: Source, sha256: str) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "sha256": sha256}


def _counts(written: Written) -> dict[str, int]:
    """What is worth knowing of the numbers of a weight: how many are NaN or infinite, how many subnormal."""
    counts = {"not_finite": written.not_finite, "subnormal": written.subnormal}
    return {name: count for name, count in counts.items() if count}


class SourceSums:
    """The SHA-256 of files, computed by a thread while others read the same files, so that they are in memory.

    ``read`` may be ``check_sums``, where only damage is asked for.
    """

    def __init__(
        self, files: Iterable[Path], read: Callable[[Path, Callable[[], bool]], str | None] = checked_sha256
    ) -> None:
        self.files = tuple(files)
        self.stopped = False
        self.thread = ThreadPoolExecutor(1)
        self.sums = [self.thread.submit(read, file, self._go_on) for file in self.files]

    def __enter__(self) -> SourceSums:
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped = True
        self.thread.shutdown(cancel_futures=True)

    def results(self) -> dict[str, dict[str, int | str | None]]:
        """Size and SHA-256 by the files' names; raises ``CorruptCheckpointError`` for one that is damaged."""
        pairs = zip(self.files, self.sums, strict=True)
        return {file.name: {"bytes": file.stat().st_size, "sha256": of.result()} for file, of in pairs}

    def _go_on(self) -> bool:
        return not self.stopped


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder, None if it has none; raises ``CorruptCheckpointError`` if it is not one."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    found = read_json(path, CorruptCheckpointError)
    weights = found.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(entry, dict) for entry in weights.values()):
        raise CorruptCheckpointError(f"{path} is damaged: it lists no weights; remove it to verify without it")
    return found


def check_record(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Compare weights, by their names in the files, with the record of their folder; False if it has none.

    Raises ``CorruptCheckpointError`` that names the weights whose type, shape or bytes are not those that were written.
    """
    found = read_record(folder)
    if found is None:
        return False
    entries = found["weights"]
    changed = [name for name in tensors if not _is_as_recorded(tensors[name], entries.get(name, {}))]
    if changed := changed + sorted(entries.keys() - tensors.keys()):
        raise CorruptCheckpointError(
            f"{folder}: {listed(changed)} changed since the conversion that {RECORD_FILE} records; convert again, or "
            f"remove {RECORD_FILE} if you changed them yourself"
        )
    return True


def _is_as_recorded(tensor: Tensor, entry: Mapping[str, Any]) -> bool:
    total = hashlib.sha256()
    for piece in pieces(tensor):
        total.update(as_bytes(piece).numpy().data)
    found = _entry(tensor, total.hexdigest())
    return found == {key: entry.get(key) for key in found}
