"""Checks of arguments. Each function returns its argument in the form the tokenizer uses, or raises an error."""

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
    """Check that text is a str that UTF-8 can encode; ``where`` begins the error message, e.g. "text 3: "."""
    if not isinstance(text, str):
        raise TokenizerError(f"{where}text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(f"{where}lone surrogate {code} at position {error.start} cannot be encoded") from None
    return text


def checked_ids(ids: Any) -> list[int]:
    """List of the integers in a sequence, an array or a 1-D tensor; a single integer gives a list of one."""
    numbers = to_list(ids)
    try:
        return [operator.index(n) for n in (numbers if isinstance(numbers, Sequence) else [numbers])]
    except TypeError:
        raise TokenizerError("token ids must be one sequence of integers; batch_decode takes several") from None


def to_list(value: Any) -> Any:
    """Convert a tensor or an array to a list; anything else is returned unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value
