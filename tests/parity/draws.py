"""Random models and inputs: strategies for configurations and batches, and HF's model beside ours.

Sizes are small and odd on purpose: head widths whose square root is not a power of two, contexts
shorter than the texts, one token, one layer, rows that are nothing but padding. Numbers come from
seeded generators, so that a falsifying example is a few integers.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import openllama
from openllama import OpenLlamaConfig
from openllama.checkpoint import hf_to_native
from openllama.config import ACTIVATIONS

Module = TypeVar("Module", bound=nn.Module)
Batch = dict[str, Tensor]  # the tensor arguments of a forward pass, by name

seeds = st.integers(0, 2**31 - 1)
PADDINGS = ("none", "ones", "left", "right", "holes", "empty rows")
MASK_DTYPES = (torch.int64, torch.bool, torch.float32)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> OpenLlamaConfig:
    """Any architecture of up to 64 dimensions, three layers and 80 tokens; ``fixed`` fields are not drawn."""
    scaling = draw(st.sampled_from((None, "linear", "dynamic")))
    head_dim = draw(st.sampled_from((4, 6, 8, 10, 16) if scaling == "dynamic" else (2, 4, 6, 8, 10, 16)))
    heads = draw(st.integers(1, 4))
    vocab_size = draw(st.integers(3, 80))
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": head_dim * heads,
        "intermediate_size": draw(st.integers(1, 96)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "hidden_act": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "max_position_embeddings": draw(st.integers(1, 24)),
        "initializer_range": draw(st.integers(1, 25)) / 50,
        "rms_norm_eps": draw(st.sampled_from((1e-8, 1e-6, 1e-5, 1e-3))),
        "pad_token_id": draw(st.sampled_from((None, -1, 0)) | st.integers(0, vocab_size - 1)),
        "tie_word_embeddings": draw(st.booleans()),
        "use_memory_efficient_attention": draw(st.booleans()),
        "use_stable_embedding": draw(st.booleans()),
        "shared_input_output_embedding": draw(st.booleans()),
        "rope_scaling": scaling and {"type": scaling, "factor": draw(st.floats(1.01, 8.0))},
    }
    return OpenLlamaConfig(**{**fields, **fixed})


@st.composite
def batches(draw: st.DrawFn, config: OpenLlamaConfig, max_length: int = 20) -> Batch:
    """Token ids or embeddings, labels, perhaps a padding mask and positions (below the length, as HF needs)."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, max_length))
    padding = draw(st.sampled_from(PADDINGS))
    positions = draw(st.sampled_from(("none", "counted", "any")))
    generator = torch.Generator().manual_seed(draw(seeds))

    mask = padding_mask(padding, batch, length, generator)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    if config.padding_idx is not None:
        ids = ids.where(mask, config.padding_idx)
    labels = torch.randint(config.vocab_size, (batch, length), generator=generator)
    ignored = torch.rand(batch, length, generator=generator) < 0.2
    ignored[0, -1] = False  # a mean over no label at all is NaN
    inputs = {"input_ids": ids, "labels": labels.masked_fill(ignored, -100)}
    if draw(st.integers(0, 4)) == 0:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = torch.randn(batch, length, config.hidden_size, generator=generator)
    if padding != "none":
        inputs["attention_mask"] = mask.to(draw(st.sampled_from(MASK_DTYPES)))
    if positions == "counted":  # as generate counts: padding apart, where it stands does not matter
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).masked_fill(~mask, 1).clamp(max=length - 1)
    elif positions == "any":
        rows = draw(st.sampled_from((1, batch)))
        inputs["position_ids"] = torch.randint(length, (rows, length), generator=generator)
    return inputs


def padding_mask(padding: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Bool (batch, length), False where padding is; ``padding`` is one of ``PADDINGS``."""
    index = torch.arange(length)
    count = torch.randint(length + 1, (batch, 1), generator=generator)
    if padding == "left":
        return index >= count
    if padding == "right":
        return index < count
    if padding in ("none", "ones"):
        return torch.ones(batch, length, dtype=torch.bool)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    if padding == "empty rows":
        mask[torch.randint(batch, (), generator=generator)] = False
    return mask


@st.composite
def chunkings(draw: st.DrawFn, length: int) -> list[int]:
    """Positive numbers that add up to ``length``, one-token chunks among them."""
    cuts = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    edges = [0, *sorted(cuts), length]
    return [end - start for start, end in pairwise(edges)]


def length_of(batch: Batch) -> int:
    return batch["labels"].shape[1]


def is_real(batch: Batch) -> Tensor:
    """Bool (batch, length): True where a token is not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()


def chunks_of(batch: Batch, lengths: list[int]) -> list[Batch]:
    """The same batch in pieces, without labels: each has its own tokens and the mask of all tokens so far."""
    pieces, start = [], 0
    for length in lengths:
        end = start + length
        piece = {name: value[:, start:end] for name, value in batch.items() if name != "labels"}
        if "attention_mask" in batch:
            piece["attention_mask"] = batch["attention_mask"][:, :end]
        if "position_ids" in batch:  # HF's tables end at the key length
            piece["position_ids"] = piece["position_ids"].clamp(max=end - 1)
        pieces.append(piece)
        start = end
    return pieces


def in_float64(batch: Batch) -> Batch:
    """The same for a float64 model, in which laws can be told from rounding whatever the weights."""
    return {name: value.double() if name == "inputs_embeds" else value for name, value in batch.items()}


def randomise_norms(model: Module, seed: int) -> Module:
    """Draw the one-dimensional parameters (norm weights and biases), which start as ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def hf_model(config: OpenLlamaConfig, seed: int, kind: str = "OpenLlamaForCausalLM") -> Any:
    """A fresh transformers 4.31.0 model in eval mode; fresh, because its dynamic RoPE remembers earlier calls."""
    from tests.oracle import transformers

    torch.manual_seed(seed)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    model = getattr(transformers, kind)(transformers.OpenLlamaConfig(**fields))
    return randomise_norms(model, seed).eval()


def our_twin(hf: Any, config: OpenLlamaConfig, attn_implementation: str = "eager") -> Any:
    """Our model of the same class with the same weights, in eval mode."""
    model = getattr(openllama, type(hf).__name__)(config, attn_implementation=attn_implementation)
    model.load_state_dict(hf_to_native(hf.state_dict()))
    return model.eval()
