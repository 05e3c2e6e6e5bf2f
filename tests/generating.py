"""A small model whose greedy continuation does not repeat one token, and a way to count its forward passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.generation.state import Sequences

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


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on generation reads values as if it had to wait for each, as it has to for those of a GPU."""
    begin = Sequences.__init__

    def on_a_device(self: Sequences, *arguments: Any) -> None:
        begin(self, *arguments)
        self._reads_at_once = False

    monkeypatch.setattr(Sequences, "__init__", on_a_device)
