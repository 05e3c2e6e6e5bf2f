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
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint ``src`` (folder, or file of weights) to the folder ``dst`` in native layout.

    A folder with an adapter of peft alone is written as an adapter of this package's model.

    ``config`` replaces the config.json of ``src``. ``dtype`` (e.g. "bfloat16") casts the weights; None
    keeps every bit. ``ignore``: shell patterns of weights to leave out. The files of the tokenizer and of
    the generation config are copied. Tensors are processed in pieces, so memory use does not grow with
    the model. The result is compared with the source before it appears as ``dst``; after an error ``dst``
    is unchanged. Raises ``CheckpointError`` or a subclass of it, ``ConfigError``, ``TokenizerError``, or
    ``OSError`` if the disk is full.
    """
    if is_adapter(Path(src)):
        return convert_adapter(src, dst, dtype=dtype, overwrite=overwrite)
    src, dst, dtype = Path(src), Path(dst), floating_dtype(dtype)
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
