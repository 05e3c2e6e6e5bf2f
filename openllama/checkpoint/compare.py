"""Numbers about weights: what is in them, and how far those of two checkpoints are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from os import PathLike

import torch
from torch import Tensor

from openllama.checkpoint.names import dtype_name, pattern, select
from openllama.checkpoint.pieces import Source, as_bytes, pieces
from openllama.checkpoint.reader import Checkpoint, open_checkpoint
from openllama.config import ACTIVATIONS, OpenLlamaConfig
from openllama.errors import CheckpointError

#: fields without an effect on the numbers or the texts of a trained model: of training, of new weights, of calls
PREFERENCES = {"initializer_range", "hidden_dropout_prob", "attention_dropout_prob", "num_labels", "problem_type",
               "use_cache", "use_memory_efficient_attention", "output_attentions", "output_hidden_states",
               "return_dict", "extra"}  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """Of the numbers of one weight, or of all weights of one kind; those that are not finite are only counted."""

    numbers: int
    total: float  # sum
    squares: float  # sum of squares
    low: float
    high: float
    zeros: int
    not_finite: int

    @property
    def mean(self) -> float:
        return self.total / max(1, self.numbers - self.not_finite)

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / max(1, self.numbers - self.not_finite) - self.mean**2))

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.numbers + other.numbers,
            self.total + other.total,
            self.squares + other.squares,
            min(self.low, other.low),
            max(self.high, other.high),
            self.zeros + other.zeros,
            self.not_finite + other.not_finite,
        )


@dataclass(frozen=True)
class Difference:
    """How far one weight, or all weights of one kind, of B are from those of A."""

    name: str
    dtypes: tuple[str, str]
    tensors: int
    numbers: int
    different: int  # numbers whose values are not the same bits in the wider of the two types
    max_error: float  # largest |b - a|; NaN if only one of a and b is
    error_squares: float  # sum of (b - a)^2
    squares: float  # sum of a^2

    @property
    def relative_error(self) -> float:
        """Root mean square of the differences, as a part of that of A's numbers."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else math.sqrt(self.error_squares)

    def __add__(self, other: Difference) -> Difference:
        return replace(
            self,
            tensors=self.tensors + other.tensors,
            numbers=self.numbers + other.numbers,
            different=self.different + other.different,
            max_error=_largest(self.max_error, other.max_error),
            error_squares=self.error_squares + other.error_squares,
            squares=self.squares + other.squares,
        )


@dataclass(frozen=True)
class Comparison:
    """What ``diff`` finds; ``str`` is a table with one line for each kind of weight."""

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    misshaped: tuple[str, ...]
    weights: tuple[Difference, ...]
    settings: tuple[str, ...] = ()  # fields of the configurations that differ, see ``differing_settings``

    @property
    def equal(self) -> bool:
        """Whether both hold the same weights, of the same types, bit for bit, and compute the same with them."""
        same_types = all(len(set(weight.dtypes)) == 1 for weight in self.weights)
        lists_empty = not (self.only_a or self.only_b or self.misshaped or self.settings)
        return lists_empty and same_types and not any(weight.different for weight in self.weights)

    def __str__(self) -> str:
        if self.equal:
            return f"{self.a} and {self.b}: the same {len(self.weights)} weights, bit for bit"
        lines = [f"other settings: {text}" for text in self.settings]
        lines += [f"only in {self.a}: {name}" for name in self.only_a]
        lines += [f"only in {self.b}: {name}" for name in self.only_b]
        lines += [f"other shapes: {text}" for text in self.misshaped]
        return "\n".join((*lines, self.table()))

    def table(self) -> str:
        """One line for each kind of weight, the layers taken together."""
        kinds: dict[tuple[str, tuple[str, str]], Difference] = {}
        for weight in self.weights:
            key = pattern(weight.name), weight.dtypes
            kinds[key] = kinds[key] + weight if key in kinds else weight
        rows = [("weight", "types", "tensors", "different", "max error", "relative error")]
        for (name, dtypes), kind in kinds.items():
            types = dtypes[0] if dtypes[0] == dtypes[1] else " / ".join(dtypes)
            errors = f"{kind.max_error:.2e}", f"{kind.relative_error:.2e}"
            rows.append((name, types, str(kind.tensors), f"{kind.different:,}", *errors))
        return as_table(rows)


def diff(
    a: str | PathLike[str], b: str | PathLike[str], config: OpenLlamaConfig | str | PathLike[str] | None = None
) -> Comparison:
    """Compare the weights of two checkpoints, of any layout and type, number by number, and what they compute with.

    ``config`` replaces the config.json of both. Raises the errors of ``verify`` for a checkpoint that is not whole.
    """
    mine, theirs = open_checkpoint(a, config), open_checkpoint(b, config)
    check_same_quantization(mine, theirs)
    weights = select(mine.tensors, mine.config), select(theirs.tensors, theirs.config)
    found = compare(weights[0].tensors, weights[1].tensors, str(a), str(b))
    return replace(found, settings=tuple(differing_settings(mine.config, theirs.config)))


