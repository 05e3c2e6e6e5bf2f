"""Converts a model of full size (6.9 billion parameters, 27.5 GB in float32): time, and memory of its own.

    python benchmarks/full_size.py [--folder /tmp] [--layers 32]

The source is written as transformers writes it, and then as safetensors, as one .bin and in float16, each made from the
one before. Beside a conversion stands what plain programs need for it, one after the other: to read the source, to
write as many bytes as the result has until the disk has them, and to read these again, with nothing in the page cache.
Anonymous memory, which is not that of a file, is sampled every 50 ms. Then the first token of the bfloat16 model, from
a file that is not in memory, beside reading the file once. Linux only; needs 56 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from convert import drop, read, seconds, write  # the other script in this folder
from torch import Tensor

from openllama import OpenLlamaConfig
from openllama.checkpoint import convert
from openllama.checkpoint.names import expected_shapes, native_to_hf
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.writer import plan_shards

TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints" / "open-llama-tiny" / "tokenizer.model"
SHARD = 10 * 10**9  # bytes, as transformers 4.31.0 splits


def write_pickles(
    folder: Path, tensors: dict[str, Tensor], config: OpenLlamaConfig, shard: int, dtype: torch.dtype = torch.float32
) -> None:
    """Shards of ``torch.save``; tensors on the meta device are filled with numbers whose period is no power of two."""
    folder.mkdir()
    config.save_pretrained(folder)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    noise = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)) / 50
    groups = plan_shards(tensors, shard).values()
    files = {f"pytorch_model-{n:05}-of-{len(groups):05}.bin": group for n, group in enumerate(groups, 1)}
    for file, group in files.items():
        torch.save({name: filled(tensors[name], noise).to(dtype) for name in group}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, group in files.items() for name in group}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def filled(tensor: Tensor, noise: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    copies = -(-tensor.numel() // len(noise))
    return noise.repeat(copies)[: tensor.numel()].reshape(tensor.shape)


def measure(source: Path, target: Path, to: str, dtype: str, keep: bool = False) -> None:
    """Convert and print one line; the result goes, unless it is kept."""
    command = [
        sys.executable,
        "-m",
        "openllama",
        "convert",
        source,
        target,
        "--to",
        to,
        "--dtype",
        dtype,
        "--overwrite",
    ]
    drop(source)
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.05)
    took = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{command} failed")
    files = [target] if target.is_file() else list(target.iterdir())
    size = sum(file.stat().st_size for file in files)
    ratio = "-"
    if not keep:
        for file in files:
            file.unlink()
        ratio = f"{took / bar(source, target.with_name('plain'), size):.2f}"
    print(
        f"| {source.name} | {to} {dtype} | {size / 1e9:.1f} | {took:.0f} | {ratio} | {peak / 2**20:.0f} |", flush=True
    )


def bar(source: Path, plain: Path, size: int) -> float:
    """Seconds of plain programs for a result of ``size`` bytes."""
    plain.mkdir()
    drop(source)
    total = seconds(lambda: read(source)) + seconds(lambda: write(plain, size))
    drop(plain)
    total += seconds(lambda: read(plain))
    shutil.rmtree(plain)
    return total


def measure_first_token(model: Path) -> None:
    """Print the seconds from ``from_pretrained`` to the first token, with nothing in the page cache."""
    script = (
        "import sys, time, torch\n"
        "from openllama import OpenLlamaForCausalLM\n"
        "start = time.perf_counter()\n"
        "model = OpenLlamaForCausalLM.from_pretrained(sys.argv[1])\n"
        "model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=1)\n"
        "print(time.perf_counter() - start)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon:')])"
    )
    for _ in range(3):
        drop(model)
        once = seconds(lambda: read(model))
        drop(model)
        command = [sys.executable, "-c", script, str(model)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        took, anonymous = map(float, output.split())
        print(
            f"first token: {took:.1f} s, reading the files once: {once:.1f} s, ratio {took / once:.2f}; "
            f"{anonymous / 2**10:.0f} MiB anonymous",
            flush=True,
        )


def anonymous_memory(pid: int) -> int:
    """Bytes; 0 if the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 2**10 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write")
    parser.add_argument("--layers", type=int, default=32, help="32: 6.9 billion parameters (default: %(default)s)")
    options = parser.parse_args()
    config = OpenLlamaConfig(
        vocab_size=100_000, num_hidden_layers=options.layers, use_stable_embedding=True, bos_token_id=1, eos_token_id=2,
        shared_input_output_embedding=True,
    )  # fmt: skip
    print("| source | to | GB | seconds | times the sum | anonymous MiB |\n| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        shards, safetensors, single, half = (
            Path(name, form) for form in ("float32 shards", "float32 safetensors", "float32 one .bin", "float16 shards")
        )
        target = Path(name, "target")
        meta = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}
        write_pickles(shards, native_to_hf(meta, config), config, SHARD)
        measure(shards, target, "native", "bfloat16")
        measure(shards, target, "llama", "bfloat16")
        measure(shards, Path(name, "model.gguf"), "gguf", "bfloat16")
        measure(shards, safetensors, "hf", "float32", keep=True)  # for the bar there is no room on the disk
        shutil.rmtree(shards)
        measure(safetensors, target, "native", "bfloat16")
        write_pickles(single, open_checkpoint(safetensors).tensors, config, 10**12)
        shutil.rmtree(safetensors)
        measure(single, target, "native", "bfloat16")
        write_pickles(half, open_checkpoint(single).tensors, config, SHARD, torch.float16)
        shutil.rmtree(single)
        measure(half, target, "native", "bfloat16")
        convert(half, target, dtype="bfloat16", progress=False)
        measure_first_token(target)


if __name__ == "__main__":
    main()
