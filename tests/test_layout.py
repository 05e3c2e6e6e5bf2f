"""The package reads top-down: modules import only what comes before them in the reading order."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import openllama
from tests.tiny import tiny_ids, tiny_model

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
    """Full names of what is imported anywhere below ``node``, inside functions and for types alone, too."""
    for child in ast.iter_child_nodes(node):
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


def modules_imported_by(path: Path) -> set[Path]:
    """Files of the package that ``path`` imports from."""
    found = set()
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        for size in range(len(parts), 1, -1):  # openllama.config.Settings is in openllama/config.py
            place = PACKAGE.joinpath(*parts[1:size])
            if parts[0] == "openllama" and (file := next(filter(Path.is_file, _files_of(place)), None)):
                found.add(file)
                break
    return found


def _files_of(place: Path) -> tuple[Path, Path]:
    return place.with_suffix(".py"), place / "__init__.py"


def test_no_import_goes_in_a_circle_not_even_for_types() -> None:
    waiting = {path: modules_imported_by(path) - {path} for path in FILES}
    while free := [path for path, needed in waiting.items() if not needed & waiting.keys()]:
        for path in free:
            del waiting[path]
    assert sorted(path.relative_to(PACKAGE).as_posix() for path in waiting) == []


HEART = ("errors", "config", "rope", "masks", "cache", "attention", "model")


def test_the_model_and_its_neighbours_need_nothing_else() -> None:
    needed, new = set(), {PACKAGE / "model.py"}
    while new:
        needed |= new
        new = {found for path in new for found in modules_imported_by(path)} - needed
    assert {path.stem for path in needed} == set(HEART)


@torch.no_grad()
def test_the_model_copied_out_with_its_neighbours_gives_the_same_logits(tmp_path: Path) -> None:
    (tmp_path / "openllama").mkdir()
    (tmp_path / "openllama" / "__init__.py").touch()
    for name in HEART:
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "openllama")
    model, ids = tiny_model(), tiny_ids()
    torch.save((model.config.to_dict(), model.state_dict(), ids), tmp_path / "weights.pt")
    code = """
import torch
from openllama.config import OpenLlamaConfig
from openllama.model import CausalLM, Inputs
torch.set_num_threads(1)
config, weights, ids = torch.load("weights.pt")
model = CausalLM(OpenLlamaConfig.from_dict(config)).eval()
model.load_state_dict(weights, strict=True)
with torch.no_grad():
    logits, _ = model(Inputs(ids))
    _, output = model(Inputs(ids[:, :4]))
    later, _ = model(Inputs(ids[:, 4:], cache=output.past_key_values))
torch.save((logits, later), "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    whole, later = torch.load(tmp_path / "logits.pt")
    assert torch.equal(whole, model(ids).logits)
    past = model(ids[:, :4]).past_key_values
    assert torch.equal(later, model(ids[:, 4:], past_key_values=past).logits)


def test_no_module_needs_a_private_part_of_torch_to_be_imported() -> None:
    """Names with an underscore may go with any release; where one is used, its absence is provided for."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = [node for node in ast.walk(tree) if isinstance(node, ast.With) and "suppress" in ast.unparse(node)]
        allowed = {name for node in guarded for name in imports(node)}
        private = {name for name in imports(tree) if name.startswith("torch.") and "._" in name}
        assert private <= allowed, path


MAIN = "import openllama.cli; openllama.cli.main"
TINY = "checkpoints/open-llama-tiny"


@pytest.mark.parametrize(
    ("start", "of_torch"),
    [
        ("import openllama", ()),
        (f"{MAIN}(['generate', '{TINY}', '--prompt', 'a', '--max-new-tokens', '1', '--greedy'])", ("torch.utils.",)),
        (f"{MAIN}(['inspect', '{TINY}'])", ("torch.utils.",)),
    ],
    ids=["import", "generate", "inspect"],
)
def test_starting_imports_little_beside_torch(start: str, of_torch: tuple[str, ...]) -> None:
    """Imports are most of the time to the first token, and torch's compiler alone takes a second."""
    code = (
        f"import sys, torch; before = set(sys.modules); {start}; print('new:', *sorted(set(sys.modules) - before))\n"
        "print('all:', *sorted(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    *_, new, everything = (set(line.split()[1:]) for line in result.stdout.splitlines())
    packages = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert packages <= {"openllama", "torch", "safetensors", "sentencepiece", "numpy", "tqdm"}
    tools = {f"openllama.checkpoint.{name}" for name in ("compare", "contents", "conversion", "gguf", "verification")}
    if start == "import openllama":
        assert not new & tools
    assert {name for name in new if name.startswith("torch.") and not name.startswith(of_torch)} == set()
    assert not new & {"asyncio", "http.server", "multiprocessing", "unittest", "xml"}
    assert not everything & {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"}
    assert not everything & {"sympy", "transformers", "huggingface_hub", "xformers", "gguf", "matplotlib", "pytest"}


def test_importing_the_package_says_nothing() -> None:
    command = [sys.executable, "-c", "import openllama"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert (result.stdout, result.stderr) == ("", "")


def test_every_public_name_is_there() -> None:
    assert {"OpenLlamaConfig", "OpenLlamaModel", "OpenLlamaForCausalLM"} <= set(openllama.__all__)
    assert [name for name in openllama.__all__ if not hasattr(openllama, name)] == []


def test_names_of_checkpoint_are_there_before_and_after_their_modules_are_imported() -> None:
    code = """
from openllama import checkpoint
assert set(checkpoint.__all__) <= set(dir(checkpoint))
first = {name: getattr(checkpoint, name) for name in checkpoint.__all__}
from openllama.checkpoint import compare, contents, conversion, verification
assert first == {name: getattr(checkpoint, name) for name in checkpoint.__all__}
assert [first[name].__module__ for name in ("convert", "diff", "inspect", "verify")] == [
    module.__name__ for module in (conversion, compare, contents, verification)]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    with pytest.raises(AttributeError, match=r"module 'openllama.checkpoint' has no attribute 'converts'"):
        openllama.checkpoint.converts  # noqa: B018
