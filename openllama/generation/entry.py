"""The way in: ``generate`` and ``stream`` choose the strategy that the settings ask for.

The rarer families are imported when they are asked for; greedy search and sampling need none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from openllama.errors import InputError
from openllama.generation.loop import Texts, decode
from openllama.generation.outputs import GenerateOutput, Record, Step
from openllama.generation.request import Request, prepare

if TYPE_CHECKING:
    from openllama.interface import OpenLlamaForCausalLM


class Streamer(Protocol):
    """Takes ids as they are made, as transformers' streamers do: first the prompt, then token by token."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def generate(
    model: OpenLlamaForCausalLM, input_ids: Tensor | None = None, *, streamer: Streamer | None = None, **arguments: Any
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
        output = BeamSearch(Texts(model, request.repeated(config.num_beams)), request).run()
    else:
        output = _collect(model, request, streamer)
    return output if config.return_dict_in_generate else output.sequences


def stream(model: OpenLlamaForCausalLM, input_ids: Tensor | None = None, **arguments: Any) -> Iterator[Tensor]:
    """The continuation token by token, each (B,), before the next is computed; arguments as of ``prepare``."""
    request = prepare(model, input_ids, **arguments)
    _refuse_beams("stream", True, request.config.num_beams)
    return (step.token for step in _steps(Texts(model, request), request))


def _steps(texts: Texts, request: Request) -> Iterator[Step]:
    """The strategy of a request that makes one token of each text at a time."""
    if request.config.penalty_alpha:
        from openllama.generation.contrastive import decode as decode_contrastive

        return decode_contrastive(texts, request)
    if request.assistant is not None or request.config.prompt_lookup_num_tokens is not None:
        from openllama.generation.assisted import decode as decode_assisted

        return decode_assisted(texts, request)
    return decode(texts, request)


def _collect(model: OpenLlamaForCausalLM, request: Request, streamer: Streamer | None) -> GenerateOutput:
    """Run a strategy to its end."""
    texts, record = Texts(model, request), Record(request.config)
    tokens = []
    if streamer is not None:
        streamer.put(request.input_ids.cpu())
    for step in _steps(texts, request):
        tokens.append(step.token[:, None])
        record.add(step)
        if streamer is not None:
            streamer.put(step.token.cpu())
    if streamer is not None:
        streamer.end()
    sequences = torch.cat((request.input_ids, *tokens), dim=1)
    return GenerateOutput(sequences, past_key_values=texts.cache, **record.fields())


def _refuse_beams(what: str, streaming: bool, num_beams: int) -> None:
    if streaming and num_beams > 1:
        raise InputError(f"{what} needs num_beams=1, got {num_beams}: beams change their beginning as they go")
