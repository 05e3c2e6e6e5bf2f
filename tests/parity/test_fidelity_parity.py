"""The rows of docs/fidelity.md, by number, against transformers 4.31.0 itself.

Where the page says that the two do the same, they are compared. Where it says that they differ, what it
claims of transformers is shown to be so; our own side is then in tests/test_fidelity.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.checkpoint import hf_to_native, native_to_hf
from openllama.errors import ConfigError, InputError
from openllama.masks import positions_from_mask
from openllama.rope import cos_sin
from tests.draw import examples
from tests.oracle import compared, transformers
from tests.parity.draws import batches, chunkings, chunks_of, configs, hf_model, length_of, our_twin, seeds
from tests.tiny import tiny_config, tiny_ids

open_llama = transformers.models.open_llama.modeling_open_llama

BAR = "models, rows of docs/fidelity.md"
CLASSIFIER = "OpenLlamaForSequenceClassification"
HALVES = (torch.bfloat16, torch.float16)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
OWN_HEAD = {"shared_input_output_embedding": False}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def both(seed: int = 0, kind: str = "OpenLlamaForCausalLM", **fields: Any) -> tuple[Any, Any]:
    """A tiny model of HF's and ours with the same weights."""
    config = tiny_config(**fields)
    hf = hf_model(config, seed, kind)
    return hf, our_twin(hf, config)


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal bits in tensors, or tuples of them."""
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By our names."""
    return hf_to_native({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class Xformers:
    """What HF uses of ``xformers.ops``, spelled out in torch: the triangle of a bias object begins at the top left."""

    class LowerTriangularMask:
        pass

    def __init__(self) -> None:
        self.dropouts: list[float] = []

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0
    ) -> Tensor:
        """All of (B, T, H, D)."""
        self.dropouts.append(p)
        scores = torch.einsum("bthd,bshd->bhts", query, key) / math.sqrt(query.shape[-1])
        if isinstance(attn_bias, self.LowerTriangularMask):
            attn_bias = torch.full(scores.shape[-2:], -math.inf).triu(1)
        scores = scores if attn_bias is None else scores + attn_bias
        return torch.einsum("bhts,bshd->bthd", F.dropout(scores.softmax(-1), p), value)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Xformers:
    """As if the library were installed and ran on this machine."""
    ops = Xformers()
    monkeypatch.setattr(open_llama, "xops", ops)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    return ops


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---- embedding


@examples(6)
@given(data=st.data(), config=configs(use_stable_embedding=True), seed=seeds)
def test_row_01_inputs_embeds_skip_the_embedding_norm(data: st.DataObject, config: OpenLlamaConfig, seed: int) -> None:
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    ids = torch.randint(config.vocab_size, (2, data.draw(st.integers(1, 12))))
    raw = hf.model.embed_tokens(ids)
    theirs, out = (m.model(inputs_embeds=raw, output_hidden_states=True).hidden_states for m in (hf, ours))
    assert_same(out, theirs)
    assert torch.equal(theirs[0], raw)
    whole = hf.model(ids).last_hidden_state
    assert torch.equal(ours.model(inputs_embeds=hf.model.embed_layer_norm(raw))[0], whole)
    compared[BAR] += 1


@examples(6)
@given(config=configs(use_stable_embedding=True, rms_norm_eps=1e-3), seed=seeds)
def test_row_02_the_embedding_norm_has_a_bias_and_its_own_eps(config: OpenLlamaConfig, seed: int) -> None:
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    ids = torch.arange(config.vocab_size)[None]
    table, norm = hf.model.embed_tokens.weight, hf.model.embed_layer_norm
    assert norm.eps == ours.model.embedding.norm.eps == 1e-5
    expected = F.layer_norm(table, table.shape[1:], norm.weight, norm.bias, 1e-5)[None]
    for model in (hf, ours):
        assert torch.equal(model.model(ids, output_hidden_states=True).hidden_states[0], expected)
    compared[BAR] += 1


@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("pad", [0, 5, -1, None])
def test_row_02_the_padding_row_of_a_new_table_is_zero(pad: int | None, stable: bool) -> None:
    hf, _ = both(pad_token_id=pad, use_stable_embedding=stable)
    new = OpenLlamaForCausalLM(tiny_config(pad_token_id=pad, use_stable_embedding=stable))
    zero = [] if pad is None else [pad % 23]
    for table in (hf.model.embed_tokens, new.model.embedding.tokens):
        assert (~table.weight.any(1)).nonzero().flatten().tolist() == zero
        assert table.padding_idx == (zero[0] if zero else None)


# ---- dropout


@examples(8)
@given(
    data=st.data(),
    config=configs(use_memory_efficient_attention=False, attention_dropout_prob=0.0, **OWN_HEAD),
    dropout=st.floats(0.1, 0.9),
    seed=seeds,
)
def test_row_03_the_output_of_each_mlp_is_dropped_and_nothing_else(
    data: st.DataObject, config: OpenLlamaConfig, dropout: float, seed: int
) -> None:
    config = dataclasses.replace(config, hidden_dropout_prob=dropout)
    batch = data.draw(batches(config))
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    states = []
    for model in (ours, hf):
        torch.manual_seed(seed)
        out = model.train()(**batch, output_hidden_states=True)
        out.logits.square().sum().backward()
        states.append(out.hidden_states)
    assert_same(*states)
    assert_same_gradients(ours, hf)
    compared[BAR] += 1


@pytest.mark.parametrize("efficient", [True, False])
def test_row_04_hf_drops_no_attention_without_xformers(efficient: bool) -> None:
    hf, _ = both(hidden_dropout_prob=0.0, attention_dropout_prob=0.9, use_memory_efficient_attention=efficient)
    evaluated = hf(tiny_ids()).logits
    assert torch.equal(hf.train()(tiny_ids()).logits, evaluated)


def test_row_04_hf_drops_attention_in_xformers(xformers: Xformers) -> None:
    hf, _ = both(hidden_dropout_prob=0.0, attention_dropout_prob=0.9)
    evaluated = hf(tiny_ids()).logits
    assert xformers.dropouts == []
    assert not torch.equal(hf.train()(tiny_ids()).logits, evaluated)
    assert xformers.dropouts == [0.9, 0.9]


# ---- masks and attention


def test_row_05_hf_forgets_the_mask_in_training() -> None:
    hf, _ = both(**NO_DROPOUT)
    evaluated = hf(tiny_ids(), attention_mask=LEFT_PADDED).logits
    trained = hf.train()(tiny_ids(), attention_mask=LEFT_PADDED).logits
    assert torch.equal(trained, hf(tiny_ids()).logits)
    assert not torch.allclose(trained[0], evaluated[0])
    hf, ours = both(**NO_DROPOUT, **OWN_HEAD, use_memory_efficient_attention=False)
    masked = hf.train()(tiny_ids(), attention_mask=LEFT_PADDED).logits
    assert torch.equal(ours.train()(tiny_ids(), attention_mask=LEFT_PADDED).logits, masked)


def test_row_05_without_a_mask_training_gives_hf_s_numbers() -> None:
    hf, ours = both(**NO_DROPOUT, **OWN_HEAD)
    ids = tiny_ids()
    ids[0, :3] = 0
    for model in (hf, ours):
        model.train()(ids, labels=ids).loss.backward()
    assert_same_gradients(ours, hf)


def test_row_06_hf_does_not_survive_an_xformers_without_a_kernel(
    xformers: Xformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*arguments: Any, **named: Any) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    monkeypatch.setattr(xformers, "memory_efficient_attention", no_kernel)
    hf, _ = both()
    hf(tiny_ids())
    with pytest.raises(NotImplementedError, match="No operator found"):
        hf.train()(tiny_ids())


def test_row_07_hf_misaligns_xformers_behind_a_cache_and_we_do_not(xformers: Xformers) -> None:
    hf, ours = both(**NO_DROPOUT)
    ours.model._attn_implementation = "xformers"
    states = []
    for model in (hf, ours):
        whole = model.train().model(tiny_ids()).last_hidden_state
        past = model.model(tiny_ids()[:, :4]).past_key_values
        rest = model.model(tiny_ids()[:, 4:], past_key_values=past).last_hidden_state
        states.append((whole[:, 4:], rest))
    assert len(xformers.dropouts) == 2 * 3 * 2  # two models, three calls, two layers
    (hf_whole, hf_rest), (whole, rest) = states
    torch.testing.assert_close(whole, hf_whole)
    torch.testing.assert_close(rest, whole)
    assert not torch.allclose(hf_rest, hf_whole, rtol=0.01, atol=0.01)


def test_row_07_hf_gives_none_for_attentions_in_xformers(xformers: Xformers) -> None:
    hf, ours = both(**NO_DROPOUT)
    assert hf.train()(tiny_ids(), output_attentions=True).attentions == (None, None)
    ours.model._attn_implementation = "xformers"
    assert_same(
        ours.train()(tiny_ids(), output_attentions=True).attentions,
        hf.eval()(tiny_ids(), output_attentions=True).attentions,
    )


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_row_08_hf_masks_wherever_the_mask_is_not_one(value: float) -> None:
    hf, ours = both(**OWN_HEAD)
    mask = LEFT_PADDED.float().masked_fill(LEFT_PADDED == 0, value)
    expected = hf(tiny_ids(), attention_mask=LEFT_PADDED).logits
    assert torch.equal(hf(tiny_ids(), attention_mask=mask).logits, expected)
    assert torch.equal(ours(tiny_ids(), attention_mask=mask == 1).logits, expected)


def test_row_08_hf_takes_no_mask_of_four_dimensions() -> None:
    hf, _ = both(**NO_DROPOUT)
    alone = torch.eye(7, dtype=torch.bool)[None, None]
    with pytest.raises(ValueError, match="too many values to unpack"):
        hf(tiny_ids(), attention_mask=alone)
    assert torch.equal(hf.train()(tiny_ids(), attention_mask=alone).logits, hf(tiny_ids()).logits)


@examples(8)
@given(config=configs(**NO_DROPOUT, **OWN_HEAD), seed=seeds, length=st.integers(2, 9))
def test_row_09_a_fully_masked_row_sees_all_keys_alike_and_splits_its_gradient(
    config: OpenLlamaConfig, seed: int, length: int
) -> None:
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :-1] = 0
    found = []
    for model in (ours, hf):
        out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        out.logits.square().sum().backward()
        found.append((out.attentions, out.hidden_states))
    assert_same(*found)
    assert_same_gradients(ours, hf)
    for weights in found[1][0]:
        blind = weights[0, :, :-1]
        torch.testing.assert_close(blind, torch.full_like(blind, 1 / length))
    compared[BAR] += 1


