"""Documents packed into one row are strangers to each other; masks of four dimensions; the fast causal path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.errors import InputError
from openllama.masks import pack_documents, prepare_mask
from tests.draw import examples
from tests.parity.draws import batches, configs, is_real, length_of, randomise_norms, seeds
from tests.tiny import tiny_ids, tiny_model

BACKENDS = ("eager", "sdpa")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


def model_of(config: OpenLlamaConfig, seed: int, backend: str) -> OpenLlamaForCausalLM:
    """In training mode."""
    torch.manual_seed(seed)
    return randomise_norms(OpenLlamaForCausalLM(config, attn_implementation=backend), seed).train()


def gradients(model: OpenLlamaForCausalLM) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


# --- packed documents ---


@examples(40)
@given(
    config=configs(**NO_DROPOUT, max_position_embeddings=64, initializer_range=0.2),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    seed=seeds,
    backend=st.sampled_from(BACKENDS),
)
def test_each_document_gets_the_values_and_gradients_it_gets_alone(
    config: OpenLlamaConfig, lengths: list[int], seed: int, backend: str
) -> None:
    model = model_of(config, seed, backend)
    documents = [torch.randint(config.vocab_size, (1, length)) for length in lengths]
    directions = [torch.randn(1, length, config.vocab_size) for length in lengths]
    mask, positions = pack_documents(lengths)

    alone = [model(document, output_hidden_states=True) for document in documents]
    sum((out.logits * to).sum() for out, to in zip(alone, directions, strict=True)).backward()
    expected = gradients(model)
    packed = model(
        torch.cat(documents, 1), attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=True
    )
    (packed.logits * torch.cat(directions, 1)).sum().backward()
    for i, states in enumerate(packed.hidden_states):
        torch.testing.assert_close(states, torch.cat([out.hidden_states[i] for out in alone], 1))
    for i, (key, value) in enumerate(packed.past_key_values):
        torch.testing.assert_close(key, torch.cat([out.past_key_values[i][0] for out in alone], 2))
        torch.testing.assert_close(value, torch.cat([out.past_key_values[i][1] for out in alone], 2))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_a_packed_row_is_that_of_all_predictions_inside_documents(backend: str) -> None:
    model, lengths = tiny_model(attn_implementation=backend), [3, 1, 5]
    documents = [tiny_ids(1, length, seed=length) for length in lengths]
    mask, positions = pack_documents(lengths)
    labels = torch.cat(documents, 1).masked_fill(positions == 0, -100)  # nobody predicts a document's first token
    arguments = {"attention_mask": mask, "position_ids": positions}
    losses = [
        (length - 1) * model(ids, labels=ids).loss for ids, length in zip(documents, lengths, strict=True) if length > 1
    ]
    expected = sum(losses) / sum(length - 1 for length in lengths)
    torch.testing.assert_close(model(torch.cat(documents, 1), labels=labels, **arguments).loss, expected)
    torch.testing.assert_close(model.loss(torch.cat(documents, 1), labels, **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_separates_documents_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    model = tiny_model(attn_implementation=backend).to(dtype)
    mask, positions = pack_documents([3, 4])
    one, other = tiny_ids(1, 7), torch.cat((tiny_ids(1, 3, seed=5), tiny_ids(1, 7)[:, 3:]), 1)
    logits = [model(ids, attention_mask=mask, position_ids=positions).logits[:, 3:] for ids in (one, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("lengths", [[], [0], [2, 0, 1], [3, -1]])
def test_a_document_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(InputError, match="document lengths must be positive") as caught:
        pack_documents(lengths)
    assert str(lengths) in str(caught.value)


def test_lengths_may_be_a_tensor_but_not_fractions() -> None:
    for one, other in zip(pack_documents(torch.tensor([2, 1])), pack_documents([2, 1]), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match=r"must be integers, got \[2.0, 1\]"):
        pack_documents([2.0, 1])


def test_a_pack_of_another_length_than_the_row_is_refused() -> None:
    mask, positions = pack_documents([2, 4])
    with pytest.raises(InputError, match=r"\(2, 7\), got \(1, 6\)"):
        tiny_model()(tiny_ids(), position_ids=positions)
    with pytest.raises(InputError, match=r"\(2, 1, 7, 7\), got \(1, 1, 6, 6\)"):
        tiny_model()(tiny_ids(), attention_mask=mask)


# --- masks of four dimensions ---


def additive(visible: Tensor, lowest: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, lowest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", [0, 3])
def test_bool_and_additive_masks_say_the_same_as_a_padding_mask(backend: str, past: int) -> None:
    model = tiny_model(attn_implementation=backend)
    padding = torch.cat((LEFT_PADDED[:, :past], LEFT_PADDED), 1)
    cache = model(tiny_ids(2, past, seed=3)).past_key_values if past else None
    expected = model(tiny_ids(), attention_mask=padding, past_key_values=cache).logits
    causal = torch.ones(7, 7 + past, dtype=torch.bool).tril(past)
    visible = causal & padding.bool()[:, None, None, :]  # (2, 1, 7, 7 + past)
    real = LEFT_PADDED.bool()
    per_head = visible.expand(2, 2, 7, 7 + past)
    lowest = torch.finfo(torch.float32).min
    for mask in (
        visible,
        additive(visible, lowest),
        additive(visible, -torch.inf),
        per_head,
        additive(per_head, -1e30),
    ):
        out = model(tiny_ids(), attention_mask=mask, past_key_values=cache).logits
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out[real], expected[real])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_four_dimensions_carries_causality_itself_for_each_row_and_head(backend: str) -> None:
    model = tiny_model(attn_implementation=backend, num_hidden_layers=1)
    ids = tiny_ids()
    later = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % 20), 1)

    def feels_the_last_token(mask: Tensor) -> list[bool]:
        first = [model(x, attention_mask=mask).logits[:, 0] for x in (ids, later)]
        return (first[0] != first[1]).any(-1).tolist()

    everything = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    assert feels_the_last_token(CAUSAL[None, None]) == [False, False]
    assert feels_the_last_token(everything) == [True, True]
    assert feels_the_last_token(torch.stack((CAUSAL, everything[0, 0]))[:, None]) == [False, True]
    assert feels_the_last_token(torch.stack((CAUSAL, everything[0, 0]))[None]) == [True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_additive_mask_shifts_scores_and_can_be_learned(backend: str) -> None:
    model = tiny_model(attn_implementation=backend)
    bias = torch.randn(1, 2, 7, 7).masked_fill(~CAUSAL, -torch.inf).requires_grad_()
    model(tiny_ids(), attention_mask=bias).logits.square().sum().backward()
    assert bool(bias.grad.isfinite().all())
    assert bool((bias.grad[..., CAUSAL][..., 1:] != 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["bool", "lowest", "-inf", "float64"])
def test_a_row_that_sees_nothing_is_never_nan(backend: str, dtype: torch.dtype, form: str) -> None:
    model = tiny_model(attn_implementation=backend).to(dtype)
    visible = CAUSAL.clone()[None, None].repeat(2, 1, 1, 1)
    visible[0, :, 2] = visible[1] = False
    mask = {
        "bool": visible,
        "lowest": additive(visible, torch.finfo(dtype).min, dtype),
        "-inf": additive(visible, -torch.inf, dtype),
        "float64": additive(visible, torch.finfo(torch.float64).min, torch.float64),
    }[form]
    out = model(tiny_ids(), attention_mask=mask, labels=tiny_ids())
    out.loss.backward()
    assert bool(out.logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# --- what sdpa is given ---


class Spy:
    """Records the mask arguments of every call of torch's fused attention."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[bool, bool]] = []  # is_causal, whether a mask was given
        self.real = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", self)

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        self.calls.append((options["is_causal"], options["attn_mask"] is not None))
        return self.real(*tensors, **options)


