"""Rounds the matrices of a checkpoint to 8 or 4 bits while they are read, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from openllama.checkpoint.export import Export
from openllama.checkpoint.names import MATRICES, Weights, pattern, scale_name
from openllama.checkpoint.pieces import Computed, Read, Source, pieces
from openllama.config import CONFIG_FILE
from openllama.quantized.rounding import FORMATS, naming, round_matrix


def quantized_weights(weights: Weights, quantization: str | None) -> Weights:
    """The same with its matrices rounded, each as a weight and a scale; None changes nothing.

    What is returned lies in memory, what was mapped is read once; of tensors on the meta device only the shapes are
    known. Raises ``InputError`` for NaN and infinity.
    """
    if quantization is None:
        return weights
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if pattern(name) in MATRICES:
            tensors[name], tensors[scale_name(name)] = _round(name, tensor.detach(), quantization)
        else:
            tensors[name] = tensor
    return dataclasses.replace(weights, tensors=tensors)


def quantized_export(exported: Export, quantization: str) -> Export:
    """An export in native layout with its matrices rounded when they are read, from the numbers before any cast."""
    tensors: dict[str, Source] = {}
    latest: dict[str, list[Tensor]] = {}
    for name, source in exported.tensors.items():
        if pattern(name) in MATRICES:
            whole = source.source if isinstance(source, Computed) else source
            tensors |= _computed(name, whole, quantization, latest)
        else:
            tensors[name] = source
    config = {**exported.files[CONFIG_FILE], "quantization": quantization}
    return dataclasses.replace(exported, tensors=tensors, files={**exported.files, CONFIG_FILE: config})


@dataclass(frozen=True, kw_only=True)
class _Rounded(Computed):
    """A matrix of which weight and scales are found together, and are read one after the other."""

    name: str
    quantization: str
    latest: dict[str, list[Tensor]]  # the scales of the one matrix whose weight was read last

    def rounded(self, read: Read) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and scale of each piece."""
        return (_round(self.name, rows, self.quantization) for rows in pieces(self.source, read))


class _Weight(_Rounded):
    def pieces(self, read: Read) -> Iterator[Tensor]:
        self.latest.clear()
        scales = []
        for weight, scale in self.rounded(read):
            scales.append(scale)
            yield weight
        self.latest[self.name] = scales


class _Scale(_Rounded):
    def pieces(self, read: Read) -> Iterator[Tensor]:
        """What was found with the weight where that was just read, else computed anew."""
        found = self.latest.pop(self.name, None)
        return iter(found) if found is not None else (scale for _, scale in self.rounded(read))


def _computed(name: str, matrix: Tensor, quantization: str, latest: dict[str, list[Tensor]]) -> dict[str, Source]:
    """Weight and scale of one matrix, rounded when they are read; of a piece nothing is kept but its scales."""
    form = FORMATS[quantization]
    weight, scale = form.shapes(*matrix.shape)
    about: Any = {"source": matrix, "name": name, "quantization": quantization, "latest": latest}
    return {
        name: _Weight(dtype=form.weight_dtype, row=weight[1:], **about),
        scale_name(name): _Scale(dtype=form.scale_dtype, row=scale[1:], **about),
    }


def _round(name: str, matrix: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    with naming(name):
        return round_matrix(matrix, quantization)
