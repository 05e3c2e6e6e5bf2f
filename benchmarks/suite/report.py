"""From seconds to rows: medians, the limit beside each, and the table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .engines import Engine
from .models import Shape
from .turns import limit_rates


def summary(seconds: Iterable[float]) -> dict[str, float]:
    taken = list(seconds)
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken), "count": len(taken)}


def limits(shape: Shape, answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each measurement "sum", "bf16", "int8": seconds, and the rate at the median (bytes or operations a second)."""
    found = {name: summary(answer["seconds"][name] for answer in answers) for name in ("sum", "bf16", "int8")}
    rates = limit_rates(shape, {name: taken["median"] for name, taken in found.items()})
    return {name: {"seconds": taken, "rate": rates[name]} for name, taken in found.items()}


def limit_seconds(
    shape: Shape, precision: str, rates: Mapping[str, float], tokens: int, rows: int, past: int
) -> tuple[float, str]:
    """The least time of a pass of ``rows`` x ``tokens`` tokens after ``past`` others, and what bounds it.

    "memory": every weight is read once. "products": at the rate of bfloat16, or for narrower weights at that of int8
    where it is higher.
    """
    memory = shape.weight_bytes(precision) / rates["sum"]
    rate = rates["bf16"] if precision == "bf16" else max(rates["bf16"], rates["int8"])
    products = shape.operations(tokens, rows, past) / rate
    return max((memory, "memory"), (products, "products"))


def row(
    shape: Shape, engine: Engine, phase: str, work: Mapping[str, int], answers: Sequence[Mapping[str, Any]],
    limit: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """A line of the table. ``work``: the arguments of the command."""
    taken = summary(second for answer in answers for second in answer["seconds"])
    rows, tokens, past = work.get("batch", 1), work["tokens"] if phase == "prefill" else 1, work.get("context", 0)
    rates = {name: of["rate"] for name, of in limit.items()}
    least, bound = limit_seconds(shape, engine.precision, rates, tokens, rows, past)
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "ours": engine.ours,
        "phase": phase,
        "seconds": taken,
        "tokens_per_second": rows * tokens / taken["median"],
        "limit_seconds": least,
        "bound": bound,
        "of_limit": least / taken["median"],
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
        "Medians [least, most]; limit: of reading the weights once, or of the products where they take longer.",
    ]
    for phase in dict.fromkeys(row["phase_name"] for row in results["rows"]):
        lines += ["", *_phase(results, phase)]
    lines += ["", *_limits(results["limits"]), "", *_others(results), "", *_bars(results["bars"]), ""]
    missing = {name: status for name, status in results["engines"].items() if status["status"] != "measured"}
    lines += ["| not measured | why |", "| --- | --- |"]
    lines += [f"| {name} | {status['status']} |" for name, status in missing.items()]
    return "\n".join(lines)


def _phase(results: Mapping[str, Any], phase: str) -> list[str]:
    lines = [
        f"| {phase} | ms | tokens/s | limit, ms | of the limit | bound by |", "| --- | --- | ---: | ---: | ---: | --- |"
    ]  # fmt: skip
    for of in sorted((r for r in results["rows"] if r["phase_name"] == phase), key=lambda r: r["seconds"]["median"]):
        lines.append(
            f"| {of['engine']} | {_milliseconds(of['seconds'])} | {of['tokens_per_second']:.1f} "
            f"| {1000 * of['limit_seconds']:.2f} | {of['of_limit']:.2f} | {of['bound']} |"
        )
    return lines


def _milliseconds(taken: Mapping[str, float]) -> str:
    return "{median:.2f} [{min:.2f}, {max:.2f}]".format(**{name: 1000 * value for name, value in taken.items()})


def _limits(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| limit during | reading, GB/s | products bf16, TFLOP/s | int8, TOP/s |", "| --- | ---: | ---: | ---: |"]
    for phase, of in found.items():
        rates = (of["sum"]["rate"] / 1e9, of["bf16"]["rate"] / 1e12, of["int8"]["rate"] / 1e12)
        lines.append(f"| {phase} | {rates[0]:.1f} | {rates[1]:.3f} | {rates[2]:.3f} |")
    return lines


def _others(results: Mapping[str, Any]) -> list[str]:
    lines = ["| other | s |", "| --- | --- |"]
    for name, taken in results["others"].items():
        if "seconds" in taken:
            lines.append("| {} | {median:.3f} [{min:.3f}, {max:.3f}] |".format(name, **taken["seconds"]))
        else:
            lines.append(f"| {name} | {taken['error']} |")
    return lines


def _bars(bars: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["| bar | must | research | measured | reached |", "| --- | ---: | ---: | ---: | --- |"]
    for bar in bars:
        wanted = [f"{bar['sense']} {value:g}" if value is not None else "" for value in (bar["must"], bar["research"])]
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.2f}"
        lines.append(f"| {bar['what']} | {wanted[0]} | {wanted[1]} | {measured} | {bar['reached']} |")
    return lines
