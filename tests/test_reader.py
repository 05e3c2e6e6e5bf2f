"""Opening checkpoints: every form, and every way in which files are wrong."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from openllama.checkpoint import reader
from openllama.checkpoint.reader import open_checkpoint, open_file
from openllama.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    KeyMismatchError,
    UnsafePickleError,
)
from tests.checkpoints import (
    FORMS,
    assert_same_tensors,
    edit_index,
    hf_weights,
    native_weights,
    tiny_config,
    write_checkpoint,
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [hf_weights, native_weights])
def test_every_form_of_folder(tmp_path: Path, form: str, make: Any) -> None:
    weights = make(CONFIG)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, weights, CONFIG, form))
    assert_same_tensors(checkpoint.tensors, weights)
    assert checkpoint.format == ("safetensors" if "safetensors" in form else "pickle")
    assert len(checkpoint.files) == (3 if "shards" in form else 1)
    assert checkpoint.config == CONFIG


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "other.safetensors"])
def test_single_files(tmp_path: Path, name: str) -> None:
    weights = hf_weights(CONFIG)
    write_file(tmp_path / name, weights)
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json.*--config"):
        open_checkpoint(tmp_path / name)
    assert_same_tensors(open_checkpoint(tmp_path / name, CONFIG).tensors, weights)
    CONFIG.save_pretrained(tmp_path / "elsewhere")
    assert open_checkpoint(tmp_path / name, tmp_path / "elsewhere" / "config.json").config == CONFIG
    CONFIG.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path / name).config == CONFIG


def test_overrides_change_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG)
    assert open_checkpoint(tmp_path, pad_token_id=3).config.pad_token_id == 3
    assert open_checkpoint(tmp_path, CONFIG, pad_token_id=3).config.pad_token_id == 3
    with pytest.raises(ConfigError, match="no_such_field"):
        open_checkpoint(tmp_path, no_such_field=3)


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


def test_files_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.arange(24.0).view(4, 6)
    weights = {
        "a": base.t(),
        "b": base[1:, 2:],
        "c": torch.randn(3).bfloat16(),
        "tied": base,
        "p": torch.nn.Parameter(base),
    }
    torch.save({"state_dict": weights}, tmp_path / "x.pt")
    monkeypatch.setattr(reader, "_memory", lambda: 1)
    tensors = open_file(tmp_path / "x.pt")
    assert_same_tensors(tensors, weights)
    assert tensors["a"].stride() == base.t().stride()
    tensors["b"].zero_()
    assert_same_tensors(open_file(tmp_path / "x.pt"), weights)


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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"PK\x03\x04" + b"x" * 50, b"\x80\x02", b"\x80\x02}q\x00(X"])
def test_empty_and_garbage(tmp_path: Path, name: str, content: bytes) -> None:
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CorruptCheckpointError, match=name):
            open_checkpoint(tmp_path)


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


# ---- folders and indexes


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"holds none of model\.safetensors"):
        open_checkpoint(tmp_path)
    write_file(tmp_path / "pytorch_model-00001-of-00002.bin", hf_weights(CONFIG))
    with pytest.raises(CheckpointNotFoundError, match=r"it has pytorch_model-00001-of-00002\.bin.*missing index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["pickle shards", "safetensors shards"])
def test_absent_shard(tmp_path: Path, form: str) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, form)
    (shard,) = tmp_path.glob("*-00002-of-00003.*")
    shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"names {shard.name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/b.bin", "a\\b.bin", "..", "", 3, None])
def test_index_that_points_elsewhere(tmp_path: Path, name: Any) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, "pickle shards")
    edit_index(tmp_path, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(CorruptCheckpointError, match=r"places model\.norm\.weight in"):
        open_checkpoint(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, "pickle shards")

    def disagree(weight_map: dict[str, str]) -> None:
        weight_map["model.extra.weight"] = weight_map["model.norm.weight"]
        del weight_map["model.norm.weight"]
        shards = sorted(set(weight_map.values()))
        here = weight_map["model.embed_tokens.weight"]
        weight_map["model.embed_tokens.weight"] = next(shard for shard in shards if shard != here)

    edit_index(tmp_path, disagree)
    with pytest.raises(KeyMismatchError) as caught:
        open_checkpoint(tmp_path)
    assert "model.norm.weight is in pytorch_model-" in str(caught.value)
    assert "but not in the index" in str(caught.value)
    assert "model.extra.weight is not in pytorch_model-" in str(caught.value)
    assert "model.embed_tokens.weight is in pytorch_model-00001-of-00003.bin, the index says" in str(caught.value)


def test_key_in_two_shards(tmp_path: Path) -> None:
    weights = hf_weights(CONFIG)
    write_checkpoint(tmp_path, weights, CONFIG, "safetensors shards")
    second = tmp_path / "model-00002-of-00003.safetensors"
    tensors: dict[str, Tensor] = {k: v.clone() for k, v in open_file(second).items()}
    save_file({**tensors, next(iter(weights)): torch.zeros(1)}, second)
    with pytest.raises(KeyMismatchError, match=rf"{next(iter(weights))} is in {second.name}, the index says"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "b", "a": "c"}}',
])  # fmt: skip
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)
