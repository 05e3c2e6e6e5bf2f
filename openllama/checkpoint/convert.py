"""Converts a checkpoint of either layout and any format to a folder in native layout, as safetensors."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path

import torch

import openllama
from openllama.checkpoint.folders import check_destination, contents, finished_folder, remains
from openllama.checkpoint.names import floating_dtype, select
from openllama.checkpoint.pieces import cast
from openllama.checkpoint.progress import ShownProgress
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.source import SourceFiles
from openllama.checkpoint.writer import OURS, Resume, write_weights
from openllama.config import CONFIG_FILE, OpenLlamaConfig
from openllama.errors import DestinationExistsError

RECORD = "verified.json"
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
    processed in pieces, so memory use does not grow with the model. Each file is read back from the disk
    and compared before the result appears as ``dst``; after an error ``dst`` is unchanged. After
    Ctrl-C, ``SystemExit`` or a kill, the next call with the same arguments keeps the files that are
    verified. Raises ``CheckpointError`` or a subclass of it, ``ConfigError``, or ``OSError`` if the disk
    is full.
    """
    src, dst, dtype = Path(src), Path(dst), floating_dtype(dtype)
    _check_places(src, dst, overwrite)
    source = open_checkpoint(src, config)
    weights = select(source.tensors, source.config)
    tensors = cast(weights.named_as_found(), dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with SourceFiles(source.files) as files, finished_folder(dst, (*OURS, *COPIED), resume=True) as folder:
        weights.described_by(source.config, dtype).save_pretrained(folder)
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        write_weights(
            folder,
            tensors,
            max_shard_size=max_shard_size,
            progress=ShownProgress(total) if progress else None,
            read=files.read,
            resume=Resume(folder.parent / RECORD, _made_from(files, source.config, dtype)),
        )
        files.check_unchanged()


def _made_from(files: SourceFiles, config: OpenLlamaConfig, dtype: torch.dtype | None) -> dict[str, object]:
    """All that the written bytes depend on, beside the names, types and shapes that are in each file's header."""
    return {
        "version": openllama.__version__,
        "source": files.identity(),
        "config": config.to_dict(),
        "dtype": str(dtype),
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
