"""Shared by the commands that run a model: loading and generation settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from openllama.checkpoint.hub import local_path
from openllama.errors import InputError
from openllama.generation import LogitsProcessor
from openllama.interface import OpenLlamaForCausalLM
from openllama.quantized.rounding import FORMATS
from openllama.tokenizer import OpenLlamaTokenizer

if TYPE_CHECKING:
    from openllama.inference import FastModel

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # the tokenizer reports wrong bytes
DTYPES = ("float32", "bfloat16", "float16")
SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}  # by default


def add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", type=Path, help="folder in HF or native layout")
    command.add_argument("--dtype", choices=DTYPES, help="compute in this dtype; default: the checkpoint's")
    command.add_argument("--quantize", choices=tuple(FORMATS), help="round the matrices when they are loaded")
    command.add_argument("--device", help="cpu, cuda, ...")
    command.add_argument("--attn-implementation", choices=("eager", "sdpa", "xformers"))
    command.add_argument(
        "--fast", action="store_true", help="decode by loops compiled for this CPU, as quantised models do"
    )


def load(options: argparse.Namespace) -> tuple[OpenLlamaForCausalLM | FastModel, OpenLlamaTokenizer]:
    """Load the model and the tokenizer from the folder that the command names."""
    options.dir = local_path(options.dir)
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise InputError("--device meta: tensors there have no numbers, and no text can be made of them; name another")
    model = _load_model(options.dir, options)
    tokenizer = OpenLlamaTokenizer.from_pretrained(options.dir)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"the tokenizer of {options.dir} has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
            "call model.resize_token_embeddings, or remove tokens from added_tokens.json"
        )
    return model, tokenizer


def _load_model(folder: Path, options: argparse.Namespace) -> OpenLlamaForCausalLM | FastModel:
    model = OpenLlamaForCausalLM.from_pretrained(
        folder,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        quantize=options.quantize,
    )
    if not (options.fast or (model.config.quantization and model.device.type == "cpu")):
        return model
    from openllama.inference import fast  # here, as it is rarely wanted
    from openllama.inference.decoding import measure

    quick = fast(model)
    measure(quick)  # not in the time of the first text
    return quick


def add_generation_options(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = command.add_argument_group(
        "generation", "samples at temperature 0.8 and top-p 0.95 by default; beam and contrastive search do not sample"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default: {max_new_tokens}")
    command.set_defaults(default_new_tokens=max_new_tokens)
    group.add_argument("--greedy", action="store_true", help="choose the most likely token instead of sampling")
    group.add_argument("--temperature", type=float, metavar="T", help="below 1 sharpens the distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens that sum up to P")
    group.add_argument("--seed", type=int, help="seed of sampling; the same seed gives the same text")
    group.add_argument(
        "--assistant",
        type=Path,
        metavar="DIR",
        help="for assisted decoding: a smaller model with the same vocabulary, or this model quantised",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of GenerationConfig, e.g. num_beams=4 or eos_token_id=[2,3]; may be repeated",
    )


def generation_arguments(
    options: argparse.Namespace, model: OpenLlamaForCausalLM | FastModel, tokenizer: OpenLlamaTokenizer
) -> dict[str, Any]:
    """Arguments of ``generate``: the checked settings of the options, and the objects that are not settings."""
    config = model.generation_config.replace(**_settings(options))
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise InputError(f"--seed must be a number from 0 to 2**63 - 1, got {options.seed}")
    generator = None if options.seed is None else torch.Generator(model.device).manual_seed(options.seed)
    return {
        "generation_config": config,
        "generator": generator,
        "logits_processor": [_only_ids_below(len(tokenizer))],
        "assistant_model": _load_model(options.assistant, options) if options.assistant else None,
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the options give; sampling is the default."""
    settings: dict[str, Any] = dict(_assignments(options.set))
    given = {
        n: v for n in ("max_new_tokens", "temperature", "top_k", "top_p") if (v := getattr(options, n)) is not None
    }
    if twice := sorted(given.keys() & settings.keys()):
        raise InputError(f"{', '.join(twice)}: given both as an option and with --set; use one of them")
    sampling = sorted((given.keys() - {"max_new_tokens"}) | (settings.keys() & {"do_sample"}))
    if options.greedy and sampling:
        raise InputError(f"--greedy does not sample; it cannot be combined with {', '.join(sampling)}")
    searches = settings.keys() & {"num_beams", "penalty_alpha"}
    settings |= given
    if settings.setdefault("do_sample", not options.greedy and (bool(sampling) or not searches)):
        settings = {**SAMPLING, **settings}
    if not settings.keys() & {"max_new_tokens", "max_length"}:
        settings["max_new_tokens"] = options.default_new_tokens
    return settings


def _assignments(texts: list[str]) -> Iterator[tuple[str, Any]]:
    """Parse NAME=VALUE; a value is JSON, or Python's True, False or None, or else a string."""
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise InputError(f"--set takes NAME=VALUE, got {text!r}")
        try:
            yield name, json.loads(value)
        except ValueError:
            yield name, {"True": True, "False": False, "None": None}.get(value, value)


def _only_ids_below(pieces: int) -> LogitsProcessor:
    """A model's vocabulary may be larger than the tokenizer's; ids without a token are never chosen."""

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(pieces, scores.shape[1], device=scores.device), -torch.inf)

    return process
