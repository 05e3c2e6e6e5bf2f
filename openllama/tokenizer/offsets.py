"""Where in a text its pieces lie. sentencepiece normalises a text before it cuts it:

    text      ﬁ n           characters 0 to 3
    normal    ▁ f i ▁ n     a space in front; the ligature becomes two letters
    origin    0 0 0 1 2 3   where each of these characters comes from, and the end
    pieces    ▁f  i  ▁n
    spans     0,1 0,1 1,3   both letters are the ligature; the space in front is no part of the text

Places are characters, not bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]  # the characters text[start:end]


def spans(
    pieces: Sequence[str], are_bytes: Sequence[bool], normal: str, origin: Sequence[int], space_in_front: bool
) -> list[Span]:
    """Span of each piece of a text.

    ``normal`` (N characters) and ``origin`` (N + 1 places) are what ``sp.normalize`` returns. ``are_bytes`` says which
    pieces are byte tokens: each has the span of its whole character. Where the pieces are shorter than ``normal``, its
    first characters belong to none.
    """
    ends = _ends(origin)
    if space_in_front and normal:
        ends[0] = origin[0]
    place = len(normal) - sum(_width(*piece) for piece in zip(pieces, are_bytes, strict=True))
    found: list[Span] = []
    bytes_left = 0  # of a character that byte tokens spell
    for piece, is_byte in zip(pieces, are_bytes, strict=True):
        size = 1 if is_byte else len(piece)
        found.append((origin[place], ends[place + size - 1]))
        if is_byte:
            bytes_left = (bytes_left or len(normal[place].encode())) - 1
        place += 0 if bytes_left else size
    return found


def _width(piece: str, is_byte: bool) -> int:
    """Characters of a piece; of the bytes of a character, only the first counts: it is not 0b10xxxxxx."""
    return int(piece[3:5], 16) & 0xC0 != 0x80 if is_byte else len(piece)


def _ends(origin: Sequence[int]) -> list[int]:
    """Where the characters that each normal character comes from end: at the next other place of origin."""
    ends = [origin[-1]]
    for start, following in zip(origin[-2::-1], origin[:0:-1], strict=True):
        ends.append(following if following > start else ends[-1])
    return ends[:0:-1]
