"""Benchmarks run at a small size, and their figures are consistent; without the peers, which tests do not install."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "vocab-size": 300,
    "hidden-size": 32,
    "intermediate-size": 64,
    "num-hidden-layers": 1,
    "num-attention-heads": 2,
    "tokens": 16,
    "threads": 1,
    "repeats": 2,
}


def training(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "benchmarks/training.py", *options, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def test_a_training_step_is_timed_in_turns_and_compared_with_the_limit_of_its_products(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = training("--rows", "model.loss", "model.loss, fast products", "--keep-memory", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = ["model.loss", "model.loss, fast products"]
    assert list(result["rows"]) == [*rows, *(f"{row}, memory kept" for row in rows)]
    operations = 6 * 16 * (4 * 32 * 32 + 3 * 32 * 64 + 300 * 32)
    assert result["limit"] == pytest.approx(operations / result["operations_per_second"])
    first = result["rows"]["model.loss"]["seconds"]
    for name, row in result["rows"].items():
        assert name in done.stdout
        assert row["lowest"] <= row["seconds"] <= row["highest"]
        assert 0 < row["forward"] < row["highest"]
        assert row["times_the_first"] == pytest.approx(first / row["seconds"])
        assert row["of_the_limit"] == pytest.approx(result["limit"] / row["seconds"])
        assert row["loss"] == pytest.approx(result["rows"]["model.loss"]["loss"], abs=0.02)


def test_the_comparison_with_transformers_asks_for_its_interpreter(tmp_path: Path) -> None:
    done = training()
    assert done.returncode == 2
    assert "--peer-python is needed" in done.stderr
    missing = training("--peer-python", str(tmp_path / "python"))
    assert missing.returncode == 1
    assert "no such file" in missing.stderr
