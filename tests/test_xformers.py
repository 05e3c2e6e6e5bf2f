"""What xformers is given, checked without a GPU: its kernels are stood in for by attention in plain torch.

The stand-in refuses what xformers' kernels refuse (shapes, dtypes, alignment) and materialises the bias
as they read it. Where xformers is installed its own bias class and its own checks are used as well.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.attention import xformers_attention
from openllama.errors import BackendError
from openllama.masks import pack_documents, prepare_mask
from tests.draw import examples
from tests.parity.draws import batches, chunkings, chunks_of, configs, is_real, length_of, randomise_norms, seeds
from tests.tiny import tiny_config, tiny_ids, tiny_model

INSTALLED = importlib.util.find_spec("xformers") is not None
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


class LowerTriangularMask:
    """As in xformers: the triangle sits upper left, which is right only where lengths are equal."""

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, -torch.inf, dtype=dtype, device=device).triu(1)


class StandIn:
    """``xformers.ops``; ``calls`` are the arguments of each attention."""

    def __init__(self, mask_class: Any = LowerTriangularMask) -> None:
        self.LowerTriangularMask = mask_class
        self.calls: list[dict[str, Any]] = []

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0
    ) -> Tensor:
        """(B, T, H, D), (B, S, H, D) twice -> (B, T, H, D)."""
        self.calls.append({"query": query, "key": key, "value": value, "attn_bias": attn_bias, "p": p})
        self.check(**self.calls[-1])
        batch, length, heads, head_dim = query.shape
        shape = (batch, heads, length, key.shape[1])
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / math.sqrt(head_dim)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))  # as the kernels accumulate
        if isinstance(attn_bias, self.LowerTriangularMask):
            wide = wide + attn_bias.materialize(shape, dtype=wide.dtype, device=wide.device)
        elif attn_bias is not None:
            wide = wide + attn_bias
        weights = F.dropout(wide.softmax(-1).to(value.dtype), p)
        return (weights @ value.transpose(1, 2)).transpose(1, 2)

    def check(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float) -> None:
        batch, length, heads, head_dim = query.shape
        assert query.dtype == key.dtype == value.dtype
        assert key.shape == value.shape == (batch, key.shape[1], heads, head_dim)
        assert 0 <= p <= 1
        if isinstance(attn_bias, self.LowerTriangularMask):
            assert length == key.shape[1]
        elif attn_bias is not None:
            assert attn_bias.shape == (batch, heads, length, key.shape[1])
            assert attn_bias.dtype == query.dtype
            assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
            assert attn_bias.stride(-1) <= 1


class Checked(StandIn):
    """The same with xformers' own mask, and what its kernels say of the arguments, the lack of a GPU apart."""

    def __init__(self) -> None:
        from xformers.ops import fmha

        super().__init__(fmha.attn_bias.LowerTriangularMask)
        self.fmha = fmha

    def check(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float) -> None:
        super().check(query, key, value, attn_bias, p)
        inputs = self.fmha.Inputs(query, key, value, attn_bias=attn_bias, p=p)
        inputs.validate_inputs()
        for kernel in (self.fmha.cutlass.FwOp, self.fmha.cutlass.BwOp):
            reasons = kernel.not_supported_reasons(inputs)
            assert [reason for reason in reasons if not reason.startswith(("device=cpu", "bf16 is only"))] == []


@pytest.fixture(
    params=[
        StandIn,
        pytest.param(Checked, marks=pytest.mark.skipif(not INSTALLED, reason="xformers is not installed")),
    ],
    ids=["stand-in", "own checks"],
)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    standing_in = request.param()
    library = types.ModuleType("xformers")
    library.ops = standing_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", library)
    return standing_in


def use_xformers(model: Any) -> Any:
    """By force: asking for it by name is refused without a GPU."""
    model.base_model._attn_implementation = "xformers"
    return model


def pair_of(config: OpenLlamaConfig, seed: int) -> tuple[OpenLlamaForCausalLM, OpenLlamaForCausalLM]:
    """The same model in training mode, once on xformers, once on eager."""
    models = []
    for _ in range(2):
        torch.manual_seed(seed)
        models.append(randomise_norms(OpenLlamaForCausalLM(config, attn_implementation="eager"), seed).train())
    return use_xformers(models[0]), models[1]


# --- the same numbers ---