def test_row_09_in_float16_a_fully_masked_row_follows_large_scores() -> None:
    hf, ours = both(initializer_range=2.0)
    found = [m.half()(tiny_ids(), attention_mask=LEFT_PADDED, output_attentions=True).attentions for m in (hf, ours)]
    first = found[0][0][0, :, :3]  # of the padding
    assert not torch.allclose(first, torch.full_like(first, 1 / 7), atol=0.1)
    assert_same(found[1][0], found[0][0])


def test_row_10_hf_cannot_run_float64_or_gives_nan() -> None:
    hf, _ = both()
    with pytest.raises(RuntimeError, match="cannot be converted to type float without overflow"):
        hf.double()(tiny_ids())
    with default_dtype(torch.float64):
        out = hf(tiny_ids(), attention_mask=LEFT_PADDED, output_attentions=True)
    assert out.logits.isnan().any(-1).any(-1).tolist() == [True, False]
    rounded = (out.attentions[0][1], open_llama.OpenLlamaRMSNorm(24).double()(torch.randn(7, 24).double()))
    assert all(torch.equal(values, values.float().double()) for values in rounded)  # softmax and norm: float32


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_row_11_scores_are_divided_after_the_product_and_softmax_is_float32(dtype: torch.dtype) -> None:
    hf, ours = both(hidden_size=40, num_attention_heads=4, initializer_range=0.5)  # sqrt(10) is no power of two
    arguments = {"attention_mask": LEFT_PADDED, "output_attentions": True, "output_hidden_states": True}
    theirs, out = (model.to(dtype)(tiny_ids(), **arguments) for model in (hf, ours))
    assert_same(out.attentions, theirs.attentions)
    assert_same(out.hidden_states, theirs.hidden_states)
    layer, x = hf.model.layers[0], theirs.hidden_states[0]
    heads = [p(layer.input_layernorm(x)).view(2, 7, 4, 10).transpose(1, 2) for p in (layer.self_attn.q_proj,
             layer.self_attn.k_proj)]  # fmt: skip
    cos, sin = layer.self_attn.rotary_emb(heads[0], seq_len=7)
    query, key = open_llama.apply_rotary_pos_emb(*heads, cos, sin, torch.arange(7)[None])
    scores = query @ key.transpose(2, 3) / math.sqrt(10)
    scores = scores[1] + torch.full((7, 7), torch.finfo(dtype).min, dtype=dtype).triu(1)  # row 1 has no padding
    assert torch.equal(theirs.attentions[0][1], scores.softmax(-1, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_row_12_hf_computes_the_loss_in_the_model_s_dtype(dtype: torch.dtype) -> None:
    hf, ours = both(**OWN_HEAD)
    theirs, out = (model.to(dtype)(tiny_ids(), labels=tiny_ids()) for model in (hf, ours))
    assert theirs.loss.dtype == theirs.logits.dtype == dtype
    assert torch.equal(out.logits, theirs.logits)
    recipe = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tiny_ids()[:, 1:].flatten())
    assert torch.equal(recipe, theirs.loss)
    torch.testing.assert_close(theirs.loss.float(), out.loss, rtol=0.02, atol=0.02)


def test_row_12_hf_lets_the_labels_set_the_type_of_the_loss() -> None:
    for kind, dtype in (("regression", torch.float64), ("multi_label_classification", torch.float16)):
        hf, ours = both(kind=CLASSIFIER, num_labels=3, problem_type=kind)
        labels = torch.rand(2, 3).to(dtype)
        theirs, out = (model(tiny_ids(), labels=labels).loss for model in (hf, ours))
        assert theirs.dtype == dtype
        torch.testing.assert_close(out, theirs.float(), rtol=0.01, atol=0.01)


# ---- positions


@pytest.mark.parametrize(
    ("dtype", "length", "error"), [(torch.bfloat16, 300, 0.9), (torch.bfloat16, 2100, 1.9), (torch.float16, 2100, 0.9)]
)
def test_row_13_hf_rebuilds_its_tables_from_rounded_frequencies(dtype: torch.dtype, length: int, error: float) -> None:
    hf, _ = both()
    hf = hf.to(dtype)
    rope = hf.model.layers[0].self_attn.rotary_emb
    exact, _ = cos_sin(torch.arange(length)[None], 12, None, 16, length, torch.float32)
    within = (rope.cos_cached[0, 0, :16, :6].float() - exact[0, :16, 0, :6]).abs().max()
    assert within < 0.003
    hf.model(tiny_ids(1, length))
    beyond = (rope.cos_cached[0, 0, :length, :6].float() - exact[0, :, 0, :6]).abs().max()
    assert beyond > error


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 3.0}, DYNAMIC])
def test_row_13_in_float32_long_calls_are_hf_s(scaling: dict[str, Any] | None) -> None:
    hf, ours = both(rope_scaling=scaling)
    ids = tiny_ids(1, 300)
    assert torch.equal(ours.model(ids).last_hidden_state, hf.model(ids).last_hidden_state)


