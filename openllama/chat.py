"""A conversation: turns in the format the model was trained on, and a cache of what was computed.

A template is a string with ``{prompt}`` and ``{answer}`` in place of the question and the answer; the text
after ``{answer}`` ends the turn. Turns are concatenated. With the default template, that of V1 and V2, the
model reads

    user:Hello
    system:Good day.</s>user:Who are you?
    system:

and continues from there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from openllama.cache import PreallocatedCache
from openllama.errors import InputError, warn
from openllama.generation import GenerationConfig, stream
from openllama.generation.state import LanguageModel
from openllama.generation.text import decoded, until
from openllama.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.template import ChatTemplate

__all__ = ["ChatSession", "ChatTemplate"]


class ChatSession:
    """The ids of all turns, and the cache of their keys and values.

    The context is ``max_position_embeddings`` tokens. A question needs room for itself and for an answer of
    ``max_new_tokens``, or half the context if that is less. The oldest turns are dropped until it fits;
    ``dropped`` is their number for the last question. ``settings`` are arguments of ``generate``; raises
    ``InputError`` for settings that do not work in a conversation.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: OpenLlamaTokenizer,
        template: ChatTemplate | None = None,
        max_new_tokens: int = 256,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template or ChatTemplate()
        if template is None and tokenizer.chat_template != self.template.jinja():
            warn(
                "the tokenizer has a chat template of its own, which is not used; give a ChatTemplate (--template FILE)"
            )
        self.context = model.config.max_position_embeddings
        self.max_new_tokens, self.settings = max_new_tokens, settings
        self._config: GenerationConfig = settings.get("generation_config") or model.generation_config
        self._end = self._encode(self.template.end)
        self._cache = PreallocatedCache(model.config, 1, self.context, model.dtype, model.device)
        self.reset()
        self._stream([0], min(max_new_tokens, self.context - 1))  # checks the settings
        if (count := self._config.num_return_sequences) > 1:
            raise InputError(f"a conversation has one answer to a question, not num_return_sequences={count}")

    def reset(self) -> None:
        """Forget all turns."""
        self.turns: list[list[int]] = []
        self.dropped = self.answered = 0  # turns dropped for the last question, tokens of its answer
        self._cache.crop(0)

    def ask(self, prompt: str) -> Generator[str, None, None]:
        """The answer as it is generated, in whole characters; if the caller stops early, the part so far is kept.

        Raises ``InputError`` for a question that leaves no room for an answer.
        """
        turn = self._encode(self.template.question(prompt))
        self._make_room(len(turn))
        return self._answer(turn)

    def _answer(self, turn: list[int]) -> Generator[str, None, None]:
        self.turns.append(turn)
        question_length = len(turn)
        stop_strings = [self.template.end] if self.template.end else []
        try:
            yield from until(decoded(self.tokenizer, tuple(turn), self._tokens(turn)), stop_strings)
        finally:  # also if the caller stops early
            self._cache.crop(sum(map(len, self.turns)) - 1)  # the cache must not contain tokens that are in no turn
            answer = turn[question_length:]
            self.answered = len(answer)
            if answer[-len(self._end) :] != self._end and self.template.end not in self.tokenizer.decode(answer):
                turn += self._end

    def _tokens(self, turn: list[int]) -> Iterator[Tensor]:
        """Continue the conversation; append each token to the last turn."""
        ids = [token_id for turn in self.turns for token_id in turn]
        room = self.context - len(ids) - len(self._end)
        for token in self._stream(ids, min(self.max_new_tokens, room)):
            turn.append(int(token))
            yield token

    def _stream(self, ids: list[int], max_new_tokens: int) -> Iterator[Tensor]:
        ends = self._end if len(self._end) == 1 else []
        return stream(
            self.model,
            input_ids := torch.tensor([ids]),
            attention_mask=torch.ones_like(input_ids),
            past_key_values=self._cache,
            max_new_tokens=max_new_tokens,
            **{**self.settings, "eos_token_id": sorted({*self._config.eos_token_ids, *ends})},
        )

    def _make_room(self, question_length: int) -> None:
        """Drop the oldest turns until question and answer fit; the other turns are then computed again."""
        needed = question_length + len(self._end)
        if needed >= self.context:
            raise InputError(
                f"a question of {question_length} tokens leaves no room for an answer in a context of {self.context}"
            )
        self.dropped = 0
        answer = min(self.max_new_tokens, self.context // 2)
        while self.turns and sum(map(len, self.turns)) + needed + answer > self.context:
            del self.turns[0]
            self.dropped += 1
        if self.dropped:
            self._cache.crop(0)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []
