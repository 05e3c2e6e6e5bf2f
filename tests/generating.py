"""A small model whose greedy continuation does not repeat one token, and a way to count its forward passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM

CONFIG = OpenLlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.4,
    eos_token_id=None,
    pad_token_id=0,
)


def make_model(seed: int = 1, **fields: Any) -> OpenLlamaForCausalLM:
    torch.manual_seed(seed)
    return OpenLlamaForCausalLM(dataclasses.replace(CONFIG, **fields), attn_implementation="eager").eval()


def count_forwards(model: OpenLlamaForCausalLM, calls: list[int]) -> torch.utils.hooks.RemovableHandle:
    """Append the number of tokens of each forward pass to ``calls``."""
    return model.model.register_forward_pre_hook(lambda module, args: calls.append(args[0].tokens.shape[1]))
