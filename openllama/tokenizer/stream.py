"""Text of ids that come one at a time. Two things keep an id from being decoded by itself:

    ▁To ▁be               a LLaMA model file drops the space that opens a text: "▁be" alone is "be", not " be"
    <0xE9> <0xBE> <0x98>  are one character, 龘; the first two alone are two replacement characters

So ids are decoded behind the opening of their text, and bytes wait until their character is whole.
"""

from __future__ import annotations

import codecs

from openllama.tokenizer.checks import checked_ids
from openllama.tokenizer.tokenizer import OpenLlamaTokenizer


class StreamDecoder:
    """Decodes ids as they come: what it returns, put together, is ``decode(ids, skip_special_tokens=True)``.

    A character of several byte tokens comes whole, with the last of them. (Special tokens are always
    skipped: ``decode`` lets them change text that stands before them. Nothing is cleaned up.)
    """

    def __init__(self, tokenizer: OpenLlamaTokenizer) -> None:
        self._tokenizer, self._skipped = tokenizer, set(tokenizer.all_special_ids)
        self._start_text()

    def _start_text(self) -> None:
        self._last_added: bool | None = None  # whether the last id was an added token; None before the first
        self._start_run()

    def _start_run(self) -> None:
        """Begin a run of ids between added tokens: ``decode`` gives each run to sentencepiece by itself."""
        self._opening: list[int] = []  # ids up to the first that show any text
        self._shown = 0  # characters they show
        self._held: list[int] = []  # ids whose text is not out yet
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` makes certain, often none."""
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
        self._held.append(number)
        return space if self._within_character(number, token) else space + self._flush()

    def finish(self) -> str:
        """The rest, half a character included; the decoder can then take another sequence."""
        text = self._flush()
        self._start_text()
        return text

    def _within_character(self, number: int, token: str) -> bool:
        """Whether ``number`` is a byte such as <0xE9> that the next ids may make a character of."""
        if not self._tokenizer.sp.is_byte(number):
            self._utf8.reset()
            return False
        self._utf8.decode(bytes.fromhex(token[3:5]))
        return bool(self._utf8.getstate()[0])  # bytes that it waits with

    def _flush(self) -> str:
        """Text of the ids held, as it stands behind the opening: "To be" without its first 2 characters is " be"."""
        text = self._tokenizer.sp.decode(self._opening + self._held)[self._shown :]
        if not self._shown:
            self._opening, self._shown = self._opening + self._held, len(text)
        self._held = []
        return text
