"""Fresh weights, and changing the size of a vocabulary."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from openllama.config import OpenLlamaConfig
from openllama.errors import InputError

if TYPE_CHECKING:
    from openllama.pretrained import PretrainedModel

Table = TypeVar("Table", nn.Embedding, nn.Linear)


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
    config = model.config
    if not isinstance(size, int) or size < 1:
        raise InputError(f"the size of a vocabulary must be a positive integer, got {size!r}")
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {"pad_token_id": config.padding_idx, "bos_token_id": config.bos_token_id}
    for name, value in [*special.items(), *(("eos_token_id", one) for one in eos)]:
        if value is not None and value >= size:
            raise InputError(f"a vocabulary of {size} has no row for {name} {value}; change the config first")
    model.config = config = dataclasses.replace(config, vocab_size=size, pad_token_id=config.padding_idx)
    old = model.get_input_embeddings()
    table = nn.Embedding(size, config.hidden_size, config.padding_idx, device=old.weight.device, dtype=old.weight.dtype)
    model.base_model.embedding.tokens = _filled(table, old, config)
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear):
        linear = nn.Linear(config.hidden_size, size, bias=False, device=head.weight.device, dtype=head.weight.dtype)
        model.lm_head = _filled(linear, head, config)
        model.tie_weights()


def _filled(new: Table, old: Table, config: OpenLlamaConfig) -> Table:
    """``new`` with fresh weights, overwritten by as many rows as ``old`` has; frozen and in training as that was."""
    init_weights(new, config)
    rows = min(len(new.weight), len(old.weight))
    with torch.no_grad():
        new.weight[:rows] = old.weight[:rows]
    return new.train(old.training).requires_grad_(old.weight.requires_grad)
