"""How likely a model finds given sequences: log-probabilities of their tokens, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openllama.checks import check_input_ids
from openllama.errors import InputError
from openllama.generation.state import LanguageModel
from openllama.losses import CHUNK_LOGITS
from openllama.model import Inputs


@dataclass(frozen=True)
class Score:
    """Of one sequence of L tokens."""

    token_ids: Tensor  # (L,)
    log_probs: Tensor  # (L - 1,), natural, of every token but the first, given those before it

    @property
    def total(self) -> float:
        """The log-probability of the sequence after its first token."""
        return float(self.log_probs.sum())

    @property
    def perplexity(self) -> float:
        """exp(-mean): tokens of probability 1/2 and 1/8 have perplexity 4, as if drawn from 4 alike."""
        return float((-self.log_probs.mean()).exp())


@torch.no_grad()
def score(model: LanguageModel, sequences: Sequence[Sequence[int] | Tensor], batch_size: int = 8) -> list[Score]:
    """Score sequences of at least two ids each, ``batch_size`` at a time.

    Sequences of like length share a forward pass, and no more than ``CHUNK_LOGITS`` logits exist at a time.
    Raises ``InputError``.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    rows = [torch.as_tensor(ids, device=model.device) for ids in sequences]
    for index, ids in enumerate(rows):
        if ids.ndim != 1 or len(ids) < 2:
            raise InputError(
                f"sequence {index} has shape {tuple(ids.shape)}; a score needs two tokens or more, (length,)"
            )
        check_input_ids(ids[None], model.config.vocab_size)
    if model.config.rope_scaling is not None and model.config.rope_scaling["type"] == "dynamic":
        batch_size = 1  # padding would count as length, which sets the rotation
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = [len(rows[index]) for index in chosen]
        ids = pad_sequence([rows[index] for index in chosen], batch_first=True).long()
        mask = None
        if min(lengths) < max(lengths):
            mask = torch.arange(ids.shape[1], device=ids.device) < ids.new_tensor(lengths)[:, None]
        inputs = Inputs(ids, mask, backend=model.attn_implementation, use_cache=False)
        hidden = model.get_decoder()(inputs).last_hidden_state
        before = torch.cat([states[: length - 1] for states, length in zip(hidden, lengths, strict=True)])
        log_probs = _log_probs(model, before, torch.cat([rows[index][1:] for index in chosen]))
        for index, part in zip(chosen, log_probs.split([length - 1 for length in lengths]), strict=True):
            scores[index] = Score(rows[index], part)
    return [scores[index] for index in range(len(rows))]


def compute_transition_scores(
    model: LanguageModel,
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """What each generated token was scored, (B, new), from the output of a ``generate`` with ``output_scores=True``.

    ``sequences`` (B, L + new), ``scores`` (rows, V) per new token, and of beams ``beam_indices`` (B, new) are those of
    a ``GenerateOutput``. ``normalize_logits``: log-probabilities instead, over the whole vocabulary. Scores of beams
    are sums of log-probabilities; where a sequence has ended, they are 0. Raises ``InputError``.
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


def _log_probs(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability (N,) of each target (N,) after hidden states (N, C), a few rows of logits at a time."""
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    chunks = []
    for vectors, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.lm_head(vectors)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunks.append(wide.log_softmax(dim=-1).gather(1, wanted[:, None].long()).squeeze(1))
    return torch.cat(chunks)
