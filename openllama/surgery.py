"""Changes a vocabulary: the rows of the embedding table and of ``lm_head``, by their number or by a tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from openllama.config import OpenLlamaConfig
from openllama.errors import InputError
from openllama.model import SharedHead, init_weights

SPACE = "▁"  # how a piece writes a space


def own_head(model: nn.Module) -> Any:
    """The ``lm_head`` of a model, None where it has none or uses the rows of the embedding table."""
    head = getattr(model, "lm_head", None)
    return None if isinstance(head, SharedHead) else head


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


def extend_vocabulary(model: Any, old: Any, new: Any) -> None:
    """Give ``model`` the vocabulary of the tokenizer ``new``; ``old`` is the tokenizer that it was trained with.

    ``new`` is usually ``old`` merged with pieces of another language, as in Open-Llama V2. Whatever its id is, a token
    of both keeps its rows of the embedding table and of ``lm_head``. A new token begins as the mean of the rows of the
    tokens into which ``old`` divides its text, and new padding as zeros. The configurations follow: special ids are
    those of ``new``, or else those that the same tokens have now. Raises ``InputError`` where a token of ``old`` has
    no row.
    """
    table, head, size = model.get_input_embeddings(), own_head(model), len(new)
    check_resizable(table, head, size)
    if len(old) > len(table.weight):
        raise InputError(f"the old tokenizer has {len(old)} tokens, the model only {len(table.weight)} rows for them")
    ids, names = new.get_vocab(), {number: token for token, number in old.get_vocab().items()}

    def now(number: int | None) -> int | None:
        return None if number is None else ids.get(names.get(number))

    special = {
        name: getattr(new, name) if getattr(new, name) is not None else now(getattr(old, name))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    if special["pad_token_id"] is None:
        special["pad_token_id"] = now(model.config.padding_idx)
    origins = _origins(old, new, padding=special["pad_token_id"])
    before = [module.weight.detach().clone() for module in (table, head) if module is not None]
    model.config = resize_vocabulary(table, head, dataclasses.replace(model.config, vocab_size=size, **special), size)
    for module, rows in zip((table, head), before, strict=False):
        _fill(module.weight, rows, origins)
    model.tie_weights()
    if hasattr(model, "generation_config"):
        model.generation_config = model.generation_config.replace(**special)


def _origins(old: Any, new: Any, padding: int | None) -> dict[int, list[int]]:
    """Id of each token of ``new`` -> ids of ``old`` of the same text; none for new padding."""
    known, origins = old.get_vocab(), {}
    for token, number in new.get_vocab().items():
        if token in known:
            origins[number] = [known[token]]
        elif number == padding:
            origins[number] = []
        else:
            text = token.removeprefix(SPACE).replace(SPACE, " ")
            parts = old.encode(text, add_special_tokens=False)
            if not token.startswith(SPACE) and parts[1:] and parts[0] == known.get(SPACE):
                parts = parts[1:]  # the space that a tokenizer puts in front of every text
            origins[number] = parts or list(known.values())
    return origins


@torch.no_grad()
def _fill(weight: torch.Tensor, rows: torch.Tensor, origins: dict[int, list[int]]) -> None:
    """Make each row of ``weight`` the mean of its ``origins`` among ``rows``, or zeros if it has none."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    for number, parts in origins.items():
        weight[number] = rows[parts].to(wide).mean(0) if parts else 0


def _factory_kwargs(module: nn.Embedding | nn.Linear) -> dict[str, Any]:
    return {"device": module.weight.device, "dtype": module.weight.dtype}


def _replace_rows(module: nn.Embedding | nn.Linear, fresh: nn.Embedding | nn.Linear, config: OpenLlamaConfig) -> None:
    """Give ``module`` the weight of ``fresh``, with its own first rows kept; a frozen module stays frozen."""
    init_weights(fresh, config)
    rows = min(len(fresh.weight), len(module.weight))
    with torch.no_grad():
        fresh.weight[:rows] = module.weight[:rows]
    module.weight = fresh.weight.requires_grad_(module.weight.requires_grad)
