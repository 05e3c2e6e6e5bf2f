"""The exceptions of this package, each also of the built-in type that callers expect; and its warnings."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

MAX_ENTRIES = 10  # of a list in a message
MAX_MESSAGE = 4000  # characters
_HEARD: list[list[str]] = []


def listed(entries: Collection[str], separator: str = ", ") -> str:
    """The first ``MAX_ENTRIES`` entries and the number of the others: "a, b, c and 999,997 more"."""
    shown = separator.join(list(entries)[:MAX_ENTRIES])
    return shown if len(entries) <= MAX_ENTRIES else f"{shown} and {len(entries) - MAX_ENTRIES:,} more"


def printable(text: str) -> str:
    """``text`` as a terminal may show it: cut to ``MAX_MESSAGE``, with control characters and line ends as escapes."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str) -> None:
    """Give a ``UserWarning`` for the line outside of this package, and of torch, that led here."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("openllama", "torch"):
        frame, level = frame.f_back, level + 1
    for messages in _HEARD:
        messages.append(message)
    warnings.warn(printable(message), stacklevel=level)


@contextmanager
def heard() -> Iterator[list[str]]:
    """A list of all warnings of this package until the block ends, from all threads; they are shown as usual."""
    messages: list[str] = []
    _HEARD.append(messages)
    try:
        yield messages
    finally:
        _HEARD[:] = [others for others in _HEARD if others is not messages]


class OpenLlamaError(Exception):
    """Base of all errors of this package; the command line prints them as one line.

    Messages contain names from files: what would control a terminal is escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(OpenLlamaError, ValueError):
    """A model configuration that is invalid or unsupported, or that contradicts the weights."""


class InputError(OpenLlamaError, ValueError):
    """An invalid argument, e.g. of a forward pass or of generate."""


class BackendError(OpenLlamaError, RuntimeError):
    """An attention backend, or the compiled loops, cannot run here."""


class NumericalError(OpenLlamaError, RuntimeError):
    """Scores by which no token can be picked: NaN, or nothing but infinity where one is drawn."""


class TokenizerError(OpenLlamaError, ValueError):
    """Text that cannot be encoded, ids that cannot be decoded, or tokenizer files that cannot be read."""


class CheckpointError(OpenLlamaError):
    """Base of all errors about files of weights."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A folder, shard, index or config is missing."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """A file that is truncated, empty or not in the format of its suffix."""


class UnsafePickleError(CheckpointError, ValueError):
    """A pickle that contains anything but plain tensors; it is never executed."""


class KeyMismatchError(CheckpointError, ValueError):
    """Unknown, missing, duplicate or mis-shaped weights; the message names the first ten of each kind."""


class DestinationExistsError(CheckpointError, FileExistsError):
    """The destination already exists."""


class DestinationBusyError(CheckpointError, BlockingIOError):
    """Another process is writing to the destination."""
