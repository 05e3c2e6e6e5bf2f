"""Time of one training step: ``model.loss`` and the Llama of current transformers, on the same weights, in turns.

    python benchmarks/training.py --peer-python PEER_VENV/bin/python [--json FILE]

The models live in two processes, each with the same random weights and ids (see ``loss_memory.py``); one works while
the other waits, so what else the machine does hits both. A figure is the median of the repeats. The limit is the
time that the products of a step would take at the rate of one large product in the same type or in float32, whichever
is faster, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import loss_memory

KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # glibc gives nothing back
PRODUCT_SECONDS = 0.3  # how long the rate of products is measured
ROWS = tuple(row for row in loss_memory.ROWS if row != "transformers, layers recomputed")


class Worker:
    """A process that holds one model and takes a step of it for each line that it is sent."""

    def __init__(self, row: str, options: argparse.Namespace) -> None:
        name = row.removesuffix(", memory kept")
        theirs = name in loss_memory.THEIRS
        environment = {**os.environ, "PYTHONPATH": "" if theirs else os.environ.get("PYTHONPATH", "")}
        if row != name:
            environment |= KEPT_MEMORY
        command = [options.peer_python if theirs else sys.executable, __file__, *sys.argv[1:], "--measure", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()  # version, loss, number of parameters

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None  # noqa: S101 - a pipe, as asked for above
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"training.py: {self.process.args} ended with code {self.process.wait()}")
        return json.loads(line)


def main() -> int:
    options = _options()
    if options.measure:
        serve(options)
        return 0
    compares = any(row in loss_memory.THEIRS for row in options.rows)
    if compares and (problem := loss_memory.missing(Path(options.peer_python))):
        print(f"training.py: {problem}", file=sys.stderr)
        return 1
    rows = [*options.rows, *(f"{row}, memory kept" for row in options.rows if options.keep_memory)]
    workers = {row: Worker(row, options) for row in rows}
    steps: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    rates = [product_rate(options)]
    for _ in range(options.repeats):
        for row, worker in workers.items():
            steps[row].append(worker.step())
        rates.append(product_rate(options))
    for worker in workers.values():
        worker.close()
    result = summary(steps, {row: worker.ready for row, worker in workers.items()}, max(rates), options)
    print(report(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    losses = [row["loss"] for row in result["rows"].values()]
    if max(losses) - min(losses) > loss_memory.TOLERANCE:
        print(f"training.py: the losses {losses} differ: not the same model", file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = loss_memory.common_options(__doc__, tokens=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["transformers", "model.loss"])
    parser.add_argument("--keep-memory", action="store_true", help="each row also with freed memory kept by glibc")
    parser.add_argument("--json", help="write the result to this file, too")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.peer_python and any(row in loss_memory.THEIRS for row in options.rows):
        parser.error("--peer-python is needed: the interpreter of a virtual environment with transformers 5")
    return options


def serve(options: argparse.Namespace) -> None:
    """Build the model, warm up, and take a step for each line of standard input."""
    import torch

    torch.set_num_threads(options.threads)
    torch.set_default_dtype(getattr(torch, options.dtype))
    shape = {name: getattr(options, name) for name in loss_memory.SHAPE} | {"max_position_embeddings": options.tokens}
    build = loss_memory.build_peer if options.measure in loss_memory.THEIRS else loss_memory.build_ours
    model, loss_of, version = build(shape, options.measure)
    model.train()
    ids = torch.randint(options.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))

    def step() -> dict[str, float]:
        start = time.perf_counter()
        loss = loss_of(ids)
        forward = time.perf_counter() - start
        loss.backward()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)  # as an optimizer's loop does; here the memory is needed by the other process
        return {"seconds": seconds, "forward": forward, "loss": loss.item()}

    for _ in range(2):
        warm = step()
    print(json.dumps({"version": version, "torch": torch.__version__, "loss": warm["loss"]}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def product_rate(options: argparse.Namespace) -> float:
    """Operations per second of one large product, in the type or in float32, which may be faster."""
    import torch

    torch.set_num_threads(options.threads)
    return max(_rate(options.hidden_size, getattr(torch, name)) for name in {options.dtype, "float32"})


def _rate(size: int, dtype: Any) -> float:
    import torch
    import torch.nn.functional as F

    left, right = torch.randn(2, size, size).to(dtype)
    F.linear(left, right)
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < PRODUCT_SECONDS:
        F.linear(left, right)
        count += 1
    return count * 2 * size**3 / seconds


def operations(options: argparse.Namespace) -> int:
    """Those of the products of a step: forward, and twice as many backward; attention left out."""
    width = options.hidden_size
    layer = 4 * width**2 + 3 * width * options.intermediate_size
    return 6 * options.tokens * (options.num_hidden_layers * layer + options.vocab_size * width)


def summary(
    steps: dict[str, list[dict[str, float]]], ready: dict[str, Any], rate: float, options: argparse.Namespace
) -> dict[str, Any]:
    limit = operations(options) / rate
    first = statistics.median(step["seconds"] for step in next(iter(steps.values())))
    rows = {}
    for row, taken in steps.items():
        seconds = [step["seconds"] for step in taken]
        median = statistics.median(seconds)
        rows[row] = {
            "version": ready[row]["version"],
            "seconds": median,
            "lowest": min(seconds),
            "highest": max(seconds),
            "forward": statistics.median(step["forward"] for step in taken),
            "times_the_first": first / median,
            "of_the_limit": limit / median,
            "loss": ready[row]["loss"],
        }
    shape = {name: getattr(options, name) for name in (*loss_memory.SHAPE, "tokens", "dtype", "threads", "repeats")}
    torch_version = next(iter(ready.values()))["torch"]
    return {"shape": shape, "torch": torch_version, "operations_per_second": rate, "limit": limit, "rows": rows}


def report(result: dict[str, Any]) -> str:
    """A table in Markdown."""
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    lines = [
        f"{shape}; torch {result['torch']}; limit {result['limit']:.3g} s at "
        f"{result['operations_per_second'] / 1e12:.2f} TFLOP/s",
        "",
        "| forward and backward | seconds | lowest - highest | of it forward | times the first | of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} ({row['version']}) | {row['seconds']:.3g} | {row['lowest']:.3g} - {row['highest']:.3g} | "
            f"{row['forward']:.3g} | {row['times_the_first']:.2f} | {row['of_the_limit']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
