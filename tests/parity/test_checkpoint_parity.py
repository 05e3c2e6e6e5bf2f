"""Checkpoints that transformers 4.31.0 writes and reads, against ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.checkpoint import convert, native_to_hf, open_checkpoint, verify
from tests.checkpoints import assert_same_tensors, edit_json, shift_data
from tests.draw import examples
from tests.oracle import compared, transformers
from tests.parity.draws import configs, hf_model, randomise_norms, seeds
from tests.tiny import tiny_model

CLASSES = (OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification)
RENAMES = (  # written down again, so that the package's own table is not its only witness
    ("embed_tokens", "embedding.tokens"),
    ("embed_layer_norm", "embedding.norm"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("self_attn", "attention"),
)


def hidden_states(model: Any, ids: Tensor) -> list[Tensor]:
    """Of the decoder, whatever head is on it: HF's classifier refuses batches without a padding id."""
    with torch.no_grad():
        return list(model.base_model(ids, output_hidden_states=True).hidden_states)


def draw_hf(config: OpenLlamaConfig, cls: Any, seed: int) -> Any:
    """HF's model of the class of the same name as ``cls``."""
    causal = hf_model(config, seed)
    if cls is OpenLlamaForCausalLM:
        return causal
    return randomise_norms(getattr(transformers, cls.__name__)(causal.config), seed).eval()


def native_state(hf: Any) -> dict[str, Tensor]:
    """HF's weights by our names."""
    state = {}
    for name, tensor in hf.state_dict().items():
        for theirs, ours in RENAMES:
            name = name.replace(theirs, ours)
        state[name] = tensor
    return {name: tensor for name, tensor in state.items() if "inv_freq" not in name}


@examples(40)
@given(
    config=configs(),
    cls=st.sampled_from(CLASSES),
    safe=st.booleans(),
    shard=st.sampled_from(("10GB", "20KB", "5KB")),
    limit=st.sampled_from(("5GB", "10KB", 1)),
    seed=seeds,
)
def test_what_hf_saves_converts_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, config: Any, cls: Any, safe: bool, shard: str, limit: Any, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("hf")
    hf = draw_hf(config, cls, seed)
    hf.save_pretrained(folder / "hf", safe_serialization=safe, max_shard_size=shard)
    ids = torch.randint(config.vocab_size, (2, 5))
    expected, states = native_state(hf), hidden_states(hf, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".* has no tokenizer.model|a sequence of more than")
        convert(folder / "hf", folder / "native", max_shard_size=limit, progress=False)
        verify(folder / "native", folder / "hf")
        for source in ("hf", "native"):
            model = cls.from_pretrained(folder / source, attn_implementation="eager")
            assert_same_tensors(model.state_dict(), expected)
            assert all(map(torch.equal, hidden_states(model, ids), states))
            assert model.config.to_dict().items() >= config.to_dict().items()
    stored = open_checkpoint(folder / "native").tensors
    assert_same_tensors(stored, {name: expected[name] for name in stored})
    compared["conversion: HF's files, bit for bit"] += 1


@examples(40)
@given(config=configs(), offset=st.sampled_from((4, 8, 12, 20, 40)), rows=st.integers(1, 3), seed=seeds)
def test_every_file_gives_hf_s_bits_wherever_its_data_begins(
    tmp_path_factory: pytest.TempPathFactory, config: OpenLlamaConfig, offset: int, rows: int, seed: int
) -> None:
    """A prompt of one token makes products of a matrix and a vector, which depend on alignment most often."""
    folder = tmp_path_factory.mktemp("hf")
    hf = hf_model(config, seed)
    hf.save_pretrained(folder / "bin", safe_serialization=False)
    hf.save_pretrained(folder / "safetensors", safe_serialization=True)
    shift_data(folder / "safetensors" / "model.safetensors", offset)
    convert(folder / "safetensors", folder / "native", progress=False)
    prompts = [torch.randint(config.vocab_size, shape) for shape in ((rows, 5), (1, 1))]
    for source in ("bin", "safetensors", "native"):
        model = OpenLlamaForCausalLM.from_pretrained(folder / source, attn_implementation="eager")
        for ids in prompts:
            assert all(map(torch.equal, hidden_states(model, ids), hidden_states(hf, ids))), source
            if not config.shared_input_output_embedding:  # HF computes a shared head another way
                assert torch.equal(model(ids).logits, hf(ids).logits), source
    compared["conversion: files with misaligned data, bit for bit"] += 1


