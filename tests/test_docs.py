"""What the pages show is what happens: every Markdown page is run, and output is compared line by line.

In a ```python block the comments directly below a statement are its output. In a ```console block a line that begins
with "$ " is a command, and what follows is its output; "..." stands for what varies, such as a speed. Commands of this
package, ``make demo`` and ``torchrun`` are run. Of what takes minutes (training, benchmarks, other make targets) it is
checked that the script or target and its options exist; no output may be shown for it.
"""

from __future__ import annotations

import ast
import doctest
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from torch import distributed as dist

from openllama.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (*ROOT.glob("*.md"), *(p for p in ROOT.glob("*/*.md") if not p.parent.name.startswith(".")))
)
OPTIONAL = ("peft", "transformers")  # of the test extra, where they can be installed
FOLDER = "checkpoints/open-llama-tiny-native"  # that ``make demo`` writes
ABORTED = "terminate called without an active exception"
WRITTEN = "checkpoints/written"  # by Python blocks: put elsewhere


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Language and text of every block of a page."""
    return iter(re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.S | re.M))


def assert_shown(shown: str, printed: str) -> None:
    """Equal line by line, "..." standing for anything."""
    same = doctest.OutputChecker().check_output(shown.strip() + "\n", printed.strip() + "\n", doctest.ELLIPSIS)
    assert same, f"the page shows\n{shown}\nbut what is printed is\n{printed}"


# --- Python ---


def shown_in(block: str) -> str:
    """The comments that directly follow statements."""
    shown, printing = [], False
    ends = {node.end_lineno: not isinstance(node, ast.FunctionDef) for node in ast.parse(block).body}
    for number, line in enumerate(block.splitlines(), start=1):
        if printing and line.startswith("# "):
            shown.append(line[2:])
        else:
            printing = ends.get(number, False)
    return "\n".join(shown)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun says to a process that it starts alone."""
    said = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():  # a block failed
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_and_print_what_is_shown(page, alone, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for language, block in blocks(page):
        if language == "python":
            try:
                exec(compile(block.replace(WRITTEN, str(tmp_path)), page, "exec"), names)
            except ModuleNotFoundError as error:  # its block stands behind those that need nothing more
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(f"{error.name} is not installed; it is part of the test extra where it can be")
            assert_shown(shown_in(block), capsys.readouterr().out)


def test_comments_below_a_statement_are_taken_for_output_and_others_are_not():
    assert shown_in("x = 1\n\n# a remark\nprint(x)\n# 1\n# 2\n\n# another\nprint(\n    x\n)\n# 3\n") == "1\n2\n3"


# --- commands ---


def sessions(page: str) -> list[tuple[str, str]]:
    """Commands of a page, each with the output that is shown."""
    found = []
    for language, block in blocks(page):
        if language == "console":
            assert block.startswith("$ "), f"{page}: a console block begins with a command"
            for session in re.split(r"^\$ ", block, flags=re.M)[1:]:
                command, output = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", session, re.S).groups()
                found.append((command.replace("\\\n", " "), output))
    return found


SESSIONS = [(page, *session) for page in PAGES for session in sessions(page)]


def openllama(command: str, folder: Path) -> str:
    """Run a command of this package at the root; the folder that ``make demo`` writes is put elsewhere."""
    words = shlex.split(command.replace(FOLDER, str(folder)))
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(ROOT)
        try:
            code: object = main(words[1:])
        except SystemExit as end:  # of argparse
            code = end.code
        out.flush()
        err.flush()
    assert code == 0, f"{command}: {err.buffer.getvalue().decode()}"
    return out.buffer.getvalue().decode().replace(str(folder), FOLDER)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that ``make demo`` writes, and what it prints."""
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line for line in listed.replace("\\\n", " ").splitlines() if "/openllama " in line]
    assert len(commands) == 2
    folder = tmp_path_factory.mktemp("demo") / "native"
    return folder, "".join(openllama(command, folder) for command in commands)


@pytest.mark.parametrize(
    ("page", "command", "shown"),
    [session for session in SESSIONS if session[1].startswith(("openllama ", "make demo"))],
)
def test_a_command_prints_what_is_shown(demo, page, command, shown):
    folder, printed = demo
    assert_shown(shown, printed if command == "make demo" else openllama(command, folder))


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, script, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("page", "command", "shown"),
    [session for session in SESSIONS if not session[1].startswith(("openllama ", "make demo", "torchrun "))],
)
def test_a_command_that_takes_long_exists_with_its_options_and_shows_no_output(page, command, shown):
    assert not shown.strip(), "what is not run shows no output"
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=True)
    elif words[0].endswith("python") and words[1].endswith(".py"):
        known_options = help_of(words[1])
        assert [word for word in words[2:] if word.startswith("--") and word not in known_options] == []
    else:
        known = (
            "pip install ",
            "python -m venv ",
            "git clone ",
            "cd ",
            "source ",
            "peer/bin/pip install ",
            "python -c ",
        )
        assert command.startswith(known), f"{page}: who runs {command!r}?"


@pytest.mark.parametrize(
    ("page", "command", "shown"), [session for session in SESSIONS if session[1].startswith("torchrun ")]
)
def test_a_program_prints_in_several_processes_what_one_process_prints(tmp_path, page, command, shown):
    """The programs are the Python blocks that begin with their names, which run in one process above."""
    *options, name = shlex.split(command)[1:]
    [program] = [block for language, block in blocks(page) if language == "python" and block.startswith(f"# {name}\n")]
    (tmp_path / name).write_text(program.replace(WRITTEN, str(tmp_path)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(tmp_path / name)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    # After their last line, processes of torch 2.13 over gloo now and then abort while the interpreter ends.
    assert done.returncode == 0 or ABORTED in done.stderr, done.stderr
    assert_shown(shown, done.stdout)
    assert_shown(shown, shown_in(program))


def test_commands_stand_in_console_blocks():
    for page in PAGES:
        for language, block in blocks(page):
            if language == "":
                assert not re.search(r"^(\$|openllama|make|python|pip|torchrun) ", block, re.M), f"{page}: {block}"


def test_the_pages_show_real_output():
    assert sum(bool(shown.strip()) for _, _, shown in SESSIONS) >= 4
    assert {"README.md", "checkpoints/README.md"} <= {page for page, command, _ in SESSIONS if command == "make demo"}


# --- links ---


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{target}#{anchor}"