def test_row_14_in_hf_a_long_call_changes_later_ones() -> None:
    hf, ours = both(rope_scaling=DYNAMIC)
    fresh = hf.model(tiny_ids()).last_hidden_state
    long = ours.model(tiny_ids(length=40)).last_hidden_state
    assert torch.equal(long, hf.model(tiny_ids(length=40)).last_hidden_state)
    assert not torch.allclose(hf.model(tiny_ids()).last_hidden_state, fresh, rtol=0.01, atol=0.01)
    assert torch.equal(ours.model(tiny_ids()).last_hidden_state, fresh)


@examples(6)
@given(
    data=st.data(),
    config=configs(rope_scaling=DYNAMIC, hidden_size=24, num_attention_heads=2, max_position_embeddings=4),
    seed=seeds,
)
def test_row_15_cached_keys_keep_the_rotation_of_their_time(
    data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = data.draw(batches(config))
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    past = hf_past = None
    for piece in chunks_of(batch, data.draw(chunkings(length_of(batch)))):
        theirs = hf.model(**piece, past_key_values=hf_past)
        out = ours.model(**piece, past_key_values=past)
        assert_same(out.last_hidden_state, theirs.last_hidden_state)
        assert_same(out.past_key_values, theirs.past_key_values)
        if past is not None:
            length = past.get_seq_length()
            assert_same([key[:, :, :length] for key, _ in out.past_key_values], [key for key, _ in past])
        past, hf_past = out.past_key_values, theirs.past_key_values
    compared[BAR] += 1


def test_row_16_hf_stores_its_frequencies_even_changed_ones() -> None:
    hf, _ = both(rope_scaling=DYNAMIC)
    stored = {name: table.clone() for name, table in hf.state_dict().items() if name.endswith("rotary_emb.inv_freq")}
    assert len(stored) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native = hf_to_native(hf.state_dict())
    hf.model(tiny_ids(length=40))
    for name, table in stored.items():
        assert not torch.allclose(hf.state_dict()[name], table)
    with pytest.warns(UserWarning, match="is not what the configuration implies"):
        assert hf_to_native(hf.state_dict()).keys() == native.keys()


@pytest.mark.parametrize("positions", [torch.arange(7) + 1, torch.arange(7) - 1])
def test_row_17_hf_has_no_position_beyond_the_keys(positions: Tensor) -> None:
    hf, _ = both()
    with pytest.raises(RuntimeError, match="out of bounds"):
        hf(tiny_ids(), position_ids=positions[None])


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 3.0}])
def test_row_17_positions_beyond_the_keys_are_those_of_a_longer_text(scaling: dict[str, Any] | None) -> None:
    hf, ours = both(rope_scaling=scaling)
    positions = torch.tensor([[3, 30, 4, 1, 19, 50, 0]])
    longer = torch.cat((tiny_ids(), tiny_ids(length=50)), dim=1)  # what follows is not seen, but lengthens the tables
    padded = torch.cat((positions, torch.zeros(1, 50, dtype=torch.long)), dim=1)
    expected = hf.model(longer, position_ids=padded).last_hidden_state[:, :7]
    torch.testing.assert_close(ours.model(tiny_ids(), position_ids=positions).last_hidden_state, expected)


