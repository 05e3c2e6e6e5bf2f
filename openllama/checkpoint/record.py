"""``conversion.json``: what a folder was made from, what was left out, and the SHA-256 of each weight in it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import openllama
from openllama.checkpoint.pieces import as_bytes, pieces
from openllama.config import read_json, write_json
from openllama.errors import CorruptCheckpointError, listed

RECORD_FILE = "conversion.json"


@dataclass(frozen=True)
class Record:
    """One conversion. Paths are names of files alone: a record tells nothing about the machine."""

    source: dict[str, dict[str, int | str]]  # file -> {"bytes", "sha256"}
    to: str
    dtype: str | None  # the type that weights were cast to; None: each has kept its own
    weights: dict[str, dict[str, Any]]  # name in the files -> {"dtype", "shape", "sha256"}
    left_out: dict[str, str] = field(default_factory=dict)  # name in the source -> why
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: dict(VERSIONS))

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD_FILE, asdict(self))


VERSIONS = {
    "openllama": openllama.__version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}


def weight_entry(dtype: torch.dtype, shape: torch.Size, sha256: str) -> dict[str, Any]:
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "sha256": sha256}


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
    changed = [name for name in tensors if name not in entries or entries[name] != _entry(tensors[name])]
    if changed := changed + sorted(entries.keys() - tensors.keys()):
        raise CorruptCheckpointError(
            f"{folder}: {listed(changed)} changed since the conversion that {RECORD_FILE} records; convert again, or "
            f"remove {RECORD_FILE} if you changed them yourself"
        )
    return True


def _entry(tensor: Tensor) -> dict[str, Any]:
    total = hashlib.sha256()
    for piece in pieces(tensor):
        total.update(as_bytes(piece).numpy().data)
    return weight_entry(tensor.dtype, tensor.shape, total.hexdigest())
