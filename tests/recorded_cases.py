"""Models whose HF outputs are recorded, for Pythons where transformers 4.31.0 cannot be installed.

Each case is one small file: configuration and versions in its header, weights (HF's names), inputs and
outputs as tensors. ``make record`` writes them, from a process that has just run the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification
from openllama.checkpoint import hf_to_native

FOLDER = Path(__file__).parent / "recorded"

BASE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "initializer_range": 0.2,  # with larger weights, processors differ by more than assert_close allows
    "eos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"use_stable_embedding": False, "shared_input_output_embedding": False, "hidden_act": "swish"},
    "tied": {"shared_input_output_embedding": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 2.5}, "hidden_act": "relu"},
    "dynamic_rope": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "hidden_act": "tanh"},
    "no_pad": {"pad_token_id": None, "use_stable_embedding": False, "hidden_act": "gelu"},
    "last_pad": {"pad_token_id": -1, "shared_input_output_embedding": False, "hidden_act": "sigmoid"},
    "classifier": {"num_labels": 3, "hidden_act": "gelu_pytorch_tanh"},
}


def config_of(name: str) -> OpenLlamaConfig:
    return OpenLlamaConfig(**{**BASE, **CASES[name]})


def inputs_of(name: str) -> dict[str, Tensor]:
    """Two texts longer than the trained context, one of them padded: left, or right for the classifier."""
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(3, 30, (2, 16), generator=generator)
    mask = torch.ones(2, 16, dtype=torch.long)
    padding = slice(11, None) if name == "classifier" else slice(5)
    mask[1, padding] = 0
    ids[1, padding] = config_of(name).padding_idx or 0
    labels = torch.tensor([0, 2]) if name == "classifier" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outputs_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything a forward pass returns, gradients apart, by name."""
    values: dict[str, Tensor] = {}
    if hasattr(model, "lm_head"):  # first, and short: HF's dynamic RoPE remembers longer calls
        ids = inputs["input_ids"][:1, :6]
        torch.manual_seed(0)
        values["sampled"] = model.generate(ids, do_sample=True, top_p=0.9, max_new_tokens=5)
        # without a repetition: such small weights would only repeat the last token
        values["greedy"] = model.generate(ids, max_new_tokens=5, no_repeat_ngram_size=1)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    out.loss.backward()
    values |= {"loss": out.loss, "logits": out.logits}
    for i, state in enumerate(out.hidden_states):
        values[f"hidden_states.{i}"] = state
    for i, (weights, (key, value)) in enumerate(zip(out.attentions, out.past_key_values, strict=True)):
        values |= {f"attentions.{i}": weights, f"keys.{i}": key, f"values.{i}": value}
    return {name: value.detach().clone() for name, value in values.items()}


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def our_model(name: str, weights: dict[str, Tensor]) -> Any:
    config = config_of(name)
    head = OpenLlamaForSequenceClassification if name == "classifier" else OpenLlamaForCausalLM
    model = head(config, attn_implementation="eager").eval()
    model.load_state_dict(hf_to_native(weights), strict=True)
    return model


def read(name: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors of a recording by kind (weights, inputs, outputs, gradients), and its header."""
    kinds: dict[str, dict[str, Tensor]] = {}
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, rest = key.split("/", 1)
            kinds.setdefault(kind, {})[rest] = file.get_tensor(key)
        header = {key: json.loads(value) for key, value in file.metadata().items()}
    return kinds, header
