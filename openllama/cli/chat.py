"""``openllama chat``: a conversation in the terminal, or over a pipe, one question per line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from openllama.chat import ChatSession, ChatTemplate
from openllama.cli.common import Commands, add_generation_options, add_model_options, generation_arguments, load
from openllama.errors import OpenLlamaError

HELP = """\
/reset   forget the conversation          Ctrl-C  stop the answer
/help    show this                        Ctrl-D  quit, like /exit
A line that ends in \\ continues in the next line."""


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("chat", help="talk to a model that was trained on conversations")
    add_model_options(command)
    command.add_argument(
        "--template",
        type=Path,
        help="file with the format of a turn, contains {prompt} and {answer} (default: the format of V1 and V2)",
    )
    add_generation_options(command, max_new_tokens=256)
    command.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> None:
    template = ChatTemplate.from_file(options.template) if options.template else ChatTemplate()
    model, tokenizer = load(options)
    arguments = generation_arguments(options, model, tokenizer)
    max_new_tokens = arguments["generation_config"].max_new_tokens or options.default_new_tokens
    session = ChatSession(model, tokenizer, template, max_new_tokens, **arguments)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
        print(HELP, file=sys.stderr)
    while True:
        try:
            line = _read(interactive)
            if line == "/exit":
                break
            _respond(session, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D quits)", file=sys.stderr)
    if interactive:
        print(file=sys.stderr)


def _read(interactive: bool) -> str:
    """Read one question, which may span several lines; raises EOFError at the end of input."""
    line = input("> " if interactive else "")
    while line.endswith("\\"):
        line = line[:-1] + "\n"
        with contextlib.suppress(EOFError):  # the input ends here: ask what was read
            line += input(". " if interactive else "")
    return line.strip()


def _respond(session: ChatSession, line: str) -> None:
    """Run a command, or print the answer to a question and its speed."""
    if line == "/reset":
        session.reset()
        print("(the conversation is forgotten)", file=sys.stderr)
    elif line == "/help":
        print(HELP, file=sys.stderr)
    elif line.startswith("/"):
        print(f"({line.split()[0]} is not a command; /help lists the commands)", file=sys.stderr)
    elif line:
        try:
            _answer(session, line)
        except OpenLlamaError as error:  # concerns this question only; the conversation continues
            print(f"({error})", file=sys.stderr)


def _answer(session: ChatSession, question: str) -> None:
    pieces = session.ask(question)
    if session.dropped:
        what = "turn is" if session.dropped == 1 else f"{session.dropped} turns are"
        print(f"(no room: the oldest {what} forgotten)", file=sys.stderr)
    start = time.perf_counter()
    with contextlib.closing(pieces):
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=sys.stderr)
    print(flush=True)
    seconds = time.perf_counter() - start
    print(f"({session.answered} tokens, {session.answered / seconds:.1f} tokens/s)", file=sys.stderr)
