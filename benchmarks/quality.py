"""What rounding costs: how far a quantised model is from itself in float32, beside llama.cpp's formats.

    python benchmarks/quality.py --text shakespeare.txt --text classical_chinese.txt [--random] ...

One table is of the model in checkpoints/ on the held-out tenth of each text (that of scripts/train_tiny.py), another,
with --random, of random weights in the shape of aerner/lm-v2 on random ids. Q8_0 and Q4_0 are rounded and restored by
the package gguf, and computed by this package, as all rows: in float32, or in bfloat16 where a row says so. "fast" is
decoding by the loops, token by token; norms and cache are bfloat16 there, what is computed between them float32. "fast,
prompt" is a prompt of such a model: its modules in bfloat16, with the products of the loops. KL is the mean of
KL(float32 || row) over all predicted tokens, in nats; "same" is how often both find the same token most likely.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from suite.report import processor
from torch import Tensor, nn

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.cache import PreallocatedCache
from openllama.inference import FastModel, fast, quantize
from openllama.inference.prompts import LoopProducts
from openllama.model import Inputs
from openllama.outputs import CausalLMOutput
from openllama.quantized.rounding import FORMATS, GROUP, integers, nearest_scale

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from train_tiny import read_text  # noqa: E402

Variant = Callable[[OpenLlamaForCausalLM], Callable[..., CausalLMOutput]]


def nearest_int4(matrix: Tensor) -> Tensor:
    """The groups of int4, each with the scale that clips nothing."""
    groups, form = _whole_groups(matrix).view(-1, GROUP).T, FORMATS["int4"]
    scale = nearest_scale(groups, form).float()
    return (integers(groups, scale, form) * scale).T.reshape(len(matrix), -1)[:, : matrix.shape[1]]


def by_gguf(kind: str) -> Callable[[Tensor], Tensor]:
    """A format of llama.cpp; rows that are not whole blocks are filled up with zeros, as int4 does."""
    import gguf

    of = gguf.GGMLQuantizationType[kind]

    def restored(matrix: Tensor) -> Tensor:
        rows = _whole_groups(matrix).numpy().astype(np.float32)
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, of), of))[:, : matrix.shape[1]]

    return restored


def _whole_groups(matrix: Tensor) -> Tensor:
    return F.pad(matrix.detach(), (0, -matrix.shape[1] % GROUP))


def replaced(restored: Callable[[Tensor], Tensor]) -> Variant:
    """Each matrix of a model by what is restored of it."""

    def variant(model: OpenLlamaForCausalLM) -> OpenLlamaForCausalLM:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data = restored(module.weight).contiguous()
        return model

    return variant


def fast_bfloat16(model: OpenLlamaForCausalLM) -> FastModel:
    warnings.filterwarnings("error", "decoding is not fast")  # else a row would be of another model than its name says
    return fast(model.bfloat16())


def token_by_token(model: OpenLlamaForCausalLM) -> Callable[[Tensor], CausalLMOutput]:
    """The logits of fast decoding, which computes each token in a pass of its own."""
    quick = fast_bfloat16(model)

    def call(ids: Tensor) -> CausalLMOutput:
        cache = PreallocatedCache(quick.config, 1, ids.shape[1], torch.bfloat16)
        passes = [Inputs(token, cache=cache, backend="sdpa") for token in ids.split(1, dim=1)]
        return CausalLMOutput(None, torch.cat([quick(one, logits_to_keep=1).logits for one in passes], dim=1))

    return call


def as_prompt(model: OpenLlamaForCausalLM) -> Callable[[Tensor], CausalLMOutput]:
    """The logits of prompts of a fast model, whose products are the loops' even where others are faster."""
    quick = fast_bfloat16(model)

    def call(ids: Tensor) -> CausalLMOutput:
        with LoopProducts():
            return quick.model(ids)

    return call


VARIANTS: dict[str, Variant] = {
    "bfloat16": lambda model: model.bfloat16(),
    "bfloat16, fast": token_by_token,
    "bfloat16, fast, prompt": as_prompt,
    "int8": lambda model: quantize(model, "int8"),
    "int8 in bfloat16": lambda model: quantize(model, "int8").bfloat16(),
    "int8 in bfloat16, fast": lambda model: token_by_token(quantize(model, "int8")),
    "int8 in bfloat16, fast, prompt": lambda model: as_prompt(quantize(model, "int8")),
    "Q8_0": lambda model: replaced(by_gguf("Q8_0"))(model),
    "int4": lambda model: quantize(model, "int4"),
    "int4 in bfloat16": lambda model: quantize(model, "int4").bfloat16(),
    "int4 in bfloat16, fast": lambda model: token_by_token(quantize(model, "int4")),
    "int4 in bfloat16, fast, prompt": lambda model: as_prompt(quantize(model, "int4")),
    "int4, nearest": replaced(nearest_int4),
    "Q4_0": lambda model: replaced(by_gguf("Q4_0"))(model),
}


