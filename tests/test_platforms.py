"""What can be seen on one system of how the package runs on others: Linux, macOS and Windows."""

from __future__ import annotations

import io
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openllama.checkpoint import reader
from openllama.cli import generate, main
from tests.checkpoints import assert_same_tensors, hf_weights, native_weights, tiny_config, write_checkpoint
from tests.sentencepieces import trained

ROOT = Path(__file__).resolve().parents[1]
UNIX_ONLY = ("crypt", "curses", "fcntl", "grp", "nis", "pty", "pwd", "readline", "resource", "spwd", "syslog",
             "termios", "tty")  # fmt: skip
PLAIN = "import sys\n"
HIDE = f"import sys; sys.modules.update(dict.fromkeys({UNIX_ONLY}))\n"  # what is None there cannot be imported
IMPORT_ALL = """
import importlib, pkgutil, openllama
sys.path.insert(0, "scripts")
modules = [module.name for module in pkgutil.walk_packages(openllama.__path__, "openllama.")]
for name in [*modules, *(module.name for module in pkgutil.iter_modules(["scripts"]))]:
    if name != "openllama.__main__":
        importlib.import_module(name)
        print(name)
"""
COMMAND_LINE = "from openllama.cli import main; sys.exit(main(sys.argv[1:]))"
COMMAND_LINES = "import json; from openllama.cli import main; sys.exit(any(map(main, json.loads(sys.argv[1]))))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in HF layout, with a tokenizer."""
    config = tiny_config(vocab_size=500, initializer_range=0.3)
    folder = write_checkpoint(tmp_path_factory.mktemp("hf"), hf_weights(config), config)
    (folder / "tokenizer.model").write_bytes(trained("v1-like"))
    return folder


def python(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run ``code`` in a fresh process at the root."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **options)


def test_every_module_and_script_imports_without_the_modules_of_unix() -> None:
    done = python(HIDE + IMPORT_ALL)
    assert done.returncode == 0, done.stderr.decode()
    assert {"openllama.cli.generate", "openllama.model", "train_tiny"} <= set(done.stdout.decode().split())


def test_commands_run_without_the_modules_of_unix(folder: Path, tmp_path: Path) -> None:
    commands = (("convert", folder, tmp_path / "native"), ("generate", tmp_path / "native", "--prompt", "To be"))
    done = python(HIDE + COMMAND_LINES, json.dumps(commands, default=str))  # up to the first that fails
    assert done.returncode == 0, done.stderr.decode()
    assert b"tokens/s\n" in done.stderr, "what is not known is not reported"


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_told_in_the_unit_of_the_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    usage = SimpleNamespace(ru_maxrss=300 * 2**20 // unit)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(generate, "_mapped_memory", lambda: 0)
    assert generate._peak_memory(torch.device("cpu")) == ", peak memory 300 MiB"


def test_pages_of_files_are_not_counted_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=300 * 2**10)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(generate, "_mapped_memory", lambda: 200 * 2**20)
    told = generate._peak_memory(torch.device("cpu"))
    assert told == ", peak memory 100 MiB and 200 MiB of mapped files, which the system can drop"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_mapped_memory_grows_with_the_pages_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2**26))
    before = generate._mapped_memory()
    with (tmp_path / "x").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        sum(mapping[i] for i in range(0, 2**26, 2**12))
        assert 2**25 < generate._mapped_memory() - before < 2**27


def test_text_is_utf_8_whatever_encoding_the_system_prefers(folder: Path) -> None:
    """A pipe on Windows prefers cp1252, which has no Chinese."""
    command = (PLAIN + COMMAND_LINE, "generate", folder, "--max-new-tokens", 8, "--greedy")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    written = python(*command, "--prompt", "春江", env=environment)
    assert written.returncode == 0, written.stderr.decode()
    assert written.stdout.decode().startswith("春江")
    assert python(*command, input="春江".encode(), env=environment).stdout == written.stdout


def test_bytes_that_are_no_utf_8_are_refused_in_one_line(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    done = python(PLAIN + COMMAND_LINE, "generate", folder, input=b"a\xff", env=environment)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"openllama: ")
    assert done.stderr.count(b"\n") == 1


def test_standard_input_may_have_been_read_from_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("first\n春".encode()), "utf-8"))
    assert sys.stdin.readline() == "first\n"
    assert main(["generate", str(folder), "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("春")


def test_files_are_mapped_privately_as_on_macos_and_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    weights = native_weights(tiny_config())
    file = write_checkpoint(tmp_path, weights, None, "one safetensors") / "model.safetensors"
    content = file.read_bytes()
    tensors = reader.open_file(file)
    assert_same_tensors(tensors, weights)
    tensors["model.norm.weight"].zero_()
    assert file.read_bytes() == content