def test_row_17_the_number_of_keys_sets_the_dynamic_base() -> None:
    hf, ours = both(rope_scaling=DYNAMIC)
    low = (torch.arange(40) % 5)[None]
    out, theirs = (m.model(tiny_ids(length=40), position_ids=low).last_hidden_state for m in (ours, hf))
    assert torch.equal(out, theirs)
    unscaled, _ = both()
    without = unscaled.model(tiny_ids(length=40), position_ids=low).last_hidden_state
    assert not torch.allclose(theirs, without, rtol=0.01, atol=0.01)


@examples(8)
@given(data=st.data(), config=configs(), seed=seeds)
def test_row_18_positions_ignore_padding_but_in_generate_they_do_not(
    data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = data.draw(batches(config).filter(lambda batch: "attention_mask" in batch and "input_ids" in batch))
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    ids, mask = batch["input_ids"], batch["attention_mask"].long()
    plain = hf.model(ids, mask).last_hidden_state
    assert torch.equal(plain, hf.model(ids, mask, torch.arange(ids.shape[1])[None]).last_hidden_state)
    assert torch.equal(ours.model(ids, mask).last_hidden_state, plain)
    prepared, expected = (m.prepare_inputs_for_generation(ids, attention_mask=mask) for m in (ours, hf))
    assert torch.equal(prepared["position_ids"], expected["position_ids"])
    assert torch.equal(prepared["position_ids"], positions_from_mask(mask))
    assert bool((prepared["position_ids"][mask == 0] == 1).all())
    compared[BAR] += 1


@pytest.mark.parametrize(("eos", "inferred"), [(2, True), ([2, 5], True), (0, False), ([2, 0], False)])
def test_row_19_generate_infers_the_mask_from_padding_that_ends_no_text(eos: Any, inferred: bool) -> None:
    hf, ours = both(seed=3, pad_token_id=0, eos_token_id=eos, max_position_embeddings=32, **OWN_HEAD)
    ids = tiny_ids().masked_fill(LEFT_PADDED == 0, 0)
    hf_ids = hf.generate(ids, max_new_tokens=12)
    assert torch.equal(ours.generate(ids, max_new_tokens=12), hf_ids)
    masked, unmasked = (hf.generate(ids, attention_mask=m, max_new_tokens=12) for m in (LEFT_PADDED, LEFT_PADDED**0))
    assert not torch.equal(masked, unmasked)
    assert torch.equal(hf_ids, masked if inferred else unmasked)


# ---- classification


def test_row_20_hf_counts_tokens_where_padding_may_be_anywhere() -> None:
    hf, ours = both(kind=CLASSIFIER, pad_token_id=0)
    ids = torch.tensor([[0, 0, 0, 5, 6], [5, 0, 6, 7, 0], [5, 6, 7, 0, 0], [0, 0, 0, 0, 0]])
    scores = hf.score(hf.model(ids).last_hidden_state)
    assert torch.equal(hf(ids).logits, scores[range(4), [1, 2, 2, -1]])
    assert torch.equal(ours(ids[:3]).logits, hf.score(hf.model(ids[:3]).last_hidden_state)[range(3), [4, 3, 2]])
    recipe = ours.score(ours.model(ids).last_hidden_state)[range(4), (ids != 0).sum(-1) - 1]
    assert torch.equal(recipe, hf(ids).logits)


def test_row_20_hf_refuses_batches_without_a_padding_id() -> None:
    hf, ours = both(kind=CLASSIFIER, pad_token_id=None)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        hf(tiny_ids())
    assert torch.equal(ours(tiny_ids(1)).logits, hf(tiny_ids(1)).logits)


@pytest.mark.parametrize(("labels", "kind"), [
    (torch.tensor([0, 1]), "single_label_classification"), (torch.rand(2, 2), "multi_label_classification"),
])  # fmt: skip
def test_row_21_hf_writes_the_kind_of_problem_into_the_config(labels: Tensor, kind: str) -> None:
    hf, ours = both(kind=CLASSIFIER)
    assert hf.config.problem_type is None
    loss = hf(tiny_ids(), labels=labels).loss
    assert hf.config.problem_type == kind
    assert torch.equal(ours(tiny_ids(), labels=labels).loss, loss)


# ---- caches, embeddings


def test_row_22_hf_fails_deep_inside_on_a_cache_with_checkpointing() -> None:
    hf, _ = both(**NO_DROPOUT)
    past = hf(tiny_ids()).past_key_values
    hf.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="index 7 is out of bounds"):
            hf.train()(tiny_ids(), past_key_values=past)


