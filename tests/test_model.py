"""The decoder: laws that hold for any weights, and what a module is expected to survive."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaModel
from openllama.errors import InputError
from openllama.masks import positions_from_mask
from openllama.model import RMSNorm, StableEmbedding
from tests.draw import examples
from tests.parity.draws import (
    batches,
    chunkings,
    chunks_of,
    configs,
    in_float64,
    is_real,
    length_of,
    randomise_norms,
    seeds,
)
from tests.tiny import CONFIG, tiny_config, tiny_ids, tiny_model

backends = st.sampled_from(("eager", "sdpa"))


def drawn_model(config: OpenLlamaConfig, seed: int, backend: str) -> OpenLlamaModel:
    torch.manual_seed(seed)
    return randomise_norms(OpenLlamaModel(config, attn_implementation=backend), seed).eval()


# --- laws ---


@examples(50)
@given(data=st.data(), config=configs(), seed=seeds, backend=backends)
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_number(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, backend: str
) -> None:
    model = drawn_model(config, seed, backend)
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 12))
    at = data.draw(st.integers(1, length - 1))
    ids = torch.randint(config.vocab_size, (batch, length))
    changed = ids.clone()
    changed[:, at:] = torch.randint(config.vocab_size, (batch, length - at))
    before, after = model(ids), model(changed)
    assert torch.equal(before[0][:, :at], after[0][:, :at])
    for pair, changed_pair in zip(before.past_key_values, after.past_key_values, strict=True):
        assert torch.equal(pair[0][:, :, :at], changed_pair[0][:, :, :at])
        assert torch.equal(pair[1][:, :, :at], changed_pair[1][:, :, :at])


@examples(50)
@given(
    config=configs(),
    seed=seeds,
    backend=backends,
    side=st.sampled_from(("left", "right")),
    pads=st.integers(1, 5),
)
@torch.no_grad()
def test_padding_changes_no_real_token(config: OpenLlamaConfig, seed: int, backend: str, side: str, pads: int) -> None:
    config = dataclasses.replace(config, rope_scaling=None)  # dynamic scaling looks at the length, padding included
    model = drawn_model(config, seed, backend).double()
    ids = torch.randint(config.vocab_size, (2, 6))
    filler = torch.randint(config.vocab_size, (2, pads))  # what stands there must not matter
    left = side == "left"
    padded = torch.cat((filler, ids) if left else (ids, filler), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :pads] = 0 if left else 1
    mask[:, 6:] = 1 if left else 0
    out = model(padded, attention_mask=mask, position_ids=positions_from_mask(mask))[0]
    torch.testing.assert_close(out[mask.bool()].view(2, 6, -1), model(ids)[0])


@examples(40)
@given(data=st.data(), config=configs(), seed=seeds, backend=backends)
@torch.no_grad()
def test_chunks_with_a_cache_give_the_whole_prompt(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, backend: str
) -> None:
    config = dataclasses.replace(config, rope_scaling=None)
    model = drawn_model(config, seed, backend).double()
    batch = in_float64(data.draw(batches(config)))
    batch.pop("position_ids", None)
    parts, past = [], None
    for piece in chunks_of(batch, data.draw(chunkings(length_of(batch)))):
        out = model(**piece, past_key_values=past)
        parts.append(out[0])
        past = out.past_key_values
    del batch["labels"]
    real = is_real({**batch, "labels": torch.cat(parts, 1)[..., 0]})
    torch.testing.assert_close(torch.cat(parts, 1)[real], model(**batch)[0][real])


@examples(25)
@given(config=configs(initializer_range=0.1), seed=seeds, shift=st.integers(1, 40))
@torch.no_grad()
def test_only_distances_between_positions_matter(config: OpenLlamaConfig, seed: int, shift: int) -> None:
    model = drawn_model(config, seed, "eager")
    ids = torch.randint(config.vocab_size, (2, 6))
    moved = model(ids, position_ids=torch.arange(shift, shift + 6))[0]
    torch.testing.assert_close(moved, model(ids)[0], rtol=1e-4, atol=1e-4)


@examples(25)
@given(config=configs(), seed=seeds, backend=backends)
@torch.no_grad()
def test_rows_do_not_know_of_each_other(config: OpenLlamaConfig, seed: int, backend: str) -> None:
    model = drawn_model(config, seed, backend).double()
    ids = torch.randint(config.vocab_size, (3, 5))
    together = model(ids)[0]
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(ids[row : row + 1])[0])


def test_a_position_far_beyond_the_key_length_is_fine() -> None:
    out = tiny_model(OpenLlamaModel)(tiny_ids(), position_ids=torch.arange(5000, 5007))
    assert bool(out[0].isfinite().all())


def test_positions_by_row_by_batch_or_flat_are_the_same() -> None:
    model, ids = tiny_model(OpenLlamaModel), tiny_ids(2, 3)
    flat = torch.tensor([4, 0, 2])
    wanted = model(ids, position_ids=flat.repeat(2, 1))[0]
    assert torch.equal(model(ids, position_ids=flat)[0], wanted)
    assert torch.equal(model(ids, position_ids=flat[None])[0], wanted)
    assert not torch.equal(model(ids)[0], wanted)


# --- parts ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rms_norm_is_its_formula_in_at_least_float32(dtype: torch.dtype) -> None:
    norm = RMSNorm(6, eps=1e-3).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (100 * torch.randn(2, 3, 6)).to(dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    expected = norm.weight * (wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()).to(dtype)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), expected)


def test_the_stable_embedding_is_the_table_s_rows_normalised() -> None:
    embedding = randomise_norms(StableEmbedding(tiny_config(rms_norm_eps=0.5)), seed=1)
    assert embedding.norm is not None
    ids = tiny_ids()
    rows = embedding.tokens.weight[ids]
    expected = F.layer_norm(rows, (24,), embedding.norm.weight, embedding.norm.bias, eps=1e-5)
    assert torch.equal(embedding(ids), expected)
    plain = StableEmbedding(tiny_config(use_stable_embedding=False))
    assert torch.equal(plain(ids), plain.tokens.weight[ids])
    assert plain.norm is None


def test_embeddings_that_are_given_skip_the_embedding_norm() -> None:
    model = tiny_model(OpenLlamaModel)
    ids = tiny_ids()
    assert torch.equal(model(inputs_embeds=model.embedding(ids))[0], model(ids)[0])
    assert not torch.equal(model(inputs_embeds=model.embedding.tokens(ids))[0], model(ids)[0])


def test_hidden_states_are_each_layer_s_input_and_the_normalised_end() -> None:
    model, ids = tiny_model(OpenLlamaModel), tiny_ids()
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, seen, strict=False))
    assert torch.equal(out.hidden_states[0], model.embedding(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_a_hook_can_change_what_a_layer_gives() -> None:
    model, ids = tiny_model(OpenLlamaModel), tiny_ids()
    handle = model.layers[0].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    without_mlp = model(ids)[0]
    handle.remove()
    assert not torch.equal(without_mlp, model(ids)[0])
    model.layers[0].mlp.down_proj.weight.data.zero_()
    assert torch.equal(without_mlp, model(ids)[0])


@pytest.mark.parametrize("stable", [True, False])
def test_fresh_weights_are_drawn_as_documented(stable: bool) -> None:
    config = tiny_config(
        vocab_size=900, hidden_size=64, intermediate_size=300, initializer_range=0.07, use_stable_embedding=stable,
        pad_token_id=5,
    )  # fmt: skip
    model = OpenLlamaModel(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None
            torch.testing.assert_close(module.weight.std(), torch.tensor(0.07), rtol=0.06, atol=0)
            assert abs(module.weight.mean()) < 0.005
    table = model.embedding.tokens.weight
    xavier = (2 / (900 + 64)) ** 0.5
    torch.testing.assert_close(table.std(), torch.tensor(xavier if stable else 0.07), rtol=0.06, atol=0)
    assert not table[5].any()
    assert table[4].any()
    assert bool((model.norm.weight == 1).all())


@pytest.mark.parametrize(("pad_token_id", "row"), [(None, None), (3, 3), (-1, 22)])
def test_the_padding_row_gets_no_gradient(pad_token_id: int | None, row: int | None) -> None:
    model = tiny_model(OpenLlamaModel, pad_token_id=pad_token_id)
    model(torch.arange(23)[None]).last_hidden_state.square().sum().backward()
    still = (model.embedding.tokens.weight.grad == 0).all(-1).nonzero().flatten().tolist()
    assert still == ([] if row is None else [row])


# --- types and devices ---


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_type_works_forwards_and_backwards(dtype: torch.dtype, backend: str) -> None:
    model = tiny_model(attn_implementation=backend, rope_scaling={"type": "dynamic", "factor": 2.0}).to(dtype)
    mask = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])
    out = model(tiny_ids(2, 20), attention_mask=mask, labels=tiny_ids(2, 20), output_hidden_states=True)
    out.loss.backward()
    assert {h.dtype for h in out.hidden_states} == {out.logits.dtype} == {dtype}
    assert {x.dtype for pair in out.past_key_values for x in pair} == {dtype}
    assert out.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    wide = tiny_model(attn_implementation=backend, rope_scaling={"type": "dynamic", "factor": 2.0})
    expected = wide(tiny_ids(2, 20), attention_mask=mask).logits
    loose = {torch.bfloat16: 0.5, torch.float16: 0.06, torch.float64: 1e-4}[dtype]
    torch.testing.assert_close(out.logits.float(), expected, rtol=0, atol=loose)


def test_the_default_model_takes_no_memory_on_the_meta_device() -> None:
    resource = pytest.importorskip("resource", reason="only Unix tells the peak of memory this way")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = OpenLlamaModel(OpenLlamaConfig())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB on Linux
    assert all(p.is_meta for p in model.parameters())
    assert model.device.type == "meta"
    assert sum(p.numel() for p in model.parameters()) == 6_885_879_808  # 27.5 GB in float32
    assert grown < 200_000
    out = model(torch.ones(1, 5, dtype=torch.long, device="meta"), attention_mask=torch.ones(1, 5, device="meta"))
    assert out.last_hidden_state.shape == (1, 5, 4096)
    assert out.past_key_values.get_seq_length() == 5


def test_device_and_dtype_are_those_of_the_weights() -> None:
    assert tiny_model().device.type == "cpu"
    assert tiny_model().dtype == torch.float32
    assert tiny_model().to(torch.bfloat16).dtype == torch.bfloat16
    assert tiny_model().to("meta").device.type == "meta"


def test_a_mask_on_another_device_is_moved() -> None:
    model = tiny_model(OpenLlamaModel).to("meta")
    out = model(tiny_ids().to("meta"), attention_mask=torch.ones(2, 7))
    assert out[0].is_meta


# --- copies ---


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copied, pickled])
@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_computes_the_same_and_is_independent(duplicate: Any, tied: bool) -> None:
    model = tiny_model(shared_input_output_embedding=False, tie_word_embeddings=tied)
    again = duplicate(model)
    assert again.config == model.config
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    assert (again.lm_head.weight is again.model.embedding.tokens.weight) is tied
    with torch.no_grad():
        again.model.embedding.tokens.weight.add_(1)
    assert not torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_state_dict_makes_the_same_model() -> None:
    model = tiny_model(OpenLlamaModel)
    other = tiny_model(OpenLlamaModel, seed=1)
    assert not torch.equal(other(tiny_ids())[0], model(tiny_ids())[0])
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(tiny_ids())[0], model(tiny_ids())[0])


def test_weights_are_named_by_what_they_are() -> None:
    assert list(tiny_model(num_hidden_layers=1, shared_input_output_embedding=False).state_dict()) == [
        "model.embedding.tokens.weight",
        "model.embedding.norm.weight",
        "model.embedding.norm.bias",
        "model.layers.0.attention_norm.weight",
        "model.layers.0.attention.q_proj.weight",
        "model.layers.0.attention.k_proj.weight",
        "model.layers.0.attention.v_proj.weight",
        "model.layers.0.attention.o_proj.weight",
        "model.layers.0.mlp_norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


# --- the configuration of a living model ---


def test_replacing_the_config_of_a_head_reaches_the_decoder() -> None:
    model, ids = tiny_model(), tiny_ids(1, 20)
    plain = model(ids).logits
    scaling = {"type": "linear", "factor": 2.0}
    model.config = dataclasses.replace(model.config, rope_scaling=scaling, use_cache=False, output_hidden_states=True)
    assert model.model.config is model.config
    out = model(ids)
    assert out.past_key_values is None
    assert len(out.hidden_states) == 3
    assert torch.equal(out.logits, tiny_model(rope_scaling=scaling)(ids).logits)
    assert not torch.equal(out.logits, plain)


def test_assigning_to_a_field_of_a_model_s_config_says_what_to_do() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"model\.config = dataclasses\.replace"):
        tiny_model().config.hidden_size = 48  # type: ignore[misc]


# --- training ---


def trained(backend: str, checkpointing: bool, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step."""
    model = tiny_model(attn_implementation=backend, **fields).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    loss = model(tiny_ids(), attention_mask=mask, labels=tiny_ids(), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(backend: str, dropout: float) -> None:
    fields = {"hidden_dropout_prob": dropout, "attention_dropout_prob": dropout}
    kept, recomputed = trained(backend, False, **fields), trained(backend, True, **fields)
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


def test_gradient_checkpointing_runs_each_layer_twice_in_training_alone() -> None:
    model, calls = tiny_model(OpenLlamaModel), []
    model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    model.gradient_checkpointing_enable()
    model(tiny_ids())[0].sum().backward()
    assert len(calls) == 1
    model.train()
    model(tiny_ids(), use_cache=False)[0].sum().backward()
    assert len(calls) == 3
    model.gradient_checkpointing_disable()
    model(tiny_ids(), use_cache=False)[0].sum().backward()
    assert len(calls) == 4


def test_gradient_checkpointing_switches_the_cache_off_aloud_and_refuses_one() -> None:
    model = tiny_model(OpenLlamaModel)
    past = model(tiny_ids(2, 3)).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache is switched off"):
        assert model(tiny_ids()).past_key_values is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(tiny_ids(), use_cache=False).past_key_values is None
    with pytest.raises(InputError, match="gradient checkpointing"):
        model(tiny_ids(), past_key_values=past, use_cache=False)
    assert model.eval()(tiny_ids()).past_key_values is not None


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_hidden_dropout_acts_on_the_mlp_s_output_in_training_alone(backend: str) -> None:
    model = tiny_model(OpenLlamaModel, attn_implementation=backend, hidden_dropout_prob=1.0, attention_dropout_prob=0.0)
    ids = tiny_ids()
    quiet = model(ids)[0]
    dropped = model.train()(ids)[0]
    assert not torch.equal(dropped, quiet)
    for layer in model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert torch.equal(model.eval()(ids)[0], dropped)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_mask_is_honoured_in_training_whatever_the_config_says(backend: str) -> None:
    model = tiny_model(OpenLlamaModel, attn_implementation=backend, hidden_dropout_prob=0.0, attention_dropout_prob=0.0)
    assert model.config.use_memory_efficient_attention
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    evaluated = model(tiny_ids(), attention_mask=mask)[0]
    torch.testing.assert_close(model.train()(tiny_ids(), attention_mask=mask)[0], evaluated)
    assert not torch.allclose(model(tiny_ids())[0], evaluated)


def test_a_few_steps_of_training_learn_a_sentence() -> None:
    model = tiny_model(attn_implementation="sdpa", initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tiny_ids(1, 12)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.5
    assert torch.equal(model.eval()(ids).logits[0, :-1].argmax(-1), ids[0, 1:])


# --- tracing ---


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_it_compiles_into_one_graph_cache_and_all(backend: str) -> None:
    model = tiny_model(attn_implementation=backend)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, mask = tiny_ids(), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    out, expected = compiled(ids, attention_mask=mask), model(ids, attention_mask=mask)
    assert torch.equal(out.logits, expected.logits)
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
    following = compiled(ids[:, :1], attention_mask=longer, past_key_values=out.past_key_values)
    expected = model(ids[:, :1], attention_mask=longer, past_key_values=expected.past_key_values)
    assert torch.equal(following.logits, expected.logits)
    assert following.past_key_values.get_seq_length() == 8


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_it_can_be_exported(backend: str) -> None:
    model = tiny_model(attn_implementation=backend)
    arguments = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), "use_cache": False}
    program = torch.export.export(model, (tiny_ids(),), {**arguments, "return_dict": False})
    other = tiny_ids(seed=9)
    exported = program.module()(other, **arguments, return_dict=False)
    torch.testing.assert_close(exported[0], model(other, **arguments).logits)


def test_autocast_computes_in_low_precision_with_a_cache() -> None:
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tiny_ids())
        again = model(tiny_ids(2, 1), past_key_values=out.past_key_values)
    assert again.past_key_values.get_seq_length() == 8
    torch.testing.assert_close(out.logits.float(), model(tiny_ids()).logits, rtol=0, atol=0.5)
    assert model.config == CONFIG
