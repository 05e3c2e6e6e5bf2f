"""Converts a checkpoint of either layout and any format, to native layout or to what another program reads."""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from pathlib import Path

import torch

import openllama
from openllama.checkpoint.adapters import convert_adapter, is_adapter
from openllama.checkpoint.export import FORMS, Export, check_stored, export
from openllama.checkpoint.folders import check_destination, check_places, copy_small, finished_folder, remains
from openllama.checkpoint.gguf import Q8_0, write_gguf
from openllama.checkpoint.hub import fetch, local_path
from openllama.checkpoint.names import Weights, dtype_name, floating_dtype, is_buffer, select, without
from openllama.checkpoint.progress import ShownProgress
from openllama.checkpoint.quantize import quantized_export
from openllama.checkpoint.reader import Checkpoint, open_checkpoint
from openllama.checkpoint.record import Record, SourceSums
from openllama.checkpoint.reports import (
    TOKENIZER_JSON,
    check_generation_config,
    check_tokenizer,
    remarks,
    warn_of_numbers,
)
from openllama.checkpoint.source import SourceFiles
from openllama.checkpoint.writer import OURS, SHARD_SIZE, Resume, parse_size, write_weights
from openllama.config import CONFIG_FILE, OpenLlamaConfig
from openllama.errors import InputError, heard
from openllama.quantized.rounding import check_quantization, to_round
from openllama.tokenizer.files import ALL_FILES as TOKENIZER_FILES

