"""Checks of arguments. Each function returns its argument in the form the tokenizer uses, or raises an error."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from openllama.errors import TokenizerError

#: arguments of HF's that are not taken, and what to do instead
NOT_TAKEN = {
    "is_split_into_words": ": join the words by spaces; return_offsets_mapping tells which token is of which word",
    "return_overflowing_tokens": ": slice the ids; `score` reads long texts in windows",
    "stride": ": slice the ids; `score` takes a stride for long texts",
    "return_length": ": take len() of each row of input_ids",
    "text_target": ": encode the targets in a call of their own and put their input_ids under labels",
    "text_pair_target": ": encode the targets in a call of their own and put their input_ids under labels",
    "tools": ": write them into a message",
    "documents": ": write them into a message",
    "return_assistant_tokens_mask": ": the chat template does not mark them",
    "tokenizer_kwargs": ": give padding, truncation and max_length themselves",
}


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if value not in choices:
        raise TokenizerError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def positive_or_none(name: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise TokenizerError(f"{name} must be a positive integer, got {value!r}")
    return value


def refuse(arguments: Mapping[str, Any]) -> None:
    """Refuse HF's arguments that are not taken, by name, unless they are off; ``verbose`` has nothing to silence."""
    for name, value in arguments.items():
        if name == "verbose" or (name in NOT_TAKEN and not value):
            continue
        raise TokenizerError(f"{name} is not an argument of this call{NOT_TAKEN.get(name, '')}; got {value!r}")


def checked_texts(text: Any, pair: Any) -> list[list[str]]:
    """The texts as a list, and the second texts of pairs as another if there are any."""
    if pair is not None and isinstance(text, str) != isinstance(pair, str):
        raise TokenizerError(f"text and text_pair must be two strings or two lists, got {_kind(text)}, {_kind(pair)}")
    columns = []
    for name, value in {"text": text, "text_pair": pair}.items():
        texts = [value] if isinstance(value, str) else value
        if name == "text_pair" and value is None:
            continue
        if not isinstance(texts, Sequence) or not texts:
            raise TokenizerError(f"{name} must be a str or a non-empty list of str, got {texts!r}")
        columns.append([checked_text(item, "" if isinstance(value, str) else f"{name} {i}: ")
                        for i, item in enumerate(texts)])  # fmt: skip
    if len({len(column) for column in columns}) > 1:
        raise TokenizerError(f"{len(columns[0])} texts and {len(columns[1])} text_pair; give one for each")
    return columns


def _kind(value: Any) -> str:
    return type(value).__name__


def checked_text(text: Any, where: str = "") -> str:
    """Check that text is a str that UTF-8 can encode; ``where`` begins the error message, e.g. "text 3: "."""
    if not isinstance(text, str):
        hint = "; pairs go in as two lists, (texts, text_pair)" if isinstance(text, (tuple, list)) else ""
        raise TokenizerError(f"{where}text must be a str, got {_kind(text)}{hint}")
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
