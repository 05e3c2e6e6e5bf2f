"""The command line: ``openllama convert | inspect | verify | diff | generate | chat``, also ``python -m openllama``.

Results go to stdout, messages to stderr. Input and output are UTF-8 on every system. An error is printed
as one line, with exit code 1; ``--debug`` shows the traceback. Ctrl-C, SIGTERM and SIGHUP end with one line and exit
code 128 + the number of the signal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from openllama import __version__
from openllama.cli import chat, checkpoints, generate
from openllama.cli.common import TEXT
from openllama.errors import OpenLlamaError


class Terminated(SystemExit):
    """Raised where a signal that ends the process arrives; ``code`` is 128 and the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.code: int = 128 + number
        self.name = signal.Signals(number).name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_closed_streams()
    options = _parser().parse_args(arguments)
    _use_utf8()
    try:
        with warnings.catch_warnings(), _signals_raise():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            options.run(options)
            sys.stdout.flush()  # errors of writing are errors of the command
    except KeyboardInterrupt as interruption:
        _print_error("\ninterrupted", *interruption.args)
        return 130
    except Terminated as end:
        _print_error(f"ended by {end.name}", *(text for text in end.args if text != end.code))
        return end.code
    except BrokenPipeError:
        return 141
    except (OpenLlamaError, OSError) as error:
        if options.debug:
            raise
        _print_error("openllama", error)
        return 1
    finally:
        _flush(sys.stdout)
    return 0


def _print_error(*texts: object) -> None:
    with contextlib.suppress(OSError):  # nobody can be told
        print(*texts, sep=": ", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``Terminated``, so that files are closed and removed; ``nohup`` keeps its meaning."""

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            if (number := getattr(signal, name, None)) and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_closed_streams() -> None:
    """Give streams that were closed (``2>&-``) to nobody: the next file opened would get their numbers, and output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the end


def _flush(stream: TextIO) -> None:
    """Write what a stream still holds; if that fails, send it to nobody, so that Python does not try again at its end.

    The failure itself has been told before, or there was another error.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nobody:
            os.dup2(nobody.fileno(), stream.fileno())


def _use_utf8() -> None:
    """Read and write UTF-8 instead of the locale's encoding, which cannot encode Chinese in a pipe on Windows."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # a stream keeps its encoding after the first read
                stream.reconfigure(**TEXT)


def _show_warning(message: Warning | str, *where: Any) -> None:
    """Print a warning as one line, without its place in the code."""
    _print_error("openllama", message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openllama", description="Open-Llama checkpoints: convert, examine, run.")
    parser.add_argument("--version", action="version", version=f"openllama {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (checkpoints, generate, chat):
        module.add_commands(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
