"""A model of a few thousand numbers for tests of single behaviours: random, but far from zeros and ones."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.pretrained import PretrainedModel
from tests.parity.draws import randomise_norms

Model = TypeVar("Model", bound=PretrainedModel)

CONFIG = OpenLlamaConfig(
    vocab_size=23,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    initializer_range=0.3,
)


def tiny_config(**fields: Any) -> OpenLlamaConfig:
    return dataclasses.replace(CONFIG, **fields)


def tiny_model(
    kind: type[Model] = OpenLlamaForCausalLM, attn_implementation: str = "eager", seed: int = 0, **fields: Any
) -> Model:
    """In eval mode."""
    torch.manual_seed(seed)
    return randomise_norms(kind(tiny_config(**fields), attn_implementation=attn_implementation), seed).eval()


def tiny_ids(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length) without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, CONFIG.vocab_size, (batch, length), generator=generator)
