"""Long sequences under sdpa: nothing of the size T x T, whatever the padding; blocks of queries change no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openllama import OpenLlamaForCausalLM, masks
from openllama.attention import attention
from openllama.masks import causal_mask, prepare_mask
from openllama.recompute import keep_products
from tests.sizes import Sizes
from tests.tiny import tiny_ids, tiny_model


def long_model(length: int, **fields: Any) -> OpenLlamaForCausalLM:
    """Linear RoPE scaling reaches ``length``; attention dropout would need all weights on a CPU."""
    scaling = {"type": "linear", "factor": length / 16}
    fields = {"num_hidden_layers": 1, "hidden_size": 8, "attention_dropout_prob": 0.0, **fields}
    return tiny_model(attn_implementation="sdpa", rope_scaling=scaling, **fields)


def left_padding(length: int) -> Tensor:
    """Row 0 begins with padding of more than a block, row 1 has none."""
    return (torch.arange(length) >= torch.tensor([[length // 4 + 1], [0]])).long()


def passes(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    half = ids.shape[1] // 2
    return {
        "prefill": lambda: model(ids),
        "padded prefill": lambda: model(ids, attention_mask=mask),
        "prefill in two parts": lambda: model(ids[:, half:], past_key_values=model(ids[:, :half]).past_key_values),
        "generate": lambda: model.generate(ids, attention_mask=mask, max_new_tokens=2),
        "loss": lambda: model.loss(ids, ids).backward(),
        "padded loss": lambda: model.loss(ids, ids, attention_mask=mask).backward(),
    }


@pytest.mark.parametrize("name", passes(None, tiny_ids(), tiny_ids()))
def test_no_tensor_has_the_size_of_all_scores_and_the_largest_grows_with_the_length(name: str) -> None:
    largest = []
    for length in (2048, 4096):
        with Sizes() as sizes:
            passes(long_model(length), tiny_ids(2, length), left_padding(length))[name]()
        largest.append(sizes.largest)
    assert largest[1] < 4096 * 4096
    assert largest[1] < 2.01 * largest[0]


def test_what_a_padded_pass_keeps_for_its_backward_pass_grows_with_the_length() -> None:
    def kept(length: int) -> int:
        model, ids = long_model(length), tiny_ids(2, length)
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = model.loss(ids, ids, attention_mask=left_padding(length))
        events = profile.profiler.kineto_results.events()
        del loss
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    assert kept(4096) < 2.1 * kept(2048)


@pytest.mark.parametrize("cached", [0, 4])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("length", [4, 7, 9])
def test_blocks_of_queries_give_the_numbers_and_gradients_of_one_mask(
    monkeypatch: pytest.MonkeyPatch, length: int, padded: bool, cached: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 3, size, 6) for size in (length, length + cached, length + cached)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    real = (torch.arange(length + cached) >= torch.tensor([[4], [0]])) if padded else None
    seen = causal_mask(length, length + cached, torch.device("cpu"))
    seen = (seen & real[:, None] if real is not None else seen[None]).any(-1)[:, None, :, None]  # rows with a key
    found = []
    for block in (3, 512):
        monkeypatch.setattr(masks, "BLOCK", block)
        mask = prepare_mask(real, length, length + cached, tensors[0], "sdpa")
        assert (mask.real is not None) == (block == 3 and (padded or cached > 0))
        output = attention(*tensors, mask, 0.0, "sdpa")[0] * seen
        found.append((output.detach(), *torch.autograd.grad(output.square().sum(), tensors)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "settings",
    [None, {}, {"context_fn": keep_products}, {"use_reentrant": True}],
    ids=["plain", "layers", "products", "reentrant"],
)
def test_blocks_computed_again_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any] | None, dropout: float
) -> None:
    monkeypatch.setattr(masks, "BLOCK", 3)
    model = tiny_model(attn_implementation="sdpa", attention_dropout_prob=dropout).train()
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7])

    def gradients() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        model.loss(tiny_ids(), tiny_ids(), attention_mask=mask).backward()
        return [p.grad for p in model.parameters()]

    with torch.autograd.graph.disable_saved_tensors_hooks("nothing is computed again"):
        once = gradients()
    if settings is not None:
        model.gradient_checkpointing_enable(settings)
    torch.testing.assert_close(gradients(), once, rtol=0, atol=0)


def test_blocks_can_be_differentiated_by_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 1, 7, 4)
    real = torch.arange(7)[None] >= 2

    def loss(query: Tensor) -> Tensor:
        mask = prepare_mask(real, 7, 7, query, "sdpa")
        return (attention(query, query, query, mask, 0.0, "sdpa")[0] * real[0, :, None]).square().sum()

    expected = torch.func.grad(loss)(query)
    monkeypatch.setattr(masks, "BLOCK", 3)
    torch.testing.assert_close(torch.func.grad(loss)(query), expected)


def test_a_compiled_model_has_its_mask_in_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = tiny_model(attn_implementation="sdpa"), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(tiny_ids(), attention_mask=mask).logits
    monkeypatch.setattr(masks, "BLOCK", 3)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tiny_ids(), attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
