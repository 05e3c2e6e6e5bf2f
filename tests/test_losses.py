"""Losses against their definitions, written as loops in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import losses
from openllama.errors import InputError
from openllama.losses import causal_lm_loss, chunked_causal_lm_loss, classification_loss
from tests.draw import examples
from tests.parity.draws import seeds


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and labels (B, T), some ignored, at least one not."""
    generator = torch.Generator().manual_seed(draw(seeds))
    batch, length, vocab = draw(st.integers(1, 3)), draw(st.integers(2, 8)), draw(st.integers(2, 20))
    logits = 3 * torch.randn(batch, length, vocab, generator=generator)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    labels[0, 1] = 0
    return logits, labels


@examples(40)
@given(drawn=predictions(), dtype=st.sampled_from((torch.int64, torch.int32, torch.int16)))
def test_each_position_is_scored_against_the_next_label(drawn: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    logits, labels = drawn
    surprises = [
        -logits[b, t].double().log_softmax(-1)[labels[b, t + 1]]
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[b, t + 1] != -100
    ]
    expected = torch.stack(surprises).mean().float()
    torch.testing.assert_close(causal_lm_loss(logits, labels.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 5, 50).to(dtype), torch.randint(50, (2, 5))
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, causal_lm_loss(logits.float(), labels))
    assert classification_loss(logits[:, 0], labels[:, 0], "single_label_classification").dtype == torch.float32


def test_float64_logits_are_scored_in_float64() -> None:
    logits, labels = torch.randn(2, 5, 50, dtype=torch.float64), torch.randint(50, (2, 5))
    assert causal_lm_loss(logits, labels).dtype == torch.float64


@examples(30)
@given(drawn=predictions(), rows=st.integers(1, 30))
def test_chunks_give_the_same_loss_and_gradients(drawn: tuple[Tensor, Tensor], rows: int) -> None:
    hidden, labels = drawn
    width, vocab = hidden.shape[-1], max(int(labels.max()) + 1, 2)
    weight = torch.randn(vocab, width, generator=torch.Generator().manual_seed(rows))
    found = []
    for chunked in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "CHUNK_LOGITS", rows * vocab)
            if chunked:
                loss = chunked_causal_lm_loss(x, labels, w)
                loss.backward()
            else:
                loss = causal_lm_loss(F.linear(x, w), labels)
                loss.backward()
        found.append((loss.detach(), x.grad, w.grad))
    torch.testing.assert_close(*found)


# 6 rows, 10 columns: chunks of 6 and 4 columns, 36 and 24 logits
@pytest.mark.parametrize(("kept", "computed"), [(0, 120), (35, 120), (36, 84), (59, 84), (60, 60)])
def test_logits_are_computed_in_chunks_and_again_where_they_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, kept: int, computed: int
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 40)
    monkeypatch.setattr(losses, "KEPT_LOGITS", kept)
    sizes: list[int] = []
    linear = losses.linear

    def spy(rows: Tensor, weight: Tensor) -> Tensor:
        sizes.append(len(rows) * len(weight))
        return linear(rows, weight)

    monkeypatch.setattr(losses, "linear", spy)
    weight = torch.zeros(10, 4, requires_grad=True)
    loss = chunked_causal_lm_loss(torch.zeros(3, 3, 4), torch.zeros(3, 3, dtype=torch.long), weight)
    saved = [t for t in loss.grad_fn.saved_tensors if t.shape[:1] == (6,) and t.ndim == 2 and t.shape[1] != 4]
    assert sum(t.numel() for t in saved) <= kept
    loss.backward()
    assert sum(sizes) == computed
    assert max(sizes) <= 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_the_same_bits_in_every_backward_pass(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 40)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(dtype).requires_grad_()
    found = []
    for kept in (0, 2**25):
        monkeypatch.setattr(losses, "KEPT_LOGITS", kept)
        loss = chunked_causal_lm_loss(hidden, torch.arange(10).view(2, 5), weight)
        found += [(loss.detach(), *torch.autograd.grad(loss, (hidden, weight), retain_graph=True)) for _ in range(2)]
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("labels", [torch.tensor([[5]]), torch.full((1, 3), -100)])
def test_with_nothing_to_predict_the_loss_is_nan_in_both(labels: Tensor) -> None:
    logits = torch.randn(*labels.shape, 7)
    assert causal_lm_loss(logits, labels).isnan()
    assert chunked_causal_lm_loss(logits, labels, torch.eye(7)).isnan()


def test_with_nothing_to_predict_no_weight_is_told_to_move() -> None:
    hidden, weight = torch.randn(1, 3, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    chunked_causal_lm_loss(hidden, torch.full((1, 3), -100), weight).backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_second_derivative_of_the_chunked_loss_is_refused() -> None:
    hidden = torch.randn(1, 3, 7, requires_grad=True)
    loss = chunked_causal_lm_loss(hidden, torch.tensor([[1, 2, 3]]), torch.eye(7))
    with pytest.raises(InputError, match=r"model\(input_ids, labels=labels\)"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_function_transforms_of_the_chunked_loss_are_those_of_the_whole() -> None:
    hidden, weight, labels = torch.randn(2, 4, 7), torch.randn(5, 7), torch.tensor([[1, 2, 3, 4], [0, 1, -100, 2]])

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return causal_lm_loss(hidden @ weight.T, labels)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_causal_lm_loss(hidden, labels, weight)

    for argument in (0, 1):
        found, expected = (torch.func.grad(loss, argument)(hidden, weight) for loss in (chunked, whole))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.hessian(chunked)(hidden, weight), torch.func.hessian(whole)(hidden, weight))


def test_classification_losses_are_what_their_names_say() -> None:
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    single = classification_loss(logits, torch.tensor([0, 1], dtype=torch.int32), "single_label_classification")
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(single, -(probabilities[0, 0].log() + probabilities[1, 1].log()) / 2)
    targets = torch.tensor([[1, 0], [1, 1]])
    multi = classification_loss(logits, targets, "multi_label_classification")
    chances = logits.sigmoid().where(targets == 1, 1 - logits.sigmoid())
    torch.testing.assert_close(multi, -chances.log().mean())
    regression = classification_loss(logits[:, :1], torch.tensor([2, 1]), "regression")
    torch.testing.assert_close(regression, torch.tensor((1.0 + 0.25) / 2))
