"""``make bench`` at a small size: what its JSON holds, and that its ratios follow from its seconds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import bars, report
from benchmarks.suite.models import SHAPES

ROOT = Path(__file__).resolve().parents[1]
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
        rows, tokens = {"prefill": (1, 32), "decode": (1, 1), "decode, batch": (2, 1)}[row["phase_key"]]
        limit = results["limits"][row["phase_key"]]
        bytes_per_second = (2 * weights // 4 * 4) / limit["sum"]["seconds"]["median"]
        operations_per_second = 2 * 128**3 / limit["bf16"]["seconds"]["median"]
        least = max(2 * weights / bytes_per_second, row["operations"] / operations_per_second)
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


def test_a_summary_is_the_median_with_the_least_and_the_most():
    taken = [3.0, 1.0, 2.5, 9.0]
    assert report.summary(taken) == {"median": statistics.median(taken), "min": 1.0, "max": 9.0, "count": 4}
