"""Examines checkpoints: what one contains, whether it is valid, whether it equals another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from openllama.checkpoint.archives import check_sums
from openllama.checkpoint.names import Weights, select
from openllama.checkpoint.pieces import Computed, is_copy, pieces
from openllama.checkpoint.reader import Checkpoint, open_checkpoint
from openllama.config import OpenLlamaConfig
from openllama.errors import CheckpointError, CorruptCheckpointError, KeyMismatchError, listed


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint contains, found without reading the weights."""

    path: Path
    layout: str  # "hf" or "native"
    format: str  # "safetensors" or "pickle"
    head: str  # "body", "causal-lm" or "classifier"
    config: OpenLlamaConfig
    parameters: int
    bytes: int  # of the weights
    dtypes: dict[str, int]  # type -> parameters of it
    files: tuple[str, ...]

    def __str__(self) -> str:
        config = self.config
        flags = {
            "stable embedding": config.use_stable_embedding,
            "shared head": config.shared_input_output_embedding,
            "tied head": config.tie_word_embeddings,
            f"rope scaling {config.rope_scaling}": config.rope_scaling is not None,
        }
        traits = "".join(f", {name}" for name, on in flags.items() if on)
        return (
            f"{self.head} of {self.parameters:,} parameters, {' + '.join(self.dtypes)}, {self.bytes / 1e9:.3f} GB "
            f"in {len(self.files)} {self.format} file{'s' * (len(self.files) > 1)}, {self.layout} layout; "
            f"vocabulary {config.vocab_size}, hidden {config.hidden_size}, intermediate {config.intermediate_size}, "
            f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads{traits}"
        )


@dataclass(frozen=True)
class Verification:
    """What ``verify`` has checked in a valid checkpoint."""

    path: Path
    tensors: int
    parameters: int
    bytes: int
    against: Path | None
    rounded_to: str | None  # the type that the weights of ``against`` were cast to for the comparison

    def __str__(self) -> str:
        text = f"{self.path}: all {self.tensors} tensors, {self.parameters:,} parameters, of the right shape and finite"
        if self.against is not None:
            rounded = f" rounded to {self.rounded_to}" if self.rounded_to else ""
            text += f"; bit for bit equal to {self.against}{rounded}"
        return text


def inspect(path: str | PathLike[str], config: OpenLlamaConfig | str | PathLike[str] | None = None) -> Inspection:
    """Describe a checkpoint by its headers; raises the errors of ``convert`` if it is incomplete or broken."""
    checkpoint, weights = _open(path, config)
    dtypes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return Inspection(
        path=checkpoint.path,
        layout=weights.layout,
        format=checkpoint.format,
        head=weights.head,
        config=checkpoint.config,
        parameters=dtypes.total(),
        bytes=sum(tensor.nbytes for tensor in weights.tensors.values()),
        dtypes=dict(dtypes.most_common()),
        files=tuple(file.name for file in checkpoint.files),
    )


def verify(
    path: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    config: OpenLlamaConfig | str | PathLike[str] | None = None,
) -> Verification:
    """Read every weight; check that names and shapes match the configuration and that all numbers are finite.

    ``against``: another checkpoint, of either layout, that must have the same bits after a cast to the
    type of this one. Raises a ``CheckpointError`` that names every wrong weight.
    """
    checkpoint, weights = _open(path, config)
    check_sums(checkpoint.files)
    broken = [name for name, tensor in weights.tensors.items() if not all(p.isfinite().all() for p in pieces(tensor))]
    if broken:
        raise CorruptCheckpointError(f"{path} holds NaN or infinity in {listed(broken)}")
    rounded_to = (
        None if against is None else _compare(weights.tensors, _open(against, config)[1].tensors, path, against)
    )
    return Verification(
        path=Path(path),
        tensors=len(weights.tensors),
        parameters=sum(tensor.numel() for tensor in weights.tensors.values()),
        bytes=sum(tensor.nbytes for tensor in weights.tensors.values()),
        against=None if against is None else Path(against),
        rounded_to=rounded_to,
    )


def _open(
    path: str | PathLike[str], config: OpenLlamaConfig | str | PathLike[str] | None
) -> tuple[Checkpoint, Weights]:
    checkpoint = open_checkpoint(path, config)
    return checkpoint, select(checkpoint.tensors, checkpoint.config)


def _compare(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: object, against: object) -> str | None:
    """Raise unless all bits are equal; returns the type that ``theirs`` had to be cast to, if any."""
    if mine.keys() != theirs.keys():
        raise KeyMismatchError(f"only one of {path} and {against} holds {listed(sorted(mine.keys() ^ theirs.keys()))}")
    different = [name for name in mine if not is_copy(mine[name], Computed(theirs[name], mine[name].dtype))]
    if different:
        raise CheckpointError(f"{path} and {against} differ in {listed(different)}")
    cast = sorted(
        {str(mine[name].dtype).removeprefix("torch.") for name in mine if mine[name].dtype != theirs[name].dtype}
    )
    return ", ".join(cast) or None
