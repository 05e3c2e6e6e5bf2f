"""What README and docs show is what happens: their Python runs, their commands run, their output is real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
DEMO_FOLDER = "checkpoints/open-llama-tiny-native"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def run(command: str, native: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of this package at the root, with the folder that ``make demo`` writes put elsewhere."""
    words = shlex.split(command.replace(DEMO_FOLDER, str(native)))
    assert Path(words[0]).name == "openllama", command
    return subprocess.run(
        [sys.executable, "-m", "openllama", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, the output and the messages of what ``make demo`` runs."""
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = listed.replace("\\\n", " ")
    commands = [line for line in listed.splitlines() if "/openllama " in line]
    assert len(commands) == 2
    native = tmp_path_factory.mktemp("demo") / "native"
    done = [run(command, native) for command in commands]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    return native, done[1].stdout, done[1].stderr


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
        out = capsys.readouterr().out
        for shown in re.findall(r"^ *print\(.*\)\n# (.*)$", block, re.M):
            assert shown in out


def test_the_readme_shows_what_make_demo_prints(demo):
    _, text, messages = demo
    shown = next(block for block in blocks("README.md", "console") if "$ make demo" in block)
    assert text.strip() in shown
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s, peak memory \d+ MiB", messages)
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s, peak memory \d+ MiB", shown)


def test_every_command_of_the_readme_runs_and_prints_what_is_shown(demo):
    shown = [
        session.split("\n", 1)
        for block in blocks("README.md", "console")
        for session in re.findall(r"^\$ (openllama .*?)(?=^\$|\Z)", block, re.S | re.M)
    ]
    assert sum(bool(output) for _, output in shown) >= 2
    for command, output in shown:
        done = run(command, demo[0])
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert not output or done.stdout.strip() == output.strip()


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "checkpoints/README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target
