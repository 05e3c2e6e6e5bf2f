"""What the commands that run a model share: loading it, and the settings of generation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from openllama.errors import InputError
from openllama.generation import LogitsProcessor
from openllama.heads import OpenLlamaForCausalLM
from openllama.tokenizer import OpenLlamaTokenizer

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float32", "bfloat16", "float16")
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}  # of a command without --set


def add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", type=Path, help="folder in HF or native layout")
    command.add_argument("--dtype", choices=DTYPES, help="compute in this dtype; default: the checkpoint's")
    command.add_argument("--device", help="cpu, cuda, ...")
    command.add_argument("--attn-implementation", choices=("eager", "sdpa", "xformers"))


def load(options: argparse.Namespace) -> tuple[OpenLlamaForCausalLM, OpenLlamaTokenizer]:
    """The model and the tokenizer of the folder that the command names."""
    tokenizer = OpenLlamaTokenizer.from_pretrained(options.dir)
    return _load_model(options.dir, options), tokenizer


def _load_model(folder: Path, options: argparse.Namespace) -> OpenLlamaForCausalLM:
    return OpenLlamaForCausalLM.from_pretrained(
        folder, dtype=options.dtype, device=options.device, attn_implementation=options.attn_implementation
    )


def add_generation_options(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = command.add_argument_group("generation", "without --set: sampling at temperature 0.8, top-p 0.95")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--greedy", action="store_true", help="the likeliest token each time, instead of drawing")
    group.add_argument("--temperature", type=float, metavar="T", help="below 1 sharpens the distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that together reach P")
    group.add_argument("--seed", type=int, help="draw the same text each time")
    group.add_argument(
        "--assistant", type=Path, metavar="DIR", help="a smaller model of the same vocabulary that guesses tokens ahead"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of GenerationConfig, as num_beams=4 or eos_token_id=[2,3]; may be given again",
    )


def generation_arguments(
    options: argparse.Namespace, model: OpenLlamaForCausalLM, tokenizer: OpenLlamaTokenizer
) -> dict[str, Any]:
    """Arguments of ``generate``: the settings that the options make, checked, and what is no setting."""
    settings: dict[str, Any] = dict(_assignments(options.set))
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.greedy and given:
        raise InputError(f"--greedy draws nothing; it cannot be combined with {', '.join(given)}")
    if options.greedy:
        settings["do_sample"] = False
    elif not settings:
        settings = {**SAMPLING, **given}
    elif given:
        settings = {"do_sample": True, **given, **settings}
    config = model.generation_config.replace(**{"max_new_tokens": options.max_new_tokens, **settings})
    generator = None if options.seed is None else torch.Generator(model.device).manual_seed(options.seed)
    return {
        "generation_config": config,
        "generator": generator,
        "logits_processor": [_only_ids_below(len(tokenizer))],
        "assistant_model": _load_model(options.assistant, options) if options.assistant else None,
    }


def _assignments(texts: list[str]) -> Iterator[tuple[str, Any]]:
    """Pairs of NAME=VALUE; a value is JSON, or else the text itself."""
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise InputError(f"--set takes NAME=VALUE, got {text!r}")
        try:
            yield name, json.loads(value)
        except ValueError:
            yield name, value


def _only_ids_below(pieces: int) -> LogitsProcessor:
    """A vocabulary may be larger than its tokenizer; ids without text are never drawn."""

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(pieces, scores.shape[1], device=scores.device), -torch.inf)

    return process
