"""How long a conversion takes, beside the time that its reading and writing needs by itself.

    python benchmarks/convert.py [--gigabytes 2] [--folder /tmp]

A checkpoint of random float32 weights is converted without a cast and to bfloat16. The bar is what plain programs need
one after the other: to read the source once, to write as many bytes as the result has until the disk has them, and to
read these again. Before each step the system drops the file from its memory. Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from openllama import OpenLlamaConfig
from openllama.checkpoint import convert
from openllama.checkpoint.names import expected_shapes, native_to_hf

CHUNK = 2**23  # bytes


def drop(folder: Path) -> None:
    """Make the system forget the files of ``folder``."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read(folder: Path) -> None:
    buffer = bytearray(CHUNK)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write(folder: Path, nbytes: int) -> None:
    data = os.urandom(CHUNK)
    with (folder / "plain.safetensors").open("wb") as file:
        for start in range(0, nbytes, CHUNK):
            file.write(data[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())


def write_source(folder: Path, gigabytes: float) -> None:
    """Layers of 270 MB, in files of at most 1 GB."""
    layers = max(1, round(gigabytes / 0.27) - 1)
    config = OpenLlamaConfig(vocab_size=16000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers)
    shapes = expected_shapes(config)
    torch.manual_seed(0)
    tensors = native_to_hf({name: torch.randn(shape) for name, shape in shapes.items()}, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def measure(source: Path, folder: Path, dtype: str | None) -> float:
    """Print the times of one conversion and of its bar; their ratio."""
    size = (source / "model.safetensors").stat().st_size // (1 if dtype is None else 2)
    plain, target = folder / "plain", folder / "target"
    plain.mkdir()
    drop(source)
    parts = {"read": seconds(lambda: read(source)), "write": seconds(lambda: write(plain, size))}
    drop(plain)
    parts["read back"] = seconds(lambda: read(plain))
    shutil.rmtree(plain)
    drop(source)
    took = seconds(lambda: convert(source, target, dtype=dtype, progress=False))
    shutil.rmtree(target)
    bar = sum(parts.values())
    text = ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())
    print(f"{dtype or 'no cast'}: {text}, sum {bar:.1f} s; convert {took:.1f} s: {took / bar:.2f} x the sum")
    return took / bar


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the source (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write; needs three times the size")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        expected_shapes(OpenLlamaConfig(num_hidden_layers=1))  # torch imports some parts of itself late, in seconds
        source = Path(name, "source")
        source.mkdir()
        write_source(source, options.gigabytes)
        ratios: dict[str | None, list[float]] = {None: [], "bfloat16": []}
        for _ in range(options.runs):
            for dtype, found in ratios.items():
                found.append(measure(source, Path(name), dtype))
    for dtype, found in ratios.items():
        print(f"{dtype or 'no cast'}: median {statistics.median(found):.2f}, from {min(found):.2f} to {max(found):.2f}")
    print(f"other programs: the load was {os.getloadavg()[0]:.1f} with {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
