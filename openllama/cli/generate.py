"""``openllama generate``: continue single prompts, or files of prompts."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from openllama.cli.common import TEXT, Commands, add_generation_options, add_model_options, generation_arguments, load
from openllama.config import refuse_constant
from openllama.errors import InputError
from openllama.generation import GenerationConfig
from openllama.generation.text import decoded, stop_at, until
from openllama.interface import OpenLlamaForCausalLM
from openllama.tokenizer import OpenLlamaTokenizer

if TYPE_CHECKING:
    from openllama.inference import FastModel


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("generate", help="continue prompts, token by token or in batches")
    add_model_options(command)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="text to continue; may be repeated (default: stdin)")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    source.add_argument("--jsonl", type=Path, help='JSON lines {"prompt": TEXT, ...}, - for stdin; writes JSON lines')
    command.add_argument("--output", type=Path, help="file for the output of --jsonl (default: stdout)")
    command.add_argument("--batch-size", type=int, help="of --jsonl (default: 8, or 1 for assisted decoding)")
    command.add_argument("--on-error", choices=("stop", "skip"), help="at a line without a prompt (default: stop)")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated"
    )
    add_generation_options(command, max_new_tokens=128)
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    _check(options)
    prompts = [] if options.jsonl else _prompts(options)
    model, tokenizer = load(options)
    arguments = generation_arguments(options, model, tokenizer)
    start = time.perf_counter()
    if options.jsonl:
        count = _generate_lines(model, tokenizer, arguments, options)
    else:
        count = sum(_print_continuation(model, tokenizer, prompt, arguments, options.stop) for prompt in prompts)
    speed = count / (time.perf_counter() - start)
    print(f"{count} tokens, {speed:.1f} tokens/s{_peak_memory(model.device)}", file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    """Raise ``InputError`` for invalid options."""
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}")
    if "" in options.stop:
        raise InputError("--stop must not be empty")
    for name in ("output", "batch_size", "on_error"):
        if not options.jsonl and getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --jsonl")


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt:
        prompts = options.prompt
    elif options.prompt_file:
        prompts = [options.prompt_file.read_text(**TEXT).removesuffix("\n")]
    else:
        prompts = [sys.stdin.read().removesuffix("\n")]
    if not all(prompts):
        raise InputError(
            "no prompt, or an empty one; give --prompt TEXT, --prompt-file FILE, or text on standard input"
        )
    return prompts


class _Counted:
    """Passes tokens on and counts them."""

    def __init__(self, tokens: Iterable[Tensor | int]) -> None:
        self._tokens, self.count = tokens, 0

    def __iter__(self) -> Iterator[Tensor | int]:
        for token in self._tokens:
            self.count += 1
            yield token


def _print_continuation(
    model: OpenLlamaForCausalLM | FastModel,
    tokenizer: OpenLlamaTokenizer,
    prompt: str,
    arguments: dict[str, Any],
    stop: Sequence[str],
) -> int:
    """Print ``prompt`` and its continuation, token by token where possible; returns the number of new tokens."""
    config = arguments["generation_config"]
    if config.num_beams > 1 or config.num_return_sequences > 1:
        [texts], count = _continue(model, tokenizer, [prompt], arguments, stop)
        print(*(prompt + text for text in texts), sep="\n\n", end="\n\n")
        return count
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = _Counted(model.stream(ids, **arguments))
    print(prompt, end="", flush=True)
    for piece in until(decoded(tokenizer, ids[0].tolist(), tokens), stop):
        print(piece, end="", flush=True)
    print("\n", flush=True)
    return tokens.count


def _continue(
    model: OpenLlamaForCausalLM | FastModel,
    tokenizer: OpenLlamaTokenizer,
    prompts: Sequence[str],
    arguments: dict[str, Any],
    stop: Sequence[str],
) -> tuple[list[list[str]], int]:
    """Continue all prompts in one batch; returns the continuations of each prompt and the number of new tokens."""
    rows = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    config: GenerationConfig = arguments["generation_config"].replace(return_dict_in_generate=False)
    criteria = [stop_at(tokenizer, stop, ids.shape[1])] if stop else []
    arguments = {**arguments, "generation_config": config, "stopping_criteria": criteria}
    output = model.generate(ids, attention_mask=mask, **arguments)
    copies = config.num_return_sequences
    texts: list[list[str]] = [[] for _ in prompts]
    count = 0
    for index, generated in enumerate(output[:, ids.shape[1] :].tolist()):
        ends = [generated.index(eos) + 1 for eos in config.eos_token_ids if eos in generated]
        tokens = _Counted(generated[: min(ends, default=None)])
        texts[index // copies].append("".join(until(decoded(tokenizer, rows[index // copies].tolist(), tokens), stop)))
        count += tokens.count
    return texts, count


def _generate_lines(
    model: OpenLlamaForCausalLM | FastModel,
    tokenizer: OpenLlamaTokenizer,
    arguments: dict[str, Any],
    options: argparse.Namespace,
) -> int:
    """Continue the prompts of all lines in batches, in order; returns the number of new tokens."""
    config = arguments["generation_config"]
    assisted = arguments["assistant_model"] is not None or config.prompt_lookup_num_tokens is not None
    size = options.batch_size or (1 if assisted else 8)
    with contextlib.nullcontext(sys.stdin) if str(options.jsonl) == "-" else options.jsonl.open(**TEXT) as source:
        lines = list(_read_lines(source, tokenizer, skip=options.on_error == "skip"))
    count = 0
    with contextlib.ExitStack() as stack:
        sink: TextIO | None = None if options.output else sys.stdout
        bar = stack.enter_context(tqdm(total=len(lines), unit="prompt", file=sys.stderr))
        for start in range(0, len(lines), size):
            batch = lines[start : start + size]
            texts, generated = _continue(model, tokenizer, [line["prompt"] for line in batch], arguments, options.stop)
            # The file is opened after the first batch, so that an early error leaves an old file unchanged.
            sink = sink or stack.enter_context(options.output.open("w", encoding="utf-8"))
            for line, continuations in zip(batch, texts, strict=True):
                answer = {"texts": continuations} if config.num_return_sequences > 1 else {"text": continuations[0]}
                print(json.dumps({**line, **answer}, ensure_ascii=False), file=sink, flush=True)
            count += generated
            bar.update(len(batch))
    return count


def _read_lines(source: TextIO, tokenizer: OpenLlamaTokenizer, skip: bool) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a line without a prompt is an error, or with ``skip`` reported and skipped."""
    for number, line in enumerate(source, start=1):
        if line.isspace():
            continue
        try:
            entry = json.loads(line, parse_constant=refuse_constant)
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise ValueError('it is not an object with a string "prompt"')
            if not tokenizer.encode(entry["prompt"]):
                raise ValueError("its prompt is empty")
        except ValueError as error:
            what = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
            problem = f"line {number}: {what}"
            if not skip:
                raise InputError(f"{problem}; --on-error skip leaves such lines out") from error
            print(f"skipped {problem}", file=sys.stderr)
        else:
            yield entry


def _peak_memory(device: torch.device) -> str:
    """The end of the report, e.g. ", peak memory 328 MiB"; empty if the system does not report it (Windows)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return f", peak memory {peak / 2**20:.0f} MiB of {torch.cuda.get_device_name(device)}"
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    mapped = min(peak, _mapped_memory())
    files = f" and {mapped / 2**20:.0f} MiB of mapped files, which the system can drop" if mapped else ""
    return f", peak memory {(peak - mapped) / 2**20:.0f} MiB{files}"


def _mapped_memory() -> int:
    """Bytes of memory that only repeat what is in a file, such as weights that are used as they are; 0 if unknown."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
        return sum(int(line.split()[1]) * 2**10 for line in status if line.startswith("RssFile:"))
    return 0
