"""Conversions that are killed, interrupted, or run beside each other. ``make kills`` is the long campaign."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openllama.checkpoint import convert, open_checkpoint, writer
from openllama.checkpoint.folders import NEW, WORK, check_destination, finished_folder
from openllama.checkpoint.source import MAPS, SourceFiles
from openllama.errors import CorruptCheckpointError, DestinationBusyError, DestinationExistsError
from tests.checkpoints import assert_same_tensors, hf_weights, native_weights, tiny_config, write_checkpoint
from tests.kills import Case, ended_by, files_of, fork, kill_at_each_rename, kill_at_random

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the victims are forks")
CONFIG = tiny_config()


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written stays; only a power cut needs the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", hf_weights(CONFIG), CONFIG)


@pytest.mark.usefixtures("no_disk")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("destination", "shards", "least"),
    [("absent", "one file", 2), ("empty", "several shards", 8), ("old", "one file", 9), ("old", "several shards", 12)],
)
def test_killed_at_every_rename_it_recovers(
    tmp_path: Path, destination: str, shards: str, least: int, before: bool
) -> None:
    assert kill_at_each_rename(Case(tmp_path, destination, shards), before) >= least


@pytest.mark.usefixtures("no_disk")
@pytest.mark.parametrize("destination", ["absent", "empty", "old"])
def test_killed_at_random_moments_it_recovers(tmp_path: Path, destination: str) -> None:
    kill_at_random(Case(tmp_path, destination, "several shards", larger=True), 4)


def test_remains_with_the_names_of_before_are_removed(source: Path, tmp_path: Path) -> None:
    """A swap that was cut off in the middle: the config has left, half of the new files have come."""
    target = tmp_path / "native"
    for name in (".native.0123abcd.incomplete", ".native.0123abcd.replaced"):
        (target / name).mkdir(parents=True)
        (tmp_path / name).mkdir()
        (target / name / "config.json").write_text("{}")
    (target / "model.safetensors").write_text("half")
    (tmp_path / ".nativ.0123abcd.incomplete").mkdir()
    convert(source, target, overwrite=True, progress=False)
    assert sorted(os.listdir(target)) == ["config.json", "conversion.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == [".nativ.0123abcd.incomplete", "native", "source"]


@pytest.mark.parametrize("names", [["../precious"], ["sub/x"], [".."], [""]])
def test_a_journal_that_leads_elsewhere_moves_nothing(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "x" / WORK / NEW).mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x" / WORK / "swap.json").write_text(json.dumps({"out": [], "in": ["a", *names]}))
    (tmp_path / "x" / WORK / NEW / "a").write_text("a")
    with pytest.raises(CorruptCheckpointError, match="leads out of its folder"):
        check_destination(tmp_path / "x", overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


# ---- resuming


def written_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files of weights that are written from now on."""
    names: list[str] = []
    real = writer._File._write

    def write(self: Any, *arguments: Any) -> Any:
        names.append(self.path.name)
        return real(self, *arguments)

    monkeypatch.setattr(writer._File, "_write", write)
    return names


@pytest.fixture
def halfway(source: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """Shards of a conversion to ``tmp_path / "native"`` that was killed when it began the fourth, and their folder."""

    def victim() -> None:
        begin, files = writer._File._write, []

        def write(self: Any, *arguments: Any) -> Any:
            files.append(self.path)
            if len(files) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return begin(self, *arguments)

        writer._File._write = write  # type: ignore[method-assign]
        convert(source, tmp_path / "native", max_shard_size=600, dtype="float32", progress=False)

    assert ended_by(fork(victim)) == -signal.SIGKILL
    folder = tmp_path / f".native{WORK}" / NEW
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) == 3
    return names, folder


def test_only_what_is_missing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: tuple[list[str], Path]
) -> None:
    names = written_files(monkeypatch)
    convert(source, tmp_path / "native", max_shard_size=600, dtype="float32", progress=False)
    whole = sorted(file.name for file in (tmp_path / "native").glob("*.safetensors"))
    assert names == whole[3:]
    assert halfway[0] == whole[:3]
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(CONFIG))
    assert sorted(os.listdir(tmp_path)) == ["native", "source"]


def test_a_damaged_file_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: tuple[list[str], Path]
) -> None:
    damaged = halfway[1] / halfway[0][1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    names = written_files(monkeypatch)
    convert(source, tmp_path / "native", max_shard_size=600, dtype="float32", progress=False)
    assert names[0] == damaged.name
    assert damaged.name not in names[1:]
    assert not set(names) & {halfway[0][0], halfway[0][2]}
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(CONFIG))


@pytest.mark.parametrize("change", ["source", "dtype", "shards", "record"])
def test_files_made_otherwise_are_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfway: tuple[list[str], Path], change: str
) -> None:
    options: dict[str, Any] = {"max_shard_size": 600, "dtype": "float32", "progress": False}
    weights = native_weights(CONFIG)
    if change == "source":
        weights = native_weights(CONFIG, seed=1)
        write_checkpoint(source, hf_weights(CONFIG, seed=1), CONFIG)
    elif change == "dtype":
        options["dtype"] = "bfloat16"
        weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    elif change == "shards":
        options["max_shard_size"] = 700
    else:
        (halfway[1].parent / "verified.json").write_text("[")
    names = written_files(monkeypatch)
    convert(source, tmp_path / "native", **options)
    assert names == sorted(file.name for file in (tmp_path / "native").glob("*.safetensors"))
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, weights)


# ---- signals

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and a shell's background jobs ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from openllama.checkpoint import writer
real = writer._File._pieces
def slow(self, read):
    for item in real(self, read):
        print("piece", flush=True)
        time.sleep(0.05)
        yield item
