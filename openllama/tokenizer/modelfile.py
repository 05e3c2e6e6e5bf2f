"""What a tokenizer.model holds: the pieces with scores and kinds, and how a text is normalised before it is cut.

The file is a protocol buffer, ``ModelProto`` of ``sentencepiece_model.proto``. The package sentencepiece tells
neither the normalisation nor which pieces are user-defined. A message is a sequence of fields, each a key and a value;
key = number * 8 + kind. Kind 0 is an integer of 7 bits a byte, 2 a length and as many bytes, 5 four bytes, 1 eight.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from openllama.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
BPE = 2  # of the algorithms: 1 unigram, 2 BPE, 3 words, 4 characters


@dataclass
class ModelFile:
    """The parts of a sentencepiece model that other programs need; the defaults are those of the format."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # BPE merges the pair whose piece has the highest
    kinds: list[int] = field(default_factory=list)
    algorithm: int = 1
    rule: str = ""  # name of the normalisation, e.g. "nfkc"
    charsmap: bytes = b""  # compiled rules of normalisation such as NFKC; none for the identity
    adds_space: bool = True  # "To" is read as " To"
    squeezes_spaces: bool = True  # several spaces are read as one, and those at the ends as none


def parse_model_file(content: bytes) -> ModelFile:
    """Parse the bytes of a tokenizer.model; raises ``TokenizerError`` if they are not one."""
    model = ModelFile()
    try:
        for number, value in _fields(content):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                model.pieces.append(_bytes(piece[1]).decode())
                model.scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
                model.kinds.append(int(piece.get(3, NORMAL)))
            elif number == 2 and isinstance(value, bytes):
                model.algorithm = int(dict(_fields(value)).get(3, 1))
            elif number == 3 and isinstance(value, bytes):
                rules = dict(_fields(value))
                model.rule = _bytes(rules.get(1, b"")).decode()
                model.charsmap = _bytes(rules.get(2, b""))
                model.adds_space, model.squeezes_spaces = bool(rules.get(3, 1)), bool(rules.get(4, 1))
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise TokenizerError(f"this is not a sentencepiece model: {type(error).__name__} {error}") from error
    return model


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field."""
    place = 0
    while place < len(message):
        key, place = _integer(message, place)
        if key % 8 == 0:
            value: int | bytes
            value, place = _integer(message, place)
        else:
            size = {1: 8, 5: 4}.get(key % 8)
            if size is None:
                size, place = _integer(message, place)
            value, place = message[place : place + size], place + size
        if place > len(message) or key % 8 not in (0, 1, 2, 5):
            raise ValueError(f"a field that ends at {place} in a message of {len(message)} bytes")
        yield key // 8, value


def _integer(message: bytes, place: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, the lowest first, and the place after it."""
    number = shift = 0
    while True:
        byte = message[place]
        number, shift, place = number | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return number, place


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("an integer where bytes belong")
    return value