@torch.inference_mode()
def figures(model: OpenLlamaForCausalLM, windows: Tensor) -> dict[str, dict[str, str]]:
    """By row of the table, what is found of a float32 model and its variants on windows (N, T) of ids."""
    targets = windows[:, 1:].flatten()
    reference = _logits(model, windows)
    expected = reference.log_softmax(-1)
    found = {"float32": _figures(0, 1, 0, _perplexity(expected, targets))}
    for name, variant in VARIANTS.items():
        print(name, file=sys.stderr, flush=True)
        logits = _logits(variant(copy.deepcopy(model)), windows)
        changed = logits.log_softmax(-1)
        kl = (expected.exp() * (expected - changed)).sum(-1).mean()
        same = (expected.argmax(-1) == changed.argmax(-1)).float().mean()
        error = (logits - reference).abs().mean()
        found[name] = _figures(float(kl), float(same), float(error), _perplexity(changed, targets))
    return found


def table(columns: Sequence[str], found: Sequence[tuple[str, Mapping[str, Mapping[str, str]]]]) -> Iterator[str]:
    """Lines of Markdown: a row for each variant, and for each text the ``columns`` of its ``figures``."""
    titles = [f"{text}: {columns[0]} | {' | '.join(columns[1:])}" for text, _ in found]
    yield f"| weights | {' | '.join(titles)} |"
    yield "| --- |" + " ---: |" * len(columns) * len(found)
    for name in ("float32", *VARIANTS):
        yield " | ".join([f"| {name}", *(of[name][column] for _, of in found for column in columns)]) + " |"


def _logits(model: Callable[..., CausalLMOutput], windows: Tensor) -> Tensor:
    """In float32, (N * (T - 1), V): those that predict a token of the windows."""
    return torch.cat([model(window[None]).logits[0, :-1].float() for window in windows])


def _figures(kl: float, same: float, error: float, perplexity: float) -> dict[str, str]:
    return {
        "perplexity": f"{perplexity:.3f}", "KL": f"{kl:.6f}" if kl else "0", "same, %": f"{100 * same:.2f}",
        "error of logits": f"{error:.4f}" if error else "0",
    }  # fmt: skip


def _perplexity(log_probabilities: Tensor, targets: Tensor) -> float:
    return math.exp(F.nll_loss(log_probabilities, targets))


def held_out_windows(folder: Path, text: Path, tokens: int) -> Tensor:
    """The first ``tokens`` of the held-out part of ``text``, as rows of the context of the model."""
    tokenizer = OpenLlamaTokenizer.from_pretrained(folder)
    context = OpenLlamaConfig.from_pretrained(folder).max_position_embeddings
    count = max(1, tokens // context)
    ids = tokenizer(read_text(text).held_out, return_tensors="pt").input_ids[0]
    return ids[: count * context].unfold(0, context, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "open-llama-tiny")
    parser.add_argument("--text", type=Path, action="append", default=[], help="as of train_tiny.py; may be repeated")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--random", action="store_true", help="also random weights of the shape that follows")
    parser.add_argument("--vocab-size", type=int, default=100000)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--random-tokens", type=int, default=64)
    options = parser.parse_args()
    for text in options.text:
        if not text.is_file():
            parser.error(f"--text {text}: there is no such file")
    print(f"{processor()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    found = []
    for text in options.text:
        windows = held_out_windows(options.model, text, options.tokens)
        model = OpenLlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        found.append((f"{text.stem}, {windows.numel():,} tokens", figures(model, windows)))
    if found:
        print(f"\n{options.model.name} on held-out text\n")
        print(*table(("perplexity", "KL", "same, %"), found), sep="\n", flush=True)
    if not options.text:
        print("no --text was given: nothing is said about the trained model")
    if options.random:
        torch.manual_seed(0)
        config = OpenLlamaConfig(
            vocab_size=options.vocab_size,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden_size // 64,
        )
        model = OpenLlamaForCausalLM(config).eval()
        ids = torch.randint(4, config.vocab_size, (1, options.random_tokens))
        title = f"{model.num_parameters():,} random weights, {options.random_tokens} random tokens"
        print("", *table(("KL", "same, %", "error of logits"), [(title, figures(model, ids))]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
