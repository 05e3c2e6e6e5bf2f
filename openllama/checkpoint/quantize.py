"""Rounds the matrices of a checkpoint to 8 or 4 bits while they are read, one after the other."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from openllama.checkpoint.export import Export
from openllama.checkpoint.names import MATRICES, Weights, pattern, scale_name
from openllama.checkpoint.pieces import Computed, Source
from openllama.config import CONFIG_FILE, OpenLlamaConfig
from openllama.errors import InputError
from openllama.quantized.rounding import FORMATS, round_matrix


def quantized_weights(weights: Weights, quantization: str | None) -> Weights:
    """The same with its matrices rounded, each as a weight and a scale; None changes nothing.

    What is returned lies in memory, what was mapped is read once. Raises ``InputError`` for NaN and infinity.
    """
    if quantization is None:
        return weights
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if pattern(name) in MATRICES:
            tensors[name], tensors[scale_name(name)] = _round(name, tensor.to("cpu"), quantization)
        else:
            tensors[name] = tensor
    return dataclasses.replace(weights, tensors=tensors)


def quantized_export(exported: Export, quantization: str) -> Export:
    """An export in native layout with its matrices rounded when they are read, from the numbers before any cast."""
    tensors: dict[str, Source] = {}
    for name, source in exported.tensors.items():
        if pattern(name) in MATRICES:
            whole = source.source if isinstance(source, Computed) else source
            tensors |= _computed(name, whole, quantization)
        else:
            tensors[name] = source
    config = {**exported.files[CONFIG_FILE], "quantization": quantization}
    return dataclasses.replace(exported, tensors=tensors, files={**exported.files, CONFIG_FILE: config})


def check_unquantized(config: OpenLlamaConfig, quantization: str | None) -> None:
    """Raise ``InputError`` for an unknown quantisation, and for a model that is quantised already."""
    if quantization is not None and quantization not in FORMATS:
        raise InputError(f"quantize must be one of {', '.join(FORMATS)}, got {quantization!r}")
    if quantization is not None and config.quantization is not None:
        raise InputError(
            f"the weights are quantised to {config.quantization} already; quantise the checkpoint that they were made "
            "from"
        )


def _computed(name: str, matrix: Tensor, quantization: str) -> dict[str, Source]:
    """Weight and scale of one matrix; each is computed from the matrix when it is read, so that nothing is kept."""
    form = FORMATS[quantization]
    weight, scale = form.shapes(*matrix.shape)

    def rounded(part: int) -> Computed:
        dtype = (form.weight_dtype, form.scale_dtype)[part]
        return Computed(matrix, dtype, lambda rows: _round(name, rows, quantization)[part], (weight, scale)[part][1:])

    return {name: rounded(0), scale_name(name): rounded(1)}


def _round(name: str, matrix: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    try:
        return round_matrix(matrix, quantization)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
