"""A training step of this package, and of the Llama of current transformers with the same weights: time and memory.

    python benchmarks/training.py --peer-python PEER_VENV/bin/python [--memory] [--json FILE]

The models live in processes of their own, each with the same random weights and ids; one works while the others wait,
so what else the machine does hits all. A figure is the median of the repeats. The limit is the time that the products
of a step would take at the rate of one large product, in the type that is fastest, in the same run. With ``--memory``
each takes one step, and the kernel reports the peak of its resident memory (Linux).

PEER_VENV needs transformers 5 and the same version of torch as here, but not this package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from suite.models import SHAPES, Shape
from suite.options import check
from suite.report import summary
from suite.rows import DTYPES, FAST, PLAIN, ROWS, THEIRS
from suite.training import KEPT, NAMES, Steps, missing
from suite.turns import PATIENCE

from openllama import OpenLlamaConfig
from openllama.checkpoint.folders import write_whole
from openllama.errors import ConfigError

MIB = 2**20
Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def main() -> int:
    options = parsed()
    if any(row in THEIRS for row in options.rows) and (problem := missing(options.peer_python)):
        print(f"training.py: --peer-python {problem}", file=sys.stderr)
        return 1
    tokens = options.tokens
    steps = Steps(options.shape, tokens, options.dtype, options.threads, options.patience, options.peer_python)
    rows = [*options.rows, *(row + KEPT for row in options.rows if options.keep_memory)]
    given = {name: getattr(options, name) for name in (*NAMES, "dtype", "threads")} | {"tokens": tokens}
    try:
        if options.memory:
            answers = steps.memory(rows)
        else:
            answers, products = steps.times(rows, options.repeats)
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130
    errors = {row: of[0]["error"] for row, of in answers.items() if "error" in of[0]}
    found = {row: of for row, of in answers.items() if row not in errors}
    versions = {answer["version"] for of in found.values() for answer in of}
    given |= {"torch": torch.__version__, "of": " and ".join(sorted(versions))}
    result = {"shape": given, "errors": errors}
    if options.memory:
        result |= {"rows": memories(found)}
    else:
        result |= {"rows": times(found, products), "limit": limit(products)}
        if failed := [answer["error"] for answer in products if "error" in answer]:
            errors["products alone"] = failed[0]
    print(memory_table(result) if options.memory else time_table(result))
    if options.json:
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    for row, error in errors.items():
        print(f"training.py: {row}: {error}", file=sys.stderr)
    return 1 if errors else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="interpreter that has transformers 5 and the same torch")
    for name in NAMES:
        default = getattr(SHAPES["A"].config, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="of the one sequence (default: 256, with --memory 2048)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: the first and two of ours; --memory: all")
    parser.add_argument("--memory", action="store_true", help="the peak of the memory, not the time")
    parser.add_argument("--keep-memory", action="store_true", help="each row also with freed memory kept by glibc")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for a step (default: %(default)g)")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    options = parser.parse_args()
    if options.tokens is None:
        options.tokens = 2048 if options.memory else 256
    check(parser, options, ("tokens", "threads", "repeats"))
    try:
        options.shape = Shape("given", OpenLlamaConfig(**{name: getattr(options, name) for name in NAMES}))
    except ConfigError as error:
        parser.error(str(error))
    if options.memory and not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is read from /proc, which this system does not have; run it on Linux")
    options.rows = options.rows or (ROWS if options.memory else (THEIRS[0], PLAIN, FAST))
    if not options.peer_python and any(row in THEIRS for row in options.rows):
        parser.error("--peer-python is needed: the interpreter of a virtual environment with transformers 5")
    return options


def limit(products: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the products alone; None where they could not be measured."""
    if any("error" in answer for answer in products):
        return None
    return summary(answer["seconds"][0] for answer in products)["median"]


def times(answers: Rows, products: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    least = limit(products)
    for row, of in answers.items():
        taken = summary(answer["seconds"][0] for answer in of)
        first = next(iter(rows.values()), {}).get("seconds", taken)
        rows[row] = {
            "seconds": taken,
            "forward": summary(answer["forward"] for answer in of)["median"],
            "times_the_first": first["median"] / taken["median"],
            "of_the_limit": None if least is None else least / taken["median"],
            "loss": of[0]["loss"],
        }
    return rows


def time_table(result: Mapping[str, Any]) -> str:
    alone = "not measured" if result["limit"] is None else f"{result['limit']:.3g} s"
    lines = [
        f"{_shape(result)}; products alone: {alone}", "",
        "| forward and backward | seconds | lowest - highest | of it forward | times the first | of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, row in result["rows"].items():
        share = "-" if row["of_the_limit"] is None else f"{row['of_the_limit']:.0%}"
        lines.append(
            "| {} | {median:.3g} | {min:.3g} - {max:.3g} | ".format(name, **row["seconds"])
            + f"{row['forward']:.3g} | {row['times_the_first']:.2f} | {share} |"
        )
    return "\n".join(lines)


def memories(answers: Rows) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for row, [of] in answers.items():
        first = next(iter(rows.values()), of)
        rows[row] = {**of, "relative": of["bytes"] / first["bytes"]}
    return rows


def memory_table(result: Mapping[str, Any]) -> str:
    lines = [
        _shape(result), "", "| MiB | before | peak | peak - parameters - gradients | relative to the first | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, row in result["rows"].items():
        sizes = " | ".join(f"{row[of] / MIB:.0f}" for of in ("before", "peak", "bytes"))
        lines.append(f"| {name} | {sizes} | {row['relative']:.2f} | {row['loss']:.4f} |")
    return "\n".join(lines)


def _shape(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in result["shape"].items())


if __name__ == "__main__":
    sys.exit(main())
