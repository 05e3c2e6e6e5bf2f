"""Processes of engines, which answer in turns: one works, the others wait."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engines import ROOT, Engine
from .models import Shape

HERE = Path(__file__).parent
LARGEST_SUM = 2 * 10**9  # bytes; no cache holds a tenth of it
LARGEST_PRODUCT = 4096
PATIENCE = 1800.0  # seconds for one answer: a large model is loaded, and rounded, on a slow disk
LIMIT = "limit"  # stands for the machine itself where engines have their names


class Worker:
    """A process that answers commands (``serving``), and is ended when an answer takes longer than ``patience``."""

    def __init__(self, command: Sequence[str | Path], patience: float = PATIENCE, **environment: str) -> None:
        self.patience = patience
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip
        self.facts = self._answer()
        self.ready_seconds = time.perf_counter() - self.started

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None  # noqa: S101
        with contextlib.suppress(OSError):  # it has ended, and what it left says why
            print(json.dumps({"op": operation, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101
        late = threading.Event()
        timer = threading.Timer(self.patience, lambda: (late.set(), self.process.kill()))
        timer.daemon = True
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        if late.is_set():
            return {"error": f"no answer within {self.patience:g} seconds: the process was ended (--patience)"}
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or ["no message"]
        return {"error": f"the process ended with exit code {self.process.wait()}: {said[-1]}"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            if file is not None:
                with contextlib.suppress(OSError):  # a command that it did not live to read is still to be written
                    file.close()


def engine_command(engine: Engine, python: Path, model: Path, shape: Shape, threads: int) -> list[str | Path]:
    return [
        python, HERE / "workers.py", engine.program, engine.precision, model,
        "--vocabulary", str(shape.config.vocab_size), "--threads", str(threads),
    ]  # fmt: skip


def engine_environment(engine: Engine) -> dict[str, str]:
    """This tree for ours, nothing of it for the others."""
    return {"PYTHONPATH": str(ROOT) if engine.ours else ""}


def limit_worker(shape: Shape, threads: int, patience: float) -> Worker:
    amount = min(int(shape.weight_bytes("bf16")), LARGEST_SUM)
    size = min(2 * shape.config.hidden_size, LARGEST_PRODUCT)
    sizes = ["--bytes", str(amount), "--size", str(size), "--threads", str(threads)]
    return Worker([sys.executable, HERE / "limits.py", *sizes], patience)


def limit_rates(shape: Shape, seconds: Mapping[str, float]) -> dict[str, float]:
    """Bytes per second of "sum", operations per second of "bf16" and "int8"."""
    amount = min(int(shape.weight_bytes("bf16")), LARGEST_SUM) // 4 * 4
    operations = 2 * min(2 * shape.config.hidden_size, LARGEST_PRODUCT) ** 3
    return {name: (amount if name == "sum" else operations) / taken for name, taken in seconds.items()}


def take_turns(
    workers: Mapping[str, Worker], limit: Worker, repeats: int, operation: str, **arguments: Any
) -> dict[str, list[dict[str, Any]]]:
    """Answers of every worker, and of the limit as ``LIMIT``, by turns; the first turn warms up and does not count.

    A worker that fails is not asked again: its one answer holds the error.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in (*workers, LIMIT)}
    for turn in range(repeats + 1):
        for name, worker in (*workers.items(), (LIMIT, limit)):
            if answers[name] and "error" in answers[name][-1]:
                continue
            answer = limit.ask("measure") if worker is limit else worker.ask(operation, **arguments)
            if "error" in answer:
                answers[name] = [answer]
            elif turn:
                answers[name].append(answer)
    return answers
