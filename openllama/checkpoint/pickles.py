"""A look at a pickle before it is read: tuples can be small in the file and endless to compare.

t1 = (1, 1); t2 = (t1, t1); ... t40 = (t39, t39)     five bytes each, but {t40: 0} hashes 2 ** 40 numbers
"""

from __future__ import annotations

import pickletools
from typing import BinaryIO

MAX_TUPLE = 10**5  # elements, those of inner tuples included
_MARK, _TUPLES = 0, {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check_tuples(file: BinaryIO) -> None:
    """Read one pickle, up to its end, without doing what it says; raise ValueError for a tuple above ``MAX_TUPLE``.

    Also raises ValueError or IndexError if it is no pickle.
    """
    stack: list[int] = []  # the number of elements of each value, 1 for all but tuples
    memo: dict[object, int] = {}
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, 1))
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code.name == "MARK":
            stack.append(_MARK)
        elif code.name == "TUPLE" or code.name in _TUPLES:
            inner = _popped(stack, _TUPLES.get(code.name))
            stack.append(1 + sum(inner))
            if stack[-1] > MAX_TUPLE:
                raise ValueError(f"it has a tuple of more than {MAX_TUPLE:,} elements")
        elif code.name != "STOP":
            if pickletools.stackslice in code.stack_before:
                _popped(stack, None)
            before = [
                kind for kind in code.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)
            ]
            _popped(stack, len(before))
            stack += [1] * len(code.stack_after)


def _popped(stack: list[int], count: int | None) -> list[int]:
    """Take ``count`` values from the stack, or all down to the last mark, which goes with them."""
    values: list[int] = []
    while count is None or len(values) < count:
        value = stack.pop()
        if count is None and value == _MARK:
            break
        values.append(value)
    return values
