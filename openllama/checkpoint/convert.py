"""Converts a checkpoint of either layout and any format, to native layout or to what another program reads."""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from pathlib import Path

import torch

import openllama
from openllama.checkpoint.adapters import convert_adapter, is_adapter
from openllama.checkpoint.archives import check_sums
from openllama.checkpoint.export import export
from openllama.checkpoint.folders import check_destination, contents, finished_folder, remains
from openllama.checkpoint.gguf import write_gguf
from openllama.checkpoint.hub import fetch, local_path
from openllama.checkpoint.names import floating_dtype, select, without
from openllama.checkpoint.progress import ShownProgress
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.reports import Nonfinite, check_tokenizer
from openllama.checkpoint.source import SourceFiles
from openllama.checkpoint.writer import OURS, Resume, write_weights
from openllama.config import CONFIG_FILE, OpenLlamaConfig, read_limited, write_json
from openllama.errors import CorruptCheckpointError, DestinationExistsError
from openllama.tokenizer.files import MAX_MODEL

RECORD = "verified.json"
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
    ignore: Collection[str] = (),
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint ``src`` to ``dst``, in the form that ``to`` names.

    ``src``: a folder, a file of weights, or ORG/NAME on the Hugging Face hub, of which ``revision`` is a branch, tag or
    commit. A folder with nothing but an adapter of peft is written as an adapter, for "native" or "hf".

    ``to``: "native" is the layout of this package, "hf" what transformers 4.31.0 reads as Open-Llama, "llama" a plain
    LLaMA with the stable embedding folded in, for current transformers and others, all of them folders; "gguf" is one
    file, DST.gguf, for llama.cpp. ``config`` replaces the config.json of ``src``. ``dtype`` (e.g. "bfloat16", for gguf
    also "q8_0") casts the weights; None keeps every bit. ``ignore``: shell patterns of weights to leave out. The files
    of the tokenizer and of the generation config are copied. Tensors are processed in pieces, so memory use does not
    grow with the model. The result is compared with the source before it appears as ``dst``; after an error ``dst`` is
    unchanged. Raises ``CheckpointError`` or a subclass of it, ``ConfigError`` also for what the other program does not
    compute, ``TokenizerError`` for a tokenizer that it does not have, or ``OSError`` if the disk is full.
    """
    dst = Path(dst).expanduser()
    if to != "gguf" and not local_path(src).exists():
        check_destination(dst, overwrite)  # before a download
    src = fetch(src, revision)
    if is_adapter(src):
        return convert_adapter(src, dst, to, dtype=dtype, overwrite=overwrite)
    source = open_checkpoint(src, config)
    weights, nonfinite = select(without(source.tensors, ignore), source.config), Nonfinite()
    if to == "gguf":
        return write_gguf(source, weights, dst, dtype=dtype, overwrite=overwrite, progress=progress)
    dtype = floating_dtype(dtype)
    _check_places(src, dst, overwrite)
    check_tokenizer(source.folder, source.config.vocab_size)
    exported = export(to, weights, source.config, dtype, source.folder)
    check_sums(source.files)
    total = sum(tensor.nbytes for tensor in exported.tensors.values())
    replaced = (*OURS, *COPIED, TOKENIZER_JSON)
    with SourceFiles(source.files) as files, finished_folder(dst, replaced, resume=True) as folder:
        for name in COPIED:
            if (source.folder / name).is_file():
                content = read_limited(source.folder / name, MAX_MODEL, CorruptCheckpointError)
                (folder / name).write_bytes(content)
        for name, values in exported.files.items():
            write_json(folder / name, values)
        write_weights(
            folder,
            exported.tensors,
            max_shard_size=max_shard_size,
            progress=ShownProgress(total) if progress else None,
            read=files.read,
            look=nonfinite.look,
            file_format=exported.file_format,
            resume=Resume(folder.parent / RECORD, _made_from(files, source.config, dtype, to)),
        )
        files.check_unchanged()
    nonfinite.warn()


def _made_from(files: SourceFiles, config: OpenLlamaConfig, dtype: torch.dtype | None, to: str) -> dict[str, object]:
    """All that the written bytes depend on, beside the names, types and shapes that are in each file's header."""
    return {
        "version": openllama.__version__,
        "source": files.identity(),
        "config": config.to_dict(),
        "dtype": str(dtype),
        "to": to,
    }


def _check_places(src: Path, dst: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` if ``dst`` is or contains ``src``, or is not empty and not a checkpoint."""
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise DestinationExistsError(f"{dst} is or contains the source {src}; choose another folder")
    check_destination(dst, overwrite)
    if dst.is_dir() and contents(dst) and not (dst / CONFIG_FILE).is_file() and not remains(dst.resolve()):
        raise DestinationExistsError(
            f"{dst} is not empty and not a checkpoint, so it is not replaced; choose a new folder"
        )
