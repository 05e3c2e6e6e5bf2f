"""``make bench`` at a small size: what its JSON holds, and that its ratios follow from its seconds."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suite import bars, report
from benchmarks.suite.models import SHAPES, TINY
from openllama import compiler
from openllama.config import QUANTIZATIONS
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "suite"))  # as where its workers run
import bench  # noqa: E402
import quality  # noqa: E402
import workers  # noqa: E402

EMPTY = "#!/bin/sh\nexit 1\n"  # an interpreter without packages


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    python = folder / "python"
    python.write_text(EMPTY, encoding="utf-8")
    python.chmod(0o755)
    command = [
        sys.executable, "benchmarks/bench.py", "--shape", "small", "--threads", "1", "--repeats", "2",
        "--context", "32", "--tokens", "4", "--batch", "2", "--engines", "openllama bf16", "llama.cpp bf16",
        "--work", folder / "work",
        "--phases", "prefill", "decode", "decode, batch", "--peer-python", f"llama-cpp={python}",
        "--json", folder / "results.json",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {**json.loads((folder / "results.json").read_text(encoding="utf-8")), "printed": done.stdout}


def test_every_phase_has_a_row_of_the_engine_that_is_there(results):
    assert [(row["engine"], row["phase_key"]) for row in results["rows"]] == [
        ("openllama bf16", phase) for phase in ("prefill", "decode", "decode, batch")
    ]
    assert [row["seconds"]["count"] for row in results["rows"]] == [2, 8, 8]  # turns, and turns x tokens
    assert results["machine"]["processor"] in results["printed"]


def test_a_peer_that_is_not_installed_is_listed(results):
    assert results["engines"]["llama.cpp bf16"] == {"status": "not installed: no llama_cpp_python"}
    assert "| llama.cpp bf16 | not installed: no llama_cpp_python |" in results["printed"]


def test_ratios_follow_from_seconds(results):
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 4600 * 64
    for row in results["rows"]:
        rows, tokens, past = {"prefill": (1, 32, 0), "decode": (1, 1, 32), "decode, batch": (2, 1, 8)}[row["phase_key"]]
        read = 2 * weights + rows * past * 2 * 2 * 2 * 64  # keys and values of 2 layers in 2 bytes
        limit = results["limits"][row["phase_key"]]
        bytes_per_second = (2 * weights // 4 * 4) / limit["sum"]["seconds"]["median"]
        operations_per_second = 2 * 128**3 / limit["bf16"]["seconds"]["median"]
        least = max(read / bytes_per_second, row["operations"] / operations_per_second)
        assert row["limit_seconds"] == pytest.approx(least)
        assert row["of_limit"] == pytest.approx(least / row["seconds"]["median"])
        assert row["tokens_per_second"] == pytest.approx(rows * tokens / row["seconds"]["median"])


def test_operations_count_every_product_that_a_causal_mask_leaves():
    shape, matrices, head = SHAPES["small"], 2 * (4 * 64 * 64 + 3 * 64 * 96), 4600 * 64
    assert shape.operations(1) == 2 * matrices + 2 * head + 4 * 2 * 64
    assert shape.operations(3) == 6 * matrices + 2 * head + 4 * 2 * 64 * (1 + 2 + 3)
    assert shape.operations(1, rows=5, past=7) == 5 * (2 * matrices + 2 * head + 4 * 2 * 64 * 8)


def test_the_published_shapes_have_their_sizes():
    sizes = {name: shape.layer_weights + shape.head_weights for name, shape in SHAPES.items()}
    assert sizes["A"] == pytest.approx(880_121_856, rel=1e-4)
    assert sizes["V1"] == pytest.approx(6.886e9, rel=1e-3)


def made(**seconds: float) -> dict[str, Any]:
    """Results with the median of each engine's decoding."""
    names = {
        "fast": "openllama fast int4",
        "fast8": "openllama fast int8",
        "peer": "llama.cpp Q4_0",
        "vino": "OpenVINO int4",
    }
    return {
        "rows": [
            {"engine": names[key], "phase_key": "decode", "seconds": report.summary([value]), "of_limit": 1.0}
            for key, value in seconds.items()
        ],
        "others": {},
        "memory": {},
    }  # fmt: skip


def reached(results: dict[str, Any], start: str) -> tuple[float | None, str]:
    [bar] = [bar for bar in bars.bars(results) if bar["what"].startswith(start)]
    return bar["measured"], bar["reached"]


