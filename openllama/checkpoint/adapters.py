"""Adapters of peft, such as LoRA: renamed between transformers' model and ours.

An adapter names its weights by the modules that they change:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    trained on transformers' model
    base_model.model.model.layers.3.attention.q_proj.lora_A.weight    trained on ours

On the model of the other names it changes nothing, and peft does not say so.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from openllama.checkpoint.archives import check_sums, is_archive
from openllama.checkpoint.files import open_file
from openllama.checkpoint.folders import check_places, copy_small, finished_folder
from openllama.checkpoint.names import HF_TO_NATIVE, PREFIX, Layout, floating_dtype
from openllama.checkpoint.pieces import is_copy
from openllama.config import CONFIG_FILE, read_json, write_json
from openllama.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InputError,
    KeyMismatchError,
    listed,
    warn,
)
from openllama.tokenizer.files import ALL_FILES as TOKENIZER_FILES

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # first found wins, as in peft
ADAPTER_PREFIX = "base_model.model."  # of every weight of an adapter that belongs to a module
MODULES: dict[Layout, list[str]] = {  # every module with weights, in the same order
    "hf": [name.rpartition(".")[0] for name in HF_TO_NATIVE],
    "native": [name.rpartition(".")[0] for name in HF_TO_NATIVE.values()],
}
WORDS = {  # the parts of their names that differ
    "embed_tokens": "embedding.tokens",
    "embed_layer_norm": "embedding.norm",
    "input_layernorm": "attention_norm",
    "self_attn": "attention",
    "post_attention_layernorm": "mlp_norm",
}
TABLE: dict[Layout, str] = {"hf": "embed_tokens.", "native": "embedding.tokens."}
LISTS = ("target_modules", "modules_to_save", "exclude_modules", "feedforward_modules")  # fields of modules' names
PATTERNS = ("rank_pattern", "alpha_pattern")  # fields that map regular expressions of modules' names to numbers
MAX_NAMES = 1000  # of modules in a configuration; 100 layers have 700 matrices
MAX_REGEX = 1000  # characters
MAX_WAYS = 300_000  # in which regular expressions may fail on a name; so many take 3 s for all modules
LONGEST = 40  # characters of a module's name
REGEX_PART = re.compile(  # a character or a class of them, perhaps repeated; a group, perhaps left out; an end
    r"(?P<one>\\[.dw-]|\[\^?[\w.-]+\]|[\w.-])(?P<repeat>[*+?]?)\??|(?P<group>\((?:\?:)?|\||\)\??)|[\^$]"
)
DIGITS = re.compile(r"\\d|\[[\d-]+\]")


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a folder of an adapter without a model beside it."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG_FILE).is_file()


def convert_adapter(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: str = "native",
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter of the folder ``src`` to ``dst`` with the names of ``to``, "native" or "hf", as safetensors.

    The names in its configuration follow; files of a tokenizer are copied. ``dtype`` casts the weights.
    An adapter that has the names already is copied. Raises ``KeyMismatchError`` for a module that no
    Open-Llama has, or one that the configuration names in a way which cannot be translated.
    """
    if to not in ("native", "hf"):
        raise InputError(
            f"an adapter is written for the names of native or hf, not for {to!r}; merge it into its model"
        )
    layout = cast("Layout", to)
    src, dst, dtype = Path(src), Path(dst), floating_dtype(dtype)
    check_places(src, dst, overwrite, is_adapter, "no adapter")
    file = next((src / name for name in ADAPTER_FILES if (src / name).is_file()), None)
    if file is None:
        raise CheckpointNotFoundError(f"{src} has {ADAPTER_CONFIG} but none of {', '.join(ADAPTER_FILES)}")
    config = read_json(src / ADAPTER_CONFIG, CorruptCheckpointError)
    check_adapter_config(config, src / ADAPTER_CONFIG)
    config = rename_config(config, layout)
    if is_archive(file):
        check_sums(file)
    tensors = {
        name: tensor.to(dtype).clone(memory_format=torch.contiguous_format)
        for name, tensor in rename_adapter(open_file(file), layout).items()
    }  # small enough for memory
    if any(TABLE[layout] in name for name in tensors):
        warn(
            "an adapter of the embedding table changes the input alone with transformers, until it is merged; here it "
            "changes the logits, too, where the model shares the table"
        )
    if dtype == torch.float16 and (large := [name for name, tensor in tensors.items() if tensor.isinf().any()]):
        raise CorruptCheckpointError(f"{listed(large)}: numbers too large for float16 (above 65504); use bfloat16")
    with finished_folder(dst, (ADAPTER_CONFIG, *ADAPTER_FILES, *TOKENIZER_FILES), overwrite) as folder:
        write_json(folder / ADAPTER_CONFIG, config)
        copy_small(src, folder, TOKENIZER_FILES)
        # save_file would make a file that only its owner can read.
        (folder / ADAPTER_FILES[0]).write_bytes(save(tensors, metadata={"format": "pt"}))
        written = open_file(folder / ADAPTER_FILES[0])
        if wrong := [name for name, tensor in tensors.items() if not is_copy(written[name], tensor)]:
            raise CorruptCheckpointError(f"{dst}: {wrong[0]} differs when read again; is the disk or memory failing?")


