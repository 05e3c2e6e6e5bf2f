"""What ``make processors`` reports, with pytest's part played by a text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.parity import cpus

OUTPUT = """
---------------------- compared with transformers 4.31.0 -----------------------
     40 conversion: HF's files, bit for bit
     72 models, beam search
    260 models, one pass: all values and gradients
computed by {kernels} kernels of torch, threads: {threads}
{end}
"""


def play(monkeypatch: pytest.MonkeyPatch, code: int, end: str, **used: object) -> list[dict[str, str]]:
    """Let pytest end with ``code`` and print ``end`` last, and ``cpus`` run on any machine; the environments."""
    environments = []

    def run(command: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        wanted = {"kernels": env.get("ATEN_CPU_CAPABILITY", "AVX512").upper(), "threads": env["OPENLLAMA_TEST_THREADS"]}
        return subprocess.CompletedProcess(command, code, OUTPUT.format(**{**wanted, **used}, end=end))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(cpus.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "argv", ["cpus"])
    return environments


def test_every_processor_runs_once_with_one_thread_and_once_with_two(monkeypatch, capsys) -> None:
    environments = play(monkeypatch, 0, "406 passed, 1 warning in 127.29s (0:02:07)")
    assert cpus.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2 * len(cpus.PROCESSORS) :]]
    assert [(row[0], row[2]) for row in rows] == [(name, threads) for name in cpus.PROCESSORS for threads in "12"]
    assert {tuple(row[3:6]) for row in rows} == {("406", "0", "332")}
    assert [env.get("MKL_CBWR") for env in environments[-2:]] == ["COMPATIBLE"] * 2


@pytest.mark.parametrize(("end", "count"), [
    ("7 failed, 399 passed, 1 warning in 127.29s", 7), ("1 failed, 2 errors in 3s", 3), ("1 error in 3s", 1),
])  # fmt: skip
def test_failures_are_counted_shown_and_end_in_exit_code_1(monkeypatch, capsys, end: str, count: int) -> None:
    play(monkeypatch, 1, end)
    assert cpus.main() == 1
    out = capsys.readouterr().out
    assert out.count(end) == 2 * len(cpus.PROCESSORS)
    assert {int(line.split()[4]) for line in out.splitlines()[-2 * len(cpus.PROCESSORS) :]} == {count}


@pytest.mark.parametrize("used", [{"kernels": "DEFAULT"}, {"threads": 4}])
def test_an_imitation_that_does_not_act_is_an_error(monkeypatch, used: dict[str, object]) -> None:
    play(monkeypatch, 0, "406 passed in 127.29s", **used)
    monkeypatch.setattr(sys, "argv", ["cpus", "--processor", "avx2"])
    with pytest.raises(SystemExit, match="cannot be imitated"):
        cpus.main()


def test_a_run_that_compares_nothing_is_an_error(monkeypatch) -> None:
    play(monkeypatch, 5, "no tests ran in 0.01s")
    with pytest.raises(SystemExit, match="exit code 5"):
        cpus.main()
