"""The package reads top-down: modules import only what comes before them in the reading order."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openllama

PACKAGE = Path(openllama.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def reading_order() -> list[set[str]]:
    """The lines of the package's docstring that name modules; those of one line belong together."""
    assert openllama.__doc__ is not None
    lines = re.findall(r"^((?:\w+, )*\w+)  +\S", openllama.__doc__, flags=re.MULTILINE)
    return [set(line.split(", ")) for line in lines]


def module_of(path: Path) -> str:
    """``checkpoint/names.py`` -> checkpoint."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere below ``node`` when the program runs, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def test_the_reading_order_names_every_module() -> None:
    named = set.union(*reading_order())
    assert named == {module_of(path) for path in FILES} - {"__init__", "__main__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_up_the_reading_order(path: Path) -> None:
    if module_of(path) in ("__init__", "__main__"):
        return
    rank = {name: number for number, line in enumerate(reading_order()) for name in line}
    own = rank[module_of(path)]
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        package, _, rest = name.partition(".")
        if package == "openllama" and (module := rest.split(".")[0]) in rank:
            assert rank[module] <= own, f"{path.name} imports {module}, which comes later"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_transformers_or_the_scripts(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert not packages & {"transformers", "scripts", "tests", "benchmarks"}


def test_importing_the_package_brings_only_what_models_need() -> None:
    unneeded = ("transformers", "huggingface_hub", "xformers", "gguf", "matplotlib", "scipy", "pandas", "pytest")
    code = f"import sys, openllama; print(*[name for name in {unneeded!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.split() == []
    assert result.stderr == ""


def test_every_public_name_is_there() -> None:
    assert {"OpenLlamaConfig", "OpenLlamaModel", "OpenLlamaForCausalLM"} <= set(openllama.__all__)
    assert [name for name in openllama.__all__ if not hasattr(openllama, name)] == []
