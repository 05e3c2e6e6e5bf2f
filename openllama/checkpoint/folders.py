"""Folders that appear only when they are complete.

All files are written to a temporary folder first; only when that is whole its files are renamed into place. An error,
a full disk or Ctrl-C leaves the destination unchanged.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from openllama.config import CONFIG_FILE
from openllama.errors import DestinationExistsError


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` if ``destination`` exists and may not be replaced."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not destination.is_dir():
        raise DestinationExistsError(f"{destination} is a file; choose a folder")
    if not overwrite:
        raise DestinationExistsError(f"{destination} exists; choose another folder, or pass overwrite (--overwrite)")


@contextmanager
def finished_folder(destination: Path, replaced: Collection[str]) -> Iterator[Path]:
    """A temporary folder; its files are moved to ``destination`` if the block raises no error.

    A new destination is created by one rename. In an existing one, files whose names match a pattern of
    ``replaced`` are removed and all others stay; config.json is moved last, because a folder without it
    is not read.
    """
    exists = destination.is_dir()
    parent = destination if exists else destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{destination.name}.{secrets.token_hex(4)}.incomplete"
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if exists:
            _move_in(temporary, destination, replaced)
        else:
            temporary.rename(destination)
        _sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_in(temporary: Path, destination: Path, replaced: Collection[str]) -> None:
    """Replace files of ``destination`` with those of ``temporary``: all of them, or none if there is an error."""
    patterns = (*replaced, *(path.name for path in temporary.iterdir()))
    old = [p for p in destination.iterdir() if p.is_file() and any(fnmatch(p.name, pattern) for pattern in patterns)]
    backup = temporary.with_suffix(".replaced")
    backup.mkdir()
    moves = [(path, backup / path.name) for path in sorted(old, key=_config_first)]
    moves += [(path, destination / path.name) for path in sorted(temporary.iterdir(), key=_config_first, reverse=True)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            done.append((source, target))
            source.rename(target)
    except BaseException:
        for source, target in reversed(done):
            if not source.exists():
                target.rename(source)
        backup.rmdir()
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _config_first(path: Path) -> bool:
    return path.name != CONFIG_FILE


def _sync(path: Path) -> None:
    """Make the system write a file or a folder to the disk."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
