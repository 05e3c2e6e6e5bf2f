"""Files of weights: what is opened, what is refused, and that nothing in a file is executed."""

from __future__ import annotations

import json
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
from torch._subclasses.fake_tensor import FakeTensorMode

from openllama.checkpoint.reader import open_file
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
    tensors = open_file(tmp_path / "x.pt")
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
        with FakeTensorMode(), torch.serialization.skip_data():
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
    {"a": torch.ones(2).to_sparse()}, {"a": {"b": torch.ones(2)}}, {"a": torch.ones(2, device="meta")},
], ids=repr)  # fmt: skip
def test_other_contents(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=r"x\.pt holds"):
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
    ({"a": entry(dtype="F7")}, "type 'F7'"),
    ({"a": entry(shape=[2, 4])}, "24 bytes for shape"),
    ({"a": entry(shape=[-2, -3])}, "must be non-negative integers"),
    ({"a": entry(data_offsets=[-24, 0])}, "must be non-negative integers"),
    ({"a": entry(data_offsets=[24, 48])}, "its header needs"),
    ({"a": entry(data_offsets=[0])}, "not enough values"),
    ({"a": entry(shape=[2.0, 3])}, "must be non-negative integers"),
    ({"a": entry(more=1)}, "more"),
    ({"a": 3}, "mapping"),
    ([1], "pop"),
])  # fmt: skip
def test_headers_that_lie(tmp_path: Path, header: Any, message: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(CorruptCheckpointError, match=rf"x\.safetensors.*{message}"):
        open_file(tmp_path / "x.safetensors")


def test_weights_given_twice_in_a_header(tmp_path: Path) -> None:
    text = b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(CorruptCheckpointError, match="a given twice"):
        open_file(tmp_path / "x.safetensors")


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