@examples(6)
@given(data=st.data(), config=configs(**NO_DROPOUT, **OWN_HEAD, use_memory_efficient_attention=False), seed=seeds)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_row_22_checkpointing_trains_without_a_cache(data: st.DataObject, config: OpenLlamaConfig, seed: int) -> None:
    batch = data.draw(batches(config))
    if "inputs_embeds" in batch:
        batch["inputs_embeds"].requires_grad_()
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    assert all(model.train()(**batch).past_key_values is not None for model in (hf, ours))
    for model in (hf, ours):
        model.gradient_checkpointing_enable()
        out = model(**batch, use_cache=True)
        assert out.past_key_values is None
        out.logits.square().sum().backward()
    assert_same_gradients(ours, hf)
    compared[BAR] += 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_row_22_hf_s_checkpointed_layers_get_no_gradient_where_their_input_needs_none() -> None:
    hf, ours = both(**NO_DROPOUT)
    trained = []
    for model in (hf, ours):
        model.gradient_checkpointing_enable()
        model.train()(inputs_embeds=torch.randn(2, 7, 24)).logits.square().sum().backward()
        trained.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert trained[0] == {"model.embed_tokens.weight", "model.norm.weight"}
    assert trained[1] == {name for name, _ in ours.named_parameters() if "embedding.norm" not in name}


