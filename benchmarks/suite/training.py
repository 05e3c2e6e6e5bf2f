"""Training steps of this package and of current transformers, in turns, and the memory that they need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .engines import ROOT
from .models import Shape
from .rows import THEIRS
from .turns import HERE, LIMIT, Worker, limit_rates, limit_worker, take_turns

Answer = dict[str, Any]
TOLERANCE = 0.02  # of the losses, which are about ln(vocab_size); half precision rounds LayerNorm(E)
KEPT = ", memory kept"  # a row whose name ends so has the environment of the next line
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # glibc gives nothing back
MEMORY_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # all blocks above 1 MiB, at once: a limit that it raises else
NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Steps:
    """What is measured: forward and backward of one sequence of so many tokens, without dropout."""

    shape: Shape
    tokens: int
    dtype: str
    threads: int
    patience: float
    peer: Path | None = None  # the interpreter that has transformers

    @property
    def operations(self) -> int:
        """Those of the products: forward, and twice as many backward; attention left out."""
        return 6 * self.tokens * (self.shape.layer_weights + self.shape.head_weights)

    def times(self, rows: Sequence[str], repeats: int) -> tuple[dict[str, list[Answer]], list[Answer]]:
        """Answers of each row, by turns, and those of the products alone, at the rate of one large product."""
        workers = {row: self._worker(row) for row in rows}
        limit = limit_worker(self.shape, self.threads, self.patience)
        try:
            ready = {row: worker for row, worker in workers.items() if "error" not in worker.facts}
            answers = take_turns(ready, limit, repeats, "step")
            products = [self._products(answer) for answer in answers.pop(LIMIT)]
        finally:
            for worker in (*workers.values(), limit):
                worker.close()
        failed = {row: [worker.facts] for row, worker in workers.items() if row not in answers}
        return _agreeing(answers | failed), products

    def memory(self, rows: Sequence[str]) -> dict[str, list[Answer]]:
        """The memory of each row, in a process of its own."""
        answers = {}
        for row in rows:
            answers[row] = [_peak(self._worker(row, **MEMORY_RETURNED))]
        return _agreeing(answers)

    def _products(self, limit: Answer) -> Answer:
        if "error" in limit:
            return limit
        return {"seconds": [self.operations / limit_rates(self.shape, limit["seconds"])["bf16"]]}

    def _worker(self, row: str, **environment: str) -> Worker:
        name = row.removesuffix(KEPT)
        theirs = name in THEIRS
        shape = {name: getattr(self.shape.config, name) for name in NAMES}
        return Worker(
            [self.peer if theirs and self.peer else sys.executable, HERE / "steps.py", name,
             "--shape", json.dumps(shape), "--tokens", str(self.tokens), "--dtype", self.dtype,
             "--threads", str(self.threads)],
            self.patience, PYTHONPATH="" if theirs else str(ROOT),
            **environment, **(KEPT_MEMORY if row != name else {}),
        )  # fmt: skip


def prompts(of: Steps, lengths: Sequence[int]) -> dict[str, Answer]:
    """Memory of prompts of these lengths, with two layers of the shape.

    Each has a process of its own: in one, a prompt would use again what the C library kept of the one before.
    """
    shape = {name: getattr(of.shape.config, name) for name in NAMES} | {"num_hidden_layers": 2}
    command = [sys.executable, HERE / "long.py", "--shape", json.dumps(shape), "--tokens", str(max(lengths)),
               "--threads", str(of.threads)]  # fmt: skip
    found = {}
    for tokens in lengths:
        answer = _peak(Worker(command, of.patience, PYTHONPATH=str(ROOT)), tokens=tokens)
        facts = {"tokens": tokens, "dtype": "bfloat16", "shape": f"{of.shape.name}, two layers"}
        found[f"prompt of {tokens} tokens"] = {**facts, **answer}
    return found


def _peak(worker: Worker, **arguments: int) -> Answer:
    """The one answer of a process, which ends then."""
    answer = worker.facts if "error" in worker.facts else worker.ask("peak", **arguments)
    worker.close()
    return answer


def _agreeing(answers: dict[str, list[Answer]]) -> dict[str, list[Answer]]:
    """``answers``, or errors where the losses differ: then these are not the same model."""
    losses = [answer["loss"] for of in answers.values() for answer in of if "loss" in answer]
    if not all(abs(loss - losses[0]) <= TOLERANCE for loss in losses):  # NaN, too
        return {row: [{"error": f"the losses are {losses}: not the same model"}] for row in answers}
    return answers


def missing(peer: Path) -> str | None:
    """Why transformers cannot be compared with, or None if it can."""
    if not peer.is_file():
        return f"{peer}: no such file"
    code = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    try:
        found = subprocess.run([peer, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{peer} cannot be run: {error.strerror}"
    if found.returncode:
        said = found.stderr.strip().splitlines() or ["no message"]
        return f"{peer} lacks torch or transformers ({said[-1]}); install both"
    torch_version, version = found.stdout.split()
    if int(version.split(".")[0]) < 5:
        return f"{peer} has transformers {version}; version 5 is needed"
    if torch_version != torch.__version__:
        return f"{peer} has torch {torch_version}, this interpreter {torch.__version__}; they must be the same"
    return None
