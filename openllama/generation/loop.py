"""Greedy search and sampling, from the call to the token: the file to read first.

``generate`` and ``stream`` check a call, choose the strategy that its settings ask for, and run it. Token ids go in and
token ids come out; text belongs to the tokenizer. The rarer strategies are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from openllama.errors import InputError
from openllama.generation.checks import prepare
from openllama.generation.outputs import GenerateOutput, Record, Step, Streamer
from openllama.generation.processors import apply
from openllama.generation.sampling import pick
from openllama.generation.state import LanguageModel, Request, Sequences

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openllama.generation.arguments import Arguments


@overload
def generate(
    model: LanguageModel,
    input_ids: Tensor | None = None,
    *,
    streamer: Streamer | None = None,
    return_dict_in_generate: Literal[False] = False,
    **arguments: Unpack[Arguments],
) -> Tensor: ...
@overload
def generate(
    model: LanguageModel,
    input_ids: Tensor | None = None,
    *,
    streamer: Streamer | None = None,
    return_dict_in_generate: Literal[True],
    **arguments: Unpack[Arguments],
) -> GenerateOutput: ...
@overload
def generate(
    model: LanguageModel,
    input_ids: Tensor | None = None,
    *,
    streamer: Streamer | None = None,
    return_dict_in_generate: bool,
    **arguments: Unpack[Arguments],
) -> Tensor | GenerateOutput: ...


def generate(
    model: LanguageModel, input_ids: Tensor | None = None, *, streamer: Streamer | None = None, **arguments: Any
) -> Tensor | GenerateOutput:
    """The prompt (B, L) and its continuation, as ids (B, L + new); arguments as of ``prepare``.

    With ``return_dict_in_generate=True`` a ``GenerateOutput``. Its ``past_key_values``, passed on with
    the longer ``input_ids`` of the next turn, save computing this one again.
    """
    request = prepare(model, input_ids, **arguments)
    config = request.config
    if config.num_beams > 1:
        from openllama.generation.beam import BeamSearch

        _refuse_beams("streamer", streamer is not None, config.num_beams)
        output = BeamSearch(Sequences(model, request.repeated(config.num_beams)), request).run()
    else:
        output = _run(Sequences(model, request), request, streamer)
    return output if config.return_dict_in_generate else output.sequences


def stream(model: LanguageModel, input_ids: Tensor | None = None, **arguments: Unpack[Arguments]) -> Iterator[Tensor]:
    """The continuation token by token, each (B,), before the next is computed; arguments as of ``prepare``."""
    request = prepare(model, input_ids, **arguments)
    _refuse_beams("stream", True, request.config.num_beams)
    return (step.token for step in _strategy(Sequences(model, request), request))


def _run(sequences: Sequences, request: Request, streamer: Streamer | None) -> GenerateOutput:
    """Run a strategy to its end."""
    tokens, record = [request.input_ids], Record(request.config)
    if streamer is not None:
        streamer.put(request.input_ids.cpu())
    for step in _strategy(sequences, request):
        tokens.append(step.token[:, None])
        record.add(step)
        if streamer is not None:
            streamer.put(step.token.cpu())
    if streamer is not None:
        streamer.end()
    return GenerateOutput(torch.cat(tokens, dim=1), past_key_values=sequences.cache or None, **record.fields())


def _strategy(sequences: Sequences, request: Request) -> Iterator[Step]:
    """The strategy of a request that makes one token of each sequence at a time."""
    if request.config.penalty_alpha:
        from openllama.generation.contrastive import contrastive_search

        return contrastive_search(sequences, request)
    if request.assistant is not None or request.config.prompt_lookup_num_tokens is not None:
        from openllama.generation.assisted import guess_ahead

        return guess_ahead(sequences, request)
    return greedy_or_sample(sequences, request)


@torch.no_grad()
def greedy_or_sample(sequences: Sequences, request: Request) -> Iterator[Step]:
    """Predict, process, pick, append: yield the next token of every sequence until all have ended or have the length.

    Every other strategy is a variation of this.
    """
    config, processors = request.config, [*request.processors, *request.filters]
    while sequences.length < config.max_length:
        logits, output = sequences.forward()
        logits = logits[:, -1]
        scores = apply(processors, sequences.ids, logits)
        token = pick(scores, config.do_sample, request.generator)
        sequences.check_picked(scores, token)
        token = sequences.pad_ended(token)
        sequences.append(token)
        yield Step(token, scores, logits, output.attentions, output.hidden_states)
        if sequences.have_ended(scores):
            break
    sequences.check()


def _refuse_beams(what: str, streaming: bool, num_beams: int) -> None:
    if streaming and num_beams > 1:
        raise InputError(f"{what} needs num_beams=1, got {num_beams}: beams change their beginning as they go")
