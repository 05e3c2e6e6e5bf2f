"""Decoding ids that arrive one at a time. An id cannot be decoded alone, for two reasons:

    ▁To ▁be               a LLaMA model file drops the first space of a string: "▁be" alone gives "be", not " be"
    <0xE9> <0xBE> <0x98>  are one character, 龘; the first two alone give two replacement characters

So an id is decoded together with the first ids of the string, and bytes wait until their character is complete.
"""

from __future__ import annotations

import codecs

from openllama.tokenizer.checks import checked_ids
from openllama.tokenizer.tokenizer import OpenLlamaTokenizer


class StreamDecoder:
    """Decodes ids as they arrive: the returned strings, joined, are ``decode(ids, skip_special_tokens=True)``.

    A character of several byte tokens is returned with the last of them. Special tokens are always skipped,
    because in ``decode`` they change the text before them. Spaces are not cleaned up.
    """

    def __init__(self, tokenizer: OpenLlamaTokenizer) -> None:
        self._tokenizer, self._skipped = tokenizer, set(tokenizer.all_special_ids)
        self._start_text()

    def _start_text(self) -> None:
        self._last_added: bool | None = None  # whether the last id was an added token; None before the first
        self._start_run()

    def _start_run(self) -> None:
        """Begin a run of ids between added tokens: ``decode`` passes each run to sentencepiece separately."""
        self._prefix: list[int] = []  # ids of the run up to the first one with text
        self._prefix_length = 0  # characters of their text
        self._pending: list[int] = []  # ids whose text has not been returned yet
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add an id; returns the text that is now complete, often none."""
        [number] = checked_ids([token_id])
        token = self._tokenizer.convert_ids_to_tokens(number)
        if number in self._skipped:
            return ""
        added = number >= self._tokenizer.vocab_size  # decode puts spaces around these
        space = " " if self._last_added or (added and self._last_added is not None) else ""
        self._last_added = added
        if added:
            text = self._flush() + space + token
            self._start_run()
            return text
        self._pending.append(number)
        return space if self._within_character(number, token) else space + self._flush()

    def finish(self) -> str:
        """Return the rest, even of an incomplete character; the decoder can then take another sequence."""
        text = self._flush()
        self._start_text()
        return text

    def _within_character(self, number: int, token: str) -> bool:
        """Whether ``number`` is a byte such as <0xE9>, of a character that the next ids may complete."""
        if not self._tokenizer.sp.is_byte(number):
            self._utf8.reset()
            return False
        self._utf8.decode(bytes.fromhex(token[3:5]))
        return bool(self._utf8.getstate()[0])  # bytes of an incomplete character

    def _flush(self) -> str:
        """Text of the pending ids, decoded after the prefix: "To be" without its first 2 characters is " be"."""
        text = self._tokenizer.sp.decode(self._prefix + self._pending)[self._prefix_length :]
        if not self._prefix_length:
            self._prefix, self._prefix_length = self._prefix + self._pending, len(text)
        self._pending = []
        return text
