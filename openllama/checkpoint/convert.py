"""Converts a checkpoint of either layout and any format to a folder in native layout, as safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from openllama.checkpoint.adapters import convert_adapter, is_adapter
from openllama.checkpoint.folders import check_destination, finished_folder
from openllama.checkpoint.hub import fetch, local_path
from openllama.checkpoint.names import floating_dtype, select, without
from openllama.checkpoint.pieces import cast
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.reports import Nonfinite, check_tokenizer
from openllama.checkpoint.writer import OURS, write_weights
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
    ignore: Collection[str] = (),
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint ``src`` to the folder ``dst`` in native layout.

    ``src``: a folder, a file of weights, or ORG/NAME on the Hugging Face hub, of which ``revision`` is a
    branch, tag or commit. A folder with nothing but an adapter of peft becomes an adapter of this
    package's model. ``config`` replaces the config.json of ``src``. ``dtype`` (e.g. "bfloat16") casts the
    weights; None keeps every bit. ``ignore``: shell patterns of weights to leave out. The files of the
    tokenizer and of the generation config are copied. Tensors are processed in pieces, so memory use does
    not grow with the model. The result is compared with the source before it appears as ``dst``; after an
    error ``dst`` is unchanged. Raises ``CheckpointError`` or a subclass of it, ``ConfigError``,
    ``TokenizerError``, or ``OSError`` if the disk is full.
    """
    dst = Path(dst).expanduser()
    if not local_path(src).exists():
        check_destination(dst, overwrite)  # before a download
    src = fetch(src, revision)
    if is_adapter(src):
        return convert_adapter(src, dst, dtype=dtype, overwrite=overwrite)
    dtype = floating_dtype(dtype)
    _check_places(src, dst, overwrite)
    source = open_checkpoint(src, config)
    weights, nonfinite = select(without(source.tensors, ignore), source.config), Nonfinite()
    check_tokenizer(source.folder, source.config.vocab_size)
    tensors = cast(weights.named_as_found(), dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with (
        finished_folder(dst, (*OURS, *COPIED)) as folder,
        tqdm(total=2 * total, unit="B", unit_scale=True, desc="write, compare", disable=not progress) as bar,
    ):
        weights.described_by(source.config, dtype).save_pretrained(folder)
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        write_weights(folder, tensors, max_shard_size=max_shard_size, tick=bar.update, look=nonfinite.look)
    nonfinite.warn()


def _check_places(src: Path, dst: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` if ``dst`` is or contains ``src``, or is not empty and not a checkpoint."""
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise DestinationExistsError(f"{dst} is or contains the source {src}; choose another folder")
    check_destination(dst, overwrite)
    if dst.is_dir() and any(dst.iterdir()) and not (dst / CONFIG_FILE).is_file():
        raise DestinationExistsError(
            f"{dst} is not empty and not a checkpoint, so it is not replaced; choose a new folder"
        )
