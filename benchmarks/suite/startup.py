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

BUILD = (
    "import time, torch; start = time.perf_counter(); from openllama.inference import compiler, structs, threshold; "
    "compiler.library(); threshold.most_rows(structs.KINDS[torch.bfloat16], torch.bfloat16, torch.get_num_threads()); "
    "print(time.perf_counter() - start)"
)


def first_tokens(
    engines: Mapping[Engine, tuple[Path, Path]], shape: Shape, threads: int, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Seconds from the start of a process to the first token after 8, and of reading the same files once, in turns.

    ``engines``: each with its interpreter and its model. The first turn brings the files into the page cache.
    """
    found: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for turn in range(repeats + 1):
        for engine, (python, model) in engines.items():
            answers = found[engine.name]
            if answers and "error" in answers[-1]:
                continue
            read = _read(model)
            worker = Worker(
                [*engine_command(engine, python, model, shape, threads), "--first"], **engine_environment(engine)
            )
            worker.close()
            if "error" in worker.facts:
                found[engine.name] = [worker.facts]
            elif turn:
                answers.append({"seconds": [worker.ready_seconds], "read": read})
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


def processes(repeats: int) -> dict[str, list[float]]:
    """Seconds of whole processes, in turns: two imports, and a first token by the command line."""
    commands: dict[str, list[str]] = {
        "import torch": ["-c", "import torch"],
        "import openllama": ["-c", "import openllama"],
        "openllama generate, tiny model, one token": [
            "-m", "openllama", "generate", str(TINY), "--prompt", "ROMEO:", "--max-new-tokens", "1",
        ],
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            _run(command)
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def builds() -> dict[str, float]:
    """Seconds until the compiled loops are ready, where they must be built and where they have been."""
    with tempfile.TemporaryDirectory() as folder:
        return {when: float(_run(["-c", BUILD], OPENLLAMA_CACHE=folder)) for when in ("built now", "built before")}


def _run(command: Sequence[str], **environment: str) -> str:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=everything)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout
