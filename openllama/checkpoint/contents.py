"""What a checkpoint contains: its description, a tree of its weights, and statistics of their numbers."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from openllama.checkpoint.compare import Statistics, as_table, by_kind, statistics
from openllama.checkpoint.names import count_parameters, dtype_name, pattern, select
from openllama.checkpoint.reader import open_checkpoint
from openllama.config import OpenLlamaConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint contains, found without reading the weights; the statistics alone need all numbers."""

    path: Path
    layout: str  # "hf" or "native"
    format: str  # "safetensors" or "pickle"
    head: str  # "body", "causal-lm" or "classifier"
    config: OpenLlamaConfig
    parameters: int
    bytes: int  # of the weights
    dtypes: dict[str, int]  # type -> stored numbers of it, which are the parameters where nothing is quantised
    files: tuple[str, ...]
    weights: dict[str, tuple[str, Shape]]  # native name -> type and shape
    statistics: dict[str, Statistics] | None = None  # by native name, if they were asked for

    def __str__(self) -> str:
        config = self.config
        flags = {
            "stable embedding": config.use_stable_embedding,
            "shared head": config.shared_input_output_embedding,
            "tied head": config.tie_word_embeddings,
            f"quantised to {config.quantization}": config.quantization is not None,
            f"rope scaling {config.rope_scaling}": config.rope_scaling is not None,
        }
        traits = "".join(f", {name}" for name, on in flags.items() if on)
        return (
            f"{self.head} of {self.parameters:,} parameters, {' + '.join(self.dtypes)}, {self.bytes / 1e9:.3f} GB "
            f"in {len(self.files)} {self.format} file{'s' * (len(self.files) > 1)}, {self.layout} layout; "
            f"vocabulary {config.vocab_size}, hidden {config.hidden_size}, intermediate {config.intermediate_size}, "
            f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads{traits}"
        )

    def tree(self) -> str:
        """One line for each kind of weight, the layers taken together."""
        kinds = Counter((pattern(name), *form) for name, form in self.weights.items())
        rows = [("weight", "type", "shape", "tensors", "parameters")]
        for (name, dtype, shape), count in kinds.items():
            rows.append((name, dtype, " x ".join(map(str, shape)), str(count), f"{count * math.prod(shape):,}"))
        return as_table(rows)

    def statistics_table(self) -> str:
        """One line for each kind of weight; "" if no statistics were asked for."""
        if self.statistics is None:
            return ""
        rows = [("weight", "mean", "std", "min", "max", "zeros", "not finite")]
        for name, of in by_kind(self.statistics).items():
            mean, std, low, high = (f"{value:.3e}" for value in (of.mean, of.std, of.low, of.high))
            rows.append((name, mean, std, low, high, str(of.zeros), str(of.not_finite)))
        return as_table(rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        found = dataclasses.asdict(dataclasses.replace(self, statistics=None))
        found |= {"path": str(self.path), "config": self.config.to_dict()}
        found["weights"] = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in self.weights.items()}
        if self.statistics is not None:
            found["statistics"] = {
                name: {"zeros": of.zeros, "not_finite": of.not_finite}
                | ({"mean": of.mean, "std": of.std, "min": of.low, "max": of.high} if of.low <= of.high else {})
                for name, of in self.statistics.items()
            }
        return found


def inspect(
    path: str | PathLike[str],
    config: OpenLlamaConfig | str | PathLike[str] | None = None,
    *,
    with_statistics: bool = False,
) -> Inspection:
    """Describe a checkpoint by its headers; ``with_statistics`` reads every weight.

    Raises the errors of ``convert`` if it is incomplete or broken.
    """
    checkpoint = open_checkpoint(path, config)
    weights = select(checkpoint.tensors, checkpoint.config)
    tensors = weights.tensors
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.numel()
    return Inspection(
        path=checkpoint.path,
        layout=weights.layout,
        format=checkpoint.format,
        head=weights.head,
        config=checkpoint.config,
        parameters=count_parameters(weights, checkpoint.config),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes=dict(dtypes.most_common()),
        files=tuple(file.name for file in checkpoint.files),
        weights={name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()},
        statistics=statistics(tensors) if with_statistics else None,
    )
