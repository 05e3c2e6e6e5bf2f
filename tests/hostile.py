"""Files that strangers might send: functions that write each of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # numbers in the storage; offset, shape and stride of the view


def rewritten(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """Write an archive again by Python's zipfile, after ``change`` of its records by name."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in records.items():
            new.writestr(name, content)
    return path


class _View:
    """Pickles as a call of torch's function that makes a tensor over a storage, with whatever numbers it is given."""

    def __init__(self, storage: torch.UntypedStorage, view: View) -> None:
        self.arguments = (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                          *view[1:], False, {})  # fmt: skip

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def pickle_of(path: Path, views: Mapping[str, View], *, legacy: bool = False, shared: bool = False) -> Path:
    """A file of ``torch.save`` with float32 tensors that are any views of their storages; ``shared``: all of one."""
    one = torch.ones(max(view[0] for view in views.values())).untyped_storage()
    tensors = {
        name: _View(one if shared else torch.ones(view[0]).untyped_storage(), view) for name, view in views.items()
    }
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    return path


def pickled(path: Path, data: bytes) -> Path:
    """A file of ``torch.save`` whose pickle is ``data``."""
    torch.save({"a": torch.ones(1)}, path)
    return rewritten(path, lambda records: records.update({f"{path.stem}/data.pkl": data}))
