"""From seconds to rows: medians, the limit beside each, and the table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .engines import Engine
from .models import Shape
from .turns import limit_rates

MEASURED = "measured"  # the status of an engine without errors


def summary(seconds: Iterable[float]) -> dict[str, float]:
    taken = list(seconds)
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken), "count": len(taken)}


def other(answers: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Seconds of answers outside of phases, or the first error; and whether the ids are those of ``plain``."""
    if errors := [answer["error"] for answer in answers if "error" in answer]:
        return {"error": errors[0]}
    found: dict[str, Any] = {"seconds": summary(second for answer in answers for second in answer["seconds"])}
    if plain and all("ids" in answer for answer in plain):
        found["same_ids"] = all(answer["ids"] == plain[0]["ids"] for answer in answers)
    return found


@dataclass(frozen=True)
class Work:
    """What a phase asks of every engine."""

    title: str
    command: str  # "prefill" or "decode"
    arguments: dict[str, int]

    @property
    def rows(self) -> int:
        return self.arguments.get("batch", 1)

    @property
    def tokens(self) -> int:
        """Tokens of a row in one pass."""
        return self.arguments["tokens"] if self.command == "prefill" else 1

    @property
    def past(self) -> int:
        """Tokens of a row that were computed before."""
        return self.arguments.get("context", 0)


def limits(shape: Shape, answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each measurement "sum", "bf16", "int8": seconds, and the rate at the median (bytes or operations a second)."""
    found = {name: summary(answer["seconds"][name] for answer in answers) for name in ("sum", "bf16", "int8")}
    rates = limit_rates(shape, {name: taken["median"] for name, taken in found.items()})
    return {name: {"seconds": taken, "rate": rates[name]} for name, taken in found.items()}


def cache_bytes(shape: Shape, work: Work) -> int:
    """Bytes of the keys and values that a pass reads."""
    return work.rows * shape.cache_bytes(work.past)


def limit_seconds(shape: Shape, precision: str, rates: Mapping[str, float], work: Work) -> tuple[float, str]:
    """The least time of a pass of ``work``, and what bounds it.

    "memory": every weight is read once, and the keys and values of earlier tokens. "products": at the rate of
    bfloat16, or for narrower weights at that of int8 where it is higher.
    """
    memory = (shape.weight_bytes(precision) + cache_bytes(shape, work)) / rates["sum"]
    rate = rates["bf16"] if precision == "bf16" else max(rates["bf16"], rates["int8"])
    products = shape.operations(work.tokens, work.rows, work.past) / rate
    return max((memory, "memory"), (products, "products"))


def row(
    shape: Shape, engine: Engine, phase: str, work: Work, answers: Sequence[Mapping[str, Any]],
    limit: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:  # fmt: skip
    """A line of the table; None where it compares with a ``limit`` that was not measured."""
    taken = summary(second for answer in answers for second in answer["seconds"])
    least = bound = None
    if limit is not None:
        least, bound = limit_seconds(shape, engine.precision, {name: of["rate"] for name, of in limit.items()}, work)
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "ours": engine.ours,
        "phase": work.command,
        "phase_key": phase,
        "phase_name": work.title,
        "seconds": taken,
        "tokens_per_second": work.rows * work.tokens / taken["median"],
        "operations": shape.operations(work.tokens, work.rows, work.past),
        "rows": work.rows,
        "weight_bytes": shape.weight_bytes(engine.precision),
        "cache_bytes": cache_bytes(shape, work),
        "bytes_per_second": None if limit is None else limit["sum"]["rate"],  # that the machine reads
        "limit_seconds": least,
        "bound": bound,
        "of_limit": None if least is None else least / taken["median"],
    }


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """The name of the processor, with what of matrix units and 16-bit products it has where Linux says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
             if flag in facts.get("flags", "").split()]  # fmt: skip
    family = f"family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else ""
    return ", ".join(filter(None, [facts.get("model name", platform.machine()), family, " ".join(flags)]))


# --- text ---


