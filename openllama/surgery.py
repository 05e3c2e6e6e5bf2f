"""Changes the size of a vocabulary: the rows of the embedding table and of ``lm_head``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from openllama.config import OpenLlamaConfig
from openllama.errors import InputError
from openllama.model import init_weights


def check_resizable(table: nn.Module, head: nn.Module | None, size: object) -> None:
    """Raise ``InputError`` for an invalid size, and for modules that cannot be resized."""
    if not isinstance(size, int) or size < 1:
        raise InputError(f"the size of a vocabulary must be a positive integer, got {size!r}")
    if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear | None):
        raise InputError(
            f"only an nn.Embedding and an nn.Linear can be resized, got {type(table).__name__} and "
            f"{type(head).__name__}; remove adapters first"
        )
    if head is not None and head.bias is not None:
        raise InputError(
            f"lm_head has a bias of {len(head.bias)} numbers and cannot be resized; the head of Open-Llama has no bias"
        )


def check_special_ids(size: int, *configs: Any) -> None:
    """Raise ``InputError`` if a special id of a configuration is outside a vocabulary of ``size``."""
    for config in configs:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and one >= size:
                    raise InputError(f"a vocabulary of {size} has no row for {name} {one}; change the config first")


def resize_vocabulary(
    table: nn.Embedding, head: nn.Linear | None, config: OpenLlamaConfig, size: int
) -> OpenLlamaConfig:
    """Resize table and head to ``size`` rows, initialise the new rows, and return the new configuration.

    The padding row stays the same: a negative padding id is replaced by the index of its row.
    """
    config = dataclasses.replace(config, vocab_size=size, pad_token_id=config.padding_idx)
    _replace_rows(table, nn.Embedding(size, config.hidden_size, config.padding_idx, **_factory_kwargs(table)), config)
    table.num_embeddings, table.padding_idx = size, config.padding_idx
    if head is not None:
        _replace_rows(head, nn.Linear(config.hidden_size, size, bias=False, **_factory_kwargs(head)), config)
        head.out_features = size
    return config


def _factory_kwargs(module: nn.Embedding | nn.Linear) -> dict[str, Any]:
    return {"device": module.weight.device, "dtype": module.weight.dtype}


def _replace_rows(module: nn.Embedding | nn.Linear, fresh: nn.Embedding | nn.Linear, config: OpenLlamaConfig) -> None:
    """Give ``module`` the weight of ``fresh``, with its own first rows kept; a frozen module stays frozen."""
    init_weights(fresh, config)
    rows = min(len(fresh.weight), len(module.weight))
    with torch.no_grad():
        fresh.weight[:rows] = module.weight[:rows]
    module.weight = fresh.weight.requires_grad_(module.weight.requires_grad)
