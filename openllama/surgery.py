"""Fresh weights, and changing the size of a vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from openllama.config import OpenLlamaConfig
from openllama.errors import InputError

if TYPE_CHECKING:
    from openllama.pretrained import PretrainedModel


def init_weights(model: nn.Module, config: OpenLlamaConfig) -> None:
    """Draw fresh weights: matrices N(0, initializer_range), a stable embedding Xavier-normal, padding zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.Embedding):
            if config.use_stable_embedding:
                nn.init.xavier_normal_(module.weight)
            else:
                nn.init.normal_(module.weight, std=config.initializer_range)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx] = 0


def resize_vocabulary(model: PretrainedModel, size: int) -> None:
    """Cut or extend the embedding table and ``lm_head`` to ``size`` rows; new rows are drawn afresh.

    The padding row stays what it is: a negative padding id is replaced by the number of its row. Raises
    ``InputError`` where a special id of the config would lose its row.
    """
    config, table, head = model.config, model.get_input_embeddings(), getattr(model, "lm_head", None)
    if not isinstance(size, int) or size < 1:
        raise InputError(f"the size of a vocabulary must be a positive integer, got {size!r}")
    if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear | None):
        raise InputError(
            f"only an nn.Embedding and an nn.Linear can be resized, these are {type(table).__name__} and "
            f"{type(head).__name__}; take adapters off first"
        )
    if head is not None and head.bias is not None:
        raise InputError(
            f"lm_head has a bias of {len(head.bias)} numbers, which no Open-Llama has; it cannot be resized"
        )
    for name, value in _special_ids(model):
        if value >= size:
            raise InputError(f"a vocabulary of {size} has no row for {name} {value}; change the config first")
    model.config = config = dataclasses.replace(config, vocab_size=size, pad_token_id=config.padding_idx)
    _resize(table, nn.Embedding(size, config.hidden_size, config.padding_idx, **_place(table)), config)
    table.num_embeddings, table.padding_idx = size, config.padding_idx
    if head is not None:
        _resize(head, nn.Linear(config.hidden_size, size, bias=False, **_place(head)), config)
        head.out_features = size
        model.tie_weights()


def _special_ids(model: PretrainedModel) -> Iterator[tuple[str, int]]:
    """Every id that the model's configurations give a meaning."""
    config = dataclasses.replace(model.config, pad_token_id=model.config.padding_idx)  # a row, counted from 0
    for source in (config, getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            yield from ((name, one) for one in (value if isinstance(value, list) else [value]) if one is not None)


def _place(module: nn.Embedding | nn.Linear) -> dict[str, Any]:
    return {"device": module.weight.device, "dtype": module.weight.dtype}


def _resize(module: nn.Embedding | nn.Linear, fresh: nn.Embedding | nn.Linear, config: OpenLlamaConfig) -> None:
    """Give ``module`` the rows of ``fresh``, the first of them as they were; it stays frozen if it was."""
    init_weights(fresh, config)
    rows = min(len(fresh.weight), len(module.weight))
    with torch.no_grad():
        fresh.weight[:rows] = module.weight[:rows]
    module.weight = fresh.weight.requires_grad_(module.weight.requires_grad)
