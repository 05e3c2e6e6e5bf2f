"""Do to a folder all that the package does to checkpoints, and measure: what is raised, time, memory, files."""

from __future__ import annotations

import contextlib
import faulthandler
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.checkpoint import convert, inspect, open_checkpoint, verify
from openllama.errors import MAX_MESSAGE, OpenLlamaError
from tests.checkpoints import hf_weights, tiny_config, write_checkpoint
from tests.sentencepieces import TINY_CHECKPOINT

SECONDS, BYTES, HUNG = 10, 10**9, 60
Entries = dict[str, Callable[[Path, Path], object]]
ENTRIES: Entries = {
    "config": lambda folder, dst: OpenLlamaConfig.from_pretrained(folder),
    "tokenizer": lambda folder, dst: OpenLlamaTokenizer.from_pretrained(folder),
    "open": lambda folder, dst: open_checkpoint(folder),
    "inspect": lambda folder, dst: str(inspect(folder)),
    "verify": lambda folder, dst: str(verify(folder)),
    "model": lambda folder, dst: OpenLlamaForCausalLM.from_pretrained(folder),
    "convert": lambda folder, dst: convert(folder, dst, progress=False),
}


def good_folder(folder: Path, form: str = "one safetensors") -> Path:
    """A small checkpoint with a file for each thing that is read, beside the other format of the weights."""
    config = tiny_config(vocab_size=4700)
    write_checkpoint(folder, hf_weights(config), config, form)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(TINY_CHECKPOINT / name, folder / name)
    (folder / "added_tokens.json").write_text('{"<|user|>": 4600}')
    return folder


def attack(folder: Path, outside: Path, entries: Entries = ENTRIES, part: int = 1) -> tuple[list[str], list[str]]:
    """What was refused, as "entry: error", and what went wrong, of all ``entries``; ``outside`` must stay as it is.

    One ``part``-th of the seconds and bytes may be taken.
    """
    refused, wrong = [], []
    before = _listing(outside)
    for name, entry in entries.items():
        destination = folder.parent / "destination"
        faulthandler.dump_traceback_later(HUNG, exit=True)
        start, memory = time.process_time(), _reset_peak()  # seconds of this process: others may keep it waiting
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                entry(folder, destination)
        except (OpenLlamaError, OSError) as error:
            refused.append(f"{name}: {type(error).__name__}: {error}")
            if "\n" in str(error) or "\x1b" in str(error) or len(str(error)) > 10 * MAX_MESSAGE:
                wrong.append(f"{name}: a message of {len(str(error))} characters: {str(error)[:200]!r}")
        except BaseException:
            wrong.append(f"{name}: {traceback.format_exc(limit=-6)}")
        faulthandler.cancel_dump_traceback_later()
        if (seconds := time.process_time() - start) > SECONDS / part:
            wrong.append(f"{name}: took {seconds:.1f} s")
        if (peak := _peak() - memory) > BYTES / part:
            wrong.append(f"{name}: took {peak / 1e6:.0f} MB")
        if name != "convert" and destination.exists():
            wrong.append(f"{name}: wrote {destination}")
        shutil.rmtree(destination, ignore_errors=True)
    if _listing(outside) != before:
        wrong.append(f"other files were written: {sorted(_listing(outside) ^ before)}")
    return refused, wrong


def _listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


def _reset_peak() -> int:
    """Make the peak of resident memory what it is now, in bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return 0


def attacks(
    cases: dict[str, Callable[[Path], object]], folder: Path, entries: Entries = ENTRIES, part: int = 1
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Run ``attack`` for each case; yields its name, what was refused and what went wrong."""
    torch.set_num_threads(1)
    good = good_folder(folder / "good")
    for name, case in cases.items():
        work = folder / "work"
        shutil.copytree(good, work / "checkpoint")
        case(work / "checkpoint")
        yield name, *attack(work / "checkpoint", folder, entries, part)
        shutil.rmtree(work)
