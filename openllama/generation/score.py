"""How likely a model finds given texts: log-probabilities of their tokens, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openllama.checks import check_input_ids
from openllama.errors import InputError
from openllama.losses import CHUNK_LOGITS

if TYPE_CHECKING:
    from openllama.interface import OpenLlamaForCausalLM


@dataclass(frozen=True)
class Score:
    """Of one text of L tokens."""

    token_ids: Tensor  # (L,)
    log_probs: Tensor  # (L - 1,), natural, of every token but the first, given those before it

    @property
    def total(self) -> float:
        """The log-probability of the text after its first token."""
        return float(self.log_probs.sum())

    @property
    def perplexity(self) -> float:
        """exp(-mean): tokens of probability 1/2 and 1/8 have perplexity 4, as if drawn from 4 alike."""
        return float((-self.log_probs.mean()).exp())


@torch.no_grad()
def score(model: OpenLlamaForCausalLM, sequences: Sequence[Sequence[int] | Tensor], batch_size: int = 8) -> list[Score]:
    """Score texts, given as ids of at least two tokens each, ``batch_size`` at a time.

    Texts of like length share a forward pass, and no more than ``CHUNK_LOGITS`` logits exist at a time.
    Raises ``InputError``.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    texts = [torch.as_tensor(ids, device=model.device) for ids in sequences]
    for index, ids in enumerate(texts):
        if ids.ndim != 1 or len(ids) < 2:
            raise InputError(f"text {index} has shape {tuple(ids.shape)}; a score needs two tokens or more, (length,)")
        check_input_ids(ids[None], model.config.vocab_size)
    if model.config.rope_scaling is not None and model.config.rope_scaling["type"] == "dynamic":
        batch_size = 1  # padding would count as length, which sets the rotation
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad_sequence([texts[index] for index in chosen], batch_first=True)
        lengths = ids.new_tensor([len(texts[index]) for index in chosen])
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        hidden = model.model(ids, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state
        real = mask[:, 1:]  # tokens with one before them
        log_probs = _log_probs(model, hidden[:, :-1][real], ids[:, 1:][real])
        for index, row in zip(chosen, log_probs.split((lengths - 1).tolist()), strict=True):
            scores[index] = Score(texts[index], row)
    return [scores[index] for index in range(len(texts))]


def _log_probs(model: OpenLlamaForCausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability (N,) of each target (N,) after hidden states (N, C), a few rows of logits at a time."""
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    chunks = []
    for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.project(rows)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunks.append(wide.log_softmax(dim=-1).gather(1, wanted[:, None].long()).squeeze(1))
    return torch.cat(chunks)
