"""How fast this package, its peers and the machine itself are, in one run: `make bench`.

    python benchmarks/bench.py [--shape A] [--engines NAME ...] [--phases NAME ...] [--json FILE] [--plot FILE.png]

Every engine is a process that loads the model once. The processes work in turns, one at a time, and in each turn the
machine's own limits are measured, too: a plain sum over as much memory as the weights have, and large products. A peer
that is not installed is listed as such. Weights are random; the files are written once, below --work.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite import startup, turns
from suite.bars import BATCH, DECODE, LONG, PREFILL, SHORT, bars
from suite.engines import ENGINES, FAST, PACKAGES, Engine, interpreter, problem
from suite.models import SHAPES, Files
from suite.plots import draw_bars, draw_roofline
from suite.report import limits, machine, row, summary, text
from suite.turns import Worker

GENERATING = {"plain": {}, "int4 assistant": {"assistant": "int4"}, "prompt lookup": {"lookup": 5}}
PHASES = (PREFILL, DECODE, SHORT, LONG, BATCH, "generate", "start")


def main() -> int:
    options = parsed()
    results = Run(options).results()
    print(text(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for draw, path in ((draw_bars, options.plot), (draw_roofline, options.roofline)):
        if path:
            draw(results, path)
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
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a turn of decoding (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the phase with several (default: %(default)s)")
    parser.add_argument("--one-at-a-time", action="store_true", help="hold one engine in memory; V1 does so always")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw all figures (PNG; needs the extra plot)")
    parser.add_argument("--roofline", type=Path, help="draw the limits and how near ours is to them (PNG)")
    options = parser.parse_args()
    options.peers = {}
    for given in options.peer_python:
        name, _, python = given.partition("=")
        if name not in PACKAGES or not Path(python).is_file():
            parser.error(f"--peer-python {given}: it is NAME=PYTHON, with a name of {', '.join(PACKAGES)} and a file")
        options.peers[name] = Path(python)
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
        self.status: dict[str, dict[str, Any]] = {}
        self.found: list[tuple[str, dict[str, list[dict[str, Any]]]]] = []  # a phase, and the answers of each engine
        context, tokens = options.context, options.tokens
        self.work: dict[str, tuple[str, str, dict[str, int]]] = {  # by phase: its title, the command and its arguments
            PREFILL: (f"prefill {context}", "prefill", {"tokens": context}),
            DECODE: (f"decode at {context}", "decode", {"context": context, "tokens": tokens}),
            SHORT: (f"decode at {context // 4}", "decode", {"context": context // 4, "tokens": tokens}),
            LONG: (f"decode at {4 * context}", "decode", {"context": 4 * context, "tokens": tokens}),
            BATCH: (f"decode {options.batch} rows at {context}", "decode",
                    {"context": context, "tokens": tokens, "batch": options.batch}),
        }  # fmt: skip

    def results(self) -> dict[str, Any]:
        ready = self.prepare()
        alone = self.options.one_at_a_time or self.options.shape == "V1"
        others: dict[str, dict[str, Any]] = {}
        for group in [[engine] for engine in ready] if alone else [list(ready)]:
            others |= self.measure({engine: ready[engine] for engine in group})
        if "start" in self.options.phases:
            others |= self.start(ready)
        rates, rows = self.rows()
        result: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "machine": machine(),
            "threads": self.options.threads,
            "shape": {
                "name": self.shape.name,
                "parameters": self.shape.layer_weights + self.shape.head_weights,
                **self.shape.config.to_dict(),
            },
            "engines": self.status,
            "limits": rates,
            "rows": rows,
            "others": others,
        }
        if LONG in rates:
            more = self.shape.cache_bytes(4 * self.options.context - self.options.context // 4)
            result["cache_seconds"] = more / rates[LONG]["sum"]["rate"]
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

    def measure(self, ready: Mapping[Engine, tuple[Path, Path]]) -> dict[str, dict[str, Any]]:
        """All phases with the engines of ``ready`` in memory; returns what ``generate`` takes."""
        workers, limit = {}, turns.limit_worker(self.shape, self.options.threads)
        try:
            for engine, (python, model) in ready.items():
                command = turns.engine_command(engine, python, model, self.shape, self.options.threads)
                worker = Worker(command, **turns.engine_environment(engine))
                self.status[engine.name] = {"status": worker.facts.get("error", "measured"), **worker.facts}
                if "error" in worker.facts:
                    worker.close()
                else:
                    workers[engine.name] = worker
            for phase in (phase for phase in self.work if phase in self.options.phases and workers):
                _, command, arguments = self.work[phase]
                self.say(phase)
                answers = turns.take_turns(workers, limit, self.options.repeats, command, **arguments)
                self.found.append((phase, answers))
            others = self.generate(workers) if "generate" in self.options.phases else {}
            for name, worker in workers.items():
                self.status[name]["peak_bytes"] = worker.ask("memory").get("bytes")
            return others
        finally:
            for worker in (*workers.values(), limit):
                worker.close()

    def generate(self, workers: Mapping[str, Worker]) -> dict[str, dict[str, Any]]:
        """The fast model with and without guesses, in turns: seconds of a call, or why there are none."""
        if FAST not in workers:
            return {}
        self.say("generate")
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in GENERATING}
        size = {"context": self.options.context, "tokens": 4 * self.options.tokens}
        for turn in range(self.options.repeats + 1):
            for name, settings in GENERATING.items():
                answer = workers[FAST].ask("generate", **size, **settings)
                if turn or "error" in answer:
                    taken[name].append(answer)
        return {f"generate, {name}": _summed(answers, taken["plain"]) for name, answers in taken.items()}

    def start(self, ready: Mapping[Engine, tuple[Path, Path]]) -> dict[str, dict[str, Any]]:
        self.say("start")
        found: dict[str, dict[str, Any]] = {}
        bf16 = {engine: of for engine, of in ready.items() if engine.precision == "bf16"}
        repeats = self.options.repeats
        for name, answers in startup.first_tokens(bf16, self.shape, self.options.threads, min(repeats, 3)).items():
            found[f"first token, {name}"] = _summed(answers)
            if "error" not in answers[0]:
                found[f"reading its files once, {name}"] = {"seconds": summary(answer["read"] for answer in answers)}
        found |= {name: {"seconds": summary(taken)} for name, taken in startup.processes(repeats).items()}
        try:
            found |= {f"loops {when}": {"seconds": summary([taken])} for when, taken in startup.builds().items()}
        except RuntimeError as error:
            found["loops built now"] = {"error": str(error)}
        return found

    def rows(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The limits during each phase, and a row for each engine in it; where one failed, its status says why."""
        rates: dict[str, Any] = {}
        rows = []
        for phase, answers in self.found:
            title, command, arguments = self.work[phase]
            rates[phase] = limit = limits(self.shape, answers["limit"])
            for name in (name for name in answers if name != "limit"):
                if "error" in answers[name][0]:
                    self.status[name]["status"] = f"{title}: {answers[name][0]['error']}"
                    continue
                of = row(self.shape, ENGINES[name], command, arguments, answers[name], limit)
                precision = ENGINES[name].precision
                tokens = arguments["tokens"] if command == "prefill" else 1
                operations = self.shape.operations(tokens, arguments.get("batch", 1), arguments.get("context", 0))
                rows.append({
                    **of, "phase_key": phase, "phase_name": title, "operations": operations,
                    "weight_bytes": self.shape.weight_bytes(precision),
                })  # fmt: skip
        return rates, rows

    def say(self, phase: str) -> None:
        print(f"{datetime.datetime.now():%H:%M:%S} {phase}", file=sys.stderr, flush=True)


def _summed(answers: list[dict[str, Any]], plain: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Seconds; and whether the ids are those of ``plain``."""
    if "error" in answers[0]:
        return {"error": answers[0]["error"]}
    found: dict[str, Any] = {"seconds": summary(second for answer in answers for second in answer["seconds"])}
    if plain is not None:
        found["same_ids"] = all(answer["ids"] == plain[0].get("ids") for answer in answers)
    return found


if __name__ == "__main__":
    sys.exit(main())
