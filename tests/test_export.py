"""Folders for other programs, read again by ours: the folded LLaMA computes the same; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel, OpenLlamaTokenizer
from openllama.checkpoint import convert, pieces
from openllama.errors import ConfigError, InputError, TokenizerError
from openllama.tokenizer.export import tokenizer_files
from tests.sentencepieces import TINY_CHECKPOINT, trained, write_folder
from tests.tiny import tiny_ids, tiny_model

FLAGS = [
    {"use_stable_embedding": stable, "shared_input_output_embedding": shared, "tie_word_embeddings": tied}
    for stable in (True, False)
    for shared in (True, False)
    for tied in (True, False)
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("piece", [2**23, 48])  # numbers; rows of the table have 24
def test_a_plain_llama_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], piece: int
) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    model = tiny_model(**flags)
    model.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "llama", to="llama", progress=False)
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("llama", ["LlamaForCausalLM"])
    plain = OpenLlamaForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    assert not plain.config.use_stable_embedding
    assert torch.equal(plain(tiny_ids()).logits, model(tiny_ids()).logits)


@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
@pytest.mark.parametrize("layout", ["native", "hf", "llama"])
def test_a_model_is_saved_as_it_is_converted(tmp_path: Path, kind: Any, layout: str) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "native")
    model.save_pretrained(tmp_path / "saved", layout=layout)
    convert(tmp_path / "native", tmp_path / "converted", to=layout, progress=False)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "converted" / file).read_bytes()


def test_the_fold_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "llama", to="llama", dtype="bfloat16", progress=False)
    table = load_file(tmp_path / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table, model.model.embedding(torch.arange(23)).bfloat16())


def test_an_older_tokenizer_json_does_not_stay(tmp_path: Path) -> None:
    convert(TINY_CHECKPOINT, tmp_path / "model", to="llama", progress=False)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    convert(TINY_CHECKPOINT, tmp_path / "model", to="hf", overwrite=True, progress=False)
    assert not (tmp_path / "model" / "tokenizer.json").exists()


# ---- refusals


def test_dynamic_scaling_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny_model(rope_scaling={"type": "dynamic", "factor": 2.0}).save_pretrained(tmp_path / "native")
    with pytest.raises(ConfigError, match='"dynamic" cannot be converted to llama'):
        convert(tmp_path / "native", tmp_path / "llama", to="llama", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    convert(tmp_path / "native", tmp_path / "hf", to="hf", progress=False)


def test_an_unknown_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'onnx' is not one of native, hf, llama"):
        convert(TINY_CHECKPOINT, tmp_path / "x", to="onnx", progress=False)
    with pytest.raises(InputError, match="'gguf' is not one of"):
        tiny_model().save_pretrained(tmp_path / "x", layout="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 340}, {}, "only BPE"),
        ({"user_defined_symbols": "<e>"}, {}, "user-defined piece '<e>'"),
        ({}, {"legacy": False}, "legacy must be true"),
    ],
)
def test_tokenizers_that_others_do_not_have_are_refused(
    tmp_path: Path, options: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path, trained("v1-like", **options), tokenizer_config=settings)
    with pytest.raises(TokenizerError, match=message):
        tokenizer_files(OpenLlamaTokenizer.from_pretrained(folder))