def check_adapter_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ``CorruptCheckpointError`` unless the fields that name modules are of the types that peft writes."""
    for field in LISTS:
        value = config.get(field)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(name, str) for name in names):
            raise CorruptCheckpointError(f"{path}: {field} must be a list of names or a regular expression")
    for field in PATTERNS:
        if not isinstance(config.get(field) or {}, dict):
            raise CorruptCheckpointError(f"{path}: {field} must map names to numbers")
    for field in (*LISTS, *PATTERNS):
        if not isinstance(config.get(field), str) and len(config.get(field) or ()) > MAX_NAMES:
            raise CorruptCheckpointError(f"{path}: {field} names more than {MAX_NAMES:,} modules")


def rename_adapter(tensors: Mapping[str, Tensor], to: Layout) -> dict[str, Tensor]:
    """The weights of an adapter by the names of ``to``; names that have no module (a prompt's) stay as they are."""
    renamed = {_translated(name, to) if name.startswith(ADAPTER_PREFIX) else name: t for name, t in tensors.items()}
    known = tuple(_variants(MODULES[to]))
    unknown = [
        name
        for name in renamed
        if name.startswith(ADAPTER_PREFIX) and not _numbered(name.removeprefix(ADAPTER_PREFIX)).startswith(known)
    ]
    if unknown:
        raise KeyMismatchError(f"not of a module of an Open-Llama ({len(unknown)}): {listed(unknown)}")
    if len(renamed) < len(tensors):
        raise KeyMismatchError("the adapter holds weights of both layouts for the same module")
    return renamed


def rename_config(config: Mapping[str, Any], to: Layout) -> dict[str, Any]:
    """A peft configuration whose ``target_modules`` and other fields name the modules of ``to``."""
    renamed = dict(config)
    for field in LISTS:
        value = config.get(field)
        if value == "all-linear":
            continue
        if isinstance(value, str):
            _check_regexes(field, [value])
            renamed[field] = _checked(field, value, to, lambda regex, module: bool(re.fullmatch(regex, module)))
        elif value:
            matches = _ends_with if field == "modules_to_save" else _is_or_ends_with
            renamed[field] = [_checked(field, str(name), to, matches) for name in value]
    for field in PATTERNS:
        _check_regexes(field, [rf"(.*\.)?{regex}$" for regex in config.get(field) or {}])
        renamed[field] = {
            _checked(field, name, to, lambda regex, module: bool(re.match(rf"(.*\.)?{regex}$", module))): number
            for name, number in (config.get(field) or {}).items()
        }
        if field not in config:
            del renamed[field]
    return renamed


def _check_regexes(field: str, regexes: Iterable[str]) -> None:
    """Raise ``KeyMismatchError`` unless matching all of them takes bounded time."""
    ways = 0.0
    for regex in regexes:
        ways += _ways(regex)
        if ways > MAX_WAYS:
            raise KeyMismatchError(
                f"{field}: {regex[:MAX_REGEX]!r} could take too long to match; names with ., .*, classes such as [0-7] "
                "and alternatives such as (q|v)_proj are read, and not many of them at once: write the names of its "
                "modules out"
            )


def _ways(regex: str) -> float:
    """How often a match of ``regex`` with a module's name may go back and try again, at most; infinity for most syntax.

    No group is repeated, so each part is tried once in each way of those before it: .*(b|c|d)?e has 41 * 3 * 2 ways.
    """
    ways, repeats, alternatives, end = 1, 0, [1], 0
    for part in REGEX_PART.finditer(regex[: MAX_REGEX + 1]):
        one, repeat, group = part.group("one", "repeat", "group")
        if part.start() != end:
            break
        end = part.end()
        if repeat == "?":
            ways *= 2
        elif repeat and DIGITS.fullmatch(one):
            ways *= 3  # numbers of layers have two digits
        elif repeat:
            repeats += 1
        elif group == "|":
            alternatives[-1] += 1
        elif group and group[0] == "(":
            alternatives.append(1)
        elif group and len(alternatives) > 1:
            ways *= alternatives.pop() * len(group)
    places = math.comb(LONGEST + repeats, repeats)  # where the repeated characters may end, one after the other
    return math.inf if end < len(regex) or len(regex) > MAX_REGEX else ways * places * math.prod(alternatives)


def _translated(text: str, to: Layout) -> str:
    """``text`` with each of ``WORDS`` in the words of ``to``."""
    for hf, native in WORDS.items():
        old, new = (hf, native) if to == "native" else (native, hf)
        text = re.sub(rf"(?<!\w){old}(?!\w)".replace(".", r"\\?\."), new, text)
    return text


def _checked(field: str, name: str, to: Layout, matches: Callable[[str, str], bool]) -> str:
    """``name`` translated; raises ``KeyMismatchError`` unless it then means the same modules as before.

    Some mean none: peft lists "classifier" and "score" for every classifier.
    """
    renamed = _translated(name, to)
    meant = False
    for layout in ("hf", "native"):  # the adapter may have the names of ``to`` already
        try:
            before = [matches(name, module) for module in _examples(layout)]
            after = [matches(renamed, module) for module in _examples(to)] if any(before) else []
        except (re.error, RecursionError) as error:
            raise KeyMismatchError(f"{field}: {name!r} is not a regular expression: {error}") from error
        if any(before) and before == after:
            return renamed
        meant |= any(before)
    if not meant:
        return name
    raise KeyMismatchError(f"{field}: {name!r} cannot be translated; write the names of its modules out")


@functools.cache
def _examples(layout: Layout) -> list[str]:
    """The modules of the first 100 layers, with and without ``model.``."""
    variants = _variants(MODULES[layout])
    return [name.replace(".N.", f".{n}.") for name in variants for n in range(100 if ".N." in name else 1)]


def _variants(modules: Iterable[str]) -> list[str]:
    return [variant for module in modules for variant in dict.fromkeys((module, module.removeprefix(PREFIX)))]


def _numbered(name: str) -> str:
    return re.sub(r"(?<=\blayers\.)\d+(?=\.)", "N", name)


def _is_or_ends_with(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _ends_with(name: str, module: str) -> bool:
    return module.endswith(name)
