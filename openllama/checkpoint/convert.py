"""Converting a checkpoint of either layout and any format into a native folder of safetensors."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from openllama.checkpoint.names import floating_dtype, select
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.writer import OURS, check_destination, finished_folder, write_weights
from openllama.config import CONFIG_FILE, OpenLlamaConfig
from openllama.errors import DestinationExistsError

COPIED = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    config: OpenLlamaConfig | str | PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint ``src`` (folder, or file of weights) to the folder ``dst`` in native layout.

    ``config`` stands in for a missing config.json. ``dtype`` ("bfloat16" or its like) casts; None
    keeps every bit. Tokenizer and generation config come along. Works by pieces of tensors, so that
    memory does not grow with the model; the result is compared with the source before it gets its
    name, and ``dst`` is as it was after any error. Raises ``CheckpointError`` of some kind,
    ``ConfigError``, or ``OSError`` when the disk is full.
    """
    src, dst, dtype = Path(src), Path(dst), floating_dtype(dtype)
    _check_places(src, dst, overwrite)
    source = open_checkpoint(src, config)
    weights = select(source.tensors, source.config)
    tensors = weights.named_as_found()
    total = sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values())
    with (
        finished_folder(dst, (*OURS, *COPIED)) as folder,
        tqdm(total=2 * total, unit="B", unit_scale=True, desc="write, compare", disable=not progress) as bar,
    ):
        weights.described_by(source.config, dtype).save_pretrained(folder)
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        write_weights(folder, tensors, dtype=dtype, max_shard_size=max_shard_size, tick=bar.update)


def _check_places(src: Path, dst: Path, overwrite: bool) -> None:
    """Refuse a destination that is the source or holds it, or a folder that is no checkpoint."""
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise DestinationExistsError(f"{dst} is or contains the source {src}; choose another folder")
    check_destination(dst, overwrite)
    if dst.is_dir() and any(dst.iterdir()) and not (dst / CONFIG_FILE).is_file():
        raise DestinationExistsError(
            f"{dst} holds other things than a checkpoint and is not replaced; name a new folder"
        )
