"""The goals, each a number from the results of a run, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .engines import ENGINES, FAST, HF_431, REFERENCE

OURS = {precision: f"openllama fast {precision}" for precision in ("bf16", "int8", "int4")}
DECODE, LONG, SHORT, BATCH, PREFILL = "decode", "decode, long", "decode, short", "decode, batch", "prefill"
STEP, STEP_PRODUCTS = "training step", "training step, its products alone"
STEP_KEPT = "training step, products kept"
STEP_BESIDE, STEP_THEIRS = "training step beside transformers", "training step of transformers"
Value = Callable[[], float | None]
Line = tuple[str, str, float | None, float | None, Value]  # what, sense, must, research, the measured value


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

    def reading(self, engine: str, phase: str, than: str) -> float:
        """Seconds that the machine needs to read what the cache of ``phase`` has more than that of ``than``."""
        row, other = self.row(engine, phase), self.row(engine, than)
        if row["bytes_per_second"] is None:
            raise Missing("limit")
        return (row["cache_bytes"] - other["cache_bytes"]) / row["bytes_per_second"]

    def gain(self, engine: str, rows: int) -> float:
        """Tokens per second with so many rows, beside one row with the same context."""
        many, one = self.row(engine, BATCH), self.row(engine, SHORT)
        if many["rows"] != rows:
            raise Missing(f"{rows} rows")
        return many["tokens_per_second"] / one["tokens_per_second"]

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

    def start(self, *engines: str) -> float:
        """From the start of a process to its first token, over reading its files once: the best of ``engines``."""
        there = [name for name in engines if "seconds" in self.results["others"].get(f"first token, {name}", {})]
        if not there:
            raise Missing("first token")
        return min(self.other(f"first token, {name}") / self.other(f"reading its files once, {name}") for name in there)

    def memory(self, name: str) -> float:
        found = self.results["memory"].get(name, {})
        if "bytes" not in found:
            raise Missing(name)
        return found["bytes"]

    def growth(self) -> float:
        """Memory of the longest prompt, beside that of the one a quarter as long."""
        sizes = {of["tokens"]: of["bytes"] for name, of in self.results["memory"].items()
                 if name.startswith("prompt") and "bytes" in of}  # fmt: skip
        longest = max(sizes, default=0)
        if longest // 4 not in sizes:
            raise Missing("prompts")
        return sizes[longest] / sizes[longest // 4]

    def same_ids(self, name: str) -> float:
        """1 where a call made the ids of the plain one, else 0."""
        found = self.results["others"].get(name, {})
        if "same_ids" not in found:
            raise Missing(name)
        return float(found["same_ids"])


def bars(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``reached`` is "research", "must" (also where there is no higher goal), "no" or "not measured"."""
    return [_bar(*line) for line in _lines(Figures(results))]


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


def _lines(of: Figures) -> Iterator[Line]:
    yield from _decode(of)
    yield from _prefill(of)
    yield from _contexts(of)
    yield from _starts(of)
    yield from _training(of)


def _decode(of: Figures) -> Iterator[Line]:
    for precision, must, research in (("bf16", 0.80, 0.92), ("int8", 0.70, 0.85)):
        yield (
            f"decode {precision}: share of the limit", ">=", must, research,
            lambda precision=precision: of.row(OURS[precision], DECODE)["of_limit"],
        )  # fmt: skip
    for precision, must, research in (("bf16", 1, None), ("int8", 1, 1.3), ("int4", 0.8, 1)):
        yield _beside_peers(of, DECODE, precision, must, research)
    yield _beside_ours(of, DECODE, "int4", "int8", 1, None)
    yield (
        "decode bf16: speed beside transformers 4.31.0", ">=", 25, 35,
        lambda: of.seconds(HF_431, DECODE) / of.seconds(FAST, DECODE),
    )  # fmt: skip


