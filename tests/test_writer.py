"""Writing files of weights: the bytes, the shards, the comparison with the source."""

from __future__ import annotations

import errno
import json
import os
import shutil
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

from openllama.checkpoint import pieces, writer
from openllama.checkpoint.pieces import cast
from openllama.checkpoint.progress import Phase, Progress
from openllama.checkpoint.writer import CODES, parse_size, plan_shards, write_weights
from openllama.errors import CheckpointError, CorruptCheckpointError
from tests.draw import examples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Counted(Progress):
    """Bytes that were written and compared."""

    def __init__(self) -> None:
        self.nbytes: dict[str, int] = {"write": 0, "compare": 0}

    def begin(self, phase: Phase, file: str, nbytes: int) -> None:
        self.phase = phase

    def tick(self, nbytes: int) -> None:
        self.nbytes[self.phase] += nbytes


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
    piece=st.integers(1, 50),
    limit=st.integers(1, 2000),
)
def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, tensors, dtype, piece: int, limit: int) -> None:
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    done = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        write_weights(folder, cast(tensors, dtype), max_shard_size=limit, progress=done)
    files = sorted(folder.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if dtype is None:
        assert save(read) == save({name: tensor.contiguous() for name, tensor in tensors.items()})
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    torch.testing.assert_close(read, tensors, rtol=0, atol=0, equal_nan=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert done.nbytes == {"write": total, "compare": total}
    assert all(safe_open(file, "pt").metadata() == {"format": "openllama-native"} for file in files)
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
    write_weights(folder, cast(tensors, dtype), max_shard_size=limit)
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


def test_numbers_beyond_float16(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="big holds numbers too large for float16"):
        write_weights(tmp_path, cast({"big": torch.tensor([1.0, 7e4])}, torch.float16))


def test_shards_are_named_as_hf_names_them() -> None:
    tensors = {name: torch.zeros(10) for name in "abcd"} | {"e": torch.zeros(100)}
    assert plan_shards(tensors, 80) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c", "d"],
        "model-00003-of-00003.safetensors": ["e"],
    }
    assert plan_shards(cast(tensors, torch.bfloat16), 40).keys() == plan_shards(tensors, 80).keys()
    assert plan_shards(tensors, 560) == {"model.safetensors": list("abcde")}


@pytest.mark.parametrize(("size", "count"), [
    (7, 7), ("7", 7), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5MiB", 3 * 2**19), ("2KB", 2000),
])  # fmt: skip
def test_sizes(size: Any, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5 apples", "0.1", None, "1e3"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(size)


def test_a_disk_that_loses_bits_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writer.forget

    def faulty(descriptor: int) -> None:
        with next(tmp_path.glob("*.safetensors")).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        real(descriptor)

    monkeypatch.setattr(writer, "forget", faulty)
    with pytest.raises(CorruptCheckpointError, match=r"b differs when read again"):
        write_weights(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    assert not list(tmp_path.iterdir())


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


def test_progress_is_closed_after_an_error(tmp_path: Path) -> None:
    """Else the bar stays on the line of the terminal on which the error is printed."""

    class Closed(Progress):
        closed = False

        def close(self) -> None:
            self.closed = True

    progress = Closed()
    with pytest.raises(CheckpointError, match="too large for float16"):
        write_weights(tmp_path, cast({"a": torch.full((2,), 1e6)}, torch.float16), progress=progress)
    assert progress.closed
