"""A process that takes training steps: forward and backward of one sequence, here or in current transformers.

    python steps.py ROW --shape JSON --tokens T --dtype TYPE --threads N

An Open-Llama with stable and shared embedding is a plain Llama whose input table is LayerNorm(E) and whose head is E.
Both get the same random weights and ids, so their losses agree. Dropout is off, because Llama has none.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from rows import DTYPES, FAST, PRODUCTS_KEPT, RECOMPUTED, ROWS, THEIRS  # beside this file, as the next
from serving import Command, peak_of, resident, seconds, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--shape", type=json.loads, required=True, help="of the model, as in its config")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    def load() -> tuple[dict[str, Command], dict[str, Any]]:
        import torch

        torch.set_num_threads(options.threads)
        torch.set_default_dtype(getattr(torch, options.dtype))
        build = build_peer if options.row in THEIRS else build_ours
        model, loss_of, version = build({**options.shape, "max_position_embeddings": options.tokens}, options.row)
        model.train()
        steps = Steps(model, loss_of, version, options.shape["vocab_size"], options.tokens)
        return {"step": steps.step, "peak": steps.peak}, {"version": version, "torch": torch.__version__}

    serve(load)


class Steps:
    """The commands of a model."""

    def __init__(self, model: Any, loss_of: Callable[[Any], Any], version: str, vocabulary: int, tokens: int) -> None:
        import torch

        self.model, self.loss_of, self.version = model, loss_of, version
        self.ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))

    def step(self) -> dict[str, Any]:
        """Seconds of a step, and those of its forward pass."""
        loss: Any = None

        def forward() -> None:
            nonlocal loss
            loss = self.loss_of(self.ids)

        first = seconds(forward)
        whole = first + seconds(loss.backward)
        self.model.zero_grad(set_to_none=True)  # as an optimizer's loop does; here others need the memory
        return {"seconds": [whole], "forward": first, "loss": loss.item(), "version": self.version}

    def peak(self) -> dict[str, Any]:
        """Bytes of a step: of the process before it, at its peak, and of that less parameters and gradients."""
        self.loss_of(self.ids[:, :8]).backward()  # sets up threads and kernels before the measurement
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        before, losses = resident(), []

        def step() -> None:
            losses.append(self.loss_of(self.ids))
            losses[0].backward()

        peak = peak_of(step)
        numbers = [(p.nbytes, p.grad.nbytes) for p in self.model.parameters()]
        rest = peak - sum(map(sum, numbers))
        return {"before": before, "peak": peak, "bytes": rest, "loss": losses[0].item(), "version": self.version}


def build_ours(shape: dict[str, int], row: str) -> tuple[Any, Callable[[Any], Any], str]:
    import openllama
    from openllama.products import FastProducts
    from openllama.recompute import keep_products

    config = openllama.OpenLlamaConfig(**shape, hidden_dropout_prob=0.0, attention_dropout_prob=0.0)
    model = openllama.OpenLlamaForCausalLM(config)
    version = f"openllama {openllama.__version__}"
    draw(model.model.embedding.tokens, *linears(model.model.layers, "attention"))
    if row == PRODUCTS_KEPT:
        model.gradient_checkpointing_enable({"context_fn": keep_products})
    elif row == RECOMPUTED:
        model.gradient_checkpointing_enable()
    if row == "all logits":
        return model, lambda ids: model(ids, labels=ids, use_cache=False).loss, version
    products = FastProducts if row == FAST else nullcontext

    def loss(ids: Any) -> Any:
        with products():
            return model.loss(ids, ids)

    return model, loss, version


def build_peer(shape: dict[str, int], row: str) -> tuple[Any, Callable[[Any], Any], str]:
    import torch
    import transformers

    config = transformers.LlamaConfig(**shape, rms_norm_eps=1e-6, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    draw(model.lm_head, *linears(model.model.layers, "self_attn"))
    with torch.no_grad():
        table = torch.nn.functional.layer_norm(model.lm_head.weight, (config.hidden_size,), eps=1e-5)
        model.model.embed_tokens.weight.copy_(table)
    if "recomputed" in row:
        model.gradient_checkpointing_enable()
    version = f"transformers {transformers.__version__}"
    return model, lambda ids: model(ids, labels=ids, use_cache=False).loss, version


def linears(layers: Any, attention: str) -> Iterator[Any]:
    """All matrices of the layers, in an order that both models share."""
    for layer in layers:
        part = getattr(layer, attention)
        yield from (part.q_proj, part.k_proj, part.v_proj, part.o_proj)
        yield from (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)


def draw(*modules: Any) -> None:
    """Draw weights from one seed, module by module."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for module in modules:
        torch.nn.init.normal_(module.weight, std=0.02, generator=generator)


if __name__ == "__main__":
    main()
