"""The zip archives of torch.save: a tensor has exactly the bytes of its record, or the file is refused."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openllama.checkpoint import convert, verify
from openllama.checkpoint.archives import checked_sha256, read_records
from openllama.checkpoint.files import open_file
from openllama.checkpoint.pickles import check_tuples
from openllama.errors import CorruptCheckpointError
from tests.checkpoints import assert_same_tensors, hf_weights, tiny_config, write_checkpoint
from tests.hostile import pickle_of, pickled, rewritten

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5), "none": torch.empty(0, 3)}


def saved(folder: Path, change: Callable[[dict[str, bytes]], object] = lambda records: None) -> Path:
    """WEIGHTS as torch saves them, with changed records."""
    torch.save(WEIGHTS, folder / "x.bin")
    rewritten(folder / "x.bin", change)
    return folder / "x.bin"


def test_archives_that_other_programs_wrote_again(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.bin")
    before = read_records(tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", lambda records: None)
    assert {n: (r.size, r.crc) for n, r in read_records(tmp_path / "x.bin").items()} == {
        n: (r.size, r.crc) for n, r in before.items()
    }
    assert read_records(tmp_path / "x.bin") != before  # no longer aligned
    assert_same_tensors(open_file(tmp_path / "x.bin"), WEIGHTS)


@pytest.mark.parametrize("size", [0, 4, 20, 28, 1000])
def test_a_record_that_is_shorter_or_longer_than_its_storage(tmp_path: Path, size: int) -> None:
    path = saved(tmp_path, lambda records: records.update({"x/data/0": records["x/data/0"].ljust(size, b"x")[:size]}))
    with pytest.raises(CorruptCheckpointError, match=rf"a is damaged: its record has {size} bytes, it needs 24"):
        open_file(path)


def test_a_record_that_is_missing(tmp_path: Path) -> None:
    for name, message in (("data/1", r"data/1|b is damaged"), ("data.pkl", r"no data\.pkl")):
        path = saved(tmp_path, lambda records, name=name: records.pop(f"x/{name}"))
        with pytest.raises(CorruptCheckpointError, match=message):
            open_file(path)


def test_big_endian_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path, lambda records: records.update({"x/byteorder": b"big"}))
    with pytest.raises(CorruptCheckpointError, match="big-endian"):
        open_file(path)


@pytest.mark.filterwarnings("ignore:.*before 1.6")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_that_reaches_beyond_its_storage(tmp_path: Path, legacy: bool) -> None:
    path = pickle_of(tmp_path / "x.bin", {"a": (4, 0, (3,), (1,)), "b": (6, 0, (6,), (1,))}, legacy=legacy)
    open_file(path)
    for offset, shape, stride in ((0, (7,), (1,)), (1, (6,), (1,)), (0, (2,), (6,)), (2**62, (1,), (1,))):
        pickle_of(path, {"a": (4, 0, (3,), (1,)), "b": (6, offset, shape, stride)}, legacy=legacy)
        with pytest.raises(CorruptCheckpointError, match=r"damaged|wrong byte size|larger than its storage"):
            open_file(path)


@pytest.mark.parametrize(("shape", "stride"), [((1000, 6), (0, 1)), ((3, 3), (1, 1)), ((2, 2, 2), (1, 1, 2))])
def test_tensors_that_overlap_themselves(tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    path = pickle_of(tmp_path / "x.bin", {"a": (6, 0, shape, stride)})
    with pytest.raises(CorruptCheckpointError, match="several numbers of a share a place"):
        open_file(path)


def test_many_tensors_in_one_storage(tmp_path: Path) -> None:
    path = pickle_of(tmp_path / "x.bin", {f"a{i}": (10**5, 0, (10**5,), (1,)) for i in range(3)}, shared=True)
    with pytest.raises(CorruptCheckpointError, match="share them to be 1,200,000 bytes"):
        open_file(path)


def test_numbers_that_no_record_holds(tmp_path: Path) -> None:
    five_numbers_of_any_memory = b"\x80\x02}X\x01\x00\x00\x00actorch\nTensor\nK\x05\x85Rs."
    with pytest.raises(CorruptCheckpointError, match="a is damaged: the file holds no numbers"):
        open_file(pickled(tmp_path / "x.bin", five_numbers_of_any_memory))


# ---- the table of records and the headers in front of the data


def test_a_record_given_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(saved(tmp_path), "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x/data/0", bytes(24))
    with pytest.raises(CorruptCheckpointError, match="given twice"):
        open_file(tmp_path / "x.bin")


def test_records_in_two_folders(tmp_path: Path) -> None:
    path = saved(tmp_path, lambda records: records.update({"y/data/0": bytes(24)}))
    with pytest.raises(CorruptCheckpointError, match="given twice"):
        open_file(path)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("flags", 0x1, "encrypted"), ("flags", 0x800, "two different ways"), ("crc", 1, "two different ways"),
    ("size", 8, "two different ways"), ("name", 0x7A, "two different ways"), ("method", 8, "two different ways"),
    ("magic", 0, "two different ways"), ("extra", 2**15, "overlap"),
])  # fmt: skip
def test_local_headers_that_differ_from_the_table(tmp_path: Path, field: str, value: int, message: str) -> None:
    places = {"magic": (0, "I"), "flags": (6, "H"), "method": (8, "H"), "crc": (14, "I"), "size": (18, "I"),
              "extra": (28, "H"), "name": (30, "B")}  # fmt: skip
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x/data/0").header_offset
        table = archive.start_dir
    content = bytearray(path.read_bytes())
    offset, code = places[field]
    struct.pack_into(f"<{code}", content, start + offset, value)
    if (field, value) == ("flags", 1):
        entry = content.index(b"x/data/0", table) - 46
        struct.pack_into("<H", content, entry + 8, value)
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message):
        open_file(path)


def test_records_that_overlap(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        where = {name: archive.getinfo(name).header_offset for name in ("x/data/0", "x/data/1")}
        entry = content.index(b"x/data/1", archive.start_dir) - 46
    # the second record begins inside the first, with a header of its own there
    header = content[where["x/data/1"] : where["x/data/1"] + 38]
    inside = where["x/data/0"] + 38
    content[inside : inside + len(header)] = header
    struct.pack_into("<I", content, entry + 42, inside)
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="overlap"):
        open_file(path)


def test_a_table_of_records_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    with path.open("r+b") as file:
        file.truncate(2**40)
        struct.pack_into("<II", content, len(content) - 10, 2**31, len(content))
        file.seek(2**31 + len(content))
        file.write(content[-22:])
        file.truncate()
    with pytest.raises(CorruptCheckpointError, match="too long"):
        open_file(path)


# ---- checksums


def flip(path: Path, name: str) -> None:
    record = read_records(path)[name]
    content = bytearray(path.read_bytes())
    content[record.offset + record.size // 2] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path / "src", hf_weights(config), config)
    path = tmp_path / "src" / "pytorch_model.bin"
    checked_sha256(path)
    flip(path, "data/3")
    for check in (
        lambda: checked_sha256(path),
        lambda: verify(tmp_path / "src"),
        lambda: convert(tmp_path / "src", tmp_path / "dst", progress=False),
    ):
        with pytest.raises(CorruptCheckpointError, match="CRC-32 of data/3"):
            check()
    assert not (tmp_path / "dst").exists()


def test_a_damaged_description_is_found_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path)
    flip(path, "data.pkl")
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl is damaged"):
        open_file(path)


def test_archives_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match="holds no checksums"):
        checked_sha256(tmp_path / "x.bin")
    assert_same_tensors(open_file(tmp_path / "x.bin"), WEIGHTS)


@pytest.mark.filterwarnings("ignore:.*before 1.6")
def test_numbers_that_a_file_from_before_1_6_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for shape, message in (((3,), None), ((7,), "larger than its storage")):
        content = pickle_of(path, {"a": (6, 0, shape, (1,))}, legacy=True).read_bytes()
        with path.open("rb") as file:
            for _ in range(4):
                check_tuples(file)
            end = file.tell()
        path.write_bytes(content[:end] + pickle.dumps([], 2) + bytes(100))  # no list of storages
        if message is None:
            assert open_file(path)["a"].isnan().all()
        else:
            with pytest.raises(CorruptCheckpointError, match=message):
                open_file(path)


def test_a_tuple_doubled_forty_times_is_found_before_it_is_hashed(tmp_path: Path) -> None:
    doubled = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40))
    with pytest.raises(CorruptCheckpointError, match="a tuple of more than 100,000 elements"):
        open_file(pickled(tmp_path / "x.bin", b"\x80\x02}" + doubled + b"K\x01s."))
