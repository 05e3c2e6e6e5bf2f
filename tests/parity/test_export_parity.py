"""Folders for other programs, read by transformers 4.31.0: Open-Llama's own layout, and a plain LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from openllama import (
    OpenLlamaConfig,
    OpenLlamaForCausalLM,
    OpenLlamaForSequenceClassification,
    OpenLlamaModel,
    OpenLlamaTokenizer,
)
from openllama.checkpoint import convert, native_to_hf
from openllama.tokenizer.export import tokenizer_files
from tests.checkpoints import assert_same_tensors
from tests.draw import examples
from tests.oracle import compared, transformers
from tests.parity.draws import configs, hf_model, randomise_norms, seeds
from tests.parity.test_checkpoint_parity import CLASSES, draw_hf, hidden_states
from tests.sentencepieces import CORPORA, TINY_CHECKPOINT, corpus, texts, trained, write_folder

LLAMAS: dict[Any, str] = {
    OpenLlamaModel: "LlamaModel",
    OpenLlamaForCausalLM: "LlamaForCausalLM",
    OpenLlamaForSequenceClassification: "LlamaForSequenceClassification",
}


def loaded(name: str, folder: Path, **options: Any) -> Any:
    """HF's model of that class, read from ``folder``: every tensor of the file is used, and nothing is missing."""
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    missing = [key for key in found.pop("missing_keys") if not key.endswith("inv_freq")]
    assert (missing, found) == ([], {"unexpected_keys": [], "mismatched_keys": [], "error_msgs": []})
    return model.eval()


def draw_model(config: OpenLlamaConfig, cls: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return randomise_norms(cls(config, attn_implementation="eager"), seed).eval()


# ---- hf


@examples(25)
@given(config=configs(), cls=st.sampled_from(CLASSES), seed=seeds)
def test_hf_reads_its_own_layout(
    tmp_path_factory: pytest.TempPathFactory, config: OpenLlamaConfig, cls: Any, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("hf")
    model = draw_model(config, cls, seed)
    model.save_pretrained(folder / "native")
    model.save_pretrained(folder / "saved", layout="hf")
    convert(folder / "native", folder / "converted", to="hf", progress=False)
    ids = torch.randint(config.vocab_size, (2, 5))
    for place in ("saved", "converted"):
        hf, found = getattr(transformers, cls.__name__).from_pretrained(folder / place, output_loading_info=True)
        assert not any(found.values()), found
        assert_same_tensors(hf.state_dict(), native_to_hf(model.state_dict(), config))
        assert all(map(torch.equal, hidden_states(hf.eval(), ids), hidden_states(model, ids)))
        assert {name: getattr(hf.config, name) for name in config.to_dict()} == config.to_dict()
    compared["export: hf's layout, read strictly"] += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_tensors_are_those_that_hf_writes(tmp_path: Path, cls: Any, dtype: torch.dtype) -> None:
    config = OpenLlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
                             num_attention_heads=2)  # fmt: skip
    draw_hf(config, cls, 0).save_pretrained(tmp_path / "float32")
    hf = getattr(transformers, cls.__name__).from_pretrained(tmp_path / "float32", torch_dtype=dtype)
    hf.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    convert(tmp_path / "float32", tmp_path / "ours", to="hf", dtype=dtype, progress=False)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert_same_tensors(ours, theirs)
    written = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")}
    expected = {key: value for key, value in written["theirs"].items() if key != "_name_or_path"}
    assert {key: written["ours"].get(key) for key in expected} == expected


# ---- llama


def plain(config: OpenLlamaConfig) -> bool:
    return config.rope_scaling is None or config.rope_scaling["type"] == "linear"


@examples(40)
@given(config=configs().filter(plain), cls=st.sampled_from(CLASSES), seed=seeds)
def test_a_plain_llama_has_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, config: OpenLlamaConfig, cls: Any, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("llama")
    model = draw_model(config, cls, seed)
    model.save_pretrained(folder / "native")
    convert(folder / "native", folder / "llama", to="llama", progress=False)
    hf = loaded(LLAMAS[cls], folder / "llama")
    ids = torch.randint(config.vocab_size, (3, 6))
    assert all(map(torch.equal, hidden_states(hf, ids), hidden_states(model, ids)))
    if cls is OpenLlamaForCausalLM:
        assert torch.equal(hf(ids).logits, model(ids).logits)
    if cls is OpenLlamaForSequenceClassification:
        ids = ids[:1]  # without padding ids it refuses more
        hf.config.pad_token_id = None  # 4.31.0 looks for the first one, current versions and ours for the last
        model.config = OpenLlamaConfig.from_dict(model.config.to_dict(), pad_token_id=None)
        assert torch.equal(hf(ids).logits, model(ids).logits)
    compared["export: a plain LLaMA, bit for bit"] += 1


def test_the_fold_of_halves_is_what_the_model_computes_in_them(tmp_path: Path) -> None:
    """In bfloat16 the LayerNorm's result is rounded anyway: folding costs nothing to a model that runs in bfloat16."""
    hf = hf_model(OpenLlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=2), 0)  # fmt: skip
    hf.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "llama", to="llama", progress=False)
    table = load_file(tmp_path / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    with torch.no_grad():
        assert torch.equal(table, hf.model.embed_layer_norm(hf.model.embed_tokens.weight))


# ---- tokenizer.json


def fast_tokenizer(folder: Path, tokenizer: OpenLlamaTokenizer) -> Any:
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama-like", "squeezing", "no bytes", "v1-like"])
@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_json_gives_the_same_ids(tmp_path: Path, name: str, bos: bool) -> None:
    settings = {"add_bos_token": bos, "add_eos_token": not bos}
    folder = write_folder(tmp_path / "any", trained(name), tokenizer_config=settings)
    tokenizer = OpenLlamaTokenizer.from_pretrained(folder)
    fast = fast_tokenizer(folder, tokenizer)

    @examples(150)
    @given(text=texts)
    def same(text: str) -> None:
        # Marks that stand on one another in no canonical order are outside what normalisers agree on.
        if name == "llama-like" or text.isascii():
            assert fast.encode(text) == tokenizer.encode(text)
            compared["export: texts by tokenizer.json"] += 1

    same()


def test_tokenizer_json_of_the_shipped_model_on_the_corpora(tmp_path: Path) -> None:
    tokenizer = OpenLlamaTokenizer.from_pretrained(TINY_CHECKPOINT)
    fast = fast_tokenizer(tmp_path, tokenizer)
    lines = [*(line for name in CORPORA for line in corpus(name)[::5]), "Ａ①，。ｶﾞ", "a</s>b <s>"]
    assert [line for line in lines if fast.encode(line) != tokenizer.encode(line)] == []