def _prefill(of: Figures) -> Iterator[Line]:
    for precision, must in (("bf16", 1.1), ("int8", 1), ("int4", 1)):
        yield _beside_peers(of, PREFILL, precision, must, None)
    yield "prefill bf16: share of the limit", ">=", None, 0.8, lambda: of.row(OURS["bf16"], PREFILL)["of_limit"]
    yield _beside_ours(of, PREFILL, "int8", "bf16", 1.5, 1.8)
    yield _beside_ours(of, PREFILL, "int4", "bf16", 0.85, None)


def _contexts(of: Figures) -> Iterator[Line]:
    # Several rows have one of two goals: the products may not allow five times the speed.
    yield "decode bf16, 8 rows: tokens/s beside one row", ">=", 5, 7, lambda: of.gain(FAST, 8)
    yield (
        "decode bf16, rows: share of the limit, where 5 times one row is not reached", ">=", 0.8, None,
        lambda: of.row(FAST, BATCH)["of_limit"],
    )  # fmt: skip
    yield (
        "decode bf16, long context: time beside short and reading the cache", "<=", 1.05, None,
        lambda: of.seconds(FAST, LONG) / (of.seconds(FAST, SHORT) + of.reading(FAST, LONG, SHORT)),
    )  # fmt: skip
    for name in ("int4 assistant", "prompt lookup"):
        yield (
            f"{name}: speed beside plain", ">=", 0.95, 1.3,
            lambda name=name: of.other("generate, plain") / of.other(f"generate, {name}"),
        )  # fmt: skip
        yield f"{name}: ids are those of plain", ">=", 1, None, lambda name=name: of.same_ids(f"generate, {name}")


def _starts(of: Figures) -> Iterator[Line]:
    yield (
        "process start to first token, bf16: times reading the file once", "<=", 1.5, 1.2,
        lambda: of.start(FAST, REFERENCE),
    )  # fmt: skip
    yield "wait for compilation, first time, s", "<=", 60, 30, lambda: of.other("loops built now")
    yield "wait for compilation, cached, s", "<=", 3, 1, lambda: of.other("loops built before")
    yield "import openllama, after torch, s", "<=", 0.1, None, lambda: of.other("import openllama, after torch")
    yield (
        "first token of openllama generate, tiny model, beyond import torch, s", "<=", 1, 0.4,
        lambda: of.other("openllama generate, tiny model, one token") - of.other("import torch"),
    )  # fmt: skip


def _training(of: Figures) -> Iterator[Line]:
    yield (
        "training step: speed beside transformers", ">=", 1.15, 1.5,
        lambda: of.other(STEP_THEIRS) / of.other(STEP_BESIDE),
    )  # fmt: skip
    yield "training step: share of the limit", ">=", None, 0.7, lambda: of.other(STEP_PRODUCTS) / of.other(STEP)
    dtype = of.results["memory"].get(STEP, {}).get("dtype", "bfloat16")
    for what, row in (("", STEP), (", products kept", STEP_KEPT)):
        yield (
            f"training step of many tokens in {dtype}{what}: memory beside transformers, less parameters and gradients",
            "<=", 0.5, 0.35,
            lambda row=row: of.memory(row) / of.memory(STEP_THEIRS),
        )  # fmt: skip
    yield "prompt 4 times as long: times the memory", "<=", 4.2, None, of.growth


def _beside_peers(of: Figures, phase: str, precision: str, must: float, research: float | None) -> Line:
    return (
        f"{phase} {precision}: speed beside the best {precision} peer", ">=", must, research,
        lambda: of.best_peer(precision, phase) / of.seconds(OURS[precision], phase),
    )  # fmt: skip


def _beside_ours(of: Figures, phase: str, precision: str, base: str, must: float, research: float | None) -> Line:
    return (
        f"{phase} {precision}: speed beside our {base}", ">=", must, research,
        lambda: of.seconds(OURS[base], phase) / of.seconds(OURS[precision], phase),
    )  # fmt: skip
