"""Adapters that peft trained on transformers' model, on ours, and the other way round."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification
from openllama.checkpoint import convert, convert_adapter
from openllama.checkpoint.files import open_file
from tests.checkpoints import assert_same_tensors
from tests.oracle import compared, transformers
from tests.parity.draws import hf_model, our_twin
from tests.tiny import tiny_config, tiny_ids

peft = pytest.importorskip("peft", reason="peft is not installed; it is part of the test extra where it can be")

CONFIG = tiny_config(hidden_dropout_prob=0.0, attention_dropout_prob=0.0, use_memory_efficient_attention=False)
TARGETS = [
    ["q_proj", "v_proj"],
    ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"],
    r".*layers\.1\.(self_attn|mlp)\.[a-z]+_proj",
]


def trained(model: Any, seed: int = 0, **settings: Any) -> Any:
    """``model`` with an adapter after two steps of training."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=64, **settings)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(input_ids=tiny_ids()).logits.square().mean().backward()
        optimizer.step()
    return adapted.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_an_adapter_gives_hf_s_numbers_on_our_model_and_returns_unchanged(tmp_path: Path, targets: Any) -> None:
    hf = hf_model(CONFIG, seed=1)
    ours = our_twin(hf, CONFIG)
    plain = logits(ours)
    adapted = trained(copy.deepcopy(hf), target_modules=targets, task_type="CAUSAL_LM", modules_to_save=["norm"])
    adapted.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached = peft.PeftModel.from_pretrained(copy.deepcopy(ours), tmp_path / "native").eval()
    assert torch.equal(logits(attached), logits(adapted))
    assert not torch.allclose(plain, logits(attached))
    compared["adapters: HF's logits, bit for bit"] += 1

    convert_adapter(tmp_path / "native", tmp_path / "back", to="hf")
    assert_same_tensors(*(open_file(tmp_path / name / "adapter_model.safetensors") for name in ("back", "hf")))
    back, before = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("back", "hf"))
    matched = "target_modules"
    if isinstance(targets, list):
        assert sorted(back.pop(matched)) == sorted(before.pop(matched))
    assert back == before


def test_an_adapter_of_the_shared_table_gives_the_numbers_that_hf_s_gives_once_it_is_merged(tmp_path: Path) -> None:
    """Unmerged, transformers applies it to the input alone."""
    hf = hf_model(CONFIG, seed=1)
    ours = our_twin(hf, CONFIG)
    adapted = trained(hf, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    adapted.save_pretrained(tmp_path / "hf")
    with pytest.warns(UserWarning, match="adapter of the embedding table .* the logits"):
        convert_adapter(tmp_path / "hf", tmp_path / "native")
    attached = peft.PeftModel.from_pretrained(ours, tmp_path / "native").eval()
    unmerged, merged = logits(adapted), logits(adapted.merge_and_unload())
    torch.testing.assert_close(logits(attached), merged)
    assert not torch.allclose(merged, unmerged, atol=1e-2)
    torch.testing.assert_close(logits(attached.merge_and_unload()), merged)


def test_an_adapter_of_ours_gives_our_numbers_on_hf_s_classifier(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_labels=3)
    hf = hf_model(config, seed=1, kind="OpenLlamaForSequenceClassification")
    ours = our_twin(hf, config)
    assert isinstance(ours, OpenLlamaForSequenceClassification)
    adapted = trained(copy.deepcopy(ours), target_modules=["attention.q_proj"], task_type="SEQ_CLS")
    adapted.save_pretrained(tmp_path / "native")
    convert_adapter(tmp_path / "native", tmp_path / "hf", to="hf")
    attached = peft.PeftModel.from_pretrained(hf, tmp_path / "hf").eval()
    assert torch.equal(logits(attached), logits(adapted))
    compared["adapters: HF's logits, bit for bit"] += 1


def test_a_classifier_with_an_adapter_trains_its_score_and_is_saved_and_loaded(tmp_path: Path) -> None:
    """LoRA for classification, as in peft's own examples: the new head is trained and stored beside the adapter."""
    config = dataclasses.replace(CONFIG, num_labels=3)
    hf = hf_model(config, seed=1, kind="OpenLlamaForSequenceClassification")
    ours = our_twin(hf, config)
    before = ours.score.weight.clone()
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
    adapted = trained(copy.deepcopy(ours), **settings)
    assert torch.equal(logits(adapted), logits(trained(hf, **settings)))
    adapted.save_pretrained(tmp_path)
    stored = open_file(tmp_path / "adapter_model.safetensors")
    assert not torch.equal(stored["base_model.model.score.weight"], before)
    attached = peft.PeftModel.from_pretrained(ours, tmp_path).eval()
    assert torch.equal(logits(attached), logits(adapted))
    compared["adapters: HF's logits, bit for bit"] += 1


PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning through an MLP": peft.PrefixTuningConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_learned_prompts_train_and_generate_as_on_hf_s_model(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # peft 0.13.2 asks for this class when it generates; transformers has it since 4.36
    monkeypatch.setattr(transformers, "Cache", type("Cache", (), {}), raising=False)
    hf = hf_model(dataclasses.replace(CONFIG, shared_input_output_embedding=False), seed=1)
    ours = our_twin(hf, dataclasses.replace(CONFIG, shared_input_output_embedding=False))
    base, found = copy.deepcopy(ours), []
    for model in (hf, ours):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, copy.deepcopy(PROMPTS[name])).train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        ids, mask = tiny_ids(), torch.ones_like(tiny_ids())
        for _ in range(2):
            adapted(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            optimizer.step()
        made = adapted.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=8)
        found.append((logits(adapted), made))
    assert torch.equal(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])
    assert not torch.equal(found[1][1], base.generate(ids, max_new_tokens=8))
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()  # of the MLP it has the result, in another layout
    torch.testing.assert_close(logits(loaded), found[1][0])
    compared["learned prompts: HF's logits and ids, bit for bit"] += 1


def test_an_adapter_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    hf = hf_model(CONFIG, seed=1)
    trained(copy.deepcopy(hf), target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"4 weights of an adapter match no module .*openllama convert") as caught:
        peft.PeftModel.from_pretrained(our_twin(hf, CONFIG), tmp_path)
    assert len(caught) == 1


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    trained(our_twin(hf_model(CONFIG, seed=1), CONFIG), target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is an adapter, not a model.*PeftModel\.from_pretrained"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