def test_goals_compare_with_the_fastest_peer():
    start = "decode int4: speed beside the best"
    assert reached(made(fast=2, peer=3, vino=1.7), start) == (0.85, "must")
    assert reached(made(fast=2, peer=2, vino=3), start) == (1, "research")
    assert reached(made(fast=2, peer=1, vino=3), start) == (0.5, "no")
    assert reached(made(fast=2), start) == (None, "not measured")
    assert reached(made(fast=2, fast8=3), "decode int4: speed beside our int8") == (1.5, "must")


FIGURES = {"engine": "openllama fast bf16", "bytes_per_second": 100.0, "of_limit": 0.9}


def in_phases(**phases: dict[str, Any]) -> dict[str, Any]:
    """Results with rows of fast bfloat16 in phases."""
    names = {"short": "decode, short", "long": "decode, long", "batch": "decode, batch"}
    rows = [{**FIGURES, "rows": 1, "phase_key": names[key], **of} for key, of in phases.items()]
    return {"rows": rows, "others": {}, "memory": {}}


def test_several_rows_have_one_of_two_goals():
    one, batch = {"tokens_per_second": 10.0}, {"tokens_per_second": 60.0, "rows": 8}
    start = "decode bf16, 8 rows: tokens/s"
    assert reached(in_phases(short=one, batch=batch), start) == (6.0, "must")
    assert reached(in_phases(short=one, batch={**batch, "rows": 4}), start) == (None, "not measured")
    for share, expected in ((0.85, "must"), (0.75, "no")):
        assert reached(in_phases(batch={"of_limit": share}), "decode bf16, rows: share") == (share, expected)


def test_a_long_context_may_cost_what_its_cache_takes_to_read_and_a_twentieth():
    short = {"seconds": {"median": 2.0}, "cache_bytes": 100}
    start = "decode bf16, long context"
    for seconds, expected in ((8.3, "must"), (8.5, "no")):
        found = reached(in_phases(short=short, long={"seconds": {"median": seconds}, "cache_bytes": 700}), start)
        assert found == (pytest.approx(seconds / (2 + 600 / 100)), expected)
    long = {"seconds": {"median": 8.0}, "cache_bytes": 700, "bytes_per_second": None}
    assert reached(in_phases(short=short, long=long), start) == (None, "not measured")


def test_the_start_of_a_process_is_that_of_the_engines_that_are_there():
    def taken(name: str, first: float) -> dict[str, Any]:
        seconds = {f"first token, {name}": first, f"reading its files once, {name}": 2.0}
        return {what: {"seconds": report.summary([value])} for what, value in seconds.items()}

    fast, plain, start = taken("openllama fast bf16", 2.8), taken("openllama bf16", 2.2), "process start"
    assert reached({"rows": [], "others": fast, "memory": {}}, start) == (1.4, "must")
    assert reached({"rows": [], "others": fast | plain, "memory": {}}, start) == (1.1, "research")
    assert reached({"rows": [], "others": {}, "memory": {}}, start) == (None, "not measured")


def test_a_summary_is_the_median_with_the_least_and_the_most():
    taken = [3.0, 1.0, 2.5, 9.0]
    assert report.summary(taken) == {"median": statistics.median(taken), "min": 1.0, "max": 9.0, "count": 4}


# --- a run with engines that only say how long they took ---

LIMIT = {"sum": 0.5, "bf16": 0.5, "int8": 0.25}