RESUME_FILE = "verified.json"  # beside the folder that is written
COPIED = (*TOKENIZER_FILES, "generation_config.json")
REPLACED = (*OURS, *COPIED, TOKENIZER_JSON)


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    to: str = "native",
    config: OpenLlamaConfig | str | PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    ignore: Collection[str] = (),
    revision: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint ``src`` to ``dst``, in the form that ``to`` names.

    ``src``: a folder, a file of weights, or ORG/NAME on the Hugging Face hub, of which ``revision`` is a branch, tag or
    commit. A folder with nothing but an adapter of peft is written as an adapter, for "native" or "hf".

    ``to``: "native" is the layout of this package, "hf" what transformers 4.31.0 reads as Open-Llama, "llama" a plain
    LLaMA with the stable embedding folded in, for current transformers and others, all of them folders; "gguf" is one
    file, DST.gguf, for llama.cpp. ``config`` replaces the config.json of ``src``. ``dtype`` (e.g. "bfloat16", for gguf
    also "q8_0") casts the weights; None keeps every bit. ``quantize``: "int8" or "int4" rounds the matrices, in native
    layout alone, from the numbers of the source; ``dtype`` is then of the other weights. ``ignore``: shell
    patterns of weights to leave out. The files of the tokenizer and of the generation config are copied.
    ``max_shard_size``: of the largest file, 5 GB if None; not for gguf and adapters, which are one file. Tensors are
    processed in pieces, so memory use does not grow with the model. Each file is read back from the disk and compared
    before the result appears as ``dst``; after an error ``dst`` is unchanged. After Ctrl-C, ``SystemExit`` or a kill,
    the next call with the same arguments keeps the files that are verified.

    Raises ``CheckpointError`` or a subclass of it, ``ConfigError`` also for what the other program does not
    compute, ``TokenizerError`` for a tokenizer that it does not have, or ``OSError`` if the disk is full.
    """
    _check_form(to, dtype, quantize, max_shard_size)
    cast_to = None if dtype == Q8_0 else floating_dtype(dtype)
    dst = Path(dst).expanduser()
    if to != "gguf" and not local_path(src).exists():
        check_destination(dst, overwrite)  # before a download
    src = fetch(src, revision)
    if is_adapter(src):
        if ignore or config is not None or max_shard_size is not None or quantize is not None:
            raise InputError(
                f"{src} is an adapter: ignore (--ignore), config (--config), max_shard_size (--max-shard-size) and "
                "quantize (--quantize) are for models"
            )
        return convert_adapter(src, dst, to, dtype=dtype, overwrite=overwrite)
    with heard() as warnings:
        source = open_checkpoint(src, config)
        chosen = without(source.tensors, ignore)
        weights = select(chosen, source.config)
        quantize = to_round(quantize, source.config.quantization, source.path)
        check_stored(source.config, to, dtype)
        if to == "gguf":
            return write_gguf(source, weights, dst, dtype=dtype, overwrite=overwrite, progress=progress)
        check_places(src, dst, overwrite, _may_be_replaced, "not a checkpoint")
        check_tokenizer(source.folder, source.config.vocab_size, is_needed=source.path.is_dir())
        check_generation_config(source.folder)
        exported = export(to, weights, source.config, cast_to, source.folder)
        if quantize is not None:
            exported = quantized_export(exported, quantize)
        warnings += remarks(weights, source.config)
        dtype_after = None if cast_to is None else dtype_name(cast_to)
        left_out = _left_out(source, chosen, weights)
        record = Record(to, dtype_after, quantize, left_out, warnings)  # warnings may still come
        with finished_folder(dst, REPLACED, overwrite, resume=True) as folder:
            _fill_folder(folder, source, exported, record, max_shard_size or SHARD_SIZE, progress)


def _check_form(
    to: str, dtype: torch.dtype | str | None, quantize: str | None, max_shard_size: int | str | None
) -> None:
    """Raise ``InputError`` for an unknown form, and for what its files cannot have."""
    if quantize is not None:
        check_quantization(quantize)
        if to != "native":
            hint = f"; for llama.cpp, dtype {Q8_0}" if to == "gguf" else ""
            raise InputError(f"quantize (--quantize) is for native alone, not for {to}{hint}")
    if dtype == Q8_0 and to != "gguf":
        raise InputError(f"dtype {Q8_0} is for gguf alone, not for {to}")
    if to not in (*FORMS, "gguf"):
        raise InputError(f"{to!r} is not one of {', '.join(FORMS)}, gguf")
    if max_shard_size is not None:
        parse_size(max_shard_size)
        if to == "gguf":
            raise InputError("gguf is one file: max_shard_size (--max-shard-size) is for folders")


def _fill_folder(
    folder: Path, source: Checkpoint, exported: Export, record: Record, max_shard_size: int | str, progress: bool
) -> None:
    """Write all files of a converted checkpoint, conversion.json last."""
    total = sum(tensor.nbytes for tensor in exported.tensors.values())
    with SourceFiles(source.files) as files, SourceSums(source.files) as sums:
        source.check_unchanged()
        copy_small(source.folder, folder, COPIED)
        exported.write_files(folder)
        written = write_weights(
            folder,
            exported.tensors,
            max_shard_size=max_shard_size,
            progress=ShownProgress(total) if progress else None,
            read=files.read,
            file_format=exported.file_format,
            resume=Resume(folder.parent / RESUME_FILE, _made_from(files, source.config, record)),
        )
        files.check_unchanged()
        warn_of_numbers(written)
        record.about(source.folder).write(folder, sums.results(), exported.tensors, written)


def _may_be_replaced(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or bool(remains(folder.resolve()))


def _left_out(source: Checkpoint, chosen: Collection[str], weights: Weights) -> dict[str, str]:
    """Why weights of the source are not in the result, by their names."""
    used = {id(tensor) for tensor in weights.tensors.values()}
    reasons = {}
    for name, tensor in source.tensors.items():
        if name not in chosen:
            reasons[name] = "was to be ignored"
        elif id(tensor) not in used:
            reasons[name] = "follows from the configuration" if is_buffer(name) else "is not used by this model"
    return reasons


def _made_from(files: SourceFiles, config: OpenLlamaConfig, record: Record) -> dict[str, object]:
    """All that the written bytes depend on, beside the names, types and shapes that are in each file's header."""
    return {
        "version": openllama.__version__,
        "source": files.identity(),
        "config": config.to_dict(),
        "dtype": record.dtype,
        "quantization": record.quantization,
        "to": record.to,
        "left_out": record.left_out,  # of two sources of a weight, the other may have been chosen
    }