@examples(40)
@given(data=st.data(), config=configs(**NO_DROPOUT, initializer_range=0.2), seed=seeds)
def test_values_and_gradients_are_those_of_eager(
    ops: StandIn, data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = data.draw(batches(config))
    found = []
    for model in pair_of(config, seed):
        logits = model(**batch).logits
        assert bool(logits.isfinite().all())
        real = logits[is_real(batch)]
        real.square().sum().backward()
        found.append(
            {"logits": real.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        )
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@examples(40)
@given(data=st.data(), config=configs(rope_scaling=None, initializer_range=0.2), seed=seeds)
@torch.no_grad()
def test_a_prompt_in_chunks_with_a_cache_is_that_of_eager(
    ops: StandIn, data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = data.draw(batches(config))
    model, eager = (m.eval() for m in pair_of(config, seed))
    past, end = None, 0
    for piece in chunks_of(batch, data.draw(chunkings(length_of(batch)))):
        out, expected = (m(**piece, past_key_values=past) for m in (model, eager))
        start, end = end, out.past_key_values.get_seq_length()
        real = is_real(batch)[:, start:end]
        torch.testing.assert_close(out.logits[real], expected.logits[real])
        past = expected.past_key_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_documents_and_rows_that_see_nothing_stay_finite(ops: StandIn, dtype: torch.dtype) -> None:
    model = use_xformers(tiny_model(**NO_DROPOUT)).to(dtype)
    packed, positions = pack_documents([2, 5])
    lowest = torch.zeros(1, 1, 7, 7).masked_fill(~packed, -torch.inf)
    empty = torch.tensor([[0] * 7, [1] * 7])
    for mask in (LEFT_PADDED, empty, packed, lowest):
        out = model(tiny_ids(), attention_mask=mask, position_ids=positions, labels=tiny_ids())
        out.loss.backward()
        assert bool(out.logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert {call["query"].dtype for call in ops.calls} == {dtype}


def test_autocast_gives_it_one_dtype(ops: StandIn) -> None:
    model = use_xformers(tiny_model(initializer_range=0.1, **NO_DROPOUT)).train()
    expected = model(tiny_ids(), attention_mask=LEFT_PADDED, labels=tiny_ids()).loss
    ops.calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (None, LEFT_PADDED):
            loss = model(tiny_ids(), attention_mask=mask, labels=tiny_ids()).loss
            loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert {call[name].dtype for call in ops.calls for name in ("query", "key", "value")} == {torch.bfloat16}


# --- the arguments ---


@pytest.mark.parametrize(
    ("length", "cached", "mask", "kind"),
    [
        (7, 0, None, LowerTriangularMask),
        (7, 0, torch.ones(2, 7), LowerTriangularMask),
        (1, 0, None, type(None)),
        (1, 6, torch.ones(2, 7), type(None)),
        (3, 4, None, Tensor),  # xformers' triangle would sit upper left
        (7, 0, LEFT_PADDED, Tensor),
        (1, 6, LEFT_PADDED, Tensor),
        (7, 0, torch.zeros(2, 1, 7, 7), Tensor),
        (7, 0, torch.ones(1, 2, 7, 7, dtype=torch.bool), Tensor),
    ],
)
def test_a_tensor_is_made_only_where_the_triangle_will_not_do(
    ops: StandIn, length: int, cached: int, mask: Tensor | None, kind: type
) -> None:
    model = use_xformers(tiny_model())
    past = model(tiny_ids(2, cached)).past_key_values if cached else None
    ops.calls.clear()
    model(tiny_ids(2, length), attention_mask=mask, past_key_values=past)
    kind = ops.LowerTriangularMask if kind is LowerTriangularMask else kind
    assert [isinstance(call["attn_bias"], kind) for call in ops.calls] == [True, True]


@pytest.mark.parametrize("key_length", [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("length", [1, 5])
def test_a_bias_begins_each_row_at_a_multiple_of_8_and_is_not_stored_per_head(
    ops: StandIn, length: int, key_length: int
) -> None:
    heads, length = 4, min(length, key_length)
    query, key = torch.randn(3, heads, length, 8), torch.randn(3, heads, key_length, 8)
    padding = torch.ones(3, key_length, dtype=torch.long)
    padding[0, 0] = 0
    xformers_attention(query, key, key, prepare_mask(padding, length, key_length, query, "xformers"), 0.0)
    bias = ops.calls[0]["attn_bias"]
    assert bias.shape == (3, heads, length, key_length)
    assert bias.storage_offset() % 8 == 0
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    assert bias.untyped_storage().nbytes() // 4 <= 3 * length * (key_length + 7)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_the_config_s_in_training_and_none_otherwise(ops: StandIn, training: bool) -> None:
    model = use_xformers(tiny_model(attention_dropout_prob=0.3, hidden_dropout_prob=0.0)).train(training)
    first, second = (model(tiny_ids(), attention_mask=LEFT_PADDED).logits for _ in range(2))
    assert {call["p"] for call in ops.calls} == {0.3 if training else 0.0}
    assert torch.equal(first, second) is not training


def test_attentions_that_are_asked_for_come_from_eager(ops: StandIn) -> None:
    out = use_xformers(tiny_model())(tiny_ids(), output_attentions=True)
    assert ops.calls == []
    assert len(out.attentions) == 2


# --- where it runs ---


@pytest.mark.skipif(not INSTALLED, reason="xformers is not installed")
def test_with_the_library_a_model_on_a_cpu_still_trains_on_sdpa() -> None:
    model = OpenLlamaForCausalLM(tiny_config()).train()
    model(tiny_ids(), attention_mask=LEFT_PADDED, labels=tiny_ids()).loss.backward()
    assert model.model._attn_implementation == "sdpa"
    with pytest.raises(BackendError, match="runs on CUDA, the model is on cpu; use 'sdpa'"):
        model.set_attn_implementation("xformers")
