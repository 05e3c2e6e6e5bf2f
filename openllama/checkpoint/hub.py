"""Where a checkpoint lies: on the disk, in the cache of the Hugging Face hub, or on the hub itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path

from openllama.errors import BackendError, CheckpointNotFoundError, warn

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ("*.json", "tokenizer.model", "chat_template.jinja")
WEIGHTS = (  # the first of these formats that a repository has is downloaded, and no other
    ("model.safetensors", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
    ("adapter_model.safetensors",),
    ("adapter_model.bin",),
    ("consolidated.*.pth",),
)


def local_path(path: str | PathLike[str]) -> Path:
    """``path`` with ``~`` expanded, and the snapshot instead of the root of a repository in the hub's cache.

    That root is a folder ``models--ORG--NAME`` with ``refs`` and ``snapshots``; the snapshot is that of
    ``refs/main``, or the only one. Raises ``CheckpointNotFoundError`` where neither is there.
    """
    path = Path(path).expanduser()
    if not (path.name.startswith("models--") and (path / "snapshots").is_dir()):
        return path
    snapshots = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    if (main := path / "refs" / "main").is_file():
        revision = main.read_text(encoding="utf-8", errors="replace").strip()
        snapshots = [snapshot for snapshot in snapshots if snapshot.name == revision] or snapshots
    if len(snapshots) != 1:
        names = ", ".join(f"snapshots/{snapshot.name}" for snapshot in snapshots) or "none"
        raise CheckpointNotFoundError(f"{path} has no snapshot of refs/main; choose one of its snapshots: {names}")
    return snapshots[0]


def fetch(source: str | PathLike[str], revision: str | None = None) -> Path:
    """``local_path(source)``; what is not there and looks like ORG/NAME is downloaded from the hub.

    Only configuration, tokenizer and weights in one format are, never code. Raises
    ``CheckpointNotFoundError`` where the hub or the repository cannot be reached, and ``BackendError``
    without huggingface_hub.
    """
    path = local_path(source)
    if path.exists() or not REPOSITORY.fullmatch(str(source)):
        if revision is not None:
            raise CheckpointNotFoundError(f"revision {revision}: {source} is not a repository of the hub, ORG/NAME")
        return path
    try:
        import huggingface_hub
    except ImportError as error:
        raise BackendError(
            f"{source}: no such file or folder, and to download a repository of that name huggingface_hub is needed: "
            "pip install 'openllama[hub]'"
        ) from error
    name = str(source)
    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except Exception as error:  # of several libraries for networks, which differ between versions
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        try:
            cached = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            raise CheckpointNotFoundError(
                f"{name}: no such file or folder, and the repository of that name cannot be reached: {reason}"
            ) from error
        warn(f"{name} cannot be reached ({reason}); what an earlier download left in {cached} is read")
        return cached
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_wanted(files)))
    except Exception as error:
        raise CheckpointNotFoundError(f"{name} could not be downloaded: {error}; a second try resumes") from error


def _wanted(files: Iterable[str]) -> list[str]:
    """The files of a repository, none from folders in it, that a conversion reads."""
    top = [file for file in files if "/" not in file]
    weights = [[file for file in top if any(fnmatch(file, pattern) for pattern in kind)] for kind in WEIGHTS]
    small = [file for file in top if any(fnmatch(file, pattern) for pattern in SMALL_FILES)]
    return small + next(filter(None, weights), [])
