"""How likely a model finds given sequences: log-probabilities of their tokens, perplexity, continuations of a prompt.

A sequence of 7 tokens with a context of 4 and ``stride=2`` is read in windows; each token is scored once:

    tokens   a b c d e f g
    window   a B C D            capitals are scored: all but the first, which nothing comes before
    window       c d E F        at least context - stride = 2 tokens come before
    window           e f G
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openllama.checks import check_input_ids
from openllama.errors import InputError, warn
from openllama.generation.config import as_list
from openllama.generation.state import Decoding, LanguageModel
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


@dataclass(frozen=True)
class ContinuationScore:
    """Of a continuation of N tokens, given its prompt."""

    log_probs: Tensor  # (N,), natural, of every token, given the prompt and those before it
    is_greedy: bool  # whether each token is the most likely one: greedy search would make this continuation

    @property
    def total(self) -> float:
        """log p(continuation | prompt)."""
        return float(self.log_probs.sum())


class Window(NamedTuple):
    """A stretch of a sequence that one forward pass reads, and the tokens in it that are scored."""

    sequence: int  # its index
    start: int
    end: int
    first: int  # first:end are scored


@torch.no_grad()
def score(
    model: LanguageModel, sequences: Sequence[Sequence[int] | Tensor], batch_size: int = 8, stride: int | None = None
) -> list[Score]:
    """Score sequences of at least two ids each, ``batch_size`` at a time.

    With ``stride``, a sequence longer than ``max_position_embeddings`` is read in windows of that many tokens, each
    beginning ``stride`` tokens after the one before: a small stride gives every token more context and takes more
    passes. Without, it is read whole, with a warning. Sequences of like length share a forward pass, and no more than
    ``CHUNK_LOGITS`` logits exist at a time. Raises ``InputError``.

        [document] = score(model, [ids], stride=model.config.max_position_embeddings // 2)
        print(document.perplexity)
    """
    rows = checked_rows(model, sequences, at_least=2)
    context = model.config.max_position_embeddings
    if stride is None:
        warn_if_long(model, rows, f"; stride={context // 2} scores it in windows" if context > 1 else "")
        context = max(map(len, rows), default=0)
    elif not isinstance(stride, int) or not 1 <= stride < context:
        raise InputError(
            f"stride must be from 1 to {context - 1}, less than max_position_embeddings {context}, got {stride!r}"
        )
    windows = [w for index, ids in enumerate(rows) for w in _windows(index, len(ids), context, stride or context)]
    parts: list[dict[int, Tensor]] = [{} for _ in rows]  # by the place of their first token
    for window, log_probs, _ in _scored(model, rows, windows, batch_size):
        parts[window.sequence][window.first] = log_probs
    return [
        Score(ids, torch.cat([logs[first] for first in sorted(logs)])) for ids, logs in zip(rows, parts, strict=True)
    ]


@torch.no_grad()
def score_continuations(
    model: LanguageModel, pairs: Sequence[tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]], batch_size: int = 8
) -> list[ContinuationScore]:
    """log p(continuation | prompt) of pairs of ids, and whether greedy search would make the continuation.

    Both have at least one id: where there is no prompt, give the id that begins a text. Raises ``InputError``.

        scores = score_continuations(model, [([5, 9], [13, 2]), ([5, 9], [7])])
        print([(one.total, one.is_greedy) for one in scores])  # what lm-evaluation-harness calls loglikelihood
    """
    prompts = checked_rows(model, [prompt for prompt, _ in pairs], at_least=1, name="prompt")
    continuations = checked_rows(model, [ids for _, ids in pairs], at_least=1, name="continuation")
    rows = [torch.cat(pair) for pair in zip(prompts, continuations, strict=True)]
    warn_if_long(model, rows, "; cut the beginning of the prompt")
    windows = [Window(i, 0, len(rows[i]), len(prompts[i])) for i in range(len(rows))]
    scores = {
        window.sequence: ContinuationScore(log_probs, bool(tops.all()))
        for window, log_probs, tops in _scored(model, rows, windows, batch_size)
    }
    return [scores[index] for index in range(len(rows))]


# ---------------------------------------------------------------------- sequences in batches


def checked_rows(
    model: Decoding, sequences: Sequence[Sequence[int] | Tensor], at_least: int, name: str = "sequence"
) -> list[Tensor]:
    """Sequences of ids as tensors (length,) on the model's device; raises ``InputError``."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("a learned prompt would be left out; compute log-probabilities from model(...).logits")
    try:
        rows = [torch.as_tensor(ids, device=model.device) for ids in sequences]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}s must be lists of ids: {error}") from error
    for index, ids in enumerate(rows):
        if ids.ndim != 1 or len(ids) < at_least:
            wanted = "a score needs two tokens or more" if at_least == 2 else "give one token or more"
            raise InputError(f"{name} {index} has shape {tuple(ids.shape)}; {wanted}, (length,)")
        check_input_ids(ids[None], model.config.vocab_size)
    padding = model.config.pad_token_id
    can_be_padded = isinstance(sequences, Tensor) and padding not in (None, *as_list(model.config.eos_token_id))
    if can_be_padded and any(padding in (int(ids[0]), int(ids[-1])) for ids in rows):
        raise InputError(
            f"a {name} begins or ends with padding (id {padding}), which would count as text; give lists without it"
        )
    return [ids.long() for ids in rows]


