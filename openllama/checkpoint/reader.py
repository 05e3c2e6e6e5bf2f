"""Opens checkpoints: every weight is a memory-mapped tensor, and every file is checked before it is used.

A checkpoint is a folder in HF or native layout, in safetensors or torch's format, as shards with an
index or one file; or a single file of either format. Opening loads nothing: the system reads a page of
a file when its numbers are used. Writing to a tensor changes a private copy of the page, never the file.
Pickles are only opened with torch's ``weights_only=True``, which executes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from openllama.checkpoint.adapters import is_adapter
from openllama.checkpoint.files import Format, format_of, open_file, with_aliases
from openllama.checkpoint.folders import check_whole
from openllama.checkpoint.hub import local_path
from openllama.checkpoint.meta import meta_files, open_meta
from openllama.checkpoint.names import check_layers, unwrap
from openllama.config import CONFIG_FILE, OpenLlamaConfig, read_json
from openllama.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeyMismatchError,
    OpenLlamaError,
    listed,
    warn,
)

SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# In checkpoints of transformers' Trainer, which writes no config.json for a model that is not of its own classes.
TRAINER_FILE = "trainer_state.json"
SEARCHED = (SAFETENSORS_FILE, SAFETENSORS_INDEX, PICKLE_FILE, PICKLE_INDEX)  # first found wins, as in HF
GGML_MAGIC = (b"GGUF", b"lmgg", b"fmgg", b"tjgg", b"algg")  # llama.cpp's formats, newest first
ALIGNMENT = 64  # bytes; torch allocates tensors at multiples of it
REPLACED = "was changed while it was read; try again when nothing writes to it"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
ORIGIN = "copy or download what is missing from where the rest came from"
MAX_ALIGNED_COPIES = 2**30  # bytes; copies stay in memory, the system can drop mapped pages


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: memory-mapped weights by the names in the files, and their configuration."""

    path: Path  # as given
    folder: Path  # of config.json and the tokenizer
    files: tuple[Path, ...]  # files of weights
    format: Format
    config: OpenLlamaConfig
    tensors: dict[str, Tensor]
    states: tuple[tuple[int, ...] | None, ...] = ()  # of the files that were read, when they had been opened

    @property
    def _read(self) -> tuple[Path, ...]:
        return (self.folder / CONFIG_FILE, *self.files)

    def check_unchanged(self) -> None:
        """Raise ``CorruptCheckpointError`` if config.json or a file of weights was replaced or changed since."""
        if _states(self._read) != self.states:
            raise CorruptCheckpointError(f"{self.path} {REPLACED}")


def open_checkpoint(
    path: str | PathLike[str], config: OpenLlamaConfig | str | PathLike[str] | None = None, **overrides: Any
) -> Checkpoint:
    """Open a folder or a file of weights; ``config`` (or its path) replaces the folder's config.json.

    ``overrides`` replace fields of the configuration. Raises ``CheckpointNotFoundError``,
    ``CorruptCheckpointError`` (also if another program replaces the checkpoint meanwhile),
    ``UnsafePickleError``, ``KeyMismatchError`` (index and shards disagree, or there are far fewer weights
    than the configuration needs) or ``ConfigError``.
    """
    path = local_path(path)
    folder = path if path.is_dir() else path.parent
    marker = [folder / CONFIG_FILE]  # it leaves first and comes last when the files of a folder are replaced
    for is_last in (False, True):
        before = _states(marker)
        try:
            checkpoint = _open(path, folder, config, overrides)
        except (OpenLlamaError, OSError):
            if is_last or _states(marker) == before:
                raise
            continue
        states = _states(checkpoint._read)  # before the second look: a file replaced later differs from them
        if _states(marker) == before:
            return replace(checkpoint, states=states)
    raise CorruptCheckpointError(f"{folder} {REPLACED}")


