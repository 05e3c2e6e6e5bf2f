"""A conversation: turns in the format a model was trained on, with a cache that is never computed twice.

A template is one string in which ``{prompt}`` and ``{answer}`` stand for the two sides of a turn. Turns
are laid end to end, so with the default, V1's and V2's own, the model reads

    user:Hello\\nsystem:Good day.</s>user:Who are you?\\nsystem:

and writes from there. What follows ``{answer}`` ends an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from openllama.cache import PreallocatedCache
from openllama.errors import InputError
from openllama.heads import OpenLlamaForCausalLM
from openllama.tokenizer import OpenLlamaTokenizer, StreamDecoder

DEFAULT_TEMPLATE = "user:{prompt}\nsystem:{answer}</s>"


class ChatTemplate:
    """How a turn is written: a string that holds ``{prompt}`` once and then ``{answer}`` once."""

    def __init__(self, text: str = DEFAULT_TEMPLATE) -> None:
        before, found_prompt, rest = text.partition("{prompt}")
        between, found_answer, after = rest.partition("{answer}")
        if not (found_prompt and found_answer) or "{prompt}" in rest or "{answer}" in after:
            raise InputError(f"a chat template holds {{prompt}} and then {{answer}}, each once; got {text!r}")
        self._around = before, between
        self.end = after

    @classmethod
    def from_file(cls, path: Path) -> ChatTemplate:
        """The template that a text file holds, without the newline at its end."""
        return cls(path.read_text(encoding="utf-8").removesuffix("\n"))

    def question(self, prompt: str) -> str:
        """A turn up to where the answer begins."""
        return prompt.join(self._around)


class ChatSession:
    """The ids of the finished turns and of the one being written, and the cache over them.

    ``context`` tokens are all that model and cache hold: the oldest turns are dropped to make room,
    and ``dropped`` counts those that the last question cost.
    """

    def __init__(
        self,
        model: OpenLlamaForCausalLM,
        tokenizer: OpenLlamaTokenizer,
        template: ChatTemplate,
        max_new_tokens: int = 256,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.max_new_tokens, self.settings = max_new_tokens, settings
        self.context = model.config.max_position_embeddings
        self._cache = PreallocatedCache(model.config, 1, self.context, model.dtype, model.device)
        self._end = self._encode(template.end)
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.turns: list[list[int]] = []
        self.dropped = 0
        self._cache.crop(0)

    def ask(self, prompt: str) -> Iterator[str]:
        """The answer, one piece of text, perhaps empty, per token; what is taken of it stays in the session.

        Raises ``InputError`` for a prompt that leaves no room for an answer in the context.
        """
        turn = self._encode(self.template.question(prompt))
        self._make_room(len(turn))
        self.turns.append(turn)
        return self._answer(turn)

    def _answer(self, turn: list[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for token_id in turn:
            decoder.push(token_id)
        written: list[int] = []
        try:
            for token in self._tokens():
                written.append(int(token))
                if written[-1:] == self._end[:1] and len(self._end) == 1:
                    break
                yield decoder.push(written[-1])
            yield decoder.finish()
        finally:  # a caller that stops early leaves an answer that has ended
            ended = written[len(written) - len(self._end) :] == self._end
            turn += written if ended else written + self._end

    def _tokens(self) -> Iterator[torch.Tensor]:
        ids = [token_id for turn in self.turns for token_id in turn]
        room = self.context - len(ids) - len(self._end)
        return self.model.stream(
            torch.tensor([ids]),
            past_key_values=self._cache,
            max_new_tokens=min(self.max_new_tokens, room),
            **self.settings,
        )

    def _make_room(self, needed: int) -> None:
        """Drop the oldest turns until ``needed`` tokens and an answer fit; what stays is computed anew."""
        wanted = needed + self.max_new_tokens + len(self._end)
        if needed + len(self._end) >= self.context:
            raise InputError(f"this takes {needed} tokens and leaves no room for an answer in {self.context}")
        self.dropped = 0
        while self.turns and sum(map(len, self.turns)) + wanted > self.context:
            del self.turns[0]
            self.dropped += 1
        if self.dropped:
            self._cache.crop(0)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
