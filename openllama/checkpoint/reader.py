"""Opens checkpoints: every weight is a memory-mapped tensor, and every file is checked before it is used.

A checkpoint is a folder in HF or native layout, in safetensors or torch's format, as shards with an
index or one file; or a single file of either format. Opening loads nothing: the system reads a page of
a file when its numbers are used. Writing to a tensor changes a private copy of the page, never the file.
Pickles are only opened with torch's ``weights_only=True``, which executes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from openllama.checkpoint.adapters import is_adapter
from openllama.checkpoint.files import Format, format_of, open_file
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
    listed,
    warn,
)

SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TRAINER_FILE = (
    "trainer_state.json"  # in checkpoints of transformers' Trainer, which has no config.json of others' models
)
SEARCHED = (SAFETENSORS_FILE, SAFETENSORS_INDEX, PICKLE_FILE, PICKLE_INDEX)  # first found wins, as in HF
GGML_MAGIC = (b"GGUF", b"lmgg", b"fmgg", b"tjgg", b"algg")  # llama.cpp's formats, newest first
ALIGNMENT = 64  # bytes; torch allocates tensors at multiples of it
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


def open_checkpoint(
    path: str | PathLike[str], config: OpenLlamaConfig | str | PathLike[str] | None = None, **overrides: Any
) -> Checkpoint:
    """Open a folder or a file of weights; ``config`` (or its path) replaces the folder's config.json.

    ``overrides`` replace fields of the configuration. Raises ``CheckpointNotFoundError``,
    ``CorruptCheckpointError``, ``UnsafePickleError``, ``KeyMismatchError`` (index and shards
    disagree, or there are far fewer weights than the configuration needs) or ``ConfigError``.
    """
    path = local_path(path)
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such file or folder; this reads local disk only, `openllama convert ORG/NAME DST` downloads"
        )
    _refuse_ggml(path)
    folder = path if path.is_dir() else path.parent
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
    for file in files:
        _add_aliases(file, tensors)
    tensors = unwrap(tensors)
    check_layers(tensors, config)
    return Checkpoint(path, folder, files, format_of(files[0]), config, tensors)


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
    hint = f"; it has {listed(others)}: pass the file itself, or add the missing index" if others else ""
    raise CheckpointNotFoundError(f"{folder} holds none of {', '.join(SEARCHED)}{hint}")


def _add_aliases(file: Path, tensors: dict[str, Tensor]) -> None:
    """Add the names of shared weights that ``safetensors.torch.save_model`` keeps in the metadata of a file."""
    if format_of(file) == "safetensors":
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
        tensors |= {
            alias: tensors[name] for alias, name in metadata.items() if name in tensors and alias not in tensors
        }


# ---- shards


def _open_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """Open the shards of ``index``; raises ``KeyMismatchError`` if they and the index disagree on a tensor."""
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointNotFoundError(f"{index} names {listed(absent)}, which {index.parent} does not contain")
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
    return files, tensors


def _read_index(index: Path) -> dict[str, str]:
    """Key -> file name; raises ``CorruptCheckpointError`` for a file outside the folder of the index."""
    entries = read_json(index, CorruptCheckpointError, unique=True).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CorruptCheckpointError(f'{index} has no "weight_map" that names weights')
    for key, name in entries.items():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise CorruptCheckpointError(f"{index} places {key} in {name!r}; only files in the same folder are allowed")
    return entries
