"""Kills conversions: at every rename, and at random moments.

    python -m tests.kills [COUNT]

After each kill the destination is the old checkpoint or the new one, whole, or nothing that can be read; the next run
restores and finishes, and leaves nothing beside the result. The victims are forks of this process, which has imported
torch already; so a kill takes milliseconds.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from openllama.checkpoint import convert, open_checkpoint
from openllama.checkpoint.folders import WORK, check_destination
from openllama.errors import CorruptCheckpointError
from tests.checkpoints import hf_weights, native_weights, tiny_config, write_checkpoint

CONFIG = tiny_config()
LARGER = tiny_config(vocab_size=3000, hidden_size=128, intermediate_size=256)
DESTINATIONS = ("absent", "empty", "old")
SHARDS = {"one file": 1, "several shards": 3}
Tree = dict[str, bytes]


def fork(victim: Callable[[], None]) -> int:
    """Run ``victim`` in a forked process; its id. The exit code is 0, or 1 after an exception."""
    if pid := os.fork():
        return pid
    code = 1
    with suppress(BaseException):
        victim()
        code = 0
    os._exit(code)


def ended_by(pid: int) -> int:
    """Wait for a process: its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_rename(number: int, before: bool) -> None:
    """From here on, this process is killed at its ``number``-th rename, before it or after."""
    calls = 0

    def killing(rename: Callable[..., None]) -> Callable[..., None]:
        def renaming(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return renaming

    os.rename, os.replace = killing(os.rename), killing(os.replace)  # type: ignore[assignment]


def files_of(folder: Path) -> Tree | None:
    """Names and bytes of the files of a destination, without the work folder; None if it does not exist."""
    if not folder.exists():
        return None
    files = (path for path in folder.rglob("*") if path.is_file() and WORK not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Case:
    """A source, and a destination that is absent, empty, or holds an older checkpoint and a file of the user."""

    def __init__(self, place: Path, destination: str, shards: str, larger: bool = False) -> None:
        self.place, self.target = place, place / "target"
        config = LARGER if larger else CONFIG
        nbytes = sum(tensor.nbytes for tensor in native_weights(config).values())
        self.options: dict[str, Any] = {"max_shard_size": nbytes // SHARDS[shards] + 1, "progress": False}
        self.source = write_checkpoint(place / "source", hf_weights(config), config, "pickle shards")
        (self.source / "tokenizer_config.json").write_text("{}")
        self.mine = {"notes.txt": b"mine"} if destination == "old" else {}
        if destination == "old":
            older = write_checkpoint(place / "older", hf_weights(config, seed=1), config)
            (older / "special_tokens_map.json").write_text("{}")
            convert(older, self.target, **{**self.options, "max_shard_size": nbytes // 2})
            (self.target / "notes.txt").write_bytes(b"mine")
        elif destination == "empty":
            self.target.mkdir()
        self.old = files_of(self.target)
        convert(self.source, place / "expected", **self.options)
        self.new = {**self.mine, **(files_of(place / "expected") or {})}
        self.beside = sorted(os.listdir(place) + ["target"] * (not self.target.exists()))

    def reset(self) -> None:
        """Put the destination back as it was."""
        shutil.rmtree(self.target, ignore_errors=True)
        if self.old is not None:
            self.target.mkdir()
            for name, content in self.old.items():
                (self.target / name).write_bytes(content)

    def run(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* has no tokenizer.model")
            convert(self.source, self.target, overwrite=True, **self.options)

    def check_after_kill(self) -> None:
        """What can be read is the old or the new one; one restoring makes it so; the next run finishes."""
        state = files_of(self.target)
        if state not in (self.old, self.new):
            with pytest.raises(CorruptCheckpointError, match="run it again"):
                open_checkpoint(self.target)
        check_destination(self.target, overwrite=True)
        assert files_of(self.target) in (self.old, self.new)
        self.run()
        assert files_of(self.target) == self.new
        assert sorted(os.listdir(self.place)) == self.beside
        assert not (self.target / WORK).exists()


def kill_at_each_rename(case: Case, before: bool) -> int:
    """Kill a conversion at its first rename, another at its second and so on, until one survives; how many."""
    for number in itertools.count(1):
        case.reset()

        def victim(number: int = number) -> None:
            kill_at_rename(number, before)
            case.run()

        if (code := ended_by(fork(victim))) == 0:
            return number - 1
        assert code == -signal.SIGKILL
        case.check_after_kill()
    raise AssertionError


def kill_at_random(case: Case, count: int) -> int:
    """Kill ``count`` conversions at random moments; how many were still running."""
    case.reset()
    start = time.perf_counter()
    assert ended_by(fork(case.run)) == 0
    seconds, killed = time.perf_counter() - start, 0
    for _ in range(count):
        case.reset()
        pid = fork(case.run)
        time.sleep(random.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        killed += ended_by(pid) == -signal.SIGKILL
        case.check_after_kill()
    return killed


def main() -> None:
    torch.set_num_threads(1)  # a fork of a process with a pool of threads would wait for them
    os.fsync = lambda descriptor: None  # what a killed process has written stays; only a power cut needs the disk
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as name:
        for destination, shards, larger in itertools.product(DESTINATIONS, SHARDS, (False, True)):
            case = Case(
                Path(name, f"{destination}, {shards}, {'larger' if larger else 'small'}"), destination, shards, larger
            )
            killed = kill_at_random(case, -(-count // 12))
            at_renames = [kill_at_each_rename(case, before) for before in (True, False)]
            print(f"{case.place.name}: killed {killed} while they ran, {sum(at_renames)} at renames; all recovered")


if __name__ == "__main__":
    main()