def test_row_23_hf_s_shared_model_has_no_output_embeddings() -> None:
    hf, _ = both(shared_input_output_embedding=True)
    logits = hf(tiny_ids()).logits
    assert hf.get_output_embeddings() is None
    hf.set_output_embeddings(nn.Linear(24, 23, bias=False))
    assert torch.equal(hf(tiny_ids()).logits, logits)
    assert "lm_head.weight" in hf.state_dict()


def test_row_24_hf_loses_the_padding_row() -> None:
    hf, ours = both(pad_token_id=3)
    assert hf.model.embed_tokens.padding_idx == 3
    for model in (hf, ours):
        model.resize_token_embeddings(40)
    assert hf.model.embed_tokens.padding_idx is None
    ours.get_input_embeddings().padding_idx = None
    for model in (hf, ours):
        model.model(torch.tensor([[3, 4]])).last_hidden_state.square().sum().backward()
        assert model.get_input_embeddings().weight.grad[3].any()
    assert_same_gradients(ours.model, hf.model)


def test_row_24_hf_trains_what_was_frozen_and_cuts_special_ids_off() -> None:
    hf, _ = both(pad_token_id=20, bos_token_id=21, eos_token_id=22, **OWN_HEAD)
    hf.requires_grad_(False).resize_token_embeddings(12)
    trained = {name for name, p in hf.named_parameters() if p.requires_grad}
    assert trained == {"model.embed_tokens.weight", "lm_head.weight"}
    assert hf.config.vocab_size == 12
    assert hf.config.pad_token_id == 20


@examples(8)
@given(
    config=configs(bos_token_id=None, eos_token_id=None, pad_token_id=0, rope_scaling=None),
    size=st.integers(1, 100),
    seed=seeds,
)
def test_row_24_all_else_about_resizing_is_hf_s(config: OpenLlamaConfig, size: int, seed: int) -> None:
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    kept = min(size, config.vocab_size)
    ids = torch.randint(kept, (2, 5), generator=torch.Generator().manual_seed(seed))
    for model in (hf, ours):
        assert model.resize_token_embeddings(size) is model.get_input_embeddings()
        assert model.config.vocab_size == size
    assert torch.equal(ours.model(ids).last_hidden_state, hf.model(ids).last_hidden_state)
    found, expected = ours.state_dict(), hf_to_native(hf.state_dict())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].shape == weight.shape
        rows = kept if name in ("model.embedding.tokens.weight", "lm_head.weight") else None
        assert torch.equal(found[name][:rows], weight[:rows])
    hf.load_state_dict(native_to_hf(found, ours.config), strict=True)
    assert torch.equal(hf.model(ids).last_hidden_state, ours.model(ids).last_hidden_state)
    compared[BAR] += 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_row_25_sharing_and_tying_are_independent(shared: bool, tied: bool, tmp_path: Path) -> None:
    hf, ours = both(shared_input_output_embedding=shared, tie_word_embeddings=tied)
    for model, table in ((hf, hf.model.embed_tokens.weight), (ours, ours.model.embedding.tokens.weight)):
        assert ("lm_head.weight" in model.state_dict()) == (not shared)
        assert shared or (model.lm_head.weight is table) == tied
    hidden = hf.model(tiny_ids()).last_hidden_state
    head = hf.model.embed_tokens.weight if shared else hf.lm_head.weight
    assert torch.equal(ours(tiny_ids()).logits, F.linear(hidden, head))
    torch.testing.assert_close(ours(tiny_ids()).logits, hf(tiny_ids()).logits)
    hf.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = OpenLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tiny_ids()).logits, ours(tiny_ids()).logits)


