"""Time per decoded token at several context lengths: our preallocated cache and HF's concatenating cache.

    python benchmarks/decode.py [--contexts 128 512 2048] [--hidden-size N] ...

Both models have the same random float32 weights and decode the same tokens, in turns within one process;
a figure is the median over all tokens. On any machine the ratio should be alike and our time nearly constant.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.cache import PreallocatedCache
from openllama.checkpoint import hf_to_native


def build(options: argparse.Namespace) -> tuple[OpenLlamaForCausalLM, Any]:
    """Our model and that of transformers 4.31.0, with the same weights."""
    import transformers

    config = OpenLlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=max(options.contexts) + options.tokens,
    )
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    theirs = transformers.OpenLlamaForCausalLM(transformers.OpenLlamaConfig(**fields)).eval()
    ours = OpenLlamaForCausalLM(config).eval()
    ours.load_state_dict(hf_to_native(theirs.state_dict()), strict=True)
    return ours, theirs


def our_decoder(model: OpenLlamaForCausalLM, prompt: torch.Tensor, tokens: int) -> Callable[[torch.Tensor], Any]:
    cache = PreallocatedCache(model.config, 1, prompt.shape[1] + tokens)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return lambda token: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def their_decoder(model: Any, prompt: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    past = model(prompt, use_cache=True).past_key_values

    def step(token: torch.Tensor) -> None:
        nonlocal past
        past = model(token, past_key_values=past, use_cache=True).past_key_values

    return step


@torch.inference_mode()
def milliseconds(decoders: list[Callable[[torch.Tensor], Any]], tokens: int) -> list[float]:
    """Median time of a step of each decoder; the decoders run in turns."""
    times: list[list[float]] = [[] for _ in decoders]
    for number in range(tokens):
        token = torch.tensor([[3 + number]])
        for decode, seconds in zip(decoders, times, strict=True):
            start = time.perf_counter()
            decode(token)
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds[2:]) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=42, help="tokens decoded at each context")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32000)
    options = parser.parse_args()
    ours, theirs = build(options)
    size = ours.num_parameters() / 1e6
    print(f"{size:.0f} M parameters, float32, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| context | openllama, ms/token | transformers 4.31.0, ms/token | ratio |\n| ---: | ---: | ---: | ---: |")
    for context in options.contexts:
        prompt = torch.randint(3, options.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            decoders = [our_decoder(ours, prompt, options.tokens), their_decoder(theirs, prompt)]
        mine, reference = milliseconds(decoders, options.tokens)
        print(f"| {context} | {mine:.1f} | {reference:.1f} | {reference / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()