class Said:
    """In place of the process of an engine: an answer for each command, an error, or Ctrl-C."""

    answers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, command: list[Any], patience: float = 0, **environment: str) -> None:
        self.facts = {"version": "1"}

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        if (answer := self.answers.get(operation)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer or {"seconds": [1.0]}

    def close(self) -> None:
        pass


class Machine(Said):
    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return self.answers.get("limit", {"seconds": LIMIT})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make a run of ``bench.py`` with arguments; ``answers`` by command."""

    def made_with(*arguments: str, **answers: Any) -> Any:
        monkeypatch.setattr(Said, "answers", answers)
        monkeypatch.setattr(bench, "Worker", Said)
        monkeypatch.setattr(bench.turns, "limit_worker", lambda shape, threads, patience: Machine([]))
        monkeypatch.setattr(bench.Files, "form", lambda self, name, python: tmp_path)
        given = ["bench.py", "--shape", "small", "--json", str(tmp_path / "results.json"), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        return bench.Run(bench.parsed())

    return made_with


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_what_was_measured_before_an_interruption_is_in_the_json(run, tmp_path):
    started = run("--engines", "openllama bf16", "--phases", "prefill", "decode", decode=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        started.measure()
    results = written(tmp_path)
    assert [(row["phase_key"], row["of_limit"] > 0) for row in results["rows"]] == [("prefill", True)]
    assert results["finished"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_with_one_engine_at_a_time_the_json_has_those_that_are_done(run, tmp_path, monkeypatch):
    started = run("--engines", "openllama fast", "--phases", "prefill", "--one-at-a-time")
    saved, save = [], bench.Run.save

    def seen(self: Any) -> None:
        save(self)
        saved.append([row["engine"] for row in written(tmp_path)["rows"]])

    monkeypatch.setattr(bench.Run, "save", seen)
    started.measure()
    bf16, int8, int4 = (f"openllama fast {precision}" for precision in ("bf16", "int8", "int4"))
    assert [engines for number, engines in enumerate(saved) if engines not in saved[:number]] == [
        [bf16], [bf16, int8], [bf16, int8, int4]
    ]  # fmt: skip
    assert written(tmp_path)["finished"] is True


@pytest.mark.parametrize("name", ["repeats", "tokens", "context", "batch", "threads"])
def test_a_number_that_measures_nothing_is_refused(run, name, capsys):
    with pytest.raises(SystemExit):
        run(f"--{name}", "0")
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err


def test_the_json_has_a_folder_before_anything_is_measured(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--json", str(tmp_path / "none" / "results.json"))
    assert "there is no folder" in capsys.readouterr().err


def test_an_error_of_the_limits_is_a_status_and_the_seconds_of_engines_remain(run, capsys, monkeypatch):
    started = run("--engines", "openllama bf16", "--phases", "prefill", limit={"error": "no memory"})
    started.measure()
    results = started.results()
    assert [(row["seconds"]["median"], row["of_limit"]) for row in results["rows"]] == [(1.0, None)]
    assert results["engines"]["limit"] == {"status": "prefill 512: no memory"}
    assert "| limit | prefill 512: no memory |" in report.text(results)
    assert {bar["reached"] for bar in results["bars"]} == {"not measured"}


def test_the_first_error_of_an_engine_is_its_status(run):
    ended = {"error": "the process ended"}
    started = run(
        "--engines", "openllama bf16", "--phases", "prefill", "decode", "decode, short", prefill={"seconds": [1.0]},
        decode=ended,
    )  # fmt: skip
    started.measure()
    assert started.results()["engines"]["openllama bf16"]["status"] == "decode at 512: the process ended"
    assert [row["phase_key"] for row in started.results()["rows"]] == ["prefill"]


HANGS = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "benchmarks" / "suite")!r})
from serving import serve
serve(lambda: ({{"hang": lambda: time.sleep(300)}}, {{}}))
"""


def test_an_engine_that_does_not_answer_is_ended_and_says_so():
    worker = bench.Worker([sys.executable, "-c", HANGS])
    try:
        assert "error" not in worker.facts
        worker.patience = 0.5
        message = "no answer within 0.5 seconds: the process was ended (--patience)"
        assert worker.ask("hang") == {"error": message}
        assert "ended with exit code -9" in worker.ask("memory")["error"], "which is known at once"
    finally:
        worker.close()


def test_an_engine_ends_in_the_middle_of_its_work_when_nobody_is_there_for_the_answer():
    with subprocess.Popen([sys.executable, "-c", HANGS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        assert b"load_seconds" in engine.stdout.readline()
        engine.stdin.write(b'{"op": "hang"}\n')
        engine.stdin.close()
        try:
            assert engine.wait(timeout=30) == 0
        finally:
            engine.kill()


def test_the_patience_is_that_of_every_process(run, monkeypatch):
    started = run("--engines", "openllama bf16", "--phases", "prefill", "start", "--patience", "7")
    given = []
    monkeypatch.setattr(bench.turns, "limit_worker", lambda *of: given.append(of[-1]) or Machine([]))
    monkeypatch.setattr(bench.startup, "first_tokens", lambda *of: given.append(of[-1]) or {})
    monkeypatch.setattr(bench.startup, "processes", lambda repeats: {})
    monkeypatch.setattr(bench.startup, "builds", dict)
    monkeypatch.setattr(bench, "Worker", lambda command, patience, **of: given.append(patience) or Said(command))
    started.measure()
    assert given == [7, 7, 7]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_patience_that_cannot_be_waited_for_is_refused(run, seconds, capsys):
    with pytest.raises(SystemExit):
        run("--patience", seconds)
    assert "--patience must be a number of seconds, got" in capsys.readouterr().err


def test_processes_that_fail_are_said_in_the_table(run, monkeypatch):
    monkeypatch.setattr(bench.startup, "first_tokens", lambda *arguments: {"first token, x": [{"error": "no x"}]})
    monkeypatch.setattr(bench.startup.sys, "executable", "/bin/false")
    started = run("--engines", "openllama bf16", "--phases", "start", "--repeats", "1")
    started.measure()
    others = started.results()["others"]
    assert set(others) == {
        "first token, x", "import torch", "import openllama, after torch",
        "openllama generate, tiny model, one token",
        "loops built now", "loops built before",
    }  # fmt: skip
    assert others["import torch"] == {"error": "the process ended with exit code 1: no message"}
    assert "| first token, x | no x |" in report.text(started.results())


def test_an_error_after_some_turns_is_the_answer_to_all():
    assert report.other([{"seconds": [1.0]}, {"error": "out of memory"}]) == {"error": "out of memory"}


@pytest.mark.parametrize(("ids", "reached_now"), [([1, 2], "must"), ([1, 3], "no"), (None, "not measured")])
def test_ids_that_guesses_change_fail_a_bar_and_stand_in_the_table(run, monkeypatch, ids, reached_now):
    def answered(self: Any, operation: str, **arguments: Any) -> dict[str, Any]:
        plain = "lookup" not in arguments and "assistant" not in arguments
        if operation == "generate" and ids is None and plain:
            return {"error": "no memory"}
        return {"seconds": [1.0], "ids": [1, 2] if plain else ids}

    started = run("--engines", "openllama fast bf16", "--phases", "generate", "--repeats", "1")
    monkeypatch.setattr(Said, "ask", answered)
    started.measure()
    for name in ("prompt lookup", "int4 assistant"):
        assert reached(started.results(), f"{name}: ids")[1] == reached_now
    printed = report.text(started.results())
    assert ("generate, prompt lookup, OTHER IDS than plain" in printed) == (ids == [1, 3])
    assert ("generate, prompt lookup, the ids of plain" in printed) == (ids == [1, 2])


def test_it_is_said_which_phase_of_how_many_runs_and_of_which_engine_if_alone(run, capsys):
    arguments = ("--engines", "openllama bf16", "openllama fast bf16", "--phases", "decode", "prefill")
    for alone in ((), ("--one-at-a-time",)):
        run(*arguments, *alone).measure()
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().err.splitlines()] == [
        "phase 1 of 2: prefill 512", "phase 2 of 2: decode at 512",
        "phase 1 of 2: prefill 512, openllama bf16", "phase 2 of 2: decode at 512, openllama bf16",
        "phase 1 of 2: prefill 512, openllama fast bf16", "phase 2 of 2: decode at 512, openllama fast bf16",
    ]  # fmt: skip


def test_training_steps_and_long_prompts_are_compared_at_any_shape(run, tmp_path):
    started = run("--engines", "openllama fast bf16", "--phases", "training", "memory", "--context", "16",
                  "--repeats", "1", "--threads", "1", "--peer-python", "transformers=/bin/false")  # fmt: skip
    started.measure()
    results = started.results()
    assert results["trained"] == {"tokens": 8, "shape": "small", "beside": "small"}
    assert "lacks torch or transformers" in results["others"]["training step of transformers"]["error"]
    assert "lacks torch or transformers" in results["memory"]["training step of transformers"]["error"]
    assert {name: of["tokens"] for name, of in results["memory"].items() if "bytes" in of} == {
        "training step": 64, "training step, products kept": 64,
        **{f"prompt of {tokens} tokens": tokens for tokens in (64, 128, 256, 512)},
    }  # fmt: skip
    assert reached(results, "training step: share of the limit")[0] > 0
    assert reached(results, "training step: speed beside transformers")[1] == "not measured"
    printed = report.text(results)
    assert "| prompt of 512 tokens | 512 | bfloat16 | small, two layers |" in printed
    assert "Training steps: 8 tokens in bfloat16, shape small; beside transformers, shape small." in printed


def test_a_limit_that_fails_is_the_error_of_the_products_and_the_steps_remain(run, monkeypatch):
    monkeypatch.setattr(bench.training, "Worker", Said)
    monkeypatch.setattr(bench.training, "limit_worker", lambda shape, threads, patience: Machine([]))
    started = run("--phases", "training", limit={"error": "E: none"}, step={"seconds": [2.0], "forward": 1, "loss": 1})
    monkeypatch.setattr(started, "theirs", lambda table: ["transformers"])
    started.measure()
    others = started.results()["others"]
    assert others["training step, its products alone"] == {"error": "E: none"}
    assert reached(started.results(), "training step: share of the limit") == (None, "not measured")
    assert reached(started.results(), "training step: speed beside transformers") == (1, "no")


def test_goals_of_training_and_memory_compare_with_transformers_and_with_a_shorter_prompt():
    step = {"training step beside transformers": 2.0, "training step of transformers": 3.0}
    others = {name: {"seconds": report.summary([seconds])} for name, seconds in step.items()}
    memory = {"training step": {"bytes": 4, "tokens": 8}, "training step of transformers": {"bytes": 8, "tokens": 8}}
    memory["training step, products kept"] = {"bytes": 2, "tokens": 8}
    memory |= {f"prompt of {n} tokens": {"bytes": 3 * n * n, "tokens": n} for n in (1, 2, 4, 8)}
    results = {"rows": [], "others": others, "memory": memory}
    assert reached(results, "training step: speed") == (1.5, "research")
    assert reached(results, "training step of many tokens in bfloat16: memory") == (0.5, "must")
    assert reached(results, "training step of many tokens in bfloat16, products kept: memory") == (0.25, "research")
    assert reached(results, "prompt 4 times as long") == (16.0, "no")


def test_each_phase_has_a_context_of_its_own_and_several_rows_a_short_one(run):
    work = run().work
    assert {phase: of.past for phase, of in work.items()} == {
        "prefill": 0, "decode": 512, "decode, short": 128, "decode, long": 2048, "decode, batch": 128
    }  # fmt: skip
    assert (work["decode, batch"].title, work["decode, batch"].rows) == ("decode 8 rows at 128", 8)


@pytest.mark.parametrize("page", ["docs/performance.md", "benchmarks/README.md"])
def test_the_choices_that_the_pages_show_can_be_made(run, page):
    shown = re.findall(r'--engines "?\w[^`]*?(?=`|"\n)', (ROOT / page).read_text(encoding="utf-8"))
    assert shown
    for arguments in shown:
        options = run(*shlex.split(arguments)).options
        chosen = [engine.name for engine in options.chosen]
        assert all(any(name in of for of in chosen) for name in options.engines), arguments


# --- rows are what they are named ---


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("OPENLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.library.cache_clear()
    with warnings.catch_warnings():
        yield
    compiler.library.cache_clear()


def test_a_fast_engine_that_would_be_the_slow_model_is_an_error_with_the_reason(no_compiler):
    for precision in ("bf16", "int4"):
        with pytest.raises(UserWarning, match=r"not fast: .*no-such-compiler"):
            workers.fast_model(str(TINY), precision)


def test_a_fast_row_of_the_quality_that_would_be_the_slow_model_is_an_error_with_the_reason(no_compiler):
    with pytest.raises(UserWarning, match=r"not fast: .*no-such-compiler"):
        quality.VARIANTS["bfloat16, fast"](tiny_model())


def test_the_rows_of_the_quality_say_in_which_type_they_are_computed(monkeypatch):
    fast = []
    monkeypatch.setattr(quality, "by_gguf", lambda kind: lambda matrix: matrix)
    monkeypatch.setattr(quality, "fast_bfloat16", lambda model: fast.append(model.bfloat16()) or model)
    for name, variant in quality.VARIANTS.items():
        fast.clear()
        made = variant(tiny_model())
        model = fast[0] if fast else made
        assert ("bfloat16" in name) == (model.dtype == torch.bfloat16), name
        assert ("fast" in name) == bool(fast), name
        rounded = next((kind for kind in QUANTIZATIONS if name.split(" in ")[0] == kind), None)
        assert model.config.quantization == rounded, name


def test_the_quality_of_several_texts_is_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "VARIANTS", {"int8": quality.VARIANTS["int8"]})
    text = tmp_path / "verse.txt"
    text.write_text("What light through yonder window breaks?\n" * 200, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["quality.py", "--text", str(text), "--text", str(text), "--tokens", "256"])
    quality.main()
    printed = capsys.readouterr().out.splitlines()
    [start] = [number for number, line in enumerate(printed) if line.startswith("| weights |")]
    columns = "verse, 256 tokens: perplexity | KL | same, %"
    assert printed[start] == f"| weights | {columns} | {columns} |"
    assert printed[start + 1] == "| --- |" + " ---: |" * 6
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in printed[start + 2 :])}
    assert list(rows) == ["float32", "int8"]
    assert rows["float32"][1:3] == ["0", "100.00"]
    assert 0 < float(rows["int8"][1]) < 0.01
    assert rows["int8"][:3] == rows["int8"][3:]


def test_a_text_that_is_missing_is_refused_in_a_line_before_another_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "held_out_windows", None)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--text", __file__, "--text", str(tmp_path / "none.txt")])
    with pytest.raises(SystemExit):
        quality.main()
    assert capsys.readouterr().err.splitlines()[-1] == f"quality.py: error: --text {tmp_path / 'none.txt'}: " + (
        "there is no such file"
    )
