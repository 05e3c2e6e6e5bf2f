"""Folders that appear only when they are complete, whatever ends the process that writes them.

All files are written to a work folder: inside the destination if that exists, otherwise beside it. It holds

    lock        locked by the process that writes, for as long as it lives, with its number
    new/        the files of the new folder; what is verified stays after an interruption, for the next run
    swap.json   while files change places: those that leave and those that come
    old/        the files that have left

A new destination appears by one rename of ``new``. In an existing one, config.json leaves first and comes last, so that
a folder in between is never read as a mixture. If the process is killed there, the next run undoes what swap.json says.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from openllama.config import CONFIG_FILE, read_json, read_limited
from openllama.errors import CorruptCheckpointError, DestinationBusyError, DestinationExistsError
from openllama.tokenizer.files import MAX_MODEL

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WORK = ".openllama.incomplete"  # inside a destination; beside one, its name comes first
LOCK, NEW, OLD, SWAP = "lock", "new", "old", "swap.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of some network file systems
INTERRUPTIONS = (KeyboardInterrupt, SystemExit)  # Ctrl-C, and what handlers of other signals raise


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise unless ``destination`` is free or may be replaced; undo a swap that was interrupted there.

    Raises ``DestinationExistsError``, or ``DestinationBusyError`` if a living process writes there.
    """
    folder = _resolved(destination)
    for work in (_inside(folder), _beside(folder)):
        if work.is_dir():
            with _locked(work, destination):
                _undo(work, folder)
    _check_free(folder, destination, overwrite)


def _check_free(folder: Path, destination: Path, overwrite: bool) -> None:
    """Raise ``DestinationExistsError`` for a file, and for a folder with contents that may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not contents(folder)):
        return
    if not folder.is_dir():
        raise DestinationExistsError(f"{destination} is a file; choose a folder")
    if not overwrite:
        raise DestinationExistsError(f"{destination} exists; choose another folder, or pass overwrite (--overwrite)")


def check_places(src: Path, dst: Path, overwrite: bool, is_own: Callable[[Path], bool], otherwise: str) -> None:
    """Raise ``DestinationExistsError`` if ``dst`` is or contains ``src``, or may not be replaced.

    What is not empty may be if ``is_own`` says so; ``otherwise``: what the error calls it if not.
    """
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise DestinationExistsError(f"{dst} is or contains the source {src}; choose another folder")
    check_destination(dst, overwrite)
    if dst.is_dir() and contents(dst) and not is_own(dst):
        raise DestinationExistsError(f"{dst} is not empty and {otherwise}, so it is not replaced; choose a new folder")


def contents(folder: Path) -> list[str]:
    """Names in ``folder``, without the remains of interrupted runs."""
    own = {WORK, *(path.name for path in remains(folder))}
    return [name for name in os.listdir(folder) if name not in own]


def remains(folder: Path) -> list[Path]:
    """What a killed process of this package left in or beside ``folder`` before work folders had fixed names."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(incomplete|replaced)")
    places = [place for place in (folder, folder.parent) if place.is_dir()]
    return [place / name for place in places for name in os.listdir(place) if pattern.fullmatch(name)]


def check_whole(folder: Path) -> None:
    """Raise ``CorruptCheckpointError`` if a process was killed while it replaced the files of ``folder``."""
    if _left(_inside(folder)):
        raise CorruptCheckpointError(
            f"{folder} is incomplete: a program was interrupted while it replaced the files; run it again with the "
            "same destination (--overwrite), which restores them first"
        )


@contextmanager
def finished_folder(
    destination: Path, replaced: Collection[str], overwrite: bool = True, resume: bool = False
) -> Iterator[Path]:
    """An empty folder; its files are moved to ``destination`` if the block raises no error.

    A new destination is created by one rename. In an existing one, files whose names match a pattern of
    ``replaced`` are removed and all others stay; without ``overwrite`` it must be empty. With ``resume``, files
    of weights stay in the work folder after ``INTERRUPTIONS`` or a kill, and the next call yields the folder with
    them. Raises ``DestinationExistsError``, or ``DestinationBusyError`` if another process writes to
    ``destination``.
    """
    folder = _resolved(destination)
    exists = folder.is_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if exists and _beside(folder).is_dir():
        with _locked(_beside(folder), destination):
            _clear(_beside(folder))
    work = _inside(folder) if exists else _beside(folder)
    with _locked(work, destination):
        if folder.is_dir() != exists:
            raise DestinationExistsError(f"{destination} was made or removed by another program just now; try again")
        _undo(work, folder)
        _check_free(folder, destination, overwrite)  # another process may have finished it just now
        _clear(work, keep_weights=resume)
        (work / NEW).mkdir(exist_ok=True)
        try:
            yield work / NEW
            for path in (*(work / NEW).iterdir(), work / NEW):
                sync(path)
            if exists:
                _swap(work, folder, replaced)
            else:
                os.rename(work / NEW, folder)
                sync(folder.parent)
        except BaseException as error:
            if (work / SWAP).exists():  # taking back was interrupted, too: the next run does it
                raise
            _clear(work, keep_weights=resume and isinstance(error, INTERRUPTIONS))
            if (work / NEW).is_dir():
                error.args = (f"verified files stay in {work}; the same command goes on from there",)
            raise
        for path in remains(folder):
            _remove(path)
        _clear(work)