def warn_if_long(model: Decoding, rows: Sequence[Tensor], advice: str) -> None:
    """Warn once if a row is longer than what the model was trained for."""
    longest, limit = max(map(len, rows), default=0), model.config.max_position_embeddings
    if longest > limit:
        warn(
            f"a sequence of {longest} tokens is longer than max_position_embeddings {limit}: "
            f"the model was not trained for it{advice}"
        )


def hidden_states(model: Decoding, rows: Sequence[Tensor], batch_size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Last hidden states (length, C) of the rows, in batches of like length, each with the indices of its rows."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    config = model.config
    if model.training and (config.hidden_dropout_prob or config.attention_dropout_prob):
        warn("the model is in training mode, so dropout changes what it computes here; call model.eval() before")
    if model.config.rope_scaling is not None and model.config.rope_scaling["type"] == "dynamic":
        batch_size = 1  # padding would count as length, which sets the rotation
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = [len(rows[index]) for index in chosen]
        ids = pad_sequence([rows[index] for index in chosen], batch_first=True)
        mask = None
        if min(lengths) < max(lengths):
            mask = torch.arange(ids.shape[1], device=ids.device) < ids.new_tensor(lengths)[:, None]
        inputs = Inputs(ids, mask, backend=model.attn_implementation, use_cache=False)
        hidden = model.get_decoder()(inputs).last_hidden_state
        yield chosen, [states[:length] for states, length in zip(hidden, lengths, strict=True)]


def _windows(sequence: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """Length 7, context 4, stride 2 -> tokens 0:4, 2:6 and 4:7, scored from 1, 4 and 6 on."""
    start, end, first = 0, min(context, length), 1
    yield Window(sequence, start, end, first)
    while end < length:
        start, first = start + stride, end
        end = min(start + context, length)
        yield Window(sequence, start, end, first)


def _scored(
    model: LanguageModel, rows: Sequence[Tensor], windows: Sequence[Window], batch_size: int
) -> Iterator[tuple[Window, Tensor, Tensor]]:
    """Of each window the log-probabilities (end - first,) of its scored tokens, and which are the most likely ones."""
    stretches = [rows[w.sequence][w.start : w.end] for w in windows]
    for chosen, hidden in hidden_states(model, stretches, batch_size):
        here = [windows[index] for index in chosen]
        before = torch.cat([h[w.first - 1 - w.start : -1] for h, w in zip(hidden, here, strict=True)])
        targets = torch.cat([rows[w.sequence][w.first : w.end] for w in here])
        sizes = [w.end - w.first for w in here]
        parts = (values.split(sizes) for values in _log_probs(model, before, targets))
        yield from zip(here, *parts, strict=True)


def _log_probs(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (N,) of each target (N,) after hidden states (N, C), and whether it is the most likely token.

    A few rows of logits exist at a time.
    """
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    chunks, tops = [], []
    for vectors, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.lm_head(vectors)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunks.append(wide.log_softmax(dim=-1).gather(1, wanted[:, None]).squeeze(1))
        tops.append(wide.argmax(dim=-1) == wanted)
    return torch.cat(chunks), torch.cat(tops)
