"""Files that strangers might send: functions that write each of them."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openllama import OpenLlamaConfig
from openllama.generation import GenerationConfig
from openllama.tokenizer.files import SETTINGS
from openllama.tokenizer.vocabulary import ROLES

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # numbers in the storage; offset, shape and stride of the view


def rewritten(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """Write an archive again by Python's zipfile, after ``change`` of its records by name."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in records.items():
            new.writestr(name, content)
    return path


class _View:
    """Pickles as a call of torch's function that makes a tensor over a storage, with whatever numbers it is given."""

    def __init__(self, storage: torch.UntypedStorage, view: View) -> None:
        self.arguments = (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                          *view[1:], False, {})  # fmt: skip

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def pickle_of(path: Path, views: Mapping[str, View], *, legacy: bool = False, shared: bool = False) -> Path:
    """A file of ``torch.save`` with float32 tensors that are any views of their storages; ``shared``: all of one."""
    one = torch.ones(max(view[0] for view in views.values())).untyped_storage()
    tensors = {
        name: _View(one if shared else torch.ones(view[0]).untyped_storage(), view) for name, view in views.items()
    }
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    return path


def pickled(path: Path, data: bytes) -> Path:
    """A file of ``torch.save`` whose pickle is ``data``."""
    torch.save({"a": torch.ones(1)}, path)
    return rewritten(path, lambda records: records.update({f"{path.stem}/data.pkl": data}))


# ---- the corpus: each function changes a folder that holds a good checkpoint

TERABYTE = 2**40
JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json")  # fmt: skip
Case = Callable[[Path], object]


def sparse(path: Path, size: int = TERABYTE, start: bytes = b"") -> None:
    """A file that is long and takes no place on the disk."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _no_file(path: Path, make: Callable[[Path], object]) -> None:
    """Something else in the place of a file."""
    path.unlink(missing_ok=True)
    make(path)


def _kinds_of_no_file() -> dict[str, Callable[[Path], object]]:
    return {
        "a pipe": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a folder": Path.mkdir,
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a link to itself": lambda path: path.symlink_to(path.name),
    }


def _json_cases(part: int) -> Iterator[tuple[str, Case]]:
    weights = [f"w{i}" for i in range(100_000 // part)]
    contents = {
        "empty": b"",
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a list": b"[]",
        "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
        "lists 100,000 deep": b'{"a": ' + b"[" * 10**5,
        "closed lists 900 deep": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        "objects 100,000 deep": b'{"a": ' * 10**5,
        "objects 900 deep": b'{"a": ' * 900 + b"1" + b"}" * 900,
        "objects without end": b'{"a": [' + b"{}," * (2_700_000 // part) + b"{}]}",
        "a long name": b'{"' + b"a" * 8_000_000 + b'": 1}',
        "half a character": b'{"a\\ud800": "\\udfff"}',
        "control characters": b'{"\\u001b[2J\\n\\u202e": "\\u001b]0;x\\u0007"}',
        "a token of 8 MB": b'{"eos_token": "' + b"a" * 8_000_000 + b'"}',
        "tokens without end": b'{"additional_special_tokens": ["a"' + b', "a"' * (10**6 // part) + b"]}",
        "many tokens": json.dumps({"additional_special_tokens": [f"t{i}" for i in range(400_000 // part)]}).encode(),
        "many names": json.dumps({f"t{i}": 4600 + i for i in range(300_000 // part)}).encode(),
        "many weights": json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}).encode(),
        "many files": json.dumps({"weight_map": {name: f"{name}.safetensors" for name in weights}}).encode(),
        "options of sentencepiece": b'{"sp_model_kwargs": {"model_file": "/etc/passwd", "num_threads": 1000000}}',
        "options that are none": b'{"sp_model_kwargs": [1]}',
    }
    for name in JSON_FILES:
        for what, content in contents.items():
            yield f"{name}: {what}", lambda folder, name=name, content=content: _write(folder / name, content)
        yield f"{name}: a terabyte", lambda folder, name=name: sparse(folder / name)
        yield f"{name}: 2 GB of spaces", lambda folder, name=name: sparse(folder / name, 2 * 10**9, b" " * 10**7)


def _edited(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def _field_cases() -> Iterator[tuple[str, Case]]:
    values = ("3", "x", float("nan"), float("inf"), 10**400, -1, 2**31, 2**62, 10**12, [], [[1]], {}, {"a": 1}, True,
              None, 0, 1.5, "a" * 10**6, [1] * 10**5)  # fmt: skip
    shown = [(value, str(value)[:20]) for value in values]
    labels = ("id2label", "rope_parameters", "model_type", "num_key_value_heads", "architectures", "torch_dtype")
    fields = {
        "config.json": [*OpenLlamaConfig.field_names(), *labels],
        "generation_config.json": GenerationConfig.field_names(),
        "tokenizer_config.json": [*SETTINGS, *ROLES],
    }
    for name, keys in fields.items():
        for key in keys:
            for value, text in shown:
                yield (f"{name}: {key} is {text}",
                       lambda f, n=name, k=key, v=value: _edited(f, n, **{k: v}))  # fmt: skip
    for key in set(labels) - {"model_type"}:
        for value, text in shown:
            yield (f"config.json of llama: {key} is {text}",
                   lambda f, k=key, v=value: _edited(f, "config.json", model_type="llama", **{k: v}))  # fmt: skip
    for layers in (10**5, 10**6, 10**12):
        yield f"{layers} layers", lambda f, n=layers: _edited(f, "config.json", num_hidden_layers=n)


def _without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def _views(**views: View) -> Case:
    return lambda folder: pickle_of(_without_weights(folder), views)


def _data(data: bytes) -> Case:
    return lambda folder: pickled(_without_weights(folder), data)


def _doubled(times: int) -> bytes:
    """A tuple of two tuples of two tuples ...: 2 ** times elements in some bytes each."""
    return b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(times))


def _pickle_cases(part: int) -> Iterator[tuple[str, Case]]:
    start, end = b"\x80\x02}(X\x01\x00\x00\x00a", b"u."
    for what, case in {
        "expanded to 6 GB": _views(a=(1, 0, (1500, 10**6), (0, 0))),
        "expanded to 2**62": _views(a=(1, 0, (2**31, 2**31), (0, 0))),
        "overlapping": _views(a=(1000, 0, (500, 500), (1, 1))),
        "beyond its storage": _views(a=(10, 2**40, (1,), (1,))),
        "strides beyond": _views(a=(10, 0, (2, 2), (2**62, 2**62))),
        "100,000 dimensions": _views(a=(1, 0, (1,) * 10**5, (1,) * 10**5)),
        "other memory": _data(start + b"ctorch\nTensor\nK\x05\x85R" + end),
        "40 GB of other memory": _data(start + b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x0a\x85R" + end),
        "an array of a terabyte": _data(start + b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R" + end),
        "a value doubled 40 times": _data(start + _doubled(40) + end),
        "a key doubled 40 times": _data(b"\x80\x02}" + _doubled(40) + b"K\x01s."),
        "many lists": _data(start + b"(" + b"]" * (10**6 // part) + b"l" + end),
        "tuples a million deep": _data(start + b"K\x01" + b"\x85" * 10**6 + end),
        "a string of 4 GB": _data(start + b"X\xff\xff\xff\xff"),
        "code": lambda folder: torch.save({"a": Code(folder / "executed")}, _without_weights(folder)),
        "code, before 1.6": lambda folder: torch.save(
            {"a": Code(folder / "executed")}, _without_weights(folder), _use_new_zipfile_serialization=False
        ),
        "a terabyte": lambda folder: sparse(_without_weights(folder), start=b"PK\x03\x04"),
        "a terabyte, before 1.6": lambda folder: sparse(_without_weights(folder), start=b"\x80\x02X\xff\xff\xff\xff"),
        "a line of a terabyte": lambda folder: sparse(_without_weights(folder), start=b"\x80\x02cos"),
        "2,000 names": _views(**{f"\x1b[2J\n{i}": (1, 0, (1,), (1,)) for i in range(2000)}),
    }.items():
        yield f"pytorch_model.bin: {what}", case


class Code:
    """A pickle of this makes a file when a plain unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _safetensors(header: Any, body: bytes = b"", length: int | None = None) -> Case:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    return lambda folder: _write(folder / "model.safetensors", start + text + body)


