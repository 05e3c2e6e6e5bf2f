"""docs/reference.md lists every public name, and is what scripts/reference.py makes of the package as it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import openllama
from openllama import errors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import reference

MODULES = [module.name for module in pkgutil.walk_packages(openllama.__path__, "openllama.")]
MODULES = ["openllama", *(name for name in MODULES if not name.endswith("__main__"))]
NAMES = [f"{module}.{name}" for module, names in reference.PUBLIC.items() for name in names.split()]


def value_of(full_name: str) -> object:
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_page_is_what_the_script_makes() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run: python scripts/reference.py"


def test_every_error_is_public() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(reference.PUBLIC["openllama.errors"].split()) == defined


@pytest.mark.parametrize("full_name", NAMES)
def test_a_public_name_can_be_imported_and_is_documented(full_name: str) -> None:
    value = value_of(full_name)
    name = full_name.rpartition(".")[2]
    is_alias = not (inspect.isclass(value) or inspect.isfunction(value))
    assert is_alias == (name in reference.ALIASES), "only types without a docstring are described in ALIASES"
    made = f"{name}("  # the docstring that dataclasses and named tuples get by themselves
    assert is_alias or not (value.__doc__ or made).startswith(made), "it has no docstring"


def test_no_name_is_listed_twice() -> None:
    values = [value_of(name) for name in NAMES]
    assert [name for name, value in zip(NAMES, values, strict=True) if sum(value is one for one in values) > 1] == []


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_exports_is_listed_and_nothing_else_of_it(module: str) -> None:
    exported = getattr(importlib.import_module(module), "__all__", None)
    if exported is None:
        return
    listed = [value_of(name) for name in NAMES]
    assert [name for name in exported if not any(value_of(f"{module}.{name}") is one for one in listed)] == []
    assert set(reference.PUBLIC.get(module, "").split()) <= set(exported)


def test_the_page_does_not_depend_on_the_run() -> None:
    page = reference.page()
    assert " at 0x" not in page
    assert str(reference.PAGE.parent.parent) not in page
