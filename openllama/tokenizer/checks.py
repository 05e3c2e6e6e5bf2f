"""Arguments checked: each function returns what it was given in the form the tokenizer works with, or refuses it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from openllama.errors import TokenizerError


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if value not in choices:
        raise TokenizerError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def checked_text(text: Any, where: str = "") -> str:
    """A str that UTF-8 can write; ``where`` opens the error, e.g. "text 3: "."""
    if not isinstance(text, str):
        raise TokenizerError(f"{where}text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(f"{where}lone surrogate {code} at position {error.start} cannot be encoded") from None
    return text


def checked_ids(ids: Any) -> list[int]:
    """Integers of a sequence, an array or a tensor of one dimension, or of a single number."""
    numbers = to_list(ids)
    try:
        return [operator.index(n) for n in (numbers if isinstance(numbers, Sequence) else [numbers])]
    except TypeError:
        raise TokenizerError("token ids must be one sequence of integers; batch_decode takes several") from None


def to_list(value: Any) -> Any:
    """The list in a tensor or an array; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
