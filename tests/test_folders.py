"""Destination folders: nothing half-written is ever seen."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from openllama.checkpoint.folders import check_destination, finished_file, finished_folder
from openllama.checkpoint.writer import OURS
from openllama.errors import DestinationBusyError, DestinationExistsError

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
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == step:
            raise error
        rename(source, target)

    with pytest.raises(type(error)), finished_folder(tmp_path / "x", OURS) as folder:  # noqa: PT012
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
        monkeypatch.setattr(os, "rename", failing)
    assert contents(tmp_path / "x") == OLD
    assert len(list((tmp_path / "x").iterdir())) == 4


def test_config_goes_first_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks in between finds a folder without configuration, which is refused, not a mixture."""
    make_old(tmp_path / "x")
    rename, seen = os.rename, []

    def watching(source: Path, target: Path) -> None:
        rename(source, target)
        seen.append((tmp_path / "x" / "config.json").exists())

    monkeypatch.setattr(os, "rename", watching)
    with finished_folder(tmp_path / "x", OURS) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
    assert seen == [False, False, False, True]


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


@pytest.mark.parametrize("exists", [True, False])
def test_a_destination_that_another_process_has_finished_meanwhile_is_kept(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "x").mkdir()
    check_destination(tmp_path / "x", overwrite=False)
    with finished_folder(tmp_path / "x", OURS) as folder:
        (folder / "config.json").write_text("of another process")
    with pytest.raises(DestinationExistsError, match="--overwrite"), finished_folder(tmp_path / "x", OURS, False):
        pytest.fail("work begins")
    assert contents(tmp_path / "x") == {"config.json": "of another process"}
    assert len(list((tmp_path / "x").iterdir())) == 1


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    make_old(tmp_path / "x")
    (tmp_path / "mine").write_text("text")
    (tmp_path / "x" / ".openllama.incomplete").mkdir()
    (tmp_path / "x" / ".openllama.incomplete" / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(DestinationExistsError, match="is a link"):
        check_destination(tmp_path / "x", overwrite=True)
    assert (tmp_path / "mine").read_text() == "text"


@pytest.mark.parametrize("step", range(2, 5))
def test_interrupted_again_while_it_takes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The first interruption is at a rename of the swap, the second at the first rename that takes it back."""
    make_old(tmp_path / "x")
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) in (step, step + 1):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(KeyboardInterrupt), finished_folder(tmp_path / "x", OURS) as folder:  # noqa: PT012
            (folder / "config.json").write_text("new")
            (folder / "model.safetensors").write_text("new")
    check_destination(tmp_path / "x", overwrite=True)
    assert contents(tmp_path / "x") == OLD


def test_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with finished_folder(tmp_path / "x", OURS) as folder:
        (folder / "config.json").write_text("new")
    assert contents(tmp_path / "x") == {"config.json": "new"}


def test_a_finished_file_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "model.gguf"
    with pytest.raises(ValueError, match="anything"), finished_file(target) as path:  # noqa: PT012
        path.write_text("half")
        raise ValueError("anything")
    assert not list(target.parent.iterdir())
    with finished_file(target) as path:
        path.write_text("whole")
        with pytest.raises(DestinationBusyError, match=str(os.getpid())), finished_file(target):
            pass
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]
