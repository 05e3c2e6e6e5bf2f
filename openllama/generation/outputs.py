"""What ``generate`` hands back, and how it is gathered step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from openllama.cache import Cache
from openllama.errors import InputError
from openllama.generation.config import GenerationConfig
from openllama.outputs import ModelOutput


@dataclass(frozen=True)
class Step:
    """One new token of each sequence and what it was picked by."""

    token: Tensor  # (B,)
    scores: Tensor  # (B, V), processed
    logits: Tensor  # (B, V), as the model makes them
    attentions: tuple[Tensor, ...] | None = None  # of the forward pass that made the logits, one per layer
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(repr=False)
class GenerateOutput(ModelOutput):
    """Of ``generate(return_dict_in_generate=True)``; the tuples have one entry per new token.

    B is prompts times ``num_return_sequences``; with beams, scores, logits, attentions and hidden states
    have a row for each beam instead. As in transformers, the scores and indices of beams come with
    ``output_scores``.
    """

    sequences: Tensor  # (B, L + new)
    sequences_scores: Tensor | None = None  # (B,), what the sequences of beam search were ranked by
    scores: tuple[Tensor, ...] | None = None  # (B, V) each, after processors and sampling filters
    logits: tuple[Tensor, ...] | None = None  # (B, V) each, as the model makes them
    beam_indices: Tensor | None = None  # (B, L + new): row of ``scores`` that each new token came from, then -1
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # per token and layer (B, H, T, S)
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # per token and layer (B, T, C)
    past_key_values: Cache | None = None  # to go on from; holds all tokens but the last; not of beams


def compute_transition_scores(
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """What each generated token was scored, (B, new), from the output of a ``generate`` with ``output_scores=True``.

    ``sequences`` (B, L + new), ``scores`` (rows, V) per new token, and of beams ``beam_indices`` (B, L + new) are
    those of a ``GenerateOutput``. ``normalize_logits``: log-probabilities instead, over the whole vocabulary. Where a
    sequence has ended, scores are 0. Raises ``InputError``.
    """
    if not isinstance(scores, (tuple, list)) or not scores or not all(isinstance(step, Tensor) for step in scores):
        raise InputError("scores are those of generate(return_dict_in_generate=True, output_scores=True), got none")
    if beam_indices is None:
        beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(scores))
    width = int((beam_indices >= 0).sum(-1).max())  # of the longest sequence
    rows, tokens = beam_indices[:, :width], sequences[:, sequences.shape[1] - width :]
    if rows.shape != tokens.shape or len(scores) < width or int(rows.max()) >= len(scores[0]):
        raise InputError(
            f"sequences {tuple(sequences.shape)}, {len(scores)} scores of {tuple(scores[0].shape)} and beam_indices "
            f"{tuple(beam_indices.shape)} are not of one output of generate; beams need beam_indices"
        )
    steps = torch.stack(tuple(scores[:width]))  # (width, rows, V)
    if normalize_logits:
        steps = steps.log_softmax(-1)
    picked = steps[torch.arange(width, device=steps.device), rows.clamp(min=0), tokens]
    return picked.masked_fill(rows < 0, 0)


class Streamer(Protocol):
    """Takes ids as they are made, as transformers' streamers do: first the prompt, then token by token."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Record:
    """What a config asks to keep of the steps."""

    def __init__(self, config: GenerationConfig) -> None:
        wanted = {
            "scores": config.output_scores,
            "logits": config.output_logits,
            "attentions": config.output_attentions,
            "hidden_states": config.output_hidden_states,
        }
        self._kept: dict[str, list[Any]] = {
            name: [] for name in wanted if wanted[name] and config.return_dict_in_generate
        }

    def add(self, step: Step) -> None:
        for name, values in self._kept.items():
            values.append(getattr(step, name))

    def fields(self) -> dict[str, Any]:
        """The fields of a ``GenerateOutput`` that were asked for."""
        return {name: tuple(values) for name, values in self._kept.items()}
