"""The benchmark of GPUs at small shapes on a CPU: its checks pass, see faults, and one failure costs one row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openllama import attention
from openllama.masks import Mask

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu
import sections

MACHINE = gpu.Machine(torch.device("cpu"), gpu.SMALL)
FLAKY = """
import json, os, sys
file, mode = sys.argv[sys.argv.index("--json") + 1], sys.argv[1]
if mode != "early":
    open(file, "w").write(json.dumps([{"case": "good", "seconds": 1.0}]))
if mode in ("crash", "early"):
    os._exit(3)
"""


def run(section: Any, seconds: float = 300) -> list[dict[str, Any]]:
    return sections.run_cases(section(MACHINE), time.monotonic() + seconds, lambda rows: None)


def test_sdpa_has_the_values_and_gradients_of_eager_in_three_dtypes() -> None:
    *rows, xformers = run(gpu.parity)
    assert [row["case"] for row in rows] == [f"sdpa, {d}, {kind}" for d in gpu.BOUNDS for kind in gpu.KINDS]
    assert all(row["passed"] for row in rows)
    assert max(row["relative"] for row in rows if "float32" in row["case"]) < 2e-6
    assert xformers["message"].startswith("not available: attn_implementation 'xformers'")


@pytest.mark.parametrize("dtype", gpu.BOUNDS)
@pytest.mark.parametrize("kind", ["left padding", "cache", "packed documents"])
def test_a_mask_that_is_dropped_does_not_pass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str) -> None:
    right = attention.sdpa_attention

    def careless(query: Any, key: Any, value: Any, mask: Mask, dropout: float) -> Any:
        length, key_length = query.shape[2], key.shape[2]
        causal = torch.ones(length, key_length, dtype=torch.bool).tril(key_length - length)
        return right(query, key, value, Mask(tensor=causal), dropout)

    monkeypatch.setitem(attention._FUNCTIONS, "sdpa", careless)
    assert gpu.compared(MACHINE, "sdpa", dtype, kind)["passed"] is False


def test_a_static_step_makes_the_ids_of_generate() -> None:
    _, static, graph = run(gpu.decode)
    assert static["passed"]
    assert static["ids equal"] == "6 of 6"
    assert static["different tokens"] > 3
    assert graph["message"] == "needs CUDA"


def test_a_capture_may_take_steps_before_the_ones_that_count() -> None:
    def captured(step: Any) -> Any:
        for _ in range(3):
            step()
        return step

    model, prompt = MACHINE.build(gpu.SMALL.base, torch.float32), MACHINE.ids(gpu.SMALL.base, 5)
    row = gpu.stepped(MACHINE, model, prompt, captured)
    assert row["as without capture"] is True
    assert row["ids equal"] == "6 of 6"


def test_a_wrong_token_is_no_tie() -> None:
    model, prompt = MACHINE.build(gpu.SMALL.base, torch.float32), MACHINE.ids(gpu.SMALL.base, 5)
    ids = model.generate(prompt, max_new_tokens=6, do_sample=False)
    ids[0, 7] = (ids[0, 7] + 1) % 100
    row = gpu.agreement(model, prompt, ids)
    assert row["ids equal"] == "2 of 6"
    assert row["gap"] > 0.1
    assert row["passed"] is False


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config, ids = gpu.SMALL.base, MACHINE.ids(gpu.SMALL.base, 16)
    model = MACHINE.build(config, torch.float32, "eager")
    with FlopCounterMode(display=False) as counter:
        gpu.compute_prompt(model, ids)
    attention_twice = config.num_hidden_layers * 2 * 16**2 * config.hidden_size  # eager computes what it masks, too
    assert counter.get_total_flops() - attention_twice == gpu.operations(config, 16, 1)


@pytest.mark.parametrize("section", [gpu.limits, gpu.backends, gpu.prefill, gpu.training])
def test_every_other_section_has_figures(section: Any) -> None:
    rows = run(section)
    assert not sections.failed(rows)
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert len(figures) >= len(rows) - 1
    assert min(figures) > 0


def test_an_error_is_a_row_and_the_next_case_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def injected(model: Any, ids: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu, "forward", injected)
    first, second, *_ = rows = run(gpu.backends)
    assert first == {"case": "sdpa, 8, forward", "error": "RuntimeError: CUDA error: an illegal memory access"}
    assert second["case"] == "sdpa, 8, forward + backward"
    assert second["seconds"] > 0
    assert sections.failed(rows)


def test_an_error_of_the_preparation_is_a_row() -> None:
    def section(machine: Any) -> Any:
        raise MemoryError("no room for the model")
        yield

    assert run(section) == [{"case": "preparation", "error": "MemoryError: no room for the model"}]


def test_cases_after_the_deadline_are_said_to_be_skipped() -> None:
    assert {row.get("skipped") for row in run(gpu.limits, seconds=-1)} == {"the time is spent"}


@pytest.mark.parametrize(
    ("mode", "rows", "problem"),
    [
        ("crash", ["good", "after good"], "the process ended with exit code 3"),
        ("early", ["the first"], "the process ended with exit code 3"),
    ],
)
def test_what_a_process_found_before_it_broke_is_kept(mode: str, rows: list[str], problem: str) -> None:
    commands = {"broken": [sys.executable, "-S", "-c", FLAKY, mode], "whole": [sys.executable, "-S", "-c", FLAKY, "ok"]}
    found = dict(sections.run_processes(commands, 60))
    assert [row["case"] for row in found["broken"]] == rows
    assert found["broken"][-1]["error"] == problem
    assert [row["case"] for row in found["whole"]] == ["good"]


def test_a_process_that_hangs_is_ended_and_the_next_section_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    start, times = sections.subprocess.run, []

    def hanging(command: list[str], **settings: Any) -> Any:
        times.append(settings["timeout"])
        done = start(command, **settings)
        if "hang" in command:
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        return done

    monkeypatch.setattr(sections.subprocess, "run", hanging)
    commands = {name: [sys.executable, "-S", "-c", FLAKY, name] for name in ("hang", "ok")}
    found = dict(sections.run_processes(commands, 40_000))
    assert found["hang"] == [
        {"case": "good", "seconds": 1.0},
        {"case": "after good", "error": "the process was ended after 20000 s"},
    ]
    assert [row["case"] for row in found["ok"]] == ["good"]
    assert times[0] == pytest.approx(20_000, abs=10)
    assert 20_000 < times[1] <= 40_000, "all that is left"


def test_no_process_is_started_once_the_time_is_spent() -> None:
    assert dict(sections.run_processes({"late": ["no such program"]}, 0)) == {
        "late": [{"case": "all", "skipped": "the time is spent"}]
    }


def test_the_command_writes_json_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    options = ["--small", "--device", "cpu", "--sections", "limits", "--json", str(file)]
    assert gpu.main(options) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["torch"] == torch.__version__
    assert [row["case"] for row in report["sections"]["limits"]] == ["sum", "copy", "product, bfloat16"]
    assert "## limits\n\n| case | GB/s | TFLOP/s |\n| --- | --- | --- |\n| sum |" in capsys.readouterr().out


def test_a_device_that_there_is_not_is_told_in_every_section(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert gpu.main(["--small", "--device", "cuda:99", "--section", "prefill", "--json", str(file)]) == 1
    assert json.loads(file.read_text(encoding="utf-8"))[0]["case"] == "preparation"