def text(results: Mapping[str, Any]) -> str:
    """All tables, in Markdown."""
    shape, made = results["shape"], results["machine"]
    lines = [
        f"{shape['name']}: {shape['parameters'] / 1e6:.0f} M parameters. {made['processor']}; {results['threads']} "
        f"threads, {made['cores']} cores; torch {made['torch']}; {results['date']}",
        "Medians [least, most]; limit: of reading weights and cache once, or of the products where they take longer.",
    ]
    for phase in dict.fromkeys(row["phase_name"] for row in results["rows"]):
        lines += ["", *_phase(results, phase)]
    lines += ["", *_limits(results), "", *_others(results), "", *_memory(results), "", *_bars(results["bars"]), ""]
    missing = {name: status for name, status in results["engines"].items() if status["status"] != MEASURED}
    lines += ["| not measured | why |", "| --- | --- |"]
    lines += [f"| {name} | {status['status']} |" for name, status in missing.items()]
    return "\n".join(lines)


def _phase(results: Mapping[str, Any], phase: str) -> list[str]:
    lines = [
        f"| {phase} | ms | tokens/s | limit, ms | of the limit | bound by |", "| --- | --- | ---: | ---: | ---: | --- |"
    ]  # fmt: skip
    for of in sorted((r for r in results["rows"] if r["phase_name"] == phase), key=lambda r: r["seconds"]["median"]):
        limit = "- | - | -"
        if of["limit_seconds"] is not None:
            limit = f"{1000 * of['limit_seconds']:.2f} | {of['of_limit']:.2f} | {of['bound']}"
        lines.append(f"| {of['engine']} | {_milliseconds(of['seconds'])} | {of['tokens_per_second']:.1f} | {limit} |")
    return lines


def _milliseconds(taken: Mapping[str, float]) -> str:
    return "{median:.2f} [{min:.2f}, {max:.2f}]".format(**{name: 1000 * value for name, value in taken.items()})


def _limits(results: Mapping[str, Any]) -> list[str]:
    """The rates of each phase, and in which type the products were computed."""
    bf16, int8 = (f"products {name} (in {results['product_types'].get(name)})" for name in ("bf16", "int8"))
    lines = [f"| limit during | reading, GB/s | {bf16}, TFLOP/s | {int8}, TOP/s |", "| --- | ---: | ---: | ---: |"]
    for phase, of in results["limits"].items():
        rates = (of["sum"]["rate"] / 1e9, of["bf16"]["rate"] / 1e12, of["int8"]["rate"] / 1e12)
        lines.append(f"| {phase} | {rates[0]:.1f} | {rates[1]:.3f} | {rates[2]:.3f} |")
    return lines


def _others(results: Mapping[str, Any]) -> list[str]:
    lines = ["| other | s |", "| --- | --- |"]
    for name, taken in results["others"].items():
        if "seconds" in taken:
            ids = {True: ", the ids of plain", False: ", OTHER IDS than plain", None: ""}[taken.get("same_ids")]
            lines.append("| {}{} | {median:.3f} [{min:.3f}, {max:.3f}] |".format(name, ids, **taken["seconds"]))
        else:
            lines.append(f"| {name} | {taken['error']} |")
    return lines


def _memory(results: Mapping[str, Any]) -> list[str]:
    """Memory of steps and prompts, and what the training steps above were."""
    lines = ["| memory; of steps less parameters and gradients | tokens | type | shape | MB |",
             "| --- | ---: | --- | --- | ---: |"]  # fmt: skip
    for name, of in results["memory"].items():
        size = f"{of['bytes'] / 1e6:.0f}" if "bytes" in of else of["error"]
        facts = " | ".join(str(of.get(fact, "-")) for fact in ("tokens", "dtype", "shape"))
        lines.append(f"| {name} | {facts} | {size} |")
    if trained := results["trained"]:
        steps = "Training steps: {tokens} tokens in bfloat16, shape {shape}; beside transformers, shape {beside}."
        lines += ["", steps.format(**trained)]
    return lines


def _bars(bars: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["| bar | must | research | measured | reached |", "| --- | ---: | ---: | ---: | --- |"]
    for bar in bars:
        wanted = [f"{bar['sense']} {value:g}" if value is not None else "" for value in (bar["must"], bar["research"])]
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.2f}"
        lines.append(f"| {bar['what']} | {wanted[0]} | {wanted[1]} | {measured} | {bar['reached']} |")
    return lines
