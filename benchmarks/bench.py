"""How fast this package, its peers and the machine itself are, in one run: `make bench`.

    python benchmarks/bench.py [--shape A] [--engines NAME ...] [--phases NAME ...] [--json FILE] [--plot FILE.png]

Every engine is a process that loads the model once. The processes work in turns, one at a time, and in each turn the
machine's own limits are measured, too: a plain sum over as much memory as the weights have, and large products. A peer
that is not installed is listed as such. Weights are random; the files are written once, below --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from suite import startup, training, turns
from suite.bars import (
    BATCH,
    DECODE,
    LONG,
    PREFILL,
    SHORT,
    STEP,
    STEP_BESIDE,
    STEP_KEPT,
    STEP_PRODUCTS,
    STEP_THEIRS,
    bars,
)
from suite.engines import ENGINES, FAST, PACKAGES, Engine, interpreter, problem
from suite.models import SHAPES, Files
from suite.options import check
from suite.plots import draw_bars, draw_roofline
from suite.report import MEASURED, Work, limits, machine, other, row, text
from suite.rows import FAST as FAST_STEP
from suite.rows import PLAIN, PRODUCTS_KEPT, THEIRS
from suite.training import Steps, missing
from suite.turns import LIMIT, PATIENCE, Worker

from openllama.checkpoint.folders import write_whole
from openllama.products import bfloat16_is_slow

GENERATING = {"plain": {}, "int4 assistant": {"assistant": "int4"}, "prompt lookup": {"lookup": 5}}
PHASES = (PREFILL, DECODE, SHORT, LONG, BATCH, "generate", "start", "training", "memory")


def main() -> int:
    options = parsed()
    run = Run(options)
    try:
        run.measure()
    except KeyboardInterrupt:
        kept = f"; {options.json} has the phases that ended, if any did" if options.json else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    results = run.results()
    print(text(results))
    for draw, path in ((draw_bars, options.plot), (draw_roofline, options.roofline)):
        if path and results["limits"]:
            draw(results, path)
        elif path:
            print(f"{path} is not drawn: nothing was measured beside the limits of the machine", file=sys.stderr)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="A", help="A: 0.88 billion parameters; V1: 6.9 billion")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="those whose names contain one of these; all")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PYTHON",
        help=f"interpreter that has a peer ({', '.join(PACKAGES)}); default: .venv-bench/PEER/bin/python, or this one",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "openllama-bench", help="the models")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=512,
        help="tokens of the prompt; short contexts and those of several rows are a quarter, long ones 4 times as long; "
        "training steps a half, in the phase memory 4 times, prompts there 4 to 32 times (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a turn of decoding (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the phase with several (default: %(default)s)")
    parser.add_argument("--one-at-a-time", action="store_true", help="hold one engine in memory; V1 does so always")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE,
        help="seconds after which an engine that gives no answer is ended (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all figures to this file, anew after each phase")
    parser.add_argument("--plot", type=Path, help="draw all figures (PNG; needs the extra plot)")
    parser.add_argument("--roofline", type=Path, help="draw the limits and how near ours is to them (PNG)")
    options = parser.parse_args()
    options.peers = {}
    for given in options.peer_python:
        name, _, python = given.partition("=")
        if name not in PACKAGES or not Path(python).is_file():
            parser.error(f"--peer-python {given}: it is NAME=PYTHON, with a name of {', '.join(PACKAGES)} and a file")
        options.peers[name] = Path(python)
    check(parser, options, ("threads", "repeats", "context", "tokens", "batch"))
    options.chosen = [
        of for name, of in ENGINES.items() if not options.engines or any(map(name.count, options.engines))
    ]
    if not options.chosen:
        parser.error(f"--engines {options.engines}: there are {', '.join(ENGINES)}")
    if (options.plot or options.roofline) and importlib.util.find_spec("matplotlib") is None:
        parser.error('pictures need matplotlib: pip install "openllama[plot]"')
    return options


class Run:
    """A run of everything that was asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.shape = options, SHAPES[options.shape]
        self.files = Files(self.shape, options.work)
        self.alone = options.one_at_a_time or options.shape == "V1"  # one engine in memory
        self.finished = False
        self.status: dict[str, dict[str, Any]] = {}
        self.product_types: dict[str, str] = {}  # in which the limits of products were computed
        self.found: list[tuple[str, dict[str, list[dict[str, Any]]]]] = []  # a phase, and the answers of each engine
        self.others: dict[str, dict[str, Any]] = {}
        self.memory: dict[str, dict[str, Any]] = {}
        self.trained: dict[str, Any] = {}  # what a training step is, here and beside transformers
        context, tokens = options.context, options.tokens
        self.work = {
            PREFILL: Work(f"prefill {context}", "prefill", {"tokens": context}),
            DECODE: Work(f"decode at {context}", "decode", {"context": context, "tokens": tokens}),
            SHORT: Work(f"decode at {context // 4}", "decode", {"context": context // 4, "tokens": tokens}),
            LONG: Work(f"decode at {4 * context}", "decode", {"context": 4 * context, "tokens": tokens}),
            BATCH: Work(f"decode {options.batch} rows at {context // 4}", "decode",
                        {"context": context // 4, "tokens": tokens, "batch": options.batch}),
        }  # fmt: skip

    def measure(self) -> None:
        """All phases. What is known is written after each, so that the end of a long run loses nothing."""
        ready = self.prepare()
        for group in [[engine] for engine in ready] if self.alone else [list(ready)]:
            self.measure_together({engine: ready[engine] for engine in group})
            self.save()
        for phase, last in (("start", lambda: self.start(ready)), ("training", self.train), ("memory", self.grow)):
            if phase in self.options.phases:
                self.say(phase)
                last()
                self.save()
        self.finished = True
        self.save()

    def save(self) -> None:
        """Write the JSON file that was asked for; there is always a whole one."""
        if self.options.json:
            write_whole(self.options.json, json.dumps(self.results(), indent=1) + "\n")

    def results(self) -> dict[str, Any]:
        """What is known so far; ``finished`` is false until that is all."""
        rates, rows = self.rows()
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "finished": self.finished,
            "machine": machine(),
            "threads": self.options.threads,
            "shape": {
                "name": self.shape.name,
                "parameters": self.shape.layer_weights + self.shape.head_weights,
                **self.shape.config.to_dict(),
            },
            "engines": self.status,
            "limits": rates,
            "product_types": self.product_types,
            "rows": rows,
            "others": self.others,
            "trained": self.trained,
            "memory": self.memory,
        }
        return {**result, "bars": bars(result)}

    def prepare(self) -> dict[Engine, tuple[Path, Path]]:
        """Engines that are there, each with its interpreter and its files."""
        ready = {}
        for engine in self.options.chosen:
            python = interpreter(engine, self.options.peers)
            if why := problem(engine, python):
                self.status[engine.name] = {"status": why}
                continue
            try:
                ready[engine] = python, self.files.form(engine.form, python)
            except Exception as error:  # it stands in the table
                self.status[engine.name] = {"status": f"{type(error).__name__}: {error}"}
        return ready

    def measure_together(self, ready: Mapping[Engine, tuple[Path, Path]]) -> None:
        """All phases with the engines of ``ready`` in memory."""
        workers, limit = {}, turns.limit_worker(self.shape, self.options.threads, self.options.patience)
        self.product_types = limit.facts.get("types", {})
        try:
            for engine, (python, model) in ready.items():
                command = turns.engine_command(engine, python, model, self.shape, self.options.threads)
                worker = Worker(command, self.options.patience, **turns.engine_environment(engine))
                self.status[engine.name] = {"status": worker.facts.get("error", MEASURED), **worker.facts}
                if "error" in worker.facts:
                    worker.close()
                else:
                    workers[engine.name] = worker
            for phase in (phase for phase in self.work if phase in self.options.phases and workers):
                work = self.work[phase]
                self.say(phase, workers)
                answers = turns.take_turns(workers, limit, self.options.repeats, work.command, **work.arguments)
                self.found.append((phase, answers))
                self.save()
            if "generate" in self.options.phases:
                self.generate(workers)
            for name, worker in workers.items():
                self.status[name]["peak_bytes"] = worker.ask("memory").get("bytes")
        finally:
            for worker in (*workers.values(), limit):
                worker.close()

    def generate(self, workers: Mapping[str, Worker]) -> None:
        """The fast model with and without guesses, in turns: seconds of a call, or why there are none."""
        if FAST not in workers:
            return
        self.say("generate", [FAST])
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in GENERATING}
        size = {"context": self.options.context, "tokens": 4 * self.options.tokens}
        for turn in range(self.options.repeats + 1):
            for name, settings in GENERATING.items():
                answer = workers[FAST].ask("generate", **size, **settings)
                if turn or "error" in answer:
                    taken[name].append(answer)
        self.others |= {f"generate, {name}": other(answers, taken["plain"]) for name, answers in taken.items()}

    def start(self, ready: Mapping[Engine, tuple[Path, Path]]) -> None:
        """Seconds of processes from their start."""
        bf16 = {engine: of for engine, of in ready.items() if engine.precision == "bf16"}
        repeats = self.options.repeats
        taken = startup.first_tokens(bf16, self.shape, self.options.threads, min(repeats, 3), self.options.patience)
        taken |= startup.processes(repeats) | startup.builds()
        self.others |= {name: other(answers) for name, answers in taken.items()}

    def train(self) -> None:
        """Seconds of a training step: alone beside its products, and in turns with that of transformers.

        Where torch's products of bfloat16 are slow, a step of transformers at full size would take half an hour, so the
        two are compared at a smaller one.
        """
        alone = self.steps(max(1, self.options.context // 2))
        answers, products = alone.times([FAST_STEP], self.options.repeats)
        self.others |= {STEP: other(answers[FAST_STEP]), STEP_PRODUCTS: other(products)}
        small = SHAPES["step"] if bfloat16_is_slow() else alone.shape
        beside = dataclasses.replace(alone, shape=min(small, alone.shape, key=lambda shape: shape.layer_weights))
        if theirs := self.theirs(self.others):
            answers, _ = beside.times([FAST_STEP, *theirs], self.options.repeats)
            names = {FAST_STEP: STEP_BESIDE, THEIRS[0]: STEP_THEIRS}
            self.others |= {names[row]: other(of) for row, of in answers.items()}
        self.trained = {"tokens": alone.tokens, "shape": alone.shape.name, "beside": beside.shape.name}

    def grow(self) -> None:
        """Memory of a training step of many tokens, and of long prompts."""
        tokens = 4 * self.options.context
        steps = self.steps(tokens, "float32" if bfloat16_is_slow() else "bfloat16")
        answers = steps.memory([*self.theirs(self.memory), PLAIN, PRODUCTS_KEPT])
        names = {THEIRS[0]: STEP_THEIRS, PLAIN: STEP, PRODUCTS_KEPT: STEP_KEPT}
        facts = {"tokens": tokens, "dtype": steps.dtype, "shape": steps.shape.name}
        self.memory |= {names[row]: {**facts, **of} for row, [of] in answers.items()}
        self.memory |= training.prompts(steps, [size * self.options.context for size in (4, 8, 16, 32)])

    def steps(self, tokens: int, dtype: str = "bfloat16") -> Steps:
        """Training steps of the shape; parameters and gradients of V1 would not fit into most memories."""
        shape = SHAPES["A"] if self.options.shape == "V1" else self.shape
        peer = interpreter(ENGINES["transformers bf16"], self.options.peers)
        return Steps(shape, tokens, dtype, self.options.threads, self.options.patience, peer)

    def theirs(self, table: dict[str, dict[str, Any]]) -> list[str]:
        """The row of transformers, or none, and then ``table`` says why."""
        if problem := missing(interpreter(ENGINES["transformers bf16"], self.options.peers)):
            table[STEP_THEIRS] = {"error": problem}
            return []
        return [THEIRS[0]]

    def rows(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The limits during each phase, and a row for each engine in it; where one failed, its status says why."""
        rates: dict[str, Any] = {}
        rows = []
        for phase, answers in self.found:
            work, limit = self.work[phase], None
            failed = {name: of[0]["error"] for name, of in answers.items() if "error" in of[0]}
            for name, error in failed.items():
                of = self.status.setdefault(name, {"status": MEASURED})
                if of["status"] == MEASURED:  # the first error says most
                    of["status"] = f"{work.title}: {error}"
            if LIMIT not in failed:
                rates[phase] = limit = limits(self.shape, answers[LIMIT])
            for name in (name for name in answers if name != LIMIT and name not in failed):
                rows.append(row(self.shape, ENGINES[name], phase, work, answers[name], limit))
        return rates, rows

    def say(self, phase: str, engines: Iterable[str] = ()) -> None:
        """Say on the standard error which phase begins, and of which engine where they do not take turns."""
        chosen = [name for name in PHASES if name in self.options.phases]
        what = [self.work[phase].title if phase in self.work else phase, *(engines if self.alone else ())]
        at = f"{datetime.datetime.now():%H:%M:%S} phase {chosen.index(phase) + 1} of {len(chosen)}"
        print(f"{at}: {', '.join(what)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
