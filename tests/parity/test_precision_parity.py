"""In bfloat16 and float16 we are as near to float64 as transformers 4.31.0 is, whatever the backend."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig
from tests.draw import examples
from tests.oracle import compared
from tests.parity.draws import Batch, batches, configs, hf_model, is_real, our_twin, seeds

HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ("eager", "sdpa")
BAR = 1.05  # of our error to HF's, in the median over models
MODELS = 60


def error(model: Any, batch: Batch, exact: Tensor) -> float:
    """Root mean square difference from the exact logits, where tokens are real."""
    logits = model(**batch).logits.double()[is_real(batch)]
    return (logits - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_as_accurate_as_hf_s(dtype: torch.dtype) -> None:
    ratios: dict[str, list[float]] = {backend: [] for backend in BACKENDS}

    @examples(MODELS + 15)
    @given(
        data=st.data(),
        # past the trained context HF's rotary tables fall apart in half precision, which is not held against it
        config=configs(max_position_embeddings=24, initializer_range=0.2),
        seed=seeds,
    )
    @torch.no_grad()
    def compare(data: st.DataObject, config: OpenLlamaConfig, seed: int) -> None:
        batch = data.draw(batches(config))
        if not bool(is_real(batch).any()):
            return
        hf = hf_model(config, seed).to(dtype)
        reference = our_twin(hf, config).double()  # of the weights as they were rounded
        if "inputs_embeds" in batch:
            batch["inputs_embeds"] = batch["inputs_embeds"].to(dtype)
        wide = {name: value.double() if name == "inputs_embeds" else value for name, value in batch.items()}
        exact = reference(**wide).logits[is_real(batch)]
        theirs = error(hf, batch, exact)
        for backend in BACKENDS:
            ours = error(our_twin(hf, config, backend).to(dtype), batch, exact)
            ratios[backend].append(ours / theirs if theirs else 1.0 if not ours else math.inf)
        compared[f"models, accuracy in {dtype}"] += 1

    compare()
    for backend, found in ratios.items():
        assert len(found) >= 50
        assert statistics.median(found) <= BAR, f"{backend}: {statistics.median(found):.3f}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_beyond_the_trained_context_we_stay_accurate_where_hf_does_not(dtype: torch.dtype) -> None:
    """HF rebuilds its rotary tables from inverse frequencies of low precision there (row 13)."""
    config = OpenLlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, shared_input_output_embedding=False,
    )  # fmt: skip
    batch = {
        "input_ids": torch.randint(64, (1, 600), generator=torch.Generator().manual_seed(0)),
    }
    hf = hf_model(config, 0).to(dtype)
    exact = our_twin(hf, config).double()(batch["input_ids"]).logits[0]
    theirs = (hf(**batch).logits[0].double() - exact).square().mean().sqrt()
    for backend in BACKENDS:
        ours = (our_twin(hf, config, backend).to(dtype)(**batch).logits[0].double() - exact).square().mean().sqrt()
        assert ours < theirs / 1.5, backend