def test_row_25_a_stray_head_in_a_shared_checkpoint_is_reported(tmp_path: Path) -> None:
    hf, ours = both(shared_input_output_embedding=True)
    hf.set_output_embeddings(nn.Linear(24, 23, bias=False))
    hf.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head\.weight is not used: shared_input_output_embedding"):
        loaded = OpenLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tiny_ids()).logits, ours(tiny_ids()).logits)


def test_row_26_a_padding_id_of_minus_one_is_the_last_row_of_the_table_only() -> None:
    hf, ours = both(pad_token_id=-1)
    assert hf.model.embed_tokens.padding_idx == ours.model.embedding.tokens.padding_idx == 22
    assert hf.config.pad_token_id == ours.config.pad_token_id == -1
    ids = tiny_ids()
    ids[0, 2] = ids[1, -1] = 22
    for model in (hf, ours):
        model.model(ids).last_hidden_state.square().sum().backward()
    assert_same_gradients(ours.model, hf.model)
    assert not ours.model.embedding.tokens.weight.grad[22].any()
    for prompt, eos in ((ids, None), (ids[1:], 2)):
        continued = (model.generate(prompt, eos_token_id=eos, max_new_tokens=5) for model in (ours, hf))
        assert torch.equal(*continued)


def test_row_26_no_text_can_be_padded_with_minus_one() -> None:
    hf, ours = both(pad_token_id=-1, **OWN_HEAD)
    half = list(range(0, 23, 2))  # of the vocabulary ends a text, so that one of two ends early
    with pytest.raises(IndexError, match="index out of range in self"):
        hf.generate(tiny_ids(), eos_token_id=half, max_new_tokens=8)
    with pytest.raises(InputError, match="pad_token_id -1 is outside the vocabulary of 23"):
        ours.generate(tiny_ids(), eos_token_id=half, max_new_tokens=8)


def test_row_26_classification_compares_the_raw_minus_one() -> None:
    hf, ours = both(kind=CLASSIFIER, pad_token_id=-1)
    ids = tiny_ids()
    ids[:, -1] = 22
    scores = hf.score(hf.model(ids).last_hidden_state)
    for model in (hf, ours):
        assert torch.equal(model(ids).logits, scores[:, -1])


@pytest.mark.parametrize("pad", [23, -24])
def test_row_26_hf_too_has_no_row_beyond_the_table(pad: int) -> None:
    hf, _ = both(pad_token_id=None)
    assert hf.model.embed_tokens.padding_idx is None
    config = hf.config
    config.pad_token_id = pad
    with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
        transformers.OpenLlamaForCausalLM(config)


# ---- configuration, initialisation


@pytest.mark.parametrize("misspelt", [True, False])
def test_row_27_the_misspelt_key_wins(misspelt: bool) -> None:
    values = {"use_memorry_efficient_attention": misspelt, "use_memory_efficient_attention": not misspelt}
    for config_class in (transformers.OpenLlamaConfig, OpenLlamaConfig):
        config = config_class.from_dict(values)
        assert config.use_memory_efficient_attention is misspelt
        assert "use_memorry_efficient_attention" not in config.to_dict()
        assert config.to_dict()["use_memory_efficient_attention"] is misspelt


@pytest.mark.parametrize("scaling", [
    {"type": "linear"}, {"factor": 2.0}, {"type": "linear", "factor": 2.0, "more": 1}, {"type": "yarn", "factor": 2.0},
    {"type": "linear", "factor": 1.0}, {"type": "dynamic", "factor": 0.5}, {"type": "dynamic", "factor": "2"}, [1, 2],
])  # fmt: skip
def test_row_28_the_same_scalings_are_refused(scaling: Any) -> None:
    with pytest.raises(ValueError, match="rope_scaling"):
        transformers.OpenLlamaConfig(rope_scaling=scaling)
    with pytest.raises(ConfigError, match="rope_scaling"):
        OpenLlamaConfig(rope_scaling=scaling)


def test_row_28_hf_refuses_an_integer_factor_but_not_infinity() -> None:
    assert transformers.OpenLlamaConfig(rope_scaling={"type": "linear", "factor": math.inf}).rope_scaling
    with pytest.raises(ValueError, match="must be an float > 1, got 2"):
        transformers.OpenLlamaConfig(rope_scaling={"type": "linear", "factor": 2})
    for kind in ("linear", "dynamic"):
        scaling = {"type": kind, "factor": 1.5}
        assert transformers.OpenLlamaConfig(rope_scaling=scaling).rope_scaling == scaling
        assert OpenLlamaConfig(rope_scaling=scaling).rope_scaling == scaling


