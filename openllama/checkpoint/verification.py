"""Verifies checkpoints: whether one is whole and finite, and whether it equals another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from openllama.checkpoint.archives import check_sums, is_archive
from openllama.checkpoint.compare import Comparison, check_same_quantization, compare, differing_settings
from openllama.checkpoint.export import folded
from openllama.checkpoint.names import EMBEDDING, count_parameters, dtype_name, select
from openllama.checkpoint.pieces import Source, as_dtype, is_copy, pieces
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.record import SourceSums, check_record
from openllama.checkpoint.writer import RECORD_FILE
from openllama.config import CONFIG_FILE, OpenLlamaConfig
from openllama.errors import CheckpointError, CorruptCheckpointError, KeyMismatchError, listed


@dataclass(frozen=True)
class Verification:
    """What ``verify`` has checked in a valid checkpoint."""

    path: Path
    tensors: int
    parameters: int
    bytes: int
    recorded: bool  # the folder has a conversion.json, and all weights are those that it lists
    against: Path | None
    folded: bool  # ``against`` was compared as the plain LLaMA that ``convert`` makes of it
    rounded_to: str | None  # the type that the weights of ``against`` were cast to for the comparison
    rounding: Comparison | None  # how far ``against`` is, if it was cast

    def __str__(self) -> str:
        text = f"{self.path}: all {self.tensors} tensors, {self.parameters:,} parameters, of the right shape and finite"
        if self.recorded:
            text += f"; as {RECORD_FILE} records them"
        if self.against is not None:
            text += f"; bit for bit equal to {self.against}"
            text += " as a plain LLaMA" * self.folded
            text += f" rounded to {self.rounded_to}" if self.rounded_to else ""
        return text if self.rounding is None else f"{text}\n{self.rounding.table()}"


def verify(
    path: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    config: OpenLlamaConfig | str | PathLike[str] | None = None,
) -> Verification:
    """Read every weight; check that names and shapes match the configuration and that all numbers are finite.

    ``against``: another checkpoint, of either layout, that must have the same bits after a cast to the type of this
    one, and compute the same with them. Where this one is a plain LLaMA and the other has a stable embedding, it is
    folded first. Raises a ``CheckpointError`` that names wrong weights, or settings that differ.
    """
    checkpoint = open_checkpoint(path, config)
    selected = select(checkpoint.tensors, checkpoint.config)
    tensors = selected.tensors
    with SourceSums(filter(is_archive, checkpoint.files), check_sums) as sums:
        recorded = checkpoint.path.is_dir() and check_record(checkpoint.folder, checkpoint.tensors)
        broken = [name for name, tensor in tensors.items() if not all(p.isfinite().all() for p in pieces(tensor))]
        sums.results()
    if broken:
        raise CorruptCheckpointError(f"{path} holds NaN or infinity in {listed(broken)}")
    is_folded, rounded_to, rounding = False, None, None
    if against is not None:
        other = open_checkpoint(against, config)
        check_same_quantization(checkpoint, other)
        weights, their_config = select(other.tensors, other.config), other.config
        theirs: Mapping[str, Source] = weights.tensors
        if is_folded := their_config.use_stable_embedding and not checkpoint.config.use_stable_embedding:
            theirs, their_config = folded(weights, their_config)
        rounded_to = _compare(tensors, theirs, path, against, is_folded)
        if settings := differing_settings(checkpoint.config, their_config):
            raise CheckpointError(
                f"{path} and {against} have the same weights and compute different things with them: "
                f"{listed(settings)}; one of their {CONFIG_FILE} is wrong"
            )
        rounding = compare(theirs, tensors, str(against), str(path)) if rounded_to else None
        other.check_unchanged()
    checkpoint.check_unchanged()
    return Verification(
        path=Path(path),
        tensors=len(tensors),
        parameters=count_parameters(selected, checkpoint.config),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        recorded=recorded,
        against=None if against is None else Path(against),
        folded=is_folded,
        rounded_to=rounded_to,
        rounding=rounding,
    )


def _compare(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Source], path: object, against: object, is_folded: bool
) -> str | None:
    """Raise unless all bits are equal; returns the type that ``theirs`` had to be cast to, if any."""
    if mine.keys() != theirs.keys():
        raise KeyMismatchError(f"only one of {path} and {against} holds {listed(sorted(mine.keys() ^ theirs.keys()))}")
    different = [name for name in mine if not is_copy(mine[name], as_dtype(theirs[name], mine[name].dtype))]
    if is_folded and different == [EMBEDDING]:
        raise CheckpointError(
            f"{path} and {against} differ in {EMBEDDING}, which is computed, and which another kind of processor may "
            "have rounded differently; convert again on this machine"
        )
    if different:
        raise CheckpointError(f"{path} and {against} differ in {listed(different)}; `openllama diff` shows how far")
    cast = sorted({dtype_name(mine[name].dtype) for name in mine if mine[name].dtype != theirs[name].dtype})
    return ", ".join(cast) or None
