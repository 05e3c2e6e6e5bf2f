"""Write docs/reference.md from the docstrings and signatures of the public names.

    python scripts/reference.py

``PUBLIC`` below is the one list of what is public. A test compares the page with what this script makes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openllama.config import FIELDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"

PUBLIC = {  # module -> its public names, in the order of the page
    "openllama": "OpenLlamaConfig OpenLlamaModel OpenLlamaForCausalLM OpenLlamaForSequenceClassification "
    "OpenLlamaTokenizer",
    "openllama.pretrained": "PretrainedModel",
    "openllama.outputs": "ModelOutput BaseModelOutput CausalLMOutput SequenceClassifierOutput",
    "openllama.generation": "GenerationConfig GenerateOutput LogitsProcessor StoppingCriterion generate stream prepare "
    "score score_continuations embed_sequences Score ContinuationScore",
    "openllama.generation.text": "stream_text decoded until stop_at score_texts score_text_continuations "
    "continuation_ids embed_texts",
    "openllama.tokenizer": "AddedToken Encoding StreamDecoder",
    "openllama.surgery": "extend_vocabulary",
    "openllama.checkpoint": "convert convert_adapter verify diff inspect open_checkpoint hf_to_native native_to_hf "
    "expected_shapes Checkpoint Comparison Inspection Verification",
    "openllama.inference": "fast FastModel",
    "openllama.quantized": "quantize QuantizedLinear QuantizedEmbedding QuantizedSharedHead",
    "openllama.cache": "GrowingCache PreallocatedCache Cache KeyValue",
    "openllama.masks": "pack_documents",
    "openllama.recompute": "keep_products",
    "openllama.products": "FastProducts",
    "openllama.chat": "ChatSession ChatTemplate",
    "openllama.model": "CausalLM Inputs Output Decoder StableEmbedding DecoderLayer Attention MLP RMSNorm init_weights",
    "openllama.errors": "OpenLlamaError ConfigError InputError BackendError NumericalError TokenizerError "
    "CheckpointError CheckpointNotFoundError CorruptCheckpointError UnsafePickleError KeyMismatchError "
    "DestinationExistsError DestinationBusyError",
}
ALIASES = {  # names of types, which cannot have a docstring
    "LogitsProcessor": "A function of ids (B, L) and scores (B, V) that returns the changed scores.",
    "StoppingCriterion": "A function of ids (B, L) and scores (B, V), asked after each token. It returns one bool for "
    "all sequences or a bool tensor (B,), one per sequence.",
    "Cache": "Either of the two caches.",
    "KeyValue": "Keys and values of one layer, each (B, H, S, D).",
}
INTRODUCTION = """\
# Reference

`python scripts/reference.py` makes this page from the docstrings. The table lists every public name.

{table}

`openllama COMMAND --help` describes the command line.

**Stability.** Fixed: names, arguments, defaults and outputs that follow transformers 4.31.0; the names of the weights;
the files that this package writes, which every later version reads. May change in a 0.x release, with an entry in
[CHANGELOG.md](../CHANGELOG.md): all other names on this page, and the options of the command line. Names that are not
on this page are internal and may change at any time.

In signatures `LanguageModel` stands for an `OpenLlamaForCausalLM`, and `Unpack[Arguments]` for the arguments of
`openllama.generation.prepare`.

Shapes: B batch, T query length, S key length, H heads, D head dim, C hidden size, V vocabulary; L is the length of a
prompt or a sequence.
"""


def public_objects() -> dict[tuple[str, str], Any]:
    """(module, name) -> what it names."""
    return {
        (module, name): getattr(importlib.import_module(module), name)
        for module, names in PUBLIC.items()
        for name in names.split()
    }


def page() -> str:
    table = ["| import from | names |", "| --- | --- |"]
    for module, names in PUBLIC.items():
        link = f"[`{module}`](#{module.replace('.', '')})"
        table.append(f"| {link} | {', '.join(f'`{name}`' for name in names.split())} |")
    parts = [INTRODUCTION.format(table="\n".join(table))]
    section = None
    for (module, name), value in public_objects().items():
        if module != section:
            section = module
            parts.append(f"## {module}\n\n{summary(importlib.import_module(module))}\n")
        parts.append(f"### {name}\n\n" + "\n\n".join(entry(name, value)) + "\n")
    return "\n".join(parts)


def summary(module: Any) -> str:
    """The first sentence of a module's docstring."""
    return re.split(r"(?<=[.])\s", documentation(module))[0]


