"""The models of tests/golden.safetensors, and the numbers in it: see docs/porting.md for what each key holds.

Small models of every kind with all their weights, and the shipped one. Their numbers are those of our model in
float64, rounded to float32: the same on every processor, and nearer to the formulas than any float32 run.
``make record`` writes the file, from a process in which transformers 4.31.0 has just confirmed them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from openllama import (
    OpenLlamaConfig,
    OpenLlamaForCausalLM,
    OpenLlamaForSequenceClassification,
    OpenLlamaTokenizer,
)
from openllama.checkpoint import hf_to_native, native_to_hf
from openllama.masks import positions_from_mask

FILE = Path(__file__).parent / "golden.safetensors"
SHIPPED = "open-llama-tiny"
FOLDER = Path(__file__).parents[1] / "checkpoints" / SHIPPED
TEXTS = ["ROMEO:\nI will go", "春江花月"]

# All sizes differ, so that no transposed tensor has the right shape; the context is shorter than the texts.
BASE = {
    "vocab_size": 31,
    "hidden_size": 18,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 8,
    "initializer_range": 0.4,
    "eos_token_id": None,
}
DRAWN: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"use_stable_embedding": False, "shared_input_output_embedding": False, "hidden_act": "swish"},
    "tied": {"shared_input_output_embedding": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 2.5}, "hidden_act": "relu"},
    "dynamic_rope": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "hidden_act": "tanh"},
    "no_pad": {"pad_token_id": None, "use_stable_embedding": False, "hidden_act": "gelu"},
    "last_pad": {"pad_token_id": -1, "shared_input_output_embedding": False, "hidden_act": "sigmoid"},
    "classifier": {"num_labels": 3, "hidden_act": "gelu_pytorch_tanh"},
}
CASES = (*DRAWN, SHIPPED)
BATCH, LENGTH, NEW = 2, 12, 5  # texts, tokens of each, tokens that generate adds


def config_of(name: str) -> OpenLlamaConfig:
    if name == SHIPPED:
        return OpenLlamaConfig.from_pretrained(FOLDER)
    return OpenLlamaConfig(**{**BASE, **DRAWN[name]})


def inputs_of(name: str) -> dict[str, Tensor]:
    """Two texts, one of them padded: left, or right for the classifier. Positions count as ``generate`` counts.

    No label is predicted from padding, whose numbers depend on how attention is computed: not even the first token.
    """
    if name == SHIPPED:
        encoded = OpenLlamaTokenizer.from_pretrained(FOLDER, padding_side="left")(TEXTS, padding=True)
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    else:
        generator = torch.Generator().manual_seed(len(name))
        ids = torch.randint(3, 30, (BATCH, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        padding = slice(8, None) if name == "classifier" else slice(4)
        mask[1, padding] = 0
        ids[1, padding] = config_of(name).padding_idx or 0
    before = torch.nn.functional.pad(mask, (1, -1))  # whether the token before is real
    labels = torch.tensor([0, 2]) if name == "classifier" else ids.masked_fill(before == 0, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions_from_mask(mask),
        "labels": labels,
    }


def our_model(name: str, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """Our model of a case in eval mode; ``weights``: HF's names, empty for the shipped one."""
    if name == SHIPPED:
        return OpenLlamaForCausalLM.from_pretrained(FOLDER, dtype=dtype, attn_implementation="eager")
    head = OpenLlamaForSequenceClassification if name == "classifier" else OpenLlamaForCausalLM
    model = head(config_of(name), attn_implementation="eager").eval()
    model.load_state_dict(hf_to_native(weights), strict=True)
    return model.to(dtype)


def texts_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ids that ``generate`` makes; a classifier makes none."""
    if not hasattr(model, "lm_head"):
        return {}
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    greedy = model.generate(**prompt, max_new_tokens=NEW)
    torch.manual_seed(0)
    return {"greedy": greedy, "sampled": model.generate(**prompt, do_sample=True, top_p=0.9, max_new_tokens=NEW)}


def numbers_of(model: Any, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a forward and a backward pass compute, by the keys of the file; ``model`` is ours or HF's."""
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    for state in out.hidden_states:
        state.retain_grad()
    out.loss.backward()
    values = {"outputs/loss": out.loss, "outputs/logits": out.logits}
    for i, state in enumerate(out.hidden_states):
        values |= {f"outputs/hidden_states.{i}": state, f"gradients/hidden_states.{i}": state.grad}
    if name != SHIPPED:
        for i, (weights, (key, value)) in enumerate(zip(out.attentions, out.past_key_values, strict=True)):
            values |= {f"outputs/attentions.{i}": weights, f"outputs/keys.{i}": key, f"outputs/values.{i}": value}
    for key, gradient in gradients_of(model, config_of(name)).items():
        values[f"gradients/{key}"] = gradient if name != SHIPPED else shown(key, gradient, inputs["input_ids"])
    return {key: value.detach().clone() for key, value in values.items()}


def gradients_of(model: Any, config: OpenLlamaConfig) -> dict[str, Tensor]:
    """The gradient of each parameter by its name in HF's checkpoints; a tied head has none of its own."""
    gradients = native_to_hf({key: weight.grad for key, weight in model.named_parameters()}, config)
    if config.tie_word_embeddings:
        gradients.pop("lm_head.weight", None)
    return {key: value for key, value in gradients.items() if not key.endswith("inv_freq")}


def shown(key: str, gradient: Tensor, input_ids: Tensor) -> Tensor:
    """The part of a gradient of the shipped model that is in the file: vectors, and rows of matrices.

    Of the embedding table the rows of the first text's tokens, in its order; of other matrices the first and the last.
    """
    if gradient.ndim == 1:
        return gradient
    return gradient[input_ids[0] if key == "model.embed_tokens.weight" else [0, -1]]


def golden_numbers(name: str, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The numbers of the file: float64, rounded to float32."""
    numbers = numbers_of(our_model(name, weights, torch.float64), name, inputs)
    return {key: value.to(torch.float32) for key, value in numbers.items()}


def read(name: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a case by kind (weights, inputs, outputs, gradients)."""
    kinds: dict[str, dict[str, Tensor]] = {"weights": {}}
    with safe_open(FILE, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            case, kind, rest = key.split("/", 2)
            if case == name:
                kinds.setdefault(kind, {})[rest] = file.get_tensor(key)
    return kinds


def read_header() -> dict[str, Any]:
    """The versions that made the file, and the configuration of each case."""
    with safe_open(FILE, "pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["about"])
        return header
