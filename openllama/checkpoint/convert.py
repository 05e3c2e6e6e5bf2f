"""Converts a checkpoint of either layout and any format, to native layout or to what another program reads."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from openllama.checkpoint.export import export
from openllama.checkpoint.folders import check_destination, finished_folder
from openllama.checkpoint.gguf import convert_to_gguf
from openllama.checkpoint.names import floating_dtype, select
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.writer import OURS, write_weights
from openllama.config import CONFIG_FILE, OpenLlamaConfig, write_json
from openllama.errors import DestinationExistsError

TOKENIZER_JSON = "tokenizer.json"
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
    to: str = "native",
    config: OpenLlamaConfig | str | PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint ``src`` (folder, or file of weights) to ``dst``, in the form that ``to`` names.

    ``to``: "native" is the layout of this package, "hf" what transformers 4.31.0 reads as Open-Llama, "llama" a plain
    LLaMA with the stable embedding folded in, for current transformers and others, all of them folders; "gguf" is one
    file, DST.gguf, for llama.cpp. ``config`` replaces the config.json of ``src``. ``dtype`` (e.g. "bfloat16", for gguf
    also "q8_0") casts the weights; None keeps every bit. The files of the tokenizer and of the generation config are
    copied. Tensors are processed in pieces, so memory use does not grow with the model. The result is compared with
    the source before it appears as ``dst``; after an error ``dst`` is unchanged. Raises ``CheckpointError`` or a
    subclass of it, ``ConfigError`` also for what the other program does not compute, ``TokenizerError`` for a
    tokenizer that it does not have, or ``OSError`` if the disk is full.
    """
    src, dst = Path(src), Path(dst)
    if to == "gguf":
        convert_to_gguf(src, dst, config=config, dtype=dtype, overwrite=overwrite, progress=progress)
        return
    dtype = floating_dtype(dtype)
    _check_places(src, dst, overwrite)
    source = open_checkpoint(src, config)
    exported = export(to, select(source.tensors, source.config), source.config, dtype, source.folder)
    total = sum(tensor.nbytes for tensor in exported.tensors.values())
    with (
        finished_folder(dst, (*OURS, *COPIED, TOKENIZER_JSON)) as folder,
        tqdm(total=2 * total, unit="B", unit_scale=True, desc="write, compare", disable=not progress) as bar,
    ):
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        for name, values in exported.files.items():
            write_json(folder / name, values)
        write_weights(folder, exported.tensors, max_shard_size=max_shard_size, tick=bar.update)


def _check_places(src: Path, dst: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` if ``dst`` is or contains ``src``, or is not empty and not a checkpoint."""
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise DestinationExistsError(f"{dst} is or contains the source {src}; choose another folder")
    check_destination(dst, overwrite)
    if dst.is_dir() and any(dst.iterdir()) and not (dst / CONFIG_FILE).is_file():
        raise DestinationExistsError(
            f"{dst} is not empty and not a checkpoint, so it is not replaced; choose a new folder"
        )