def entry(name: str, value: Any) -> Iterator[str]:
    """Paragraphs on one public name."""
    if name in ALIASES:
        short = re.sub(r"[a-z_]+[.]|'", "", str(value))  # collections.abc.Callable -> Callable
        yield code(f"{name} = {short}")
        yield ALIASES[name]
    elif inspect.isclass(value):
        yield from class_entry(name, value)
    else:
        yield code(name + signature(value))
        yield documentation(value)


def class_entry(name: str, cls: type) -> Iterator[str]:
    """A class: how it is made, its fields, and its methods and properties.

    What it inherits from a public class of this package is listed there; from an internal one, here.
    """
    rows = list(fields(cls))
    if issubclass(cls, BaseException):
        yield f"Bases: {', '.join(f'`{base.__name__}`' for base in cls.__bases__)}"
    elif "__init__" in vars(cls) and not dataclasses.is_dataclass(cls):
        yield code(name + signature(cls.__init__, skipped=1))
    yield documentation(cls)
    listed = [base for base in cls.__mro__[1:] if base in public_objects().values()]
    if listed and not issubclass(cls, BaseException):
        yield f"Inherits from {', '.join(f'[`{base.__name__}`](#{base.__name__.lower()})' for base in listed)}."
    if rows:
        yield "\n".join(["| field | type | default | |", "| --- | --- | --- | --- |", *rows])
    for base in cls.__mro__:
        if base is cls or (base.__module__.startswith("openllama") and base not in listed):
            for member, value in vars(base).items():
                yield from method(member, value)


def method(name: str, value: Any) -> Iterator[str]:
    """A public method or property; nothing for anything else."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if (name.startswith("_") and name != "__call__") or not inspect.isfunction(function):
        return
    if isinstance(value, property):
        yield code(f"{name}: {function.__annotations__['return']}  # property")
    else:
        yield code(
            name + signature(function, skipped=1) + ("  # class method" if isinstance(value, classmethod) else "")
        )
    if function.__doc__:
        yield documentation(function)


def signature(function: Any, skipped: int = 0) -> str:
    """``(x: Tensor, n: int = 1) -> Tensor``; ``skipped=1`` leaves out ``self``. Long ones get a line per argument."""
    found = inspect.signature(function)
    arguments: list[str] = []
    for argument in [*found.parameters.values()][skipped:]:
        if argument.kind is argument.KEYWORD_ONLY and not any(text.startswith("*") for text in arguments):
            arguments.append("*")
        arguments.append(re.sub(r"^(\S+: )'(.*?)'", r"\1\2", str(argument)))  # annotations are strings
    returns = "" if found.return_annotation in (found.empty, "None") else f" -> {found.return_annotation}"
    line = f"({', '.join(arguments)}){returns}"
    return line if len(line) < 90 else "(\n" + "".join(f"    {text},\n" for text in arguments) + f"){returns}"


def fields(cls: type) -> Iterator[str]:
    """Rows of a table: the fields of a dataclass or a named tuple, with what is said of each."""
    if not dataclasses.is_dataclass(cls) and not hasattr(cls, "_fields"):
        return
    lines = inspect.getsource(cls).splitlines()
    declared = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    abouts = {f.name: f.metadata["about"] for f in declared if "about" in f.metadata}
    for item in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(item, ast.AnnAssign) or item.col_offset > 4:  # deeper are variables of methods
            continue
        if "ClassVar" not in ast.unparse(item.annotation):
            name = ast.unparse(item.target)
            cells = [f"`{name}`", f"`{ast.unparse(item.annotation)}`", default(item.value)]
            cells.append(abouts.get(name) or comment(item, lines))
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("setting", "fixed"):  # (default, rule, about)
        value = value.args[0]
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":  # field(default_factory=dict, ...)
        return f"`{ast.unparse(value.keywords[0].value)}()`"
    return f"`{ast.unparse(value)}`"


def comment(item: ast.AnnAssign, lines: list[str]) -> str:
    """What stands behind a field, or else the lines above it."""
    behind = lines[item.end_lineno - 1].encode()[item.end_col_offset :].decode()  # type: ignore[operator]
    if text := re.sub(r"^ *(# type: \S+ *)?(# )?", "", behind):
        return text
    above = itertools.takewhile(lambda line: re.match("    # (?!--)", line), reversed(lines[: item.lineno - 1]))
    return " ".join(line.strip("# ") for line in reversed([*above]))


def documentation(value: Any) -> str:
    """The docstring, without fields, which have a table; outside of code a "<" would begin a tag."""
    text = (inspect.getdoc(value) or "").partition(FIELDS)[0].rstrip()
    return re.sub(r"(``.*?``)|<", lambda found: found[1] or "&lt;", text)


def code(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
