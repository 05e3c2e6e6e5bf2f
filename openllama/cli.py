"""The command line: ``openllama convert | generate | inspect | verify``, also ``python -m openllama``.

Text goes to stdout, everything about it to stderr. A refusal is one line and exit code 1; ``--debug``
shows where it came from.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from openllama import __version__
from openllama.checkpoint import convert, inspect, verify
from openllama.errors import InputError, OpenLlamaError
from openllama.generation import LogitsProcessor
from openllama.heads import OpenLlamaForCausalLM
from openllama.tokenizer import OpenLlamaTokenizer, StreamDecoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (OpenLlamaError, OSError) as error:
        if options.debug:
            raise
        print(f"openllama: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openllama", description="Open-Llama checkpoints: convert, run, examine.")
    parser.add_argument("--version", action="version", version=f"openllama {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_verify(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("convert", help="rewrite a checkpoint in native layout, as safetensors")
    command.add_argument("src", type=Path, help="folder in HF or native layout, or a .pt/.pth/.bin state dict")
    command.add_argument("dst", type=Path, help="folder to make")
    command.add_argument("--config", type=Path, help="config.json of a state dict that has none beside it")
    command.add_argument("--dtype", choices=DTYPES, help="convert the weights; default: as they are")
    command.add_argument("--max-shard-size", default="5GB", help="largest file, as 500MB or 5GB (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    command.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    convert(
        options.src,
        options.dst,
        config=options.config,
        dtype=DTYPES.get(options.dtype),
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    print(f"{options.dst}: {inspect(options.dst)}")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("inspect", help="say what a checkpoint holds, without loading it")
    command.add_argument("dir", type=Path)
    command.set_defaults(run=lambda options: print(inspect(options.dir)))


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("verify", help="read every weight: names, shapes, finite values")
    command.add_argument("dir", type=Path)
    command.add_argument("--against", type=Path, help="another checkpoint, of either layout, to compare bit for bit")
    command.set_defaults(run=lambda options: print(verify(options.dir, options.against)))


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("generate", help="continue prompts, token by token")
    command.add_argument("dir", type=Path, help="folder in HF or native layout")
    command.add_argument("--prompt", action="append", help="text to continue; may be given again (default: stdin)")
    command.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    command.add_argument("--greedy", action="store_true", help="the likeliest token each time, instead of drawing")
    command.add_argument("--temperature", type=float, default=0.8, help="default: %(default)s")
    command.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest (default: all)")
    command.add_argument(
        "--top-p", type=float, default=0.95, help="draw among the likeliest that reach P (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, help="draw the same text each time")
    command.add_argument("--dtype", choices=DTYPES, help="compute in this dtype; default: the checkpoint's")
    command.add_argument("--device", help="cpu, cuda, ...")
    command.add_argument("--attn-implementation", choices=("eager", "sdpa", "xformers"))
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    prompts = options.prompt or [_read_stdin()]
    tokenizer = OpenLlamaTokenizer.from_pretrained(options.dir)
    model = OpenLlamaForCausalLM.from_pretrained(
        options.dir,
        dtype=DTYPES.get(options.dtype),
        device=options.device,
        attn_implementation=options.attn_implementation,
    )
    generator = None if options.seed is None else torch.Generator(model.device).manual_seed(options.seed)
    start = time.perf_counter()
    count = sum(_print_continuation(model, tokenizer, prompt, options, generator) for prompt in prompts)
    speed = count / (time.perf_counter() - start)
    print(f"{count} tokens, {speed:.1f} tokens/s, peak memory {_peak_memory(model.device)}", file=sys.stderr)


def _read_stdin() -> str:
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise InputError("no prompt: give --prompt TEXT, or text on standard input")
    return text


def _print_continuation(
    model: OpenLlamaForCausalLM,
    tokenizer: OpenLlamaTokenizer,
    prompt: str,
    options: argparse.Namespace,
    generator: torch.Generator | None,
) -> int:
    """Print ``prompt`` and its continuation, each token as it is made; the number of tokens made."""
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = model.stream(
        input_ids,
        max_new_tokens=options.max_new_tokens,
        do_sample=not options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        logits_processor=[_only_ids_below(len(tokenizer))],
        generator=generator,
    )
    decoder = StreamDecoder(tokenizer)
    for token_id in input_ids[0].tolist():
        decoder.push(token_id)  # the first piece depends on what stands before it
    print(prompt, end="", flush=True)
    count = 0
    for token in tokens:
        print(decoder.push(int(token)), end="", flush=True)
        count += 1
    print(decoder.finish(), end="\n\n", flush=True)
    return count


def _only_ids_below(pieces: int) -> LogitsProcessor:
    """A vocabulary may be larger than its tokenizer; ids without text are never drawn."""

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(pieces, scores.shape[1], device=scores.device), -torch.inf)

    return process


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB of {torch.cuda.get_device_name(device)}"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
