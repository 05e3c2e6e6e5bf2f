"""Files of weights: what is opened, what is refused, and that nothing in a file is executed."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from openllama.checkpoint.files import DTYPES, open_file
from openllama.checkpoint.names import unwrap
from openllama.errors import (
    CorruptCheckpointError,
    UnsafePickleError,
)
from tests.checkpoints import (
    assert_same_tensors,
    hf_weights,
    native_weights,
    tiny_config,
    write_file,
)
from tests.draw import examples

CONFIG = tiny_config()


class Malicious:
    """A pickle of this runs a command when a plain unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [
    lambda sd: {"state_dict": sd, "epoch": 3},
    lambda sd: {"module": {f"module.{name}": tensor for name, tensor in sd.items()}},
    lambda sd: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in sd.items()}},
    lambda sd: {name: torch.nn.Parameter(tensor) for name, tensor in sd.items()},
])  # fmt: skip
def test_what_trainers_wrap_around(tmp_path: Path, wrap: Any) -> None:
    weights = native_weights(CONFIG)
    torch.save(wrap(weights), tmp_path / "x.pt")
    tensors = unwrap(open_file(tmp_path / "x.pt"))
    assert_same_tensors(tensors, weights)
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_pickles_from_before_torch_1_6(tmp_path: Path) -> None:
    weights = hf_weights(CONFIG)
    torch.save(weights, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="read into memory completely"):
        assert_same_tensors(open_file(tmp_path / "x.pt"), weights)


def test_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    weights = {
        "a": base.t(),
        "c": torch.randn(300).bfloat16(),
        "tied": base,
        "p": torch.nn.Parameter(base),
        "none": torch.empty(0, 3),
        "one": torch.ones(1, 1).expand(1, 1),
    }
    torch.save({"state_dict": weights}, tmp_path / "x.pt")
    tensors = open_file(tmp_path / "x.pt")
    assert_same_tensors(tensors, weights)
    assert tensors["a"].stride() == base.t().stride()
    tensors["a"].zero_()
    assert_same_tensors(open_file(tmp_path / "x.pt"), weights)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files have no holes, or fill the disk")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_larger_than_memory(tmp_path: Path, name: str) -> None:
    count = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if name == "x.pt":
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"a": torch.empty(count, dtype=torch.bfloat16)}, tmp_path / name)
    else:
        entry = {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}
        text = json.dumps({"a": entry}).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 2 * count)
    tensor = open_file(tmp_path / name)["a"]
    tensor[-3:] = 1
    assert tensor[-4:].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, {"a": torch.ones(1000)})
    content = (tmp_path / name).read_bytes()
    tensor = open_file(tmp_path / name)["a"]
    tensor.mul_(3)
    assert tensor.sum() == 3000
    assert (tmp_path / name).read_bytes() == content
    assert open_file(tmp_path / name)["a"].sum() == 1000


