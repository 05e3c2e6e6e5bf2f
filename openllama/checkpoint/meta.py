"""LLaMA as Meta publishes it: ``params.json`` and ``consolidated.00.pth``, ``consolidated.01.pth`` and so on.

Each file has a part of every matrix, as one of several devices used it. And each rotates neighbouring
numbers of a head, (0, 1), (2, 3) ..., where HF and this package rotate halves, (0, D/2), (1, D/2 + 1) ...;
the rows of the query and key projections are put into that order. Both are done when rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from openllama.checkpoint.files import open_file
from openllama.config import read_json
from openllama.errors import ConfigError, KeyMismatchError, listed

PARAMS_FILE = "params.json"
ROWS, COLUMNS = 0, 1  # the dimension along which the files share a matrix out
META_TO_HF: dict[str, tuple[str, int | None]] = {  # HF's name, and that dimension; None: each file has it all
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "layers.N.attention_norm.weight": ("model.layers.N.input_layernorm.weight", None),
    "layers.N.attention.wq.weight": ("model.layers.N.self_attn.q_proj.weight", ROWS),
    "layers.N.attention.wk.weight": ("model.layers.N.self_attn.k_proj.weight", ROWS),
    "layers.N.attention.wv.weight": ("model.layers.N.self_attn.v_proj.weight", ROWS),
    "layers.N.attention.wo.weight": ("model.layers.N.self_attn.o_proj.weight", COLUMNS),
    "layers.N.ffn_norm.weight": ("model.layers.N.post_attention_layernorm.weight", None),
    "layers.N.feed_forward.w1.weight": ("model.layers.N.mlp.gate_proj.weight", ROWS),
    "layers.N.feed_forward.w2.weight": ("model.layers.N.mlp.down_proj.weight", COLUMNS),
    "layers.N.feed_forward.w3.weight": ("model.layers.N.mlp.up_proj.weight", ROWS),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", ROWS),
}
ROTATED = ("layers.N.attention.wq.weight", "layers.N.attention.wk.weight")
FREQUENCIES = "rope.freqs"  # follow from the configuration
PARAMS_TO_HF = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
}


@dataclass(frozen=True)
class Assembled:
    """A matrix that is put together from parts of files, as many rows of it as are read.

    It has what this package asks of a weight in a file; ``to`` and ``detach`` give a real tensor.
    """

    parts: tuple[Tensor, ...]
    dimension: int  # along which the parts follow one another
    head_dim: int | None = None  # of the heads in which neighbours become halves; None: rows keep their order

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.parts[0].shape)
        sizes[self.dimension] *= len(self.parts)
        return torch.Size(sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def numel(self) -> int:
        return sum(part.numel() for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> Tensor:
        if isinstance(rows, int):
            return self[slice(rows, rows + 1)][0]
        places = self._places(torch.arange(*rows.indices(len(self))))
        if self.dimension == COLUMNS:
            return torch.cat([part[places] for part in self.parts], COLUMNS)
        result = torch.empty(len(places), *self.shape[1:], dtype=self.dtype)
        size = len(self.parts[0])
        for number, part in enumerate(self.parts):
            here = places // size == number
            result[here] = part[places[here] - number * size]
        return result

    def split(self, size: int) -> Iterator[Tensor]:
        return (self[start : start + size] for start in range(0, len(self), size))

    def detach(self) -> Tensor:
        return self[:]

    def to(self, *arguments: Any) -> Tensor:
        return self[:].to(*arguments)

    def _places(self, rows: Tensor) -> Tensor:
        """Where rows lie in the files. Heads of 6: rows 0 1 2 3 4 5 lie at 0 2 4 1 3 5."""
        if self.head_dim is None:
            return rows
        within = rows % self.head_dim
        half = self.head_dim // 2
        return rows - within + 2 * (within % half) + within // half


def meta_files(folder: Path) -> list[Path]:
    """The files of weights of a folder as Meta's; none for another folder."""
    return sorted(folder.glob("consolidated.*.pth")) if (folder / PARAMS_FILE).is_file() else []


def open_meta(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights by HF's names, put together when they are read, and the fields of HF's config.json.

    Raises ``KeyMismatchError`` where the files hold different weights, or parts that do not fit.
    """
    files = meta_files(folder)
    shards = [open_file(file) for file in files]
    params = read_json(folder / PARAMS_FILE, ConfigError)
    for file, shard in zip(files, shards, strict=True):
        if different := sorted(shard.keys() ^ shards[0].keys()):
            raise KeyMismatchError(f"only one of {files[0].name} and {file.name} holds {listed(different)}")
    try:
        head_dim = params["dim"] // params["n_heads"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{folder / PARAMS_FILE} needs dim and n_heads, whole numbers above 0") from error
    tensors: dict[str, Tensor] = {}
    for name in shards[0]:
        if name != FREQUENCIES:
            renamed, weight = _weight(name, [shard[name] for shard in shards], head_dim)
            tensors[renamed] = weight
    return tensors, _config(params, tensors)


def _weight(name: str, parts: list[Tensor], head_dim: int) -> tuple[str, Tensor]:
    """A weight by HF's name; an unknown one keeps its name, so that it is reported with all others."""
    number = re.search(r"(?<=^layers\.)\d+(?=\.)", name)
    pattern = name if number is None else name.replace(f".{number[0]}.", ".N.", 1)
    renamed, dimension = META_TO_HF.get(pattern, (name, None))
    if number is not None:
        renamed = renamed.replace(".N.", f".{number[0]}.")
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise KeyMismatchError(
            f"{name} has another shape or type in each file: {[tuple(part.shape) for part in parts]}"
        )
    rotated = head_dim if pattern in ROTATED else None
    if dimension is None or (len(parts) == 1 and rotated is None):
        return renamed, parts[0]
    if parts[0].ndim != 2 or (rotated and len(parts[0]) % rotated):
        raise KeyMismatchError(f"{name} is {tuple(parts[0].shape)}, which is no matrix of whole heads")
    return renamed, cast(Tensor, Assembled(tuple(parts), dimension, rotated))


def _config(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of a LLaMA's config.json; vocabulary (often -1 in the parameters) and MLP are as large as the weights."""
    values = {hf: params[meta] for meta, hf in PARAMS_TO_HF.items() if params.get(meta) is not None}
    sizes = {"vocab_size": "model.embed_tokens.weight", "intermediate_size": "model.layers.0.mlp.gate_proj.weight"}
    for field, name in sizes.items():
        if name in tensors:
            values[field] = tensors[name].shape[0]
    return {"model_type": "llama", "max_position_embeddings": 2048, **values}
