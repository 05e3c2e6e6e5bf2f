"""Builds loops in C++ for the processor at hand with the system's compiler, once, and loads them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from openllama.errors import BackendError

COMPILERS = ("c++", "g++", "clang++")  # after $CXX
# No -ffast-math: a library that is built with it rounds the subnormal numbers of the whole process to zero.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-w", "-shared", "-fPIC", "-fopenmp")
SECONDS = 120
DEPENDS = ("CXX", "PATH", "OPENLLAMA_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR")  # variables that may mend a failure
_failures: dict[tuple[str | None, ...], str] = {}  # by source and the values of these, what has been tried in vain


@functools.cache
def library(source: Path, declare: Callable[[ctypes.CDLL], object], *flags: str) -> ctypes.CDLL:
    """The loops of ``source``, built at the first use on a machine (seconds) and then loaded from their folder.

    ``declare`` sets the types of their functions; ``flags`` are for this source alone. Raises ``BackendError`` where
    they cannot be built, which this process does not try twice in the same environment.
    """
    given = (source.name, *map(os.environ.get, DEPENDS))
    if given not in _failures:
        try:
            return _loaded(source, declare, flags)
        except BackendError as error:
            _failures[given] = str(error)
    raise BackendError(_failures[given])


def is_built(source: Path, *flags: str) -> bool:
    """Whether ``library`` would find the loops of ``source`` built."""
    try:
        return _is_whole(_built(source, flags)[1])
    except BackendError:
        return False


def _loaded(source: Path, declare: Callable[[ctypes.CDLL], object], flags: tuple[str, ...]) -> ctypes.CDLL:
    command, path = _built(source, flags)
    if not _is_whole(path):
        _build([*command, str(source)], path)
    try:
        loops = ctypes.CDLL(str(path))
        declare(loops)
        return loops
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"{path} cannot be loaded: {error}; remove it, and the next process builds it again"
        ) from error


def _built(source: Path, flags: tuple[str, ...]) -> tuple[list[str], Path]:
    """The command that builds ``source`` here, without its name, and where what it builds is kept."""
    command = [*_compiler(), *FLAGS, *flags, *_tuned()]
    key = "\0".join((*command, source.read_text(encoding="utf-8"), _version(command[0]), _processor()))
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    return command, folder(name) / name


def _checksum(path: Path) -> Path:
    """The file beside a built library that has the SHA-256 of its bytes."""
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was built: the first look into one that was cut would end the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _checksum(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return False


def folder(name: str) -> Path:
    """The folder that has the built loops ``name``, or is to have them: ``$OPENLLAMA_CACHE`` where that is set.

    Else ``openllama`` in the user's folder for such files, or, where nothing can be written there, one among the
    temporary files. ``BackendError`` where that is not this user's alone.
    """
    if given := os.environ.get("OPENLLAMA_CACHE"):
        try:
            return Path(given).expanduser().absolute()  # of a bare name, the system would search its own folders
        except (OSError, RuntimeError) as error:
            raise BackendError(f"OPENLLAMA_CACHE is no folder: {given} ({error})") from error
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openllama"
        if (usual / name).exists():
            return usual
        usual.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=usual):
            return usual
    return _private_folder()


def _private_folder() -> Path:
    """A folder that anybody could have made before, and loops of somebody else would run as this user."""
    if not hasattr(os, "getuid"):
        raise BackendError("the compiled loops have no folder that can be written; set OPENLLAMA_CACHE to one")
    try:
        path = Path(tempfile.gettempdir(), f"openllama-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise BackendError(f"the compiled loops have no folder ({error}); set OPENLLAMA_CACHE to one") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BackendError(
            f"{path} must be a folder of user {os.getuid()} that no other can open, it has mode "
            f"{stat.filemode(found.st_mode)} and is of user {found.st_uid}; remove it, or set OPENLLAMA_CACHE"
        )
    return path


def _compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, which may have arguments, or the first of the usual names."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BackendError(f"CXX is no command: {os.environ['CXX']} ({error})") from error
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    tried = wanted[0] if wanted else ", ".join(COMPILERS)
    raise BackendError(f"compiled loops need a C++ compiler, and there is none ({tried}); install one or set CXX")


def _tuned() -> list[str]:
    """Flags that use all that this processor has."""
    if platform.machine() in ("x86_64", "AMD64"):
        return ["-march=native", "-mprefer-vector-width=512"]  # narrower vectors where there are no such
    return ["-mcpu=native"]


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS).stdout
    except (OSError, UnicodeError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"the C++ compiler {compiler} cannot be run: {error}; install one or set CXX") from error


def _processor() -> str:
    """What tells processors apart that share a folder of built loops."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(command: list[str], path: Path) -> None:
    """Compile in another folder first, so that there is a whole library at ``path``, with its checksum, or none."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as work,
            tqdm(total=1, desc="compiling for this processor", leave=False, disable=None, file=sys.stderr) as bar,
        ):
            built = Path(work, path.name)
            subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True, timeout=SECONDS)
            if not built.exists():
                raise BackendError(f"{command[0]} ended without an error, but wrote no file; set CXX to a C++ compiler")
            checksum = _checksum(built)
            checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="utf-8")
            checksum.replace(_checksum(path))
            built.replace(path)
            bar.update()
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f"it ended with code {error.returncode}"
        reason = next((line for line in said.splitlines() if "error" in line), said)
        raise BackendError(
            f"{command[0]} could not compile the loops: {reason}; set CXX to another compiler"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(
            f"the compiled loops could not be built in {path.parent}: {error}; set OPENLLAMA_CACHE to a folder of yours"
        ) from error
