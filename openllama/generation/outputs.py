"""What ``generate`` hands back, and how it is gathered step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from openllama.cache import Cache
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
