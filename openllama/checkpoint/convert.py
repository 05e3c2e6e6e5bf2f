"""Converts a checkpoint of either layout and any format to a folder in native layout, as safetensors."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from openllama.checkpoint.archives import check_sums
from openllama.checkpoint.folders import check_destination, finished_folder
from openllama.checkpoint.names import floating_dtype, select
from openllama.checkpoint.pieces import cast
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.writer import OURS, write_weights
from openllama.config import CONFIG_FILE, OpenLlamaConfig, read_limited
from openllama.errors import CorruptCheckpointError, DestinationExistsError
from openllama.tokenizer.files import MAX_MODEL

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

    ``config`` replaces the config.json of ``src``. ``dtype`` (e.g. "bfloat16") casts the weights; None
    keeps every bit. The files of the tokenizer and of the generation config are copied. Tensors are
    processed in pieces, so memory use does not grow with the model. The result is compared with the
    source before it appears as ``dst``; after an error ``dst`` is unchanged. Raises ``CheckpointError``
    or a subclass of it, ``ConfigError``, or ``OSError`` if the disk is full.
    """
    src, dst, dtype = Path(src), Path(dst), floating_dtype(dtype)
    _check_places(src, dst, overwrite)
    source = open_checkpoint(src, config)
    weights = select(source.tensors, source.config)
    check_sums(source.files)
    tensors = cast(weights.named_as_found(), dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with (
        finished_folder(dst, (*OURS, *COPIED)) as folder,
        tqdm(total=2 * total, unit="B", unit_scale=True, desc="write, compare", disable=not progress) as bar,
    ):
        weights.described_by(source.config, dtype).save_pretrained(folder)
        for name in COPIED:
            if (source.folder / name).is_file():
                content = read_limited(source.folder / name, MAX_MODEL, CorruptCheckpointError)
                (folder / name).write_bytes(content)
        write_weights(folder, tensors, max_shard_size=max_shard_size, tick=bar.update)


def _check_places(src: Path, dst: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` if ``dst`` is or contains ``src``, or is not empty and not a checkpoint."""
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise DestinationExistsError(f"{dst} is or contains the source {src}; choose another folder")
    check_destination(dst, overwrite)
    if dst.is_dir() and any(dst.iterdir()) and not (dst / CONFIG_FILE).is_file():
        raise DestinationExistsError(
            f"{dst} is not empty and not a checkpoint, so it is not replaced; choose a new folder"
        )
