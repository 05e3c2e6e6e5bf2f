"""Training: dropout, checkpointing, low precision, frozen weights, and a loss that never holds all logits."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel, losses
from openllama.attention import attention
from openllama.cache import PreallocatedCache
from openllama.errors import InputError
from openllama.masks import prepare_mask
from tests.draw import examples
from tests.parity.draws import Batch, batches, configs, length_of, randomise_norms, seeds
from tests.sizes import Sizes
from tests.tiny import tiny_ids, tiny_model

BACKENDS = ("eager", "sdpa")
HALVES = (torch.bfloat16, torch.float16)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def model_of(config: OpenLlamaConfig, seed: int, backend: str = "eager") -> OpenLlamaForCausalLM:
    """In training mode."""
    torch.manual_seed(seed)
    return randomise_norms(OpenLlamaForCausalLM(config, attn_implementation=backend), seed).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, of the parameters that have one; they are forgotten."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# --- dropout ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_dropout_zeroes_that_share_of_the_weights_and_scales_the_rest(backend: str, padded: bool) -> None:
    heads, length, dropout = 8, 48, 0.3
    query, key = torch.randn(2, 2, heads, length, 6)
    value = torch.eye(length).expand(2, heads, length, length)  # the output is the weights themselves
    padding = torch.arange(length) >= torch.tensor([[5], [0]]) if padded else None
    mask = prepare_mask(padding, length, length, query, backend)
    weights, _ = attention(query, key, value, mask, 0.0, backend)
    dropped, _ = attention(query, key, value, mask, dropout, backend)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - dropout))
    assert kept[weights > 0].float().mean().item() == pytest.approx(1 - dropout, abs=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_attention_weights_a_layer_has_no_attention(backend: str) -> None:
    model = tiny_model(attn_implementation=backend, attention_dropout_prob=1.0, hidden_dropout_prob=0.0)
    dropped = model.train()(tiny_ids(), attention_mask=LEFT_PADDED).logits
    for layer in model.model.layers:
        nn.init.zeros_(layer.attention.o_proj.weight)
    torch.testing.assert_close(dropped, model.eval()(tiny_ids(), attention_mask=LEFT_PADDED).logits)


@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_random_where_both_dropouts_are_zero_or_in_eval_mode(kind: Any, backend: str) -> None:
    quiet = tiny_model(kind, attn_implementation=backend, **NO_DROPOUT)
    expected = quiet(tiny_ids())[0]
    torch.testing.assert_close(quiet.train()(tiny_ids())[0], expected, rtol=0, atol=0)
    assert torch.equal(tiny_model(kind, attn_implementation=backend)(tiny_ids())[0], expected)
    noisy = tiny_model(kind, attn_implementation=backend).train()
    assert not torch.equal(noisy(tiny_ids())[0], noisy(tiny_ids())[0])


# --- gradient checkpointing ---


@examples(20)
@given(data=st.data(), config=configs(), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_recomputed_layers_give_equal_gradients(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, backend: str
) -> None:
    batch = data.draw(batches(config))
    model = model_of(config, seed, backend)
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(seed)
        out = model(**batch, use_cache=False, output_hidden_states=True)
        out.logits.square().mean().backward()
        found.append({**gradients(model), "hidden": out.hidden_states[-1].detach()})
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    model = tiny_model(attn_implementation="sdpa", num_hidden_layers=6).train()

    def kept() -> int:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            model(tiny_ids(), use_cache=False)
        parameters = {p.data_ptr() for p in model.parameters()}
        return sum(t.numel() for t in tensors if t.data_ptr() not in parameters)

    everything = kept()
    model.gradient_checkpointing_enable()
    assert kept() < everything / 3
    model.gradient_checkpointing_disable()
    assert kept() == everything


@pytest.mark.parametrize("kind", [OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_heads_pass_checkpointing_on_to_the_decoder(kind: Any) -> None:
    model = tiny_model(kind).train()
    past = model(tiny_ids(2, 3)).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache is switched off"):
        assert model(tiny_ids()).past_key_values is None
    with pytest.raises(InputError, match="past_key_values cannot be combined with gradient checkpointing"):
        model(tiny_ids(), past_key_values=past)
    model.gradient_checkpointing_disable()
    assert model(tiny_ids(), past_key_values=past).past_key_values.get_seq_length() == 10


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("name", ["gradient", "activation"])
def test_checkpointing_takes_what_trainers_of_each_release_pass(name: str, kwargs: dict[str, Any] | None) -> None:
    model = tiny_model().train()
    found = []
    for enabled in (False, True):
        if enabled:
            enable = getattr(model, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": kwargs})
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        model(tiny_ids(), use_cache=False).logits.square().mean().backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"every_n_layers": 2}, {"offload": True}])
def test_checkpointing_of_some_layers_is_refused(settings: dict[str, Any]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="every layer is computed again and nothing is offloaded"):
        model.activation_checkpointing_enable(**settings)
    assert not model.is_gradient_checkpointing


# --- low precision ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_trains_in_bfloat16_near_float32(backend: str, checkpointing: bool) -> None:
    model = tiny_model(attn_implementation=backend, initializer_range=0.1, **NO_DROPOUT).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    arguments = {"attention_mask": LEFT_PADDED, "labels": tiny_ids(), "use_cache": False}
    exact = model(tiny_ids(), **arguments).loss
    exact.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tiny_ids(), **arguments)
        chunked = model.loss(tiny_ids(), tiny_ids(), attention_mask=LEFT_PADDED)
    assert (out.logits.dtype, out.loss.dtype, chunked.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    for loss in (out.loss, chunked):
        torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
        loss.backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_continues_either_cache_and_one_from_outside(backend: str) -> None:
    model = tiny_model(attn_implementation=backend, initializer_range=0.1)
    ids, expected = tiny_ids(), model(tiny_ids()).logits[:, 4:]
    outside = model(ids[:, :4]).past_key_values
    with torch.autocast("cpu", torch.bfloat16):
        growing = model(ids[:, :4]).past_key_values
        logits = [model(ids[:, 4:], past_key_values=past).logits for past in (growing, outside)]
        logits[0].float().square().mean().backward()
        with torch.no_grad():
            place = model(ids[:, :4], past_key_values=PreallocatedCache(model.config, 2, 7)).past_key_values
            logits.append(model(ids[:, 4:], past_key_values=place).logits)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    for found in logits:
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_loss_of_a_half_precision_model_is_that_of_its_logits_in_float32(dtype: torch.dtype, backend: str) -> None:
    model = tiny_model(attn_implementation=backend).to(dtype).train()
    torch.manual_seed(1)
    out = model(tiny_ids(), labels=tiny_ids())
    expected = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), tiny_ids()[:, 1:].flatten())
    assert (out.logits.dtype, out.loss.dtype) == (dtype, torch.float32)
    assert torch.equal(out.loss, expected)
    torch.manual_seed(1)
    chunked = model.loss(tiny_ids(), tiny_ids())
    torch.testing.assert_close(chunked, expected)
    (out.loss + chunked).backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# --- what is frozen ---


def test_a_frozen_model_stays_frozen() -> None:
    model = tiny_model(shared_input_output_embedding=False).train().requires_grad_(False)
    out = model(tiny_ids(), labels=tiny_ids())
    chunked = model.loss(tiny_ids(), tiny_ids())
    assert not any(t.requires_grad for t in (out.logits, out.loss, chunked, *out.past_key_values[0]))
    assert model.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["model.layers.0.attention.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_step_changes_what_is_not_frozen_and_nothing_else(name: str, checkpointing: bool) -> None:
    model = tiny_model(shared_input_output_embedding=False).train().requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.get_parameter(name).requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.loss(tiny_ids(), tiny_ids()).backward()
    optimizer.step()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [name]
    assert [key for key, p in model.named_parameters() if p.grad is not None] == [name]


@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_gradients_flow_from_a_frozen_embedding_once_asked_for(kind: Any) -> None:
    model = tiny_model(kind).train().requires_grad_(False)
    assert not model(tiny_ids())[0].requires_grad
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    out = model(tiny_ids(), use_cache=False)[0]
    assert out.requires_grad
    embedded[0].retain_grad()
    out.square().sum().backward()
    assert embedded[0].grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_the_wish_for_gradients_survives_pickling_and_can_be_taken_back() -> None:
    wishing = tiny_model().requires_grad_(False)
    wishing.enable_input_require_grads()
    wishing.enable_input_require_grads()
    again = pickle.loads(pickle.dumps(wishing))
    assert again(tiny_ids()).logits.requires_grad
    for one in (wishing, again):
        one.disable_input_require_grads()
        assert not one(tiny_ids()).logits.requires_grad


# --- a loss without all logits ---


HEADS = {
    "shared": {"shared_input_output_embedding": True, "tie_word_embeddings": False},
    "tied": {"shared_input_output_embedding": False, "tie_word_embeddings": True},
    "own": {"shared_input_output_embedding": False, "tie_word_embeddings": False},
}


@contextmanager
def logits_at_a_time(count: int, kept: int = 0) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_LOGITS", count)
        patch.setattr(losses, "KEPT_LOGITS", kept)
        yield


@examples(60)
@given(
    data=st.data(),
    head=st.sampled_from(sorted(HEADS)),
    backend=st.sampled_from(BACKENDS),
    rows=st.sampled_from((0.5, 1, 1.5, 2, 7, 1000)),  # of logits in a chunk
    kept=st.sampled_from((0, 1.5, 4, 1000)),  # rows of logits that are not computed again
    seed=seeds,
)
def test_the_chunked_loss_and_its_gradients_are_those_of_forward(
    data: st.DataObject, head: str, backend: str, rows: float, kept: float, seed: int
) -> None:
    config = data.draw(configs(**NO_DROPOUT, **HEADS[head]))
    batch: Batch = data.draw(batches(config))
    model = model_of(config, seed, backend)
    if "inputs_embeds" in batch:
        batch["inputs_embeds"].requires_grad_()

    def result(loss: Tensor) -> dict[str, Any]:
        if length_of(batch) > 1:  # one token predicts nothing
            loss.backward()
        if "inputs_embeds" in batch:
            embeds_grad, batch["inputs_embeds"].grad = batch["inputs_embeds"].grad, None
            return {"loss": loss.detach(), "inputs_embeds": embeds_grad, **gradients(model)}
        return {"loss": loss.detach(), **gradients(model)}

    expected = result(model(**batch).loss)
    arguments = {"input_ids": None, **batch}
    with logits_at_a_time(math.ceil(rows * config.vocab_size), math.ceil(kept * config.vocab_size)):
        found = result(model.loss(**arguments))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value is None:
            assert expected[name] is None
        else:
            torch.testing.assert_close(value, expected[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_pass_ever_makes_a_tensor_near_the_size_of_all_logits(head: str, dtype: torch.dtype) -> None:
    vocab, batch, length = 500, 2, 40
    model = tiny_model(vocab_size=vocab, pad_token_id=None, **HEADS[head]).to(dtype).train()
    ids = torch.randint(vocab, (batch, length))
    with logits_at_a_time(3 * vocab), Sizes() as chunked:
        model.loss(ids, ids).backward()
    with Sizes() as whole:
        model(ids, labels=ids).loss.backward()
    assert whole.largest >= batch * (length - 1) * vocab, "the recorder sees nothing"
    assert chunked.largest == vocab * model.config.hidden_size, "the largest is the gradient of the table"


def test_between_the_passes_no_more_logits_are_kept_than_allowed() -> None:
    vocab, batch, length = 2000, 2, 40
    model = tiny_model(vocab_size=vocab, num_hidden_layers=1).train()
    ids = torch.randint(1, vocab, (batch, length))

    def kept(loss_of: Any) -> int:
        sizes: dict[int, int] = {}
        known = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            loss_of()
        return sum(size for place, size in sizes.items() if place not in known)

    found = {}
    for rows in (0, 9, 20):
        with logits_at_a_time(3 * vocab, rows * vocab):
            found[rows] = kept(lambda: model.loss(ids, ids))
    assert found[0] < batch * length * vocab / 2 < kept(lambda: model(ids, labels=ids, use_cache=False).loss)
    assert 7 * vocab < found[9] - found[0] <= 9 * vocab
    assert 17 * vocab < found[20] - found[0] <= 20 * vocab


def test_the_chunked_loss_takes_what_the_decoder_takes_and_keeps_no_cache() -> None:
    model = tiny_model(attn_implementation="sdpa")
    calls: list[dict[str, Any]] = []
    model.model.register_forward_hook(lambda module, args, kwargs, out: calls.append(out), with_kwargs=True)
    past = model(tiny_ids(2, 3)).past_key_values
    positions = torch.arange(3, 10) * 2
    arguments = {"past_key_values": past, "position_ids": positions, "attention_mask": torch.ones(2, 10)}
    expected = model(tiny_ids(), labels=tiny_ids(), **arguments).loss
    torch.testing.assert_close(model.loss(tiny_ids(), tiny_ids(), **arguments), expected)
    assert calls[-1].past_key_values is None


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(2, 6, dtype=torch.long), ("(2, 7)", "(2, 6)")),
        (torch.zeros(2, 7), ("integers", "float32")),
        (torch.full((2, 7), 23), ("label 23", "vocabulary of 23")),
        (torch.full((2, 7), -1), ("label -1", "-100 is ignored")),
    ],
)
def test_the_chunked_loss_refuses_labels_before_any_work(labels: Tensor, said: tuple[str, ...]) -> None:
    model = tiny_model()
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the decoder ran"))
    with pytest.raises(InputError) as caught:
        model.loss(tiny_ids(), labels)
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize("label", [torch.full((2, 7), -100), tiny_ids()])
def test_a_head_with_a_bias_has_its_share_in_the_loss(label: Tensor) -> None:
    model = tiny_model(shared_input_output_embedding=False)
    model.lm_head = torch.nn.Linear(24, 23)
    torch.testing.assert_close(
        model.loss(tiny_ids(), label), model(tiny_ids(), labels=label).loss, equal_nan=True, rtol=0, atol=0
    )


def test_the_chunked_loss_has_a_shape_on_the_meta_device() -> None:
    model, ids = tiny_model().to("meta"), tiny_ids().to("meta")
    model.loss(ids, ids).backward()
    assert {p.grad.shape == p.shape for p in model.parameters()} == {True}


def test_autocast_leaves_a_float64_model_alone_in_both_losses() -> None:
    model = tiny_model().double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.loss(tiny_ids(), tiny_ids()), model(tiny_ids(), labels=tiny_ids()).loss)
