"""``openllama convert | inspect | verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openllama.checkpoint import convert, inspect, verify
from openllama.checkpoint.adapters import is_adapter
from openllama.cli.common import DTYPES, Commands


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("convert", help="convert a checkpoint to native layout and safetensors")
    command.add_argument("src", help="folder in HF or native layout, .pt/.pth/.bin state dict, or ORG/NAME on the hub")
    command.add_argument("dst", type=Path, help="folder to create")
    command.add_argument("--config", type=Path, help="config.json for a state dict whose folder has none")
    command.add_argument("--dtype", choices=DTYPES, help="cast the weights; default: keep their type")
    command.add_argument("--revision", help="branch, tag or commit of ORG/NAME (default: main)")
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out weights whose names match, e.g. '*.value_head.*'; may be repeated",
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
        config=options.config,
        dtype=options.dtype,
        ignore=options.ignore,
        revision=options.revision,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    print(f"{options.dst}: {'an adapter' if is_adapter(options.dst) else inspect(options.dst)}")
