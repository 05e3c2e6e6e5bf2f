"""The goals, each a number from the results of a run, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .engines import ENGINES, FAST, HF_431, REFERENCE

OURS = {precision: f"openllama fast {precision}" for precision in ("bf16", "int8", "int4")}
DECODE, LONG, SHORT, BATCH, PREFILL = "decode", "decode, long", "decode, short", "decode, batch", "prefill"
Value = Callable[[], float | None]


class Missing(Exception):
    """Something a goal compares was not measured."""


class Figures:
    """Medians of a run, by engine and phase."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.rows = {(row["engine"], row["phase_key"]): row for row in results["rows"]}

    def row(self, engine: str, phase: str) -> Mapping[str, Any]:
        if (engine, phase) not in self.rows:
            raise Missing(engine)
        return self.rows[engine, phase]

    def seconds(self, engine: str, phase: str) -> float:
        return self.row(engine, phase)["seconds"]["median"]

    def best_peer(self, precision: str, phase: str) -> float:
        """Seconds of the fastest peer with weights of that precision."""
        peers = (name for name, of in ENGINES.items() if of.precision == precision and not of.ours)
        taken = [self.seconds(name, phase) for name in peers if (name, phase) in self.rows]
        if not taken:
            raise Missing("no peer")
        return min(taken)

    def other(self, name: str) -> float:
        found = self.results["others"].get(name, {})
        if "seconds" not in found:
            raise Missing(name)
        return found["seconds"]["median"]


def bars(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``reached`` is "research", "must" (also where there is no higher goal), "no" or "not measured"."""
    return [_bar(*line) for line in _lines(Figures(results), results)]


def _bar(what: str, sense: str, must: float | None, research: float | None, value: Value) -> dict[str, Any]:
    try:
        measured = value()
    except Missing:
        measured = None
    return {
        "what": what, "sense": sense, "must": must, "research": research, "measured": measured,
        "reached": _reached(measured, sense, must, research),
    }  # fmt: skip


def _reached(measured: float | None, sense: str, must: float | None, research: float | None) -> str:
    if measured is None:
        return "not measured"
    for goal, name in ((research, "research"), (must, "must")):
        if goal is not None and (measured >= goal if sense == ">=" else measured <= goal):
            return name
    return "no"


def _lines(of: Figures, results: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None, float | None, Value]]:
    for precision, must, research in (("bf16", 0.80, 0.92), ("int8", 0.70, 0.85)):
        yield (
            f"decode {precision}: share of the limit", ">=", must, research,
            lambda precision=precision: of.row(OURS[precision], DECODE)["of_limit"],
        )  # fmt: skip
    for phase, precision, must, research in (
        (DECODE, "bf16", 1, None), (DECODE, "int8", 1, 1.3), (DECODE, "int4", 0.8, 1),
        (PREFILL, "bf16", 1.1, None), (PREFILL, "int8", 1, None), (PREFILL, "int4", 1, None),
    ):  # fmt: skip
        yield (
            f"{phase} {precision}: speed beside the best {precision} peer", ">=", must, research,
            lambda kind=precision, phase=phase: of.best_peer(kind, phase) / of.seconds(OURS[kind], phase),
        )  # fmt: skip
    yield "prefill bf16: share of the limit", ">=", None, 0.8, lambda: of.row(OURS["bf16"], PREFILL)["of_limit"]
    for phase, precision, base, must, research in (
        (DECODE, "int4", "int8", 1, None), (PREFILL, "int8", "bf16", 1.5, 1.8), (PREFILL, "int4", "bf16", 0.85, None),
    ):  # fmt: skip
        yield (
            f"{phase} {precision}: speed beside our {base}", ">=", must, research,
            lambda phase=phase, precision=precision, base=base: (
                of.seconds(OURS[base], phase) / of.seconds(OURS[precision], phase)
            ),
        )  # fmt: skip
    yield (
        "decode bf16: speed beside transformers 4.31.0", ">=", 25, 35,
        lambda: of.seconds(HF_431, DECODE) / of.seconds(FAST, DECODE),
    )  # fmt: skip
    yield (
        "decode bf16, batch: tokens/s beside one row", ">=", 5, 7,
        lambda: of.row(FAST, BATCH)["tokens_per_second"] / of.row(FAST, DECODE)["tokens_per_second"],
    )  # fmt: skip
    yield "decode bf16, batch: share of the limit", ">=", 1, None, lambda: of.row(FAST, BATCH)["of_limit"]
    yield (
        "decode bf16, long context: time beside short and reading the cache", "<=", 1.05, None,
        lambda: of.seconds(FAST, LONG) / (of.seconds(FAST, SHORT) + results["cache_seconds"]),
    )  # fmt: skip
    yield (
        "process start to first token, bf16: times reading the file once", "<=", 1.5, 1.2,
        lambda: min(
            of.other(f"first token, {name}") / of.other(f"reading its files once, {name}") for name in (FAST, REFERENCE)
        ),
    )  # fmt: skip
    for name in ("int4 assistant", "prompt lookup"):
        yield (
            f"{name}: speed beside plain", ">=", 0.95, 1.3,
            lambda name=name: of.other("generate, plain") / of.other(f"generate, {name}"),
        )  # fmt: skip
    yield "wait for compilation, first time, s", "<=", 60, 30, lambda: of.other("loops built now")
    yield "wait for compilation, cached, s", "<=", 3, 1, lambda: of.other("loops built before")
    yield (
        "import openllama beyond import torch, s", "<=", 0.1, None,
        lambda: of.other("import openllama") - of.other("import torch"),
    )  # fmt: skip
    yield (
        "first token of openllama generate, tiny model, beyond import torch, s", "<=", 1, 0.4,
        lambda: of.other("openllama generate, tiny model, one token") - of.other("import torch"),
    )  # fmt: skip