# ---- pickles that are not plain tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "executed"
    torch.save({"a": torch.ones(2), "b": Malicious(target)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsafePickleError, match=r"x\.pt.*was not executed.*system"):
            open_file(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_not_run(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "executed"
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": Malicious(target)}, protocol))
    with pytest.warns(UserWarning, match="before 1.6"), pytest.raises((UnsafePickleError, CorruptCheckpointError)):
        open_file(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize("content", [
    [torch.ones(2)], torch.ones(2), {"a": torch.ones(2), "b": 3}, {1: torch.ones(2)},
    {"a": torch.ones(2).to_sparse()}, {"a": {"b": torch.ones(2)}},
], ids=repr)  # fmt: skip
def test_other_contents(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=r"x\.pt holds"):
        open_file(tmp_path / "x.pt")


def test_tensors_without_numbers(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "x.pt")
    with pytest.raises(CorruptCheckpointError, match="a is damaged: the file holds no numbers for it"):
        open_file(tmp_path / "x.pt")


def test_whole_modules_and_torchscript(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match="Linear"):
        open_file(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("y/constants.pkl", b"")
    with pytest.raises(UnsafePickleError, match="TorchScript"):
        open_file(tmp_path / "y.pt")


# ---- damaged files


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
@examples(30)
@given(fraction=st.floats(0, 0.999))
def test_truncated_anywhere(tmp_path: Path, name: str, fraction: float) -> None:
    write_file(tmp_path / name, hf_weights(CONFIG))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(CorruptCheckpointError, match=name):
        open_file(tmp_path / name)


@examples(50)
@given(where=st.integers(0, 300), what=st.binary(min_size=1, max_size=9))
def test_a_damaged_header_is_an_error_or_harmless(tmp_path: Path, where: int, what: bytes) -> None:
    write_file(tmp_path / "x.safetensors", {"a": torch.zeros(3, 2), "b": torch.zeros(5)})
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    content[where : where + len(what)] = what
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        tensors = open_file(tmp_path / "x.safetensors")
    except CorruptCheckpointError:
        return
    for tensor in tensors.values():
        tensor.double().sum()  # reads all of it


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


@pytest.mark.parametrize(("header", "message"), [
    ({"a": entry(dtype="F7")}, "unknown variant `F7`"),
    ({"a": entry(dtype="F8_E4M3", shape=[24])}, "a is of type F8_E4M3, which is none of F64"),
    ({"a": entry(dtype="F6_E2M3", shape=[32])}, "a is of type F6_E2M3"),
    ({"a": entry(dtype="U16", shape=[12])}, "a is of type U16"),
    ({"a": entry(shape=[2, 4])}, "invalid shape, data type, or offset"),
    ({"a": entry(shape=[-2, -3])}, "expected usize"),
    ({"a": entry(data_offsets=[-24, 0])}, "expected usize"),
    ({"a": entry(data_offsets=[24, 48])}, "invalid offset"),
    ({"a": entry(data_offsets=[0])}, "expected a tuple of size 2"),
    ({"a": entry(shape=[2.0, 3])}, "expected usize"),
    ({"a": entry(shape=[1] * 65 + [6])}, "a has 66 dimensions"),
    ({"a": entry(shape=[10**18, 10**18])}, "overflow"),
    ({"a": entry(shape=[10**18])}, "overflow"),
    ({"a": entry(shape=[0, 10**18, 10**18], data_offsets=[0, 0]), "b": entry()}, "overflowed"),
    ({"a": entry(shape=[10**40])}, "expected usize"),
    ({"a": entry(), "b": entry()}, "invalid offset"),  # aliased
    ({"a": entry(), "b": entry(data_offsets=[12, 36])}, "invalid offset"),
    ({"a": entry(shape=[2, 2], data_offsets=[0, 16])}, "not fully covered"),
    ({"a": 3}, "expected struct TensorInfo"),
    ([1], "invalid type: sequence"),
])  # fmt: skip
def test_headers_that_lie(tmp_path: Path, header: Any, message: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(CorruptCheckpointError, match=rf"x\.safetensors.*{message}"):
        open_file(tmp_path / "x.safetensors")


def test_headers_in_other_encodings(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-8-sig", "utf-32-le"):
        text = json.dumps({"a": entry()}).encode(encoding)
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
        with pytest.raises(CorruptCheckpointError, match="invalid"):
            open_file(tmp_path / "x.safetensors")


def test_headers_above_the_limit_are_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**24 + 1) + b"{")
        file.truncate(2**40)
    with pytest.raises(CorruptCheckpointError, match=r"header of 16,777,217 bytes; at most 16,777,216"):
        open_file(tmp_path / "x.safetensors")


MUTATIONS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["put", "insert", "cut"]), st.binary(min_size=1, max_size=4)),
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "F8_E4M3", "F4", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BF16", "BOOL"]),
        "shape": st.lists(st.integers(0, 4) | st.just(2**62), max_size=3),
        "data_offsets": st.tuples(st.sampled_from([0, 4, 8, 16]), st.sampled_from([0, 4, 8, 16, 24])),
    },
    optional={"more": JSON},
)


SIZES = {"F32": 4, "I8": 1, "BF16": 2, "F8_E4M3": 1}


def laid_out(kinds: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """A header as the format wants it."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in zip("abc", kinds, strict=False):
        begin, end = end, end + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header


RIGHT = st.lists(st.tuples(st.sampled_from([*SIZES]), st.lists(st.integers(0, 4), max_size=2)), max_size=3)


@examples(400)
@given(
    header=RIGHT.map(laid_out)
    | st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\x1b"]), ENTRY | JSON, max_size=3),
    size=st.none() | st.integers(0, 32),
    mutations=st.just([]) | MUTATIONS,
)
def test_the_library_of_the_format_accepts_the_same_files(
    tmp_path: Path, header: Any, size: int, mutations: list[tuple[int, str, bytes]]
) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    if size is None:
        size = max((e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and "shape" in e), default=0)
    content = bytearray(struct.pack("<Q", len(text)) + text + bytes(i % 256 for i in range(size)))
    for where, how, what in mutations:
        where %= len(content) + 1
        content[where : where + len(what) * (how != "insert")] = b"" if how == "cut" else what
    path.write_bytes(content)
    try:
        with safe_open(path, "pt") as file:
            expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError):
        expected = None
    if expected is None or not all(tensor.dtype in DTYPES.values() for tensor in expected.values()):
        with pytest.raises(CorruptCheckpointError):
            open_file(path)
        return
    got = open_file(path)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert same_bytes(got[name], tensor)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_numbers_at_odd_places_are_read(tmp_path: Path) -> None:
    values = torch.arange(6.0).view(2, 3)
    text = json.dumps({"a": entry()}).encode()
    text += b" " * (1 - len(text) % 2)
    raw = values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw)
    assert len(text) % 2
    assert torch.equal(open_file(tmp_path / "x.safetensors")["a"] @ torch.ones(3, 1), values.sum(1, keepdim=True))


def test_git_lfs_pointers_and_packed_archives(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CorruptCheckpointError, match="git lfs pull"):
        open_file(tmp_path / "x.bin")
    torch.save(hf_weights(CONFIG), tmp_path / "y.bin")
    with (
        zipfile.ZipFile(tmp_path / "y.bin") as old,
        zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        open_file(tmp_path / "z.bin")
