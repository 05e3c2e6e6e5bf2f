"""Inspecting checkpoints: description, tree, statistics, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openllama.checkpoint import convert, inspect
from tests.checkpoints import hf_weights, native_weights, tiny_config, write_checkpoint

CONFIG = tiny_config()


@pytest.fixture(name="source")
def source_folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", hf_weights(CONFIG), CONFIG)


def test_a_description_is_one_line(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "native", dtype="bfloat16", max_shard_size=500, progress=False)
    hf, native = inspect(source), inspect(tmp_path / "native")
    assert (hf.layout, hf.format, hf.head, hf.dtypes) == ("hf", "pickle", "causal-lm", {"float32": hf.parameters})
    assert (native.layout, native.format, native.dtypes) == ("native", "safetensors", {"bfloat16": hf.parameters})
    assert hf.bytes == 2 * native.bytes == 4 * sum(tensor.numel() for tensor in native_weights(CONFIG).values())
    assert len(native.files) > 1
    assert f"causal-lm of {hf.parameters:,} parameters, float32" in str(hf)
    assert "stable embedding, shared head" in str(native)
    assert "\n" not in str(native)


def test_a_tree_has_a_line_for_each_kind_of_weight(source: Path) -> None:
    found = inspect(source)
    title, *lines = [line.split("  ") for line in found.tree().splitlines()]
    assert title[0].strip() == "weight"
    assert len(lines) == 4 + 9, "two tables of the embedding's norm, the last norm, nine of a layer"
    counts = [int(line[-1].replace(",", "")) for line in lines]
    assert sum(counts) == found.parameters


def test_statistics_are_computed_when_they_are_asked_for(source: Path) -> None:
    assert inspect(source).statistics is None
    assert inspect(source).statistics_table() == ""
    found = inspect(source, with_statistics=True)
    assert found.statistics is not None
    table = native_weights(CONFIG)["model.embedding.tokens.weight"]
    of = found.statistics["model.embedding.tokens.weight"]
    assert of.mean == pytest.approx(float(table.mean()), abs=1e-6)
    assert of.high == float(table.max())
    assert len(found.statistics_table().splitlines()) == 1 + 13


def test_json_has_every_weight(source: Path) -> None:
    found = json.loads(json.dumps(inspect(source, with_statistics=True).to_dict(), allow_nan=False))
    assert found["weights"]["model.norm.weight"] == {"dtype": "float32", "shape": [CONFIG.hidden_size]}
    assert found["statistics"].keys() == found["weights"].keys() == native_weights(CONFIG).keys()
    assert found["config"]["hidden_size"] == CONFIG.hidden_size
    assert found["parameters"] == sum(tensor.numel() for tensor in native_weights(CONFIG).values())


def test_json_of_numbers_that_are_none(tmp_path: Path) -> None:
    weights = native_weights(CONFIG)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    write_checkpoint(tmp_path / "nan", weights, CONFIG)
    found = inspect(tmp_path / "nan", with_statistics=True).to_dict()
    assert found["statistics"]["model.norm.weight"]["not_finite"] == CONFIG.hidden_size
    json.dumps(found, allow_nan=False)
