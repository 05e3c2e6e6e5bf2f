"""Verifying against another checkpoint: settings that compute something else, and plain LLaMAs of Open-Llamas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.checkpoint import convert, diff, verification, verify
from openllama.checkpoint.record import RECORD_FILE
from openllama.errors import CheckpointError, CorruptCheckpointError
from tests.checkpoints import native_weights, tiny_config, write_checkpoint
from tests.test_export import FLAGS
from tests.tiny import tiny_model

CONFIG = tiny_config()


@pytest.mark.parametrize(("field", "value"), [
    ("rms_norm_eps", 1e-5),
    ("hidden_act", "relu"),
    ("num_attention_heads", 4),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("pad_token_id", 3),
    ("eos_token_id", [2, 3]),
])  # fmt: skip
def test_equal_weights_with_other_settings_are_not_equal(tmp_path: Path, field: str, value: Any) -> None:
    for name, config in (("a", CONFIG), ("b", replace(CONFIG, **{field: value}))):
        write_checkpoint(tmp_path / name, native_weights(CONFIG), config)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.equal
    assert f"other settings: {field} {getattr(CONFIG, field)} and {value}\n" in str(found)
    with pytest.raises(CheckpointError, match=f"same weights and compute different things with them: {field} "):
        verify(tmp_path / "b", tmp_path / "a")


def test_under_dynamic_scaling_the_trained_length_is_such_a_setting(tmp_path: Path) -> None:
    dynamic = replace(CONFIG, rope_scaling={"type": "dynamic", "factor": 2.0})
    for name, config in (("a", dynamic), ("b", replace(dynamic, max_position_embeddings=7))):
        write_checkpoint(tmp_path / name, native_weights(CONFIG), config)
    assert "other settings: max_position_embeddings" in str(diff(tmp_path / "a", tmp_path / "b"))


@pytest.mark.parametrize("fields", [
    {"hidden_act": "swish"},
    {"pad_token_id": -13},
    {"eos_token_id": [2]},
    {"max_position_embeddings": 7},
    {"shared_input_output_embedding": False, "tie_word_embeddings": True},
    {"use_cache": False, "hidden_dropout_prob": 0.0, "initializer_range": 1.0, "num_labels": 5},
    {"extra": {"transformers_version": "4.31.0"}},
])  # fmt: skip
def test_settings_that_compute_the_same_are_equal(tmp_path: Path, fields: dict[str, Any]) -> None:
    for name, config in (("a", CONFIG), ("b", replace(CONFIG, **fields))):
        write_checkpoint(tmp_path / name, native_weights(CONFIG), config)
    assert diff(tmp_path / "a", tmp_path / "b").equal
    verify(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize(("kind", "dtype"), [
    (OpenLlamaModel, None), (OpenLlamaForCausalLM, None), (OpenLlamaForSequenceClassification, "bfloat16"),
])  # fmt: skip
def test_a_plain_llama_is_compared_with_the_fold(tmp_path: Path, flags: Any, kind: Any, dtype: Any) -> None:
    tiny_model(kind, **flags).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "llama", to="llama", dtype=dtype, progress=False)
    found = verify(tmp_path / "llama", tmp_path / "native")
    assert found.folded == flags["use_stable_embedding"]
    assert ("as a plain LLaMA" in str(found)) == found.folded
    assert found.rounded_to == dtype


def test_a_table_that_was_folded_otherwise_is_found(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "llama", to="llama", progress=False)
    (tmp_path / "llama" / RECORD_FILE).unlink()
    weights = load_file(tmp_path / "llama" / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        changed = {**weights, name: torch.nextafter(weights[name], torch.tensor(0.0))}
        save_file(changed, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="which is computed" if "embed" in name else r"differ in lm_head"):
            verify(tmp_path / "llama", tmp_path / "native")


@pytest.mark.parametrize("replaced", ["a", "b"])
@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_what_is_replaced_while_it_is_verified_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str, name: str
) -> None:
    """The weights that were opened are no longer those of the folder."""
    for folder in ("a", "b"):
        write_checkpoint(tmp_path / folder, native_weights(CONFIG), CONFIG)

    def replacing(*configs: OpenLlamaConfig) -> list[str]:
        (tmp_path / "copy").write_bytes((tmp_path / replaced / name).read_bytes())
        (tmp_path / "copy").replace(tmp_path / replaced / name)
        return []

    monkeypatch.setattr(verification, "differing_settings", replacing)
    with pytest.raises(CorruptCheckpointError, match=f"{replaced} was changed while it was read"):
        verify(tmp_path / "a", tmp_path / "b")
