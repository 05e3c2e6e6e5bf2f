"""Small files that are read as a whole: a limit on their size is checked before one byte is read.

A checkpoint comes from strangers. A file of nothing may be a terabyte long, a file of brackets may nest 100,000 deep,
and a name may belong to a pipe that never ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openllama.errors import OpenLlamaError, listed

MAX_JSON = 2**23  # bytes; the index of 10,000 layers has as many, and Python needs up to 60 times as much memory
MAX_DEPTH = 64  # of objects and lists in JSON; copying and printing a value takes a call for each


def read_limited(path: Path, limit: int, refusal: type[OpenLlamaError]) -> bytes:
    """The bytes of a regular file; raises ``refusal`` for anything else, and for a file of more than ``limit`` bytes.

    A folder, a pipe or a device is refused before it is opened, because opening a pipe may wait for ever.
    """
    try:
        if not path.is_file():
            raise refusal(f"{path} is not a regular file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        if isinstance(error, OpenLlamaError):
            raise
        raise refusal(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise refusal(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
    return content


def read_json(path: Path, refusal: type[OpenLlamaError], unique: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; raises ``refusal`` for anything else. ``unique``: no key may occur twice."""
    content = read_limited(path, MAX_JSON, refusal)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise refusal(f"{path} holds a {type(values).__name__}, not a JSON object")
    if _depth(values, MAX_DEPTH) > MAX_DEPTH:
        raise refusal(f"{path} nests objects and lists more than {MAX_DEPTH} deep")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise ValueError(f"{listed(twice)} given twice")
    return result


def _depth(values: Any, limit: int) -> int:
    """How deep objects and lists nest in ``values``; counts no further than one above ``limit``."""
    depth, level = 0, [values]
    while level and depth <= limit:
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        depth += 1
    return depth