def _open(
    path: Path, folder: Path, config: OpenLlamaConfig | str | PathLike[str] | None, overrides: Mapping[str, Any]
) -> Checkpoint:
    """``open_checkpoint`` of a folder that does not change."""
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such file or folder; this reads local disk only, `openllama convert ORG/NAME DST` downloads"
        )
    _refuse_ggml(path)
    if path.is_file() and (shard := SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
        raise CheckpointNotFoundError(f"{path} is one of {int(shard[3])} files of a checkpoint; pass their folder")
    check_whole(folder)
    if config is None and is_adapter(folder):
        raise CheckpointNotFoundError(
            f"{folder} is an adapter, not a model: load the model it was trained on, then "
            "peft.PeftModel.from_pretrained(model, folder); `openllama convert` renames one of transformers' model"
        )
    meta = path.is_dir() and not (path / CONFIG_FILE).is_file() and meta_files(path)
    if meta:
        tensors, values = open_meta(path)
        config = config or OpenLlamaConfig.from_dict(values)
    if config is None and not (folder / CONFIG_FILE).is_file():
        trained = (folder / TRAINER_FILE).is_file()
        hint = (
            ", such as the folder that was trained; model.config.save_pretrained(folder) writes it" if trained else ""
        )
        raise CheckpointNotFoundError(f"{folder} has no {CONFIG_FILE}; put it there, or pass config (--config){hint}")
    if not isinstance(config, OpenLlamaConfig):
        config = OpenLlamaConfig.from_pretrained(config or folder)
    if overrides:
        config = OpenLlamaConfig.from_dict(config.to_dict(), **overrides)
    if meta:
        check_layers(tensors, config)
        return Checkpoint(path, folder, tuple(meta), "pickle", config, tensors)
    source = _find_weights(path) if path.is_dir() else path
    if source.suffix == ".json":
        files, tensors = _open_shards(source)
    else:
        files, tensors = (source,), open_file(source)
    tensors = unwrap(tensors)
    check_layers(tensors, config)
    return Checkpoint(path, folder, files, format_of(files[0]), config, tensors)


def _states(files: Iterable[Path]) -> tuple[tuple[int, ...] | None, ...]:
    """What tells whether files are others or were changed: device, number, size and time; None for one that is not."""
    found: list[tuple[int, ...] | None] = []
    for file in files:
        try:
            state = file.stat()
            found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def _refuse_ggml(path: Path) -> None:
    """Raise ``CheckpointError`` for a file of llama.cpp, and for a folder whose only weights are such files."""
    files = [path] if path.is_file() else []
    if path.is_dir() and not meta_files(path) and not any((path / name).is_file() for name in SEARCHED):
        names = [file for file in path.iterdir() if fnmatch(file.name, "*.gguf") or fnmatch(file.name, "ggml*.bin")]
        files = [file for file in names if file.is_file()]
    for file in files:
        with file.open("rb") as opened:
            magic = opened.read(4)
        if magic in GGML_MAGIC or file.suffix == ".gguf":
            raise CheckpointError(
                f"{file} is a file of llama.cpp (GGUF or ggml) with usually rounded numbers; this package reads the "
                "checkpoint that it was made from"
            )


def aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with data at multiples of ``ALIGNMENT`` bytes; other tensors are copied.

    On some processors the rounding of a matrix product depends on the alignment of the weights. If all
    copies together would take more than ``MAX_ALIGNED_COPIES`` bytes, nothing is copied.
    """
    misaligned = {name: tensor for name, tensor in tensors.items() if tensor.is_cpu and tensor.data_ptr() % ALIGNMENT}
    if sum(tensor.nbytes for tensor in misaligned.values()) > MAX_ALIGNED_COPIES:
        return dict(tensors)
    return {**tensors, **{name: tensor.clone() for name, tensor in misaligned.items()}}


def _find_weights(folder: Path) -> Path:
    if found := [name for name in SEARCHED if (folder / name).is_file()]:
        if len(found) > 1:
            warn(f"{folder} has {' and '.join(found)}: only {found[0]} is read")
        return folder / found[0]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    hint = ""
    if absent := _absent_shards(others):
        hint = f"; it has {listed(others)} without {listed(absent)}: {ORIGIN}"
    elif others:
        hint = f"; it has {listed(others)}: pass the file itself"
    raise CheckpointNotFoundError(f"{folder} holds none of {', '.join(SEARCHED)}{hint}")


def _absent_shards(names: Sequence[str]) -> list[str]:
    """The index and the shards that are missing beside the shards among ``names``, if there are any."""
    shards = [match for name in names if (match := SHARD.fullmatch(name))]
    if not shards:
        return []
    stem, _, count, suffix = shards[0].groups()
    expected = [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    return [name for name in expected if name not in names] + [f"{stem}{suffix}.index.json"]


# ---- shards


def _open_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """Open the shards of ``index``; raises ``KeyMismatchError`` if they and the index disagree on a tensor."""
    weight_map, metadata = _read_index(index)
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointNotFoundError(
            f"{index} names {listed(absent)}, which {index.parent} does not contain ({len(absent)} of {len(names)}): "
            f"{ORIGIN}"
        )
    files = tuple(index.parent / name for name in names)
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        for key, tensor in open_file(file).items():
            if key not in weight_map:
                problems.append(f"{key} is in {file.name} but not in the index")
            elif weight_map[key] != file.name:
                problems.append(f"{key} is in {file.name}, the index says {weight_map[key]}")
            else:
                tensors[key] = tensor
    problems += [f"{key} is not in {weight_map[key]}" for key in sorted(weight_map.keys() - tensors.keys())]
    if problems:
        raise KeyMismatchError(f"{index} and its shards disagree: {listed(problems, '; ')}")
    return files, with_aliases(tensors, metadata, index)


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Key -> file name, and metadata; raises ``CorruptCheckpointError`` for a file outside the folder of the index."""
    content = read_json(index, CorruptCheckpointError, unique=True)
    entries, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(entries, dict) or not entries:
        raise CorruptCheckpointError(
            f'{index} is not an index of shards, it has no "weight_map" that names weights; pass a folder or a file of '
            "weights"
        )
    for key, name in entries.items():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise CorruptCheckpointError(f"{index} places {key} in {name!r}; only files in the same folder are allowed")
    return entries, metadata if isinstance(metadata, dict) else {}