def _safetensors_cases(part: int) -> Iterator[tuple[str, Case]]:
    def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    for what, case in {
        "aliased": _safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
        "a gap": _safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "trailing data": _safetensors({"a": entry([1], 0, 4)}, bytes(5)),
        "UTF-16": _safetensors(json.dumps({"a": entry([1], 0, 4)}).encode("utf-16"), bytes(4)),
        "10**18 numbers": _safetensors({"a": entry([10**18], 0, 4)}, bytes(4)),
        "0 times 10**36": _safetensors({"a": entry([0, 10**18, 10**18], 0, 0)}),
        "100,000 dimensions": _safetensors({"a": entry([1] * 10**5, 0, 4)}, bytes(4)),
        "millions of dimensions": _safetensors({"a": entry([1] * (5_000_000 // part), 0, 4)}, bytes(4)),
        "lists 100,000 deep": _safetensors(b'{"a": ' + b"[" * 10**5),
        "control characters": _safetensors({"\x1b[2J\n": entry([1], 0, 4)}, bytes(4)),
        "many names": _safetensors({f"w{i}": entry([0], 0, 0) for i in range(200_000 // part)}),
        "a header of 2**63 bytes": _safetensors(b"{}", length=2**63),
        "a header of a terabyte": lambda f: sparse(f / "model.safetensors", start=struct.pack("<Q", TERABYTE - 8)),
        "a header of 99 MB": lambda f: sparse(f / "model.safetensors", start=struct.pack("<Q", 99 * 10**6)),
        "a terabyte": lambda f: sparse(f / "model.safetensors", start=struct.pack("<Q", 2) + b"{}"),
    }.items():
        yield f"model.safetensors: {what}", case


def without_unk(folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(b"\x1a" + path.read_bytes()[1:])  # the first piece becomes a field of the trainer


def _found_by_index(case: Case) -> Case:
    """``case`` where the index is what is read: a file with the usual name goes first."""

    def moved(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        case(folder)

    return moved


@cache
def corpus(part: int = 1) -> dict[str, Case]:
    """All cases by name; not to be changed. Files of very many things have one ``part``-th of them."""
    cases = dict(_json_cases(part)) | dict(_field_cases()) | dict(_pickle_cases(part)) | dict(_safetensors_cases(part))
    for name in (*JSON_FILES, "tokenizer.model", "model.safetensors"):
        for what, make in _kinds_of_no_file().items():
            cases[f"{name}: {what}"] = lambda folder, name=name, make=make: _no_file(folder / name, make)
    model = {
        "empty": b"",
        "garbage": bytes(range(256)) * 9,
        "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for what, content in model.items():
        cases[f"tokenizer.model: {what}"] = lambda folder, c=content: _write(folder / "tokenizer.model", c)
    cases["tokenizer.model: no piece for unknown text"] = without_unk
    cases["tokenizer.model: a terabyte"] = lambda folder: sparse(folder / "tokenizer.model")
    return {name: _found_by_index(case) if ".index." in name else case for name, case in cases.items()}