def check_same_quantization(a: Checkpoint, b: Checkpoint) -> None:
    """Raise ``CheckpointError`` for weights that are stored in different ways, which have no numbers in common."""
    mine, theirs = a.config.quantization, b.config.quantization
    if mine == theirs:
        return
    if mine is not None and theirs is not None:
        way = "convert what one was made from with the --quantize of the other, and compare that with the other"
    else:
        way = f"convert {a.path if mine is None else b.path} with --quantize {mine or theirs}, and compare the result"
    raise CheckpointError(
        f"{a.path} is {mine or 'not quantised'} and {b.path} is {theirs or 'not quantised'}: their stored numbers "
        f"cannot be compared; {way}"
    )


def differing_settings(a: OpenLlamaConfig, b: OpenLlamaConfig) -> list[str]:
    """Fields by which two models with the same weights compute different things: "rms_norm_eps 1e-06 and 1e-05"."""
    mine, theirs = _computed_with(a), _computed_with(b)
    values = {name: (getattr(a, name), getattr(b, name)) for name in mine if mine[name] != theirs[name]}
    return [f"{name} {one} and {other}" for name, (one, other) in values.items() if one != other]


def _computed_with(config: OpenLlamaConfig) -> dict[str, object]:
    """The fields of a config but for ``PREFERENCES``; one value for what can be said in two ways."""
    is_dynamic = config.rope_scaling is not None and config.rope_scaling["type"] == "dynamic"
    is_tied = config.shared_input_output_embedding or config.tie_word_embeddings
    return {
        **{name: getattr(config, name) for name in config.field_names() if name not in PREFERENCES},
        "hidden_act": ACTIVATIONS[config.hidden_act],
        "pad_token_id": config.padding_idx,
        "eos_token_id": config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id],
        "max_position_embeddings": config.max_position_embeddings if is_dynamic else None,
        "shared_input_output_embedding": is_tied,
        "tie_word_embeddings": is_tied,
    }


def compare(mine: Mapping[str, Source], theirs: Mapping[str, Source], a: str = "A", b: str = "B") -> Comparison:
    """Compare weights by their full native names."""
    common = [name for name in mine if name in theirs]
    same_shape = [name for name in common if mine[name].shape == theirs[name].shape]
    return Comparison(
        a,
        b,
        only_a=tuple(name for name in mine if name not in theirs),
        only_b=tuple(name for name in theirs if name not in mine),
        misshaped=tuple(
            f"{name} is {tuple(mine[name].shape)} and {tuple(theirs[name].shape)}"
            for name in common
            if name not in same_shape
        ),
        weights=tuple(_difference(name, mine[name], theirs[name]) for name in same_shape),
    )


def statistics(tensors: Mapping[str, Tensor]) -> dict[str, Statistics]:
    """Statistics of each weight; all of it is read."""
    return {name: reduce(Statistics.__add__, map(_statistics, pieces(tensor))) for name, tensor in tensors.items()}


def by_kind(weights: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The layers taken together: ``model.layers.N...`` in place of each layer's name."""
    kinds: dict[str, Statistics] = {}
    for name, found in weights.items():
        kind = pattern(name)
        kinds[kind] = kinds[kind] + found if kind in kinds else found
    return kinds


def as_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell: the first is text, all others end at the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            (row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))
        )
        for row in rows
    )


def _statistics(piece: Tensor) -> Statistics:
    wide = piece.to(torch.promote_types(piece.dtype, torch.float32)).flatten()
    finite = wide[wide.isfinite()]
    low, high = map(float, finite.aminmax()) if finite.numel() else (math.inf, -math.inf)
    return Statistics(
        numbers=piece.numel(),
        total=float(finite.sum(dtype=torch.float64)),
        squares=float(finite.double().square().sum()),
        low=low,
        high=high,
        zeros=piece.numel() - int(piece.count_nonzero()),
        not_finite=piece.numel() - finite.numel(),
    )


def _difference(name: str, mine: Source, theirs: Source) -> Difference:
    parts = [_errors(a, b) for a, b in zip(pieces(mine), pieces(theirs), strict=True)]
    different, max_errors, error_squares, squares = zip(*parts, strict=True)
    dtypes = dtype_name(mine.dtype), dtype_name(theirs.dtype)
    sums = sum(different), _largest(*max_errors), sum(error_squares), sum(squares)
    return Difference(name, dtypes, 1, mine.shape.numel(), *sums)


def _errors(a: Tensor, b: Tensor) -> tuple[int, float, float, float]:
    """How many numbers differ in bits, the largest error, the sum of squared errors, and of A's squares."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    different = int((as_bytes(a) != as_bytes(b)).any(-1).sum())
    error = (b - a).abs().masked_fill(a == b, 0)  # infinity minus itself is NaN
    error = error.masked_fill(a.isnan() & b.isnan(), 0)
    squares = float(a.square().sum(dtype=torch.float64))
    return different, float(error.max()) if different else 0.0, float(error.square().sum(dtype=torch.float64)), squares


def _largest(*values: float) -> float:
    """The largest value; NaN if there is one, which ``max`` may lose."""
    return max(values, key=lambda value: (math.isnan(value), value))
