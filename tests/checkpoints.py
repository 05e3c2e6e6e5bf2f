"""Small checkpoints for tests: random weights by name, and the files that trainers leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openllama import OpenLlamaConfig
from openllama.checkpoint.names import Head, expected_shapes, native_to_hf

FORMS = ("one pickle", "pickle shards", "one safetensors", "safetensors shards")


def tiny_config(**fields: Any) -> OpenLlamaConfig:
    sizes = {
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return OpenLlamaConfig(**{**sizes, **fields})


def native_weights(config: OpenLlamaConfig, head: Head = "causal-lm", seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the right shapes, as the native layout names them; a bare decoder has no prefix."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(config, head)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors if head != "body" else {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def hf_weights(config: OpenLlamaConfig, head: Head = "causal-lm", seed: int = 0) -> dict[str, Tensor]:
    return native_to_hf(native_weights(config, head, seed), config)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: OpenLlamaConfig | None,
    form: str = "one pickle",
    shards: int = 3,
) -> Path:
    """``tensors`` in ``folder`` in one of ``FORMS``, by torch and the safetensors library, with the config."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        config.save_pretrained(folder)
    stem, suffix = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
    if form.startswith("one"):
        write_file(folder / f"{stem}.{suffix}", tensors)
        return folder
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        write_file(folder / file, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), path)


def shift_data(path: Path, offset: int) -> None:
    """Pad the header of a safetensors file so that its data begins at ``offset`` modulo 64."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * ((offset - end) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def edit_index(folder: Path, change: Any) -> None:
    """Apply ``change`` to the weight map of the folder's index."""
    (index,) = folder.glob("*.index.json")
    edit_json(index, lambda content: change(content["weight_map"]))


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
