"""``openllama convert | inspect | verify | diff``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from openllama.checkpoint import convert, diff, inspect, verify
from openllama.checkpoint.adapters import is_adapter
from openllama.checkpoint.export import FORMS
from openllama.checkpoint.gguf import Q8_0
from openllama.checkpoint.writer import SHARD_SIZE
from openllama.cli.common import DTYPES, Commands
from openllama.errors import CheckpointError
from openllama.interface import OpenLlamaForCausalLM
from openllama.quantized.rounding import FORMATS
from openllama.tokenizer import OpenLlamaTokenizer

PROMPT = "Attention is all you need. 春江潮水连海平，海上明月共潮生。"


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("convert", help="convert a checkpoint to safetensors, or for other programs")
    command.add_argument("src", help="folder in HF or native layout, .pt/.pth/.bin state dict, or ORG/NAME on the hub")
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
    command.add_argument("--quantize", choices=tuple(FORMATS), help="round the matrices, for native only")
    command.add_argument("--revision", help="branch, tag or commit of ORG/NAME (default: main)")
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out weights whose names match, e.g. '*.value_head.*'; may be repeated",
    )
    command.add_argument("--max-shard-size", help=f"largest file, e.g. 500MB (default: {SHARD_SIZE})")
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.set_defaults(run=_convert)

    command = commands.add_parser("inspect", help="show what a checkpoint contains, without loading it")
    command.add_argument("dir", type=Path)
    command.add_argument("--tree", action="store_true", help="list the kinds of weights with types and shapes")
    command.add_argument("--stats", action="store_true", help="read all numbers: mean, deviation, range, NaN")
    command.add_argument("--json", action="store_true", help="print all of it as JSON, weight by weight")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="read every weight and check names, shapes and that values are finite")
    command.add_argument("dir", type=Path)
    command.add_argument("--against", type=Path, help="another checkpoint, of either layout, to compare bit for bit")
    command.add_argument(
        "--logits", nargs="?", const=PROMPT, metavar="TEXT", help="compute a text with both, and compare the logits"
    )
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "diff", help="show how far the weights of two checkpoints are apart; exit code 1 if they differ"
    )
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.set_defaults(run=_diff)


def _convert(options: argparse.Namespace) -> None:
    convert(
        options.src,
        options.dst,
        to=options.to,
        config=options.config,
        dtype=options.dtype,
        quantize=options.quantize,
        ignore=options.ignore,
        revision=options.revision,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    if options.to == "gguf":
        print(f"{options.dst}: {options.dst.stat().st_size / 1e9:.3f} GB, weights and tokenizer for llama.cpp")
    else:
        print(f"{options.dst}: {'an adapter' if is_adapter(options.dst) else inspect(options.dst)}")


def _inspect(options: argparse.Namespace) -> None:
    found = inspect(options.dir, with_statistics=options.stats)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        return
    print(found)
    if options.tree:
        print(found.tree())
    if options.stats:
        print(found.statistics_table())


def _verify(options: argparse.Namespace) -> None:
    if options.logits is not None and options.against is None:
        raise CheckpointError("--logits compares two checkpoints; name the other one with --against")
    print(verify(options.dir, options.against))
    if options.logits is not None:
        print(_compare_logits(options.dir, options.against, options.logits))


def _diff(options: argparse.Namespace) -> None:
    found = diff(options.a, options.b)
    print(found)
    if not found.equal:
        sys.exit(1)


@torch.no_grad()
def _compare_logits(mine: Path, theirs: Path, text: str) -> str:
    """Both models on the same text, each in its own type: how far their predictions are apart."""
    ids = OpenLlamaTokenizer.from_pretrained(mine)(text, return_tensors="pt").input_ids
    a, b = (OpenLlamaForCausalLM.from_pretrained(path)(ids).logits[0].float() for path in (theirs, mine))
    error = (b - a).abs()
    same = int((a.argmax(-1) == b.argmax(-1)).sum())
    return (
        f"logits of {len(a)} tokens: largest difference {error.max():.3g}, mean {error.mean():.3g}, of numbers up to "
        f"{a.abs().max():.3g}; the same next token at {same} of {len(a)}"
    )
