"""The Makefile: what ``make help`` says of it, and what ``make quick`` runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> str:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_lists_every_target() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert re.findall(r"^make (\w+) ", make("help"), re.M) == [name for name in targets if name != "help"]


def test_quick_compares_with_transformers_and_names_files_that_exist() -> None:
    (tests,) = (line for line in make("-n", "quick").splitlines() if "pytest" in line)
    files = re.findall(r"tests/[\w/]+\.py", tests)
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert any(file.startswith("tests/parity/") for file in files)
