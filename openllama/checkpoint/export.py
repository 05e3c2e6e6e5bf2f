"""Checkpoints for other programs: the tensors, names and config.json that each of them reads.

``hf`` is what transformers 4.31.0 reads as an Open-Llama. ``llama`` is what everything else reads: a plain LLaMA. The
stable embedding normalises each row of the table by itself, so its result is a table again:

    LayerNorm(E[ids]) = LayerNorm(E)[ids]

An Open-Llama is a LLaMA with the input table ``LayerNorm(E)`` and, where the head is shared, ``E`` itself as
``lm_head``. That holds for token ids, not for ``inputs_embeds``, and without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openllama.checkpoint.names import (
    EMBEDDING,
    HF_TO_NATIVE,
    LM_HEAD,
    PREFIX,
    Head,
    Weights,
    native_to_hf,
    translate,
    without_numbers,
)
from openllama.checkpoint.pieces import Computed, Source, as_dtype, cast
from openllama.config import CONFIG_FILE, MODEL_TYPE, NATIVE_TYPE, OpenLlamaConfig, write_json
from openllama.errors import ConfigError, InputError
from openllama.model import StableEmbedding
from openllama.rope import BASE
from openllama.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.export import tokenizer_files
from openllama.tokenizer.files import MODEL_FILE

LLAMA_ARCHITECTURES: dict[Head, str] = {
    "body": "LlamaModel",
    "causal-lm": "LlamaForCausalLM",
    "classifier": "LlamaForSequenceClassification",
}
#: what LLaMA's config.json has under the same name
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "bos_token_id", "eos_token_id",
        "rope_scaling", "num_labels", "problem_type", "id2label", "label2id")  # fmt: skip


@dataclass(frozen=True)
class Export:
    """What is written for one program: weights by its names, and JSON files by their names."""

    tensors: dict[str, Source]
    files: dict[str, dict[str, Any]]
    file_format: str = "pt"  # in the header of safetensors files; others take "pt" for names that they know

    def write_files(self, folder: Path) -> None:
        """Write the JSON files."""
        for name, values in self.files.items():
            write_json(folder / name, values)


def to_native(weights: Weights, config: OpenLlamaConfig, dtype: torch.dtype | None, folder: Path | None) -> Export:
    """The layout of this package."""
    tensors = cast(weights.named_as_found(), dtype)
    return Export(tensors, {CONFIG_FILE: weights.described_by(config, dtype).to_dict()}, NATIVE_TYPE)


def to_hf(weights: Weights, config: OpenLlamaConfig, dtype: torch.dtype | None, folder: Path | None) -> Export:
    """What transformers 4.31.0 writes and reads: its names, and the ``inv_freq`` of each layer, in float32."""
    named = native_to_hf(weights.named_as_found(), config)
    tables = {name: tensor for name, tensor in named.items() if name.endswith(".inv_freq")}
    values = {**weights.described_by(config, dtype).to_dict(), "model_type": MODEL_TYPE}
    return Export({**cast(named, dtype), **tables}, {CONFIG_FILE: values})


def to_llama(weights: Weights, config: OpenLlamaConfig, dtype: torch.dtype | None, folder: Path | None) -> Export:
    """A plain LLaMA, with the tokenizer of ``folder`` as tokenizer.json.

    Raises ``ConfigError`` for dynamic RoPE scaling.
    """
    check_llama(config, "llama")
    files = {CONFIG_FILE: _llama_config(weights, config, dtype)}
    if folder is not None and (folder / MODEL_FILE).is_file():
        files |= tokenizer_files(OpenLlamaTokenizer.from_pretrained(folder))
    return Export(llama_tensors(weights, config, dtype), files)


def check_stored(config: OpenLlamaConfig, to: str, dtype: object = None) -> None:
    """Raise ``InputError`` for quantised weights that are to be written in another form or type."""
    if config.quantization is not None and (to != "native" or dtype is not None):
        raise InputError(
            f"the weights are quantised to {config.quantization}, not {to if dtype is None else dtype}; "
            "convert the checkpoint that they were made from"
        )


def check_llama(config: OpenLlamaConfig, to: str) -> None:
    """Raise ``ConfigError`` if no plain LLaMA computes the same."""
    if config.rope_scaling is not None and config.rope_scaling["type"] == "dynamic":
        raise ConfigError(
            f'rope_scaling "dynamic" cannot be converted to {to}: its frequencies follow the length of each call, and '
            "other programs keep those of the longest call, or do not support it; use native or hf"
        )


def llama_tensors(weights: Weights, config: OpenLlamaConfig, dtype: torch.dtype | None) -> dict[str, Source]:
    """The weights by LLaMA's names, the stable embedding folded into the input table.

    The fold is computed in at least float32 when it is read, then rounded to ``dtype`` (None: the table's own).
    """
    named = native_to_hf(weights.named_as_found(), config)
    named = {name: tensor for name, tensor in named.items() if not name.endswith(".inv_freq")}
    prefix = "" if weights.bare else PREFIX
    place = f"{prefix}embed_tokens.weight"
    table = named[place]
    if weights.head == "causal-lm" and not _is_tied(config):
        named.setdefault(LM_HEAD, table)
    elif _is_tied(config):
        named.pop(LM_HEAD, None)
    with without_numbers():
        norm = StableEmbedding(config).norm
    if norm is None:
        return cast(named, dtype)
    weight, bias = (named.pop(f"{prefix}embed_layer_norm.{part}") for part in ("weight", "bias"))
    folding = Computed(table, dtype or table.dtype, _layer_norm(weight, bias, norm.eps, table.dtype))
    return {**cast(named, dtype), place: folding}


def _layer_norm(weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The LayerNorm of the stable embedding, of rows in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = weight.to("cpu", wide), bias.to("cpu", wide)  # as the rows are
    return lambda rows: F.layer_norm(rows.to(wide), weight.shape, weight, bias, eps)


def folded(weights: Weights, config: OpenLlamaConfig) -> tuple[dict[str, Source], OpenLlamaConfig]:
    """The plain LLaMA that ``to_llama`` writes as this package reads it: by full native names, and its configuration.

    The folded table is not rounded.
    """
    named = {translate(name, HF_TO_NATIVE) or name: of for name, of in llama_tensors(weights, config, None).items()}
    table = named[EMBEDDING]
    named[EMBEDDING] = as_dtype(table, torch.promote_types(table.dtype, torch.float32))
    return named, OpenLlamaConfig.from_dict(_llama_config(weights, config, None))


def _is_tied(config: OpenLlamaConfig) -> bool:
    """Whether the head is the input table itself, which a stable embedding rules out."""
    return not config.use_stable_embedding and (config.shared_input_output_embedding or config.tie_word_embeddings)


def _llama_config(weights: Weights, config: OpenLlamaConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    values = weights.described_by(config, dtype).to_dict()
    return {
        **{name: values[name] for name in SAME if name in values},
        "model_type": "llama",
        "architectures": [LLAMA_ARCHITECTURES[weights.head]],
        "torch_dtype": values["torch_dtype"],
        "hidden_act": "silu" if config.hidden_act == "swish" else config.hidden_act,  # some know it by one name only
        "num_key_value_heads": config.num_attention_heads,
        "pad_token_id": config.padding_idx,
        "tie_word_embeddings": _is_tied(config),
        "attention_dropout": config.attention_dropout_prob,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": BASE,
    }


FORMS = {"native": to_native, "hf": to_hf, "llama": to_llama}


def export(
    to: str,
    weights: Weights,
    config: OpenLlamaConfig,
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
) -> Export:
    """``weights`` as ``to`` (a key of ``FORMS``) reads them, cast to ``dtype``; ``folder`` holds the tokenizer, if any.

    Nothing is computed before it is read. Raises ``InputError``, and ``ConfigError`` or ``TokenizerError`` for what
    the other program does not have.
    """
    if to not in FORMS:
        raise InputError(f"{to!r} is not one of {', '.join(FORMS)}")
    check_stored(config, to, dtype)
    return FORMS[to](weights, config, dtype, folder)
