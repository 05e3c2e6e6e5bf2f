"""``openllama convert | inspect | verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openllama.checkpoint import convert, inspect, verify
from openllama.checkpoint.export import FORMS
from openllama.checkpoint.gguf import Q8_0
from openllama.cli.common import DTYPES, Commands


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("convert", help="convert a checkpoint to safetensors, or for other programs")
    command.add_argument("src", type=Path, help="folder in HF or native layout, or a .pt/.pth/.bin state dict")
    command.add_argument("dst", type=Path, help="folder to create; with --to gguf a file, DST.gguf")
    command.add_argument(
        "--to",
        choices=(*FORMS, "gguf"),
        default="native",
        help="native: this package; hf: transformers 4.31.0; llama: current transformers, vLLM, ...; gguf: llama.cpp",
    )
    command.add_argument("--config", type=Path, help="config.json for a state dict whose folder has none")
    command.add_argument(
        "--dtype", choices=(*DTYPES, Q8_0), help="cast the weights (q8_0: gguf only); default: keep their type"
    )
    command.add_argument("--max-shard-size", default="5GB", help="largest file, e.g. 500MB (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.set_defaults(run=_convert)

    command = commands.add_parser("inspect", help="show what a checkpoint contains, without loading it")
    command.add_argument("dir", type=Path)
    command.set_defaults(run=lambda options: print(inspect(options.dir)))

    command = commands.add_parser("verify", help="read every weight and check names, shapes and that values are finite")
    command.add_argument("dir", type=Path)
    command.add_argument("--against", type=Path, help="another checkpoint, of either layout, to compare bit for bit")
    command.set_defaults(run=lambda options: print(verify(options.dir, options.against)))


def _convert(options: argparse.Namespace) -> None:
    convert(
        options.src,
        options.dst,
        to=options.to,
        config=options.config,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    if options.to == "gguf":
        print(f"{options.dst}: {options.dst.stat().st_size / 1e9:.3f} GB, weights and tokenizer for llama.cpp")
    else:
        print(f"{options.dst}: {inspect(options.dst)}")
