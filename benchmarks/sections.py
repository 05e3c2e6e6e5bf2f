"""Runs the sections of a benchmark one after the other, each in a process of its own, within one budget of time.

A section is a function that yields cases: a name, and a function that returns figures. What fails becomes a row with
the error, and the next case goes on; what a process wrote before it crashed or ran out of time is kept. So one run on a
machine that is hard to get brings home all that it can give.
"""

from __future__ import annotations

import gc
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

Row: TypeAlias = dict[str, Any]  # "case", and either figures, "message", "skipped" or "error"
Case: TypeAlias = tuple[str, Callable[[], Row]]


def run_cases(cases: Iterator[Case], deadline: float, save: Callable[[list[Row]], None]) -> list[Row]:
    """Run the cases of a section until ``deadline`` (of ``time.monotonic``); ``save`` gets all rows after each."""
    rows: list[Row] = []
    while (row := _next_row(cases, deadline)) is not None:
        rows.append(row)
        save(rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def _next_row(cases: Iterator[Case], deadline: float) -> Row | None:
    """The row of the next case; None after the last. An error between two cases ends the section with a row."""
    name = "preparation"
    try:
        name, run = next(cases)
        if time.monotonic() > deadline:
            return {"case": name, "skipped": "the time is spent"}
        return {"case": name, **run()}
    except StopIteration:
        return None
    except Exception as error:  # whatever it is, the other cases are worth having
        return {"case": name, "error": f"{type(error).__name__}: {error}"}


def run_processes(commands: Mapping[str, Sequence[str]], budget: float) -> Iterator[tuple[str, list[Row]]]:
    """Run each section's command with ``--json FILE --seconds N`` added, and yield its name and rows.

    A section may use an equal share of what is left of the ``budget`` in seconds: 4 sections and 480 s: 120 s; if it
    took 60, the next may use 140.
    """
    deadline = time.monotonic() + budget
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, command) in enumerate(commands.items()):
            share = (deadline - time.monotonic()) / (len(commands) - number)
            yield name, _run_process(command, share, Path(folder, f"{name}.json"))


def _run_process(command: Sequence[str], share: float, file: Path) -> list[Row]:
    if share <= 0:
        return [{"case": "all", "skipped": "the time is spent"}]
    problem = None
    try:
        # The cases stop by themselves after 90 % of the time; one that hangs is ended.
        options = ["--json", str(file), "--seconds", str(0.9 * share)]
        code = subprocess.run([*command, *options], stdout=subprocess.DEVNULL, timeout=share).returncode
        if code not in (0, 1):  # 1: a row tells of a failure
            problem = f"the process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        problem = f"the process was ended after {share:.0f} s"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    if problem is not None:
        rows.append({"case": f"after {rows[-1]['case']}" if rows else "the first", "error": problem})
    return rows


def failed(rows: Sequence[Row]) -> bool:
    """Whether a case had an error or did not pass."""
    return any("error" in row or row.get("passed") is False for row in rows)


def markdown(rows: Sequence[Row]) -> str:
    """A table with a column for each figure that a row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return text.replace("\n", " ").replace("|", "/")[:200]
