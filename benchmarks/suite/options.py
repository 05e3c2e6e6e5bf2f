"""Checks of options that commands share: what is wrong is one line, before anything is measured."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> None:
    """End where one of ``counts`` is below 1, ``--patience`` is no time, or a file to write has no folder."""
    for name in counts:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not 0 < options.patience <= threading.TIMEOUT_MAX:
        parser.error(f"--patience must be a number of seconds, got {options.patience}")
    for name in ("json", "plot", "roofline"):
        path: Path | None = getattr(options, name, None)
        if path is None:
            continue
        if path.is_dir():
            parser.error(f"{path} cannot be written: it is a folder")
        if not path.absolute().parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.absolute().parent}")
