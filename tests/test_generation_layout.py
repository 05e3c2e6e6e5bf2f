"""The modules of generation: the way to a token is straight, the rarer strategies lie beside it, names do not clash."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from openllama import generation

FOLDER = Path(inspect.getfile(generation)).parent
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("[a-z]*.py")}
SHARED = {"config", "outputs", "processors", "sampling", "stopping", "state"}


def imported(module: str) -> set[str]:
    """Full names of the modules that a module of generation imports anywhere, for types alone, too."""
    nodes = ast.walk(MODULES[module])
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module is not None}


STRATEGIES = ("beam", "contrastive", "assisted")


@pytest.mark.parametrize("module", STRATEGIES)
def test_a_rarer_strategy_imports_the_shared_state_and_neither_the_loop_nor_another_strategy(module: str) -> None:
    own = {name.removeprefix("openllama.generation.") for name in imported(module) if ".generation." in name}
    assert "state" in own
    assert own <= SHARED


@pytest.mark.parametrize("module", MODULES)
def test_a_rarer_strategy_is_imported_only_when_a_call_asks_for_it(module: str) -> None:
    at_once = {node.module for node in MODULES[module].body if isinstance(node, ast.ImportFrom)}
    assert not at_once & {f"openllama.generation.{strategy}" for strategy in STRATEGIES}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_class_that_calls_it_not_even_for_types(module: str) -> None:
    assert not imported(module) & {"openllama", "openllama.interface", "openllama.generation"}


def test_no_module_has_the_name_of_something_that_the_package_exports() -> None:
    assert not MODULES.keys() & set(generation.__all__)
    for name in generation.__all__:
        assert not inspect.ismodule(getattr(generation, name)), name


def test_public_functions_of_different_modules_have_different_names() -> None:
    names = [node.name for tree in MODULES.values() for node in tree.body if isinstance(node, ast.FunctionDef)]
    overloaded = {"generate"}
    assert sorted(name for name in set(names) - overloaded if names.count(name) > 1 and name[0] != "_") == []