FAST, PLAIN, MASKED = (True, False), (False, False), (False, True)


@pytest.mark.parametrize(
    ("length", "cached", "mask", "wanted"),
    [
        (7, 0, None, FAST),
        (7, 0, torch.ones(2, 7), FAST),
        (7, 0, torch.ones(2, 7, dtype=torch.bool), FAST),
        (7, 0, LEFT_PADDED, MASKED),
        (7, 0, LEFT_PADDED.flip(1), MASKED),
        (7, 0, CAUSAL[None, None], MASKED),
        (1, 0, None, PLAIN),
        (1, 6, None, PLAIN),
        (1, 6, torch.ones(2, 7), PLAIN),
        (1, 6, LEFT_PADDED, MASKED),
        (3, 4, None, MASKED),  # the kernel's triangle would sit upper left
        (3, 4, torch.ones(2, 7), MASKED),
    ],
)
def test_sdpa_gets_the_flag_where_the_triangle_is_all_and_a_tensor_only_where_needed(
    length: int, cached: int, mask: Tensor | None, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(attn_implementation="sdpa")
    past = model(tiny_ids(2, cached, seed=4)).past_key_values if cached else None
    spy = Spy(monkeypatch)
    for training in (False, True):
        model.train(training)(tiny_ids(2, length), attention_mask=mask, past_key_values=past)
    assert spy.calls == [wanted] * 4


@examples(60)
@given(data=st.data(), config=configs(**NO_DROPOUT), seed=seeds)
def test_the_fast_path_is_taken_exactly_where_nothing_is_hidden_and_nothing_is_ever_nan(
    data: st.DataObject, config: OpenLlamaConfig, seed: int
) -> None:
    batch = data.draw(batches(config))
    model = model_of(config, seed, "sdpa")
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        out = model(**batch)
    several = length_of(batch) > 1
    complete = bool(is_real(batch).all())
    assert spy.calls == [(several, False) if complete else MASKED] * config.num_hidden_layers
    out.logits.square().mean().backward()
    assert bool(out.logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_the_mask_is_built_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counting(*arguments: Any) -> Any:
        made.append(arguments[-1])
        return prepare_mask(*arguments)

    monkeypatch.setattr("openllama.model.prepare_mask", counting)
    tiny_model(attn_implementation="sdpa", num_hidden_layers=3)(tiny_ids(), attention_mask=LEFT_PADDED)
    assert made == ["sdpa"]
