"""From the start of a process to its first token, and what an import takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engines import ROOT, Engine
from .models import TINY, Shape
from .turns import Worker, engine_command, engine_environment

Answer = dict[str, Any]  # as of a worker: "seconds", or an "error"
IMPORT = "import time, torch; start = time.perf_counter(); import openllama; print(time.perf_counter() - start)"
BUILD = (
    "import time, torch; start = time.perf_counter(); from openllama.inference import kernels, structs, threshold; "
    "kernels.library(); threshold.most_rows(structs.KINDS[torch.bfloat16], torch.bfloat16, torch.get_num_threads()); "
    "print(time.perf_counter() - start)"
)


def first_tokens(
    engines: Mapping[Engine, tuple[Path, Path]], shape: Shape, threads: int, repeats: int, patience: float
) -> dict[str, list[Answer]]:
    """Seconds from the start of a process to the first token after 8, and of reading the same files once, in turns.

    ``engines``: each with its interpreter and its model. The first turn brings the files into the page cache.
    """
    found: dict[str, list[Answer]] = {}
    failed = set()
    for turn in range(repeats + 1):
        for engine, (python, model) in engines.items():
            if engine in failed:
                continue
            read = _read(model)
            command = [*engine_command(engine, python, model, shape, threads), "--first"]
            worker = Worker(command, patience, **engine_environment(engine))
            worker.close()
            if "error" in worker.facts:
                found[f"first token, {engine.name}"] = [worker.facts]
                failed.add(engine)
            elif turn:
                found.setdefault(f"first token, {engine.name}", []).append({"seconds": [worker.ready_seconds]})
                found.setdefault(f"reading its files once, {engine.name}", []).append({"seconds": [read]})
    return found


def _read(path: Path) -> float:
    """Seconds of reading a file, or the files in a folder, once."""
    start, buffer = time.perf_counter(), bytearray(2**23)
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    return time.perf_counter() - start


def processes(repeats: int) -> dict[str, list[Answer]]:
    """Seconds of whole processes, in turns: an import, and a first token by the command line; and of our import alone.

    This one is told by the process: it takes less than two processes differ by.
    """
    commands: dict[str, list[str]] = {
        "import torch": ["-c", "import torch"],
        "openllama generate, tiny model, one token": [
            "-m", "openllama", "generate", str(TINY), "--prompt", "ROMEO:", "--max-new-tokens", "1",
        ],
    }  # fmt: skip
    found: dict[str, list[Answer]] = {name: [] for name in commands}
    found["import openllama, after torch"] = [_told(IMPORT) for _ in range(repeats)]
    for turn in range(repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            answer = _run(command)
            if turn or "error" in answer:
                found[name].append(answer if "error" in answer else {"seconds": [time.perf_counter() - start]})
    return found


def builds() -> dict[str, list[Answer]]:
    """Seconds until the compiled loops are ready, where they must be built and where they have been."""
    found: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for when in ("loops built now", "loops built before"):
            found[when] = [_told(BUILD, OPENLLAMA_CACHE=folder)]
    return found


def _told(code: str, **environment: str) -> Answer:
    """Seconds that a process prints."""
    answer = _run(["-c", code], **environment)
    return answer if "error" in answer else {"seconds": [float(answer["printed"])]}


def _run(command: Sequence[str], **environment: str) -> Answer:
    """What a process ``printed``, or its ``error``."""
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=everything)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"the process ended with exit code {done.returncode}: {said[-1]}"}
    return {"printed": done.stdout}
