"""Writing checkpoints: the bytes, the shards, and that nothing half-written is ever seen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from openllama.checkpoint import writer
from openllama.checkpoint.writer import (
    CODES,
    OURS,
    check_destination,
    finished_folder,
    is_copy,
    parse_size,
    pieces,
    plan_shards,
    write_weights,
)
from openllama.errors import CheckpointError, CorruptCheckpointError, DestinationExistsError
from tests.draw import examples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any type and shape, transposed ones and NaN among them."""
    tensors = {}
    for i in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        tensor = torch.randn(shape, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
        tensor[0] = float(draw(st.sampled_from(("nan", "-0.0", "1.5"))))
        tensors[f"weight.{i} «»"] = tensor.transpose(0, -1) if draw(st.booleans()) else tensor
    return tensors


@examples(50)
@given(
    tensors=tensor_dicts(),
    dtype=st.sampled_from((None, *DTYPES)),
    chunk=st.integers(1, 200),
    limit=st.integers(1, 2000),
)
def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, tensors, dtype, chunk: int, limit: int) -> None:
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", chunk)
        write_weights(folder, tensors, dtype=dtype, max_shard_size=limit, tick=done.append)
    files = sorted(folder.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if dtype is None:
        assert save(read) == save({name: tensor.contiguous() for name, tensor in tensors.items()})
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    torch.testing.assert_close(read, tensors, rtol=0, atol=0, equal_nan=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(done) == 2 * total
    assert all(safe_open(file, "pt").metadata() == {"format": "pt"} for file in files)
    if len(files) == 1:
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


shapes = st.lists(st.integers(0, 9) | st.sampled_from((16, 24, 32, 64)), min_size=1, max_size=2)


@examples(100)
@given(
    forms=st.lists(st.tuples(shapes, st.sampled_from(tuple(CODES))), min_size=1, max_size=8),
    dtype=st.sampled_from((None, torch.float32, torch.bfloat16)),
    limit=st.integers(1, 20_000),
)
def test_tensors_begin_at_multiples_of_64_bytes_where_sizes_allow(tmp_path: Path, forms, dtype, limit: int) -> None:
    """Read by the format's definition: eight bytes of length, a header, tensors without gaps."""
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = {f"weight.{i}": torch.ones(shape).to(kind) for i, (shape, kind) in enumerate(forms)}
    write_weights(folder, tensors, dtype=dtype, max_shard_size=limit)
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert (8 + length) % 64 == 0
        header = json.loads(content[8 : 8 + length])
        del header["__metadata__"]
        end = 0
        for name, entry in header.items():
            begin, previous, end = entry["data_offsets"][0], end, entry["data_offsets"][1]
            assert begin == previous
            assert begin % (dtype or tensors[name].dtype).itemsize == 0
            if (end - begin) % 64 == 0:
                assert begin % 64 == 0, f"{name}: {header}"
        assert 8 + length + end == len(content)


def test_copies_are_told_by_their_bits() -> None:
    original = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    assert is_copy(original.clone(), original)
    assert is_copy(original.bfloat16(), original)
    assert is_copy(original.t().contiguous().t(), original)
    assert not is_copy(original.t(), original)
    assert not is_copy(original.flatten(), original)
    assert not is_copy(-original.nan_to_num(), original.nan_to_num())
    assert not is_copy(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_numbers_beyond_float16(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="big holds numbers too large for float16"):
        write_weights(tmp_path, {"big": torch.tensor([1.0, 7e4])}, dtype=torch.float16)


def test_shards_are_named_as_hf_names_them() -> None:
    tensors = {name: torch.zeros(10) for name in "abcd"} | {"e": torch.zeros(100)}
    assert plan_shards(tensors, 80, None) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c", "d"],
        "model-00003-of-00003.safetensors": ["e"],
    }
    assert plan_shards(tensors, 40, torch.bfloat16).keys() == plan_shards(tensors, 80, None).keys()
    assert plan_shards(tensors, 560, None) == {"model.safetensors": list("abcde")}


@pytest.mark.parametrize(("size", "count"), [
    (7, 7), ("7", 7), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5MiB", 3 * 2**19), ("2KB", 2000),
])  # fmt: skip
def test_sizes(size: Any, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5 apples", "0.1", None, "1e3"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(size)


def test_pieces_are_small_and_complete() -> None:
    tensor = torch.arange(600.0).view(100, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", 100)
        parts = list(pieces(tensor.t(), torch.float64))
        assert max(part.nbytes for part in pieces(tensor)) <= 100
    assert torch.equal(torch.cat(parts), tensor.t().double())


def test_a_disk_that_loses_bits_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writer._write_file

    def faulty(path: Path, *arguments: Any) -> None:
        real(path, *arguments)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")

    monkeypatch.setattr(writer, "_write_file", faulty)
    with pytest.raises(CorruptCheckpointError, match=r"b differs when read again"):
        write_weights(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)})


# ---- folders

OLD = {"config.json": "{}", "model.safetensors": "old", "notes.txt": "mine"}
FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("anything")]


def make_old(folder: Path) -> None:
    folder.mkdir()
    for name, text in OLD.items():
        (folder / name).write_text(text)
    (folder / "sub").mkdir()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "new"
    with finished_folder(target, OURS) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert contents(target) == {"config.json": "{}"}
    assert [path.name for path in target.parent.iterdir()] == ["new"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_replacing_keeps_what_is_not_ours(tmp_path: Path) -> None:
    make_old(tmp_path / "x")
    inode = (tmp_path / "x").stat().st_ino
    with finished_folder(tmp_path / "x", OURS) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model-00001-of-00001.safetensors").write_text("new")
        assert contents(tmp_path / "x") == OLD
    new = {"config.json": "new", "model-00001-of-00001.safetensors": "new", "notes.txt": "mine"}
    assert contents(tmp_path / "x") == new
    assert (tmp_path / "x" / "sub").is_dir()
    assert len(list((tmp_path / "x").iterdir())) == 4
    assert (tmp_path / "x").stat().st_ino == inode  # a working directory stays one


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_things_as_they_were(tmp_path: Path, error: BaseException, exists: bool) -> None:
    if exists:
        make_old(tmp_path / "x")
    with pytest.raises(type(error)), finished_folder(tmp_path / "x", OURS) as folder:  # noqa: PT012
        (folder / "config.json").write_text("new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == (["x"] if exists else [])
    if exists:
        assert contents(tmp_path / "x") == OLD
        assert len(list((tmp_path / "x").iterdir())) == 4


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("step", range(1, 5))
def test_a_failure_while_files_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: int
) -> None:
    make_old(tmp_path / "x")
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step:
            raise error
        return rename(self, target)

    with pytest.raises(type(error)), finished_folder(tmp_path / "x", OURS) as folder:  # noqa: PT012
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
        monkeypatch.setattr(Path, "rename", failing)
    assert contents(tmp_path / "x") == OLD
    assert len(list((tmp_path / "x").iterdir())) == 4


def test_config_goes_first_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks in between finds a folder without configuration, which is refused, not a mixture."""
    make_old(tmp_path / "x")
    rename, seen = Path.rename, []

    def watching(self: Path, target: Path) -> Path:
        result = rename(self, target)
        seen.append((tmp_path / "x" / "config.json").exists())
        return result

    monkeypatch.setattr(Path, "rename", watching)
    with finished_folder(tmp_path / "x", OURS) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
    assert seen == [False, False, False, True]


def test_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match=r"No space left: 0\.00 GB to write") as caught:
        write_weights(tmp_path, {"a": torch.zeros(10)})
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_full_disk_says_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(piece: Tensor) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_raw", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors'"):
        write_weights(tmp_path, {"a": torch.zeros(10)})


def test_destinations(tmp_path: Path) -> None:
    check_destination(tmp_path / "absent", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty", overwrite=False)
    make_old(tmp_path / "x")
    check_destination(tmp_path / "x", overwrite=True)
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        check_destination(tmp_path / "x", overwrite=False)
    with pytest.raises(DestinationExistsError, match="is a file"):
        check_destination(tmp_path / "x" / "notes.txt", overwrite=True)