@examples(40)
@given(config=configs(), cls=st.sampled_from(CLASSES), seed=seeds)
def test_hf_loads_strictly_what_goes_back(config: OpenLlamaConfig, cls: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomise_norms(cls(config, attn_implementation="eager"), seed).eval()
    hf = draw_hf(config, cls, seed + 1)
    stored = {name: value.clone() for name, value in hf.state_dict().items() if "inv_freq" in name}
    back = native_to_hf(model.state_dict(), config)
    hf.load_state_dict(back, strict=True)
    assert back.keys() == hf.state_dict().keys()
    assert_same_tensors({name: back[name] for name in stored}, stored)
    ids = torch.randint(config.vocab_size, (2, 5))
    assert all(map(torch.equal, hidden_states(hf, ids), hidden_states(model, ids)))
    compared["conversion: back to HF, strictly"] += 1


def test_dynamic_ntk_leaves_another_table_in_hf(tmp_path: Path) -> None:
    config = OpenLlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 2.0},
    )  # fmt: skip
    hf = hf_model(config, 0)
    hidden_states(hf, torch.ones(1, 30, dtype=torch.long))
    hf.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="inv_freq is not what the configuration implies"):
        model = OpenLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.randint(20, (1, 5))
    assert all(map(torch.equal, hidden_states(model, ids), hidden_states(hf_model(config, 0), ids)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path: Path, dtype: torch.dtype) -> None:
    config = OpenLlamaConfig(
        vocab_size=20, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    hf = hf_model(config, 0).to(dtype)  # its inv_freq are rounded too
    hf.save_pretrained(tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".* has no tokenizer.model")
        convert(tmp_path / "hf", tmp_path / "native", progress=False)
        model = OpenLlamaForCausalLM.from_pretrained(tmp_path / "native")
    assert model.dtype == dtype
    assert_same_tensors(model.state_dict(), native_state(hf))


@pytest.mark.parametrize("limit", ["5GB", "10KB"])
@pytest.mark.parametrize("name", ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "OpenLlamaModel",
                                  "OpenLlamaForCausalLM", "LlamaForCausalLM"])  # fmt: skip
def test_transformers_refuses_a_native_folder(tmp_path: Path, name: str, limit: str) -> None:
    """It knows none of the layers' names: whatever it loaded would be random."""
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=limit)
    error, message = (KeyError, "openllama-native") if name.startswith("Auto") else (OSError, "valid metadata")
    for arguments in ({}, {"low_cpu_mem_usage": True}):
        with pytest.raises(error, match=message):
            getattr(transformers, name).from_pretrained(tmp_path, **arguments)
    assert_same_tensors(OpenLlamaForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_native_folders_of_before_are_read(tmp_path: Path) -> None:
    """They said they were transformers' own, which then loaded them with random weights."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "config.json", lambda values: values.update(model_type="open-llama"))
    again = OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("safe", [True, False])
def test_a_plain_llama_has_hf_s_logits(tmp_path: Path, safe: bool) -> None:
    """As LLaMA, LLaMA 2 and openlm-research/open_llama are published for transformers."""
    config = transformers.LlamaConfig(vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                      num_attention_heads=4, rms_norm_eps=1e-5)  # fmt: skip
    hf = randomise_norms(transformers.LlamaForCausalLM(config), 0).eval()
    hf.save_pretrained(tmp_path / "hf", safe_serialization=safe)
    convert(tmp_path / "hf", tmp_path / "native", progress=False)
    ids = torch.randint(29, (2, 9))
    for folder in ("hf", "native"):
        model = OpenLlamaForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager")
        with torch.no_grad():
            assert torch.equal(model(ids).logits, hf(ids).logits)
    compared["conversion: a plain LLaMA's logits, bit for bit"] += 1
