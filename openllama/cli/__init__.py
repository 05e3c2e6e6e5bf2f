"""The command line: ``openllama convert | inspect | verify | generate | chat``, also ``python -m openllama``.

Results go to stdout, messages to stderr. Input and output are UTF-8 on every system. An error is printed
as one line, with exit code 1; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from openllama import __version__
from openllama.cli import chat, checkpoints, generate
from openllama.cli.common import TEXT
from openllama.errors import OpenLlamaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    _use_utf8()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (OpenLlamaError, OSError) as error:
        if options.debug:
            raise
        print(f"openllama: {error}", file=sys.stderr)
        return 1
    return 0


def _use_utf8() -> None:
    """Read and write UTF-8 instead of the locale's encoding, which cannot encode Chinese in a pipe on Windows."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # a stream keeps its encoding after the first read
                stream.reconfigure(**TEXT)


def _show_warning(message: Warning | str, *where: Any) -> None:
    """Print a warning as one line, without its place in the code."""
    print(f"openllama: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openllama", description="Open-Llama checkpoints: convert, examine, run.")
    parser.add_argument("--version", action="version", version=f"openllama {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (checkpoints, generate, chat):
        module.add_commands(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
