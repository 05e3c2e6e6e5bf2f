"""Text to tokens and ids. "To be</s>龘" -> "To be", "</s>", "龘" -> To ▁be </s> <0xE9> <0xBE> <0x98>: special tokens
are cut out, sentencepiece cuts the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from openllama.tokenizer.checks import checked_text
from openllama.tokenizer.offsets import Span, spans
from openllama.tokenizer.vocabulary import AddedToken, Vocabulary

SPACE = "▁"  # how sentencepiece writes a space inside a piece


class Splitter(Vocabulary):
    """A vocabulary that cuts text."""

    legacy: bool  # as HF: sentencepiece puts a space in front of the text after each special token

    def tokenize(self, text: str, split_special_tokens: bool = False) -> list[str]:
        """Tokens of a string. With ``split_special_tokens``, ``</s>`` in it is just four characters."""
        checked_text(text)
        if split_special_tokens:
            return [self._id_to_token(number) for number in self._ids(text, True)]
        tokens: list[str] = []
        for _, part in self._parts(text):
            tokens += [part] if part in self._no_split else self._pieces(part)
        return tokens

    def _ids(self, text: str, split_special_tokens: bool) -> list[int]:
        """Ids of a text, without bos and eos."""
        if split_special_tokens:
            return self._without_roles(self.sp.encode(text if self.legacy else text.replace(SPACE, " "), out_type=int))
        ids: list[int] = []
        for _, part in self._parts(text):
            ids += [self._token_to_id(part)] if part in self._no_split else self._part_ids(part)
        return ids

    def _ids_and_spans(self, text: str, split_special_tokens: bool) -> tuple[list[int], list[Span]]:
        """Ids of a text, and the characters of the text that each stands for."""
        ids: list[int] = []
        places: list[Span] = []
        if split_special_tokens:
            text = text if self.legacy else text.replace(SPACE, " ")
            pieces = self.sp.encode(text, out_type=str)
            for piece, place in zip(pieces, self._spans(text, pieces), strict=True):
                number = self.sp.piece_to_id(piece)
                # sentencepiece finds no control tokens; an unknown stretch of text can be spelt like one
                new = self._without_roles([self.sp.unk_id() if self.sp.is_control(number) else number])
                ids += new
                places += [place] * len(new)
            return ids, places
        for start, part in self._parts(text):
            if part in self._no_split:
                ids.append(self._token_to_id(part))
                places.append((max(start, 0), start + len(part)))
                continue
            pieces = self._pieces(part)
            unmarked = part if self.legacy else part.removeprefix(SPACE)
            start += len(part) - len(unmarked)
            ids += map(self._token_to_id, pieces)
            places += [(start + first, start + last) for first, last in self._spans(unmarked, pieces)]
        return ids, places

    def _spans(self, part: str, pieces: Sequence[str]) -> list[Span]:
        normal, origin = self.sp.normalize(part, with_offsets=True)
        are_bytes = [self.sp.is_byte(self.sp.piece_to_id(piece)) for piece in pieces]
        return spans(pieces, are_bytes, normal, origin, self.sp.normalize("a").startswith((SPACE, " ")))

    # ------------------------------------------------------------------ special tokens and what lies between

    def _parts(self, text: str) -> list[tuple[int, str]]:
        """Split at special and added tokens, strip the whitespace around a token if its flags say so; with places.

        "to be </s> or" -> (0, "to be "), (6, "</s>"), (10, " or"), or, if ``</s>`` strips both sides,
        (0, "to be"), (6, "</s>"), (11, "or"). Without ``legacy`` the text gets the mark ▁ in front, at place -1.
        """
        if not self.legacy:
            text = SPACE + text.replace(SPACE, " ")  # the mark tells _pieces which part is the first
        first = 0 if self.legacy else -1
        parts = [part for part in self._no_split_pattern.split(text) if part]
        if len(parts) < 2:
            return [(first, part) for part in parts]
        starts = [*accumulate(map(len, parts), initial=first)][:-1]
        self._strip_around_tokens(parts, starts)
        return [*zip(starts, parts, strict=True)]

    def _strip_around_tokens(self, parts: list[str], starts: list[int]) -> None:
        flags = {str(token): token for token in self._special_tokens() if isinstance(token, AddedToken)}
        for i, part in enumerate(parts):  # later iterations see the changes of earlier ones
            if part in self._no_split:
                token = flags.get(part, AddedToken(part, lstrip=True, rstrip=True))
                if token.rstrip and i + 1 < len(parts):
                    right = parts[i + 1]
                    parts[i + 1] = right.lstrip()
                    starts[i + 1] += len(right) - len(parts[i + 1])
                if token.lstrip and i > 0:
                    parts[i - 1] = parts[i - 1].rstrip()

    def _pieces(self, part: str) -> list[str]:
        """Pieces of a part of the text between special tokens.

        With a LLaMA model file sentencepiece adds a space to every string: "or" -> ["▁or"]. With ``legacy``
        that happens after ``</s>``, too; without it, the "or" of "</s>or" -> ["or"].
        """
        if self.legacy:
            return self.sp.encode(part, out_type=str)
        if part.startswith(SPACE):  # the mark: this part is the first
            return self.sp.encode(part[1:], out_type=str)
        pieces = self.sp.encode(part, out_type=str)
        if pieces and pieces[0].startswith(SPACE) and not part.startswith(" "):
            pieces[0] = pieces[0][1:]
        return [piece for piece in pieces if piece]

    def _part_ids(self, part: str) -> list[int]:
        """``_token_to_id`` of each of the ``_pieces``.

        sentencepiece gives the ids several times as fast, but not where a piece is unknown, as an added token can have
        its name, or loses its space.
        """
        if self.legacy or part.startswith((SPACE, " ")):
            ids: list[int] = self.sp.encode(part if self.legacy else part.removeprefix(SPACE), out_type=int)
            if self.sp.unk_id() not in ids:
                return ids
        return [*map(self._token_to_id, self._pieces(part))]

    def _without_roles(self, ids: list[int]) -> list[int]:
        """Replace the ids of special tokens by byte tokens.

        If the model file itself has a piece "<e>" and "<e>" has a role: "<e>" -> <0x3C> <0x65> <0x3E>.
        """
        special = set(self.all_special_ids) - {self.sp.unk_id()}
        plain: list[int] = []
        for number in ids:
            if number in special:
                characters = self.sp.id_to_piece(number).replace(SPACE, " ")
                plain += [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in characters.encode()]
            else:
                plain.append(number)
        return plain
