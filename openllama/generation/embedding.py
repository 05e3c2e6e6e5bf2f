"""Vectors of whole sequences: hidden states of the last layer, pooled over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openllama.errors import InputError
from openllama.generation.scoring import checked_rows, hidden_states, warn_if_long
from openllama.generation.state import Decoding

POOLINGS = ("mean", "last")


@torch.no_grad()
def embed_sequences(
    model: Decoding, sequences: Sequence[Sequence[int] | Tensor], pooling: str = "mean", batch_size: int = 8
) -> Tensor:
    """Embeddings (N, C) of N sequences of ids, in at least float32; for causal language models, decoders, classifiers.

    ``pooling``: "mean" of the hidden states after the final norm, or the "last" one, which alone has seen all tokens.
    Padding counts in neither: a row is that of the same sequence alone, up to rounding. Sequences of like length share
    a forward pass, ``batch_size`` at a time. Raises ``InputError``.

        first, second = embed_sequences(model, [[5, 9, 13], [7, 21]])
        print(torch.cosine_similarity(first, second, dim=0))
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, got {pooling!r}")
    rows = checked_rows(model, sequences, at_least=1)
    warn_if_long(model, rows, "; embed its parts")
    dtype = torch.promote_types(model.dtype, torch.float32)
    vectors = torch.empty(len(rows), model.config.hidden_size, dtype=dtype, device=model.device)
    for chosen, hidden in hidden_states(model, rows, batch_size):
        for index, states in zip(chosen, hidden, strict=True):
            vectors[index] = states[-1] if pooling == "last" else states.to(dtype).mean(0)
    return vectors