@pytest.mark.parametrize("stable", [True, False])
def test_row_29_new_weights_have_hf_s_distributions(stable: bool) -> None:
    sizes = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 500, "initializer_range": 0.05}
    hf = hf_model(tiny_config(**sizes, **OWN_HEAD, use_stable_embedding=stable), 1)
    new = OpenLlamaForCausalLM(hf_config := tiny_config(**sizes, **OWN_HEAD, use_stable_embedding=stable))
    found, expected = dict(new.named_parameters()), hf_to_native(hf.state_dict())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.zeros(64) if name.endswith("bias") else torch.ones(64))
            continue
        xavier = stable and name == "model.embedding.tokens.weight"
        spread = math.sqrt(2 / (2000 + 64)) if xavier else hf_config.initializer_range
        for drawn in (weight.detach(), expected[name]):
            assert abs(float(drawn.mean())) < 0.05 * spread
            assert float(drawn.std()) == pytest.approx(spread, rel=0.05)
            assert float((drawn.abs() < spread).float().mean()) == pytest.approx(0.6827, abs=0.03)  # normal


@examples(6)
@given(data=st.data(), config=configs(), seed=seeds)
def test_row_30_hidden_states_begin_after_the_embedding_norm_and_end_after_the_final_norm(
    data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    hf = hf_model(config, seed)
    ours = our_twin(hf, config)
    ids = torch.randint(config.vocab_size, (2, data.draw(st.integers(1, 12))))
    seen: dict[str, Tensor] = {}
    hf.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.update(first=inputs[0]))
    hf.model.norm.register_forward_hook(lambda module, inputs, output: seen.update(last=output))
    theirs, out = (m.model(ids, output_hidden_states=True) for m in (hf, ours))
    assert_same(out.hidden_states, theirs.hidden_states)
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[0], seen["first"])
    assert torch.equal(out.hidden_states[0], ours.model.embedding(ids))
    assert torch.equal(out.hidden_states[-1], seen["last"])
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    compared[BAR] += 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_row_31_hf_s_shared_head_is_an_einsum(dtype: torch.dtype) -> None:
    hf, ours = both(shared_input_output_embedding=True)
    logits = hf.to(dtype)(tiny_ids()).logits
    hidden = ours.to(dtype).model(tiny_ids()).last_hidden_state
    assert torch.equal(logits, torch.einsum("blh,vh->blv", hidden, ours.get_output_embeddings().weight))
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(ours(tiny_ids()).logits, logits, **tolerance)


# ---- generation, loading, labels


@pytest.mark.parametrize("max_length", [7, 3])
def test_row_32_hf_makes_one_token_although_there_is_no_room(max_length: int) -> None:
    hf, ours = both(**OWN_HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = hf.generate(tiny_ids(), max_length=max_length)
    assert ids.shape == (2, 8)
    assert torch.equal(ours.generate(tiny_ids(), max_new_tokens=1), ids)


@pytest.mark.parametrize("dtype", HALVES)
def test_row_33_hf_loads_half_precision_files_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    hf, _ = both()
    hf.to(dtype).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    loaded = transformers.OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).dtype == dtype
    ours = OpenLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(ours.model(tiny_ids()).last_hidden_state, loaded.eval().model(tiny_ids()).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_row_34_hf_takes_int64_labels_only(dtype: torch.dtype) -> None:
    hf, ours = both(**OWN_HEAD)
    with pytest.raises(RuntimeError, match=r"expected target dtype to be Long|expected scalar type Long"):
        hf(tiny_ids(), labels=tiny_ids().to(dtype))
    assert torch.equal(ours(tiny_ids(), labels=tiny_ids().to(dtype)).loss, hf(tiny_ids(), labels=tiny_ids()).loss)
    hf, ours = both(kind=CLASSIFIER, num_labels=3)
    labels = torch.tensor([2, 0])
    with pytest.raises((RuntimeError, ValueError)):
        hf(tiny_ids(), labels=labels.to(dtype))
    hf.config.problem_type = None  # the call that failed has written it
    assert torch.equal(ours(tiny_ids(), labels=labels.to(dtype)).loss, hf(tiny_ids(), labels=labels).loss)


@torch.no_grad()
def test_row_35_hf_takes_the_first_token_whose_score_is_nan() -> None:
    hf, ours = both(**OWN_HEAD)
    for model in (hf, ours):
        model.lm_head.weight[7] = torch.nan
    assert (hf.generate(tiny_ids(), max_new_tokens=2)[:, 7:] == 7).all()
    settings = {"max_new_tokens": 2, "remove_invalid_values": True}
    assert torch.equal(ours.generate(tiny_ids(), **settings), hf.generate(tiny_ids(), **settings))
