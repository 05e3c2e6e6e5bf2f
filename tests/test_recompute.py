"""``keep_products``: layers whose cheap parts are computed again give the same bits and remember less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.recompute import keep_products
from tests.draw import examples
from tests.parity.draws import batches, configs, randomise_norms, seeds
from tests.tiny import tiny_ids, tiny_model

KEEP_PRODUCTS = {"context_fn": keep_products}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@examples(20)
@given(
    data=st.data(),
    config=configs(),
    seed=seeds,
    backend=st.sampled_from(("eager", "sdpa")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_loss_and_gradients_are_the_same_bits(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, backend: str, dtype: torch.dtype
) -> None:
    batch = data.draw(batches(config))
    if "inputs_embeds" in batch:
        batch["inputs_embeds"] = batch["inputs_embeds"].to(dtype)
    torch.manual_seed(seed)
    model = randomise_norms(OpenLlamaForCausalLM(config, attn_implementation=backend), seed).train().to(dtype)
    found: list[dict[str, Tensor]] = []
    for enable in (lambda: None, lambda: model.gradient_checkpointing_enable(KEEP_PRODUCTS)):
        enable()
        torch.manual_seed(seed)  # the same dropout
        out = model(**batch, use_cache=False)
        out.logits.float().square().mean().backward()
        found.append({**gradients(model), "logits": out.logits.detach()})
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def kept(model: Any, ids: Tensor) -> int:
    """Bytes that the forward pass allocates and does not give back."""
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = model.loss(ids, ids)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    loss.backward()
    return sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_is_kept_than_by_default_and_more_than_by_whole_layers(dtype: torch.dtype) -> None:
    fields = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    model = tiny_model(attn_implementation="sdpa", hidden_dropout_prob=0.0, **fields).train().to(dtype)
    ids = tiny_ids(2, 16)
    model.loss(ids, ids).backward()
    everything = kept(model, ids)
    model.gradient_checkpointing_enable(KEEP_PRODUCTS)
    products = kept(model, ids)
    model.gradient_checkpointing_enable()
    layers = kept(model, ids)
    assert layers < products < 0.75 * everything


def test_no_product_is_computed_again() -> None:
    model, ids = tiny_model(attn_implementation="sdpa").train(), tiny_ids()

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            model.loss(ids, ids).backward()
        return counter.get_total_flops()

    once = products()
    model.gradient_checkpointing_enable(KEEP_PRODUCTS)
    assert products() == once
    model.gradient_checkpointing_enable()
    assert products() > once