@contextmanager
def finished_file(destination: Path) -> Iterator[Path]:
    """A path; the file that the block writes there is renamed to ``destination`` if it raises no error.

    Raises ``DestinationBusyError`` if another process writes to ``destination``.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(destination)
    with _locked(work, destination):
        _clear(work)
        try:
            yield work / destination.name
            sync(work / destination.name)
            os.replace(work / destination.name, destination)
            sync(destination.parent)
        finally:
            _clear(work)


def check_space(folder: Path, needed: int) -> None:
    """Raise ``OSError`` if a folder has no room for so many bytes."""
    if needed > (free := shutil.disk_usage(folder).free):
        text = f"No space left: {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, text, str(folder))


# ---- names


def _resolved(destination: Path) -> Path:
    """The folder that ``destination`` means, links followed."""
    if destination.is_symlink() and not destination.exists():
        raise DestinationExistsError(
            f"{destination} is a link to a folder that does not exist; create that folder or remove the link"
        )
    return destination.resolve()


def _inside(folder: Path) -> Path:
    return folder / WORK


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}{WORK}"


# ---- the lock


@contextmanager
def _locked(work: Path, destination: Path) -> Iterator[None]:
    """Hold the lock of ``work``, which is made if absent, and removed in the end if it holds nothing else."""
    descriptor = _lock(work, destination)
    try:
        yield
    finally:
        # Others may open the file until it is gone; _lock notices that it is. Windows cannot remove an open file.
        if fcntl is None:
            os.close(descriptor)
        with suppress(OSError):
            os.unlink(work / LOCK)
            work.rmdir()
        if fcntl is not None:
            os.close(descriptor)


def _lock(work: Path, destination: Path) -> int:
    """A descriptor of the locked file; the system unlocks it when the process ends, however it ends."""
    for _ in range(100):
        for path in (work, work / LOCK):
            if path.is_symlink():
                raise DestinationExistsError(f"{path} is a link, which this package does not make; remove it")
        work.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process has just removed the folder or the file
            descriptor = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if not _try_lock(descriptor):
                holder = os.read(descriptor, 20).decode(errors="replace") or "another"
                os.close(descriptor)
                raise DestinationBusyError(f"{destination} is being written by process {holder}; wait for it or end it")
            if os.path.samestat(os.fstat(descriptor), os.stat(work / LOCK)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)
    raise DestinationBusyError(f"{work} is made and removed by other processes again and again; try later")


def _try_lock(descriptor: int) -> bool:
    """Lock a file if no other process has; where the file system has no locks, say yes."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**20, os.SEEK_SET)  # beyond the text: a locked byte cannot be read by others
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


# ---- the swap


def _swap(work: Path, folder: Path, replaced: Collection[str]) -> None:
    """Replace files of ``folder`` by those of ``new``: all of them, or none if there is an error."""
    new = sorted(os.listdir(work / NEW), key=_is_config)
    patterns = (*replaced, *new)
    old = [path.name for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, p) for p in patterns)]
    old.sort(key=_is_config, reverse=True)
    (work / OLD).mkdir()
    write_whole(work / SWAP, json.dumps({"out": old, "in": new}))
    try:
        for name in old:
            os.rename(folder / name, work / OLD / name)
        for name in new:
            os.rename(work / NEW / name, folder / name)
        sync(folder)
    except BaseException:
        _undo(work, folder)
        raise
    os.unlink(work / SWAP)


def _undo(work: Path, folder: Path) -> None:
    """Take back a swap that did not come to its last rename; killed in between, it can be called again."""
    swap, left = _journal(work), _left(work)
    if left:
        for name in swap["in"]:
            if name not in left and os.path.lexists(folder / name):
                os.rename(folder / name, work / NEW / name)
        for name in reversed(swap["out"]):
            if os.path.lexists(work / OLD / name):
                os.rename(work / OLD / name, folder / name)
        sync(folder)
    (work / SWAP).unlink(missing_ok=True)


def _left(work: Path) -> list[str]:
    """Files that a swap has still to move into the destination."""
    return [name for name in _journal(work)["in"] if os.path.lexists(work / NEW / name)]


def _journal(work: Path) -> dict[str, list[str]]:
    """What an interrupted swap was to move out and in; raises ``CorruptCheckpointError`` for names of other places."""
    path = work / SWAP
    if not path.is_file():
        return {"out": [], "in": []}
    try:
        swap = read_json(path, CorruptCheckpointError)
        names = {side: [str(name) for name in swap[side]] for side in ("out", "in")}
    except (CorruptCheckpointError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}; look into {work}, then remove it") from error
    linked = [part for part in (work, work / NEW, work / OLD) if part.is_symlink()]
    if linked or any(name != Path(name).name or name in ("", "..") for name in (*names["out"], *names["in"])):
        raise CorruptCheckpointError(f"{path} leads out of its folder; this package did not write it: remove {work}")
    return names


def _is_config(name: str) -> bool:
    return name == CONFIG_FILE


# ---- files


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written, and that the disk has when this returns."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def copy_small(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files ``names`` that the folder ``source`` has; none may be larger than a tokenizer."""
    for name in names:
        if (source / name).is_file():
            (target / name).write_bytes(read_limited(source / name, MAX_MODEL, CorruptCheckpointError))


def sync(path: Path) -> None:
    """Make the system write a file or a folder to the disk."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(work: Path, keep_weights: bool = False) -> None:
    """Remove what is in a work folder, but for its lock and, if they are to stay, for files of weights and records."""
    for path in work.iterdir():
        if keep_weights and path.name == NEW and path.is_dir() and not path.is_symlink():
            for file in path.iterdir():
                if file.suffix != ".safetensors":
                    _remove(file)
            with suppress(OSError):
                path.rmdir()  # if nothing stays
        elif path.name != LOCK and not (keep_weights and path.suffix == ".json"):
            _remove(path)
    if not (work / NEW).exists():
        for path in work.glob("*.json"):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
