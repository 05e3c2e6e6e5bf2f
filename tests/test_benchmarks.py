"""Benchmarks run at a small size, and their figures are consistent; without the peers, which tests do not install."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.suite import training as training_suite
from benchmarks.suite import turns
from benchmarks.suite.models import Shape
from openllama import OpenLlamaConfig, __version__

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from benchmarks import training as training_script  # noqa: E402

SMALL = {
    "vocab-size": 300,
    "hidden-size": 32,
    "intermediate-size": 64,
    "num-hidden-layers": 1,
    "num-attention-heads": 2,
    "tokens": 16,
    "threads": 1,
}
SHAPE = Shape("given", OpenLlamaConfig(**{name.replace("-", "_"): SMALL[name] for name in list(SMALL)[:5]}))


def training(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "benchmarks/training.py", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def test_a_training_step_is_timed_in_turns_and_compared_with_the_limit_of_its_products(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    rows = ["model.loss", "model.loss, fast products"]
    done = training("--repeats", "2", "--rows", *rows, "--keep-memory", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert list(result["rows"]) == [*rows, *(f"{row}, memory kept" for row in rows)]
    assert (result["shape"]["torch"], result["shape"]["of"]) == (torch.__version__, f"openllama {__version__}")
    first = result["rows"]["model.loss"]["seconds"]["median"]
    for name, row in result["rows"].items():
        assert name in done.stdout
        taken = row["seconds"]
        assert taken["count"] == 2
        assert 0 < row["forward"] < taken["max"]
        assert row["times_the_first"] == pytest.approx(first / taken["median"])
        assert row["of_the_limit"] == pytest.approx(result["limit"] / taken["median"])
        assert row["loss"] == pytest.approx(result["rows"]["model.loss"]["loss"], abs=0.02)


def test_the_limit_is_the_operations_of_all_products_at_the_rate_of_a_large_one() -> None:
    steps = training_suite.Steps(SHAPE, 16, "bfloat16", 1, 1.0)
    assert steps.operations == 6 * 16 * (4 * 32 * 32 + 3 * 32 * 64 + 300 * 32)
    rate = turns.limit_rates(SHAPE, {"bf16": 0.5})["bf16"]
    assert steps._products({"seconds": {"bf16": 0.5}}) == {"seconds": [pytest.approx(steps.operations / rate)]}


def test_the_memory_of_a_step_is_its_peak_less_parameters_and_gradients(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = training("--memory", "--rows", "all logits", "model.loss, layers recomputed", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    parameters = 300 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 5 * 32  # the table, a layer, three norms and the stable one
    for row in rows.values():
        assert row["peak"] - row["bytes"] == 2 * 2 * parameters
        assert row["before"] <= row["peak"] < row["before"] + 2**28
        assert row["relative"] == pytest.approx(row["bytes"] / rows["all logits"]["bytes"])


def test_rows_that_are_not_of_the_same_model_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": [{"loss": 1.0}, {"loss": 1.01}], "b": [{"loss": 1.0}]}
    assert training_suite._agreeing(answers) == answers
    for other in (1.1, float("nan")):
        found = training_suite._agreeing({**answers, "c": [{"loss": other}]})
        assert all("not the same model" in of["error"] for [of] in found.values())


def test_memory_is_measured_where_the_c_library_returns_it_and_seconds_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    class Process:
        def __init__(self, command: object, patience: float, **environment: str) -> None:
            self.facts = {"error": "not started"}
            environments.append(environment)

        def close(self) -> None:
            pass

    monkeypatch.setattr(training_suite, "Worker", Process)
    monkeypatch.setattr(training_suite, "limit_worker", lambda *_: Process([], 1))
    monkeypatch.setattr(training_suite, "take_turns", lambda *_: {training_suite.LIMIT: []})
    steps = training_suite.Steps(SHAPE, 8, "float32", 1, 60)
    steps.memory(["model.loss"])
    steps.times(["model.loss"], 1)
    assert ["MALLOC_MMAP_THRESHOLD_" in environment for environment in environments] == [True, False, False]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the arguments of the script, which is then called here, at the root of the repository."""

    def given(*arguments: str) -> None:
        options = [f"--{name}={value}" for name, value in SMALL.items()]
        monkeypatch.setattr(sys, "argv", ["training.py", *options, *arguments])

    monkeypatch.chdir(ROOT)
    return given


def test_the_comparison_with_transformers_asks_for_its_interpreter(
    in_this_process: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process()
    with pytest.raises(SystemExit, match="2"):
        training_script.main()
    assert "--peer-python is needed" in capsys.readouterr().err
    missing = training("--peer-python", str(tmp_path / "python"))
    assert missing.returncode == 1
    assert "no such file" in missing.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--tokens=0", "--tokens must be at least 1, got 0"),
        ("--repeats=-1", "--repeats must be at least 1, got -1"),
        ("--threads=0", "--threads must be at least 1, got 0"),
        ("--patience=0", "--patience must be a number of seconds, got 0.0"),
        ("--num-attention-heads=3", "hidden_size 32 is not divisible by num_attention_heads 3"),
        ("--json=missing/result.json", "there is no folder"),
        ("--json=benchmarks", "it is a folder"),
    ],
)
def test_a_wrong_option_of_a_training_step_is_one_line_before_any_work(
    wrong: str, said: str, in_this_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process("--rows", "model.loss", wrong)
    with pytest.raises(SystemExit, match="2"):
        training_script.parsed()
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_interpreter_that_cannot_be_run_is_said_to_be_so(tmp_path: Path) -> None:
    file = tmp_path / "python"
    file.touch()
    assert training_suite.missing(file) == f"{file} cannot be run: Permission denied"


def test_prompts_have_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, *_: object, **__: object) -> None:
            self.facts: dict[str, object] = {}
            self.asked = 0

        def ask(self, operation: str, tokens: int) -> dict[str, int]:
            self.asked += 1
            return {"bytes": tokens if self.asked == 1 else 0}  # what a second one takes is there already

        def close(self) -> None:
            pass

    monkeypatch.setattr(training_suite, "Worker", Process)
    found = training_suite.prompts(training_suite.Steps(SHAPE, 1, "bfloat16", 1, 1.0), [8, 32])
    assert [of["bytes"] for of in found.values()] == [8, 32]


def test_steps_are_reported_where_the_products_alone_failed() -> None:
    answers = {"model.loss": [{"seconds": [2.0], "forward": 1.0, "loss": 1.0}]}
    products = [{"error": "E: none"}]
    rows = training_script.times(answers, products)
    assert rows["model.loss"]["of_the_limit"] is None
    result = {"shape": SMALL, "rows": rows, "limit": training_script.limit(products)}
    assert "products alone: not measured" in training_script.time_table(result)
    assert "| model.loss | 2 | 2 - 2 | 1 | 1.00 | - |" in training_script.time_table(result)
