"""Build the wheel and use it as a stranger would: in an empty environment, outside the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "open-llama-tiny"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "checkpoints")
BIN = "Scripts" if os.name == "nt" else "bin"


class PackageError(Exception):
    """The wheel is not what it should be."""


def run(environment: Path, program: str, *arguments: object, where: Path) -> str:
    """Run a program of an environment in the folder ``where``; what it prints."""
    print("$", program, *arguments, flush=True)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / BIN / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=where, env=variables, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        raise PackageError(f"{program} ended with exit code {done.returncode} and printed {done.stdout!r}")
    return done.stdout


def check_files(wheel: Path) -> None:
    """Every file of the package is in the wheel, ``py.typed`` and the loops among them, and nothing else."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "openllama").rglob("*.py")}
    package |= {"openllama/py.typed", "openllama/inference/kernels.cpp", "openllama/quantized/rounding.cpp"}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != package:
        raise PackageError(f"not in the wheel: {sorted(package - found)}; only there: {sorted(found - package)}")


def check_commands(environment: Path, where: Path) -> None:
    """Convert the shipped checkpoint and continue a text."""
    run(environment, "openllama", "convert", CHECKPOINT, "native", where=where)
    prompt, options = "ROMEO:", ("--greedy", "--max-new-tokens", 20, "--dtype", "float32")
    text = run(environment, "openllama", "generate", "native", "--prompt", prompt, *options, where=where)
    print(text)
    if not (text.startswith(prompt) and text.removeprefix(prompt).strip()):
        raise PackageError(f"generate printed {text!r}")
    if (
        quick := run(
            environment, "openllama", "generate", "native", "--fast", "--prompt", prompt, *options, where=where
        )
    ) != text:
        raise PackageError(f"generate --fast printed {quick!r}")


def check_types(environment: Path, where: Path) -> None:
    """A type checker sees the package's annotations."""
    code = "import openllama; reveal_type(openllama.OpenLlamaConfig().hidden_size)"
    found = run(environment, "mypy", "-c", code, where=where)
    if 'Revealed type is "int"' not in found:
        raise PackageError(f"mypy does not see the types: {found}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source, empty, environment, typing = (work / name for name in ("source", "empty", "environment", "typing"))
        shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
        empty.mkdir()
        for one in (environment, typing):
            venv.create(one, with_pip=True)
        run(environment, "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work, source, where=empty)
        (wheel,) = work.glob("*.whl")
        check_files(wheel)
        run(environment, "pip", "install", "--quiet", "--constraint", CONSTRAINTS, wheel, where=empty)
        check_commands(environment, empty)
        run(typing, "pip", "install", "--quiet", "--constraint", CONSTRAINTS, "mypy", where=empty)
        for arguments in ((wheel,), ("--editable", source)):
            run(typing, "pip", "install", "--quiet", "--no-deps", *arguments, where=empty)
            check_types(typing, empty)
        print(f"{wheel.name} works ({sys.version.split()[0]})")


if __name__ == "__main__":
    main()