writer._File._pieces = slow
from openllama.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def slow_conversion(*arguments: object, pieces: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A conversion in its own process, once it has read so many pieces."""
    command = [sys.executable, "-c", SLOW, "convert", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            for _ in range(pieces):
                assert child.stdout is not None
                assert child.stdout.readline() == "piece\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_in_a_line_and_leaves_only_what_the_next_run_needs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = signal.Signals[name]
    with slow_conversion(source, tmp_path / "native", "--max-shard-size", 600, pieces=12) as child:
        start = time.monotonic()
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        print(f"answered after {time.monotonic() - start:.2f} s")
    assert child.returncode == 128 + number
    last = err.splitlines()[-1]
    assert "interrupted" in last if name == "SIGINT" else last.startswith(f"ended by {name}")
    assert "Traceback" not in err
    work = tmp_path / f".native{WORK}"
    assert f"verified files stay in {work}" in last
    assert sorted(os.listdir(work)) == ["new", "verified.json"]
    kept = sorted(os.listdir(work / NEW))
    assert kept
    assert set(kept) == set(json.loads((work / "verified.json").read_text())["files"])
    names = written_files(monkeypatch)
    convert(source, tmp_path / "native", max_shard_size=600, progress=False)
    assert not set(names) & set(kept)
    assert sorted(os.listdir(tmp_path)) == ["native", "source"]


def test_an_interruption_before_a_file_is_verified_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with slow_conversion(source, tmp_path / "native") as child:
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    assert err.splitlines()[-1] == "ended by SIGTERM"
    assert os.listdir(tmp_path) == ["source"]


def test_the_second_of_two_runs_says_at_once_who_is_there(source: Path, tmp_path: Path) -> None:
    with slow_conversion(source, tmp_path / "native") as child:
        for overwrite in (True, False):
            with pytest.raises(DestinationBusyError, match=f"process {child.pid}"):
                convert(source, tmp_path / "native", overwrite=overwrite, progress=False)
        child.communicate(timeout=60)
    assert child.returncode == 0
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(CONFIG))
    assert sorted(os.listdir(tmp_path)) == ["native", "source"]


# ---- sources that change


def cut(source: Path) -> None:
    """Leave the first bytes of the weights, after the header has been read."""
    os.truncate(source / "pytorch_model.bin", 1000)


def touch(source: Path) -> None:
    with (source / "pytorch_model.bin").open("r+b") as file:
        file.write(file.read(1))


def convert_changing(source: Path, target: Path, change: Callable[[Path], None], monkeypatch: Any) -> None:
    real = writer._File._pieces

    def pieces(self: Any, read: Any) -> Iterator[Any]:
        change(source)
        yield from real(self, read)

    monkeypatch.setattr(writer._File, "_pieces", pieces)
    convert(source, target, progress=False)


@pytest.mark.parametrize("proc", [True, False])
@pytest.mark.parametrize(("change", "message"), [(cut, "shorter|changed"), (touch, "changed")])
def test_a_source_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proc: bool, change: Callable[[Path], None], message: str
) -> None:
    config = tiny_config(vocab_size=4000)  # of more than a page
    source = write_checkpoint(tmp_path / "source", hf_weights(config), config)
    if not proc:
        monkeypatch.setattr("openllama.checkpoint.source.MAPS", tmp_path / "absent")

    def victim() -> None:
        with pytest.raises(CorruptCheckpointError, match=message):
            convert_changing(source, tmp_path / "native", change, monkeypatch)

    assert ended_by(fork(victim)) == 0, "SIGBUS would be -7"
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.skipif(not MAPS.exists(), reason="Linux's list of mappings")
@pytest.mark.parametrize("form", ["one pickle", "pickle shards", "one safetensors"])
def test_numbers_come_from_the_file_and_not_through_the_mapping(tmp_path: Path, form: str) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "x", hf_weights(CONFIG), CONFIG, form))
    with SourceFiles(source.files) as files:
        for tensor in source.tensors.values():
            copy = files.read(tensor)
            assert torch.equal(copy, tensor)
            assert copy.data_ptr() != tensor.data_ptr()
        view = torch.ones(3, 4).t()
        assert files.read(view) is view


# ---- destinations


def test_links_as_destinations(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DestinationExistsError, match="link to a folder that does not exist"):
        convert(source, tmp_path / "link", overwrite=True, progress=False)
    (tmp_path / "nowhere").mkdir()
    convert(source, tmp_path / "link", progress=False)
    assert (tmp_path / "link").is_symlink()
    assert set(files_of(tmp_path / "nowhere") or {}) == {"config.json", "conversion.json", "model.safetensors"}


def test_the_working_directory_as_destination(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(source, ".", progress=False)
    assert sorted(os.listdir()) == ["config.json", "conversion.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["here", "source"]


def test_a_folder_that_is_written_is_not_written_by_another_thread(tmp_path: Path) -> None:
    with (
        finished_folder(tmp_path / "x", ()) as folder,
        pytest.raises(DestinationBusyError, match=str(os.getpid())),
        finished_folder(tmp_path / "x", ()),
    ):
        pass
    assert folder.name == NEW


# ---- standard streams


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("2>/dev/full", 0, ""),
        (">/dev/full", 1, "No space left on device"),
        ("<&- >&- 2>&-", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_streams_that_are_closed_or_full(
    source: Path, tmp_path: Path, redirection: str, code: int | None, message: str
) -> None:
    command = f"{sys.executable} -m openllama convert {source} {tmp_path / 'native'} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in ((0, 141) if code is None else (code,))
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert_same_tensors(open_checkpoint(tmp_path / "native").tensors, native_weights(CONFIG))
