"""The process of an engine answers commands: one JSON object a line comes in, one goes out."""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

Command = Callable[..., dict[str, Any]]


def private_output() -> TextIO:
    """The standard output of this process, which libraries can no longer write to: they get the standard error."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


def serve(load: Callable[[], tuple[dict[str, Command], dict[str, Any]]]) -> None:
    """``load`` returns commands by name, and facts such as a version; then commands are answered.

    When the input ends, whoever asked is gone, and this process ends, whatever it is computing.

    A command is ``{"op": NAME, ...arguments}``. The answer is what the command returns, or ``{"error": TEXT}``.
    """
    output = private_output()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def reply(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer = work()
        except Exception as error:  # it stands in the table
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=output, flush=True)
        return "error" not in answer

    commands: dict[str, Command] = {"memory": peak_memory}

    def start() -> dict[str, Any]:
        began = time.perf_counter()
        found, facts = load()
        commands.update(found)
        return {**facts, "load_seconds": time.perf_counter() - began}

    if not reply(start):
        return
    while True:
        command = json.loads(lines.get())
        operation = commands[command.pop("op")]
        reply(lambda operation=operation, command=command: operation(**command))


def _read(lines: queue.SimpleQueue[str]) -> None:
    with open(0, encoding="utf-8", closefd=False) as commands:  # sys.stdin would be locked when Python ends
        for line in commands:
            lines.put(line)
    os._exit(0)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory() -> dict[str, Any]:
    """The largest resident memory so far, in bytes; mapped files count."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def resident() -> int:
    """Bytes of resident memory, now."""
    return _status("VmRSS")


def peak_of(work: Callable[[], object]) -> int:
    """The largest resident memory during ``work``, in bytes, as Linux knows it."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # forget the peak so far
    work()
    return _status("VmHWM")


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{field}:"))
