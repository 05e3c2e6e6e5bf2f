"""The classifier gives the numbers of transformers 4.31.0, bit for bit, where rows are padded on the right.

There HF's count of tokens that are not padding and our last such token are the same place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig
from openllama.checkpoint import hf_to_native
from tests.draw import examples
from tests.oracle import compared
from tests.parity.draws import MASK_DTYPES, Batch, configs, hf_model, our_twin, seeds
from tests.tiny import tiny_config, tiny_ids

KIND = "OpenLlamaForSequenceClassification"
REGRESSION, SINGLE, MULTI = "regression", "single_label_classification", "multi_label_classification"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


@st.composite
def problems(draw: st.DrawFn, rows: int) -> tuple[dict[str, Any], Tensor]:
    """Config fields and labels: of each kind, with ``problem_type`` set, or left open where HF finds the same."""
    generator = torch.Generator().manual_seed(draw(seeds))
    kind, count = draw(st.sampled_from((REGRESSION, SINGLE, MULTI))), draw(st.integers(1, 5))
    found = {REGRESSION: count == 1, SINGLE: count > 1, MULTI: count > 1}[kind]
    shape = (rows,) if count == 1 and kind == REGRESSION and draw(st.booleans()) else (rows, count)
    if kind == SINGLE:
        labels = torch.randint(count, (rows, 1) if draw(st.booleans()) else (rows,), generator=generator)
        if draw(st.booleans()):
            labels[1:].masked_fill_(torch.rand(labels[1:].shape, generator=generator) < 0.4, -100)
    elif kind == MULTI:
        labels = torch.rand(shape, generator=generator)
        labels = labels if draw(st.booleans()) else labels.round()
    else:
        labels = 3 * torch.randn(shape, generator=generator)
    problem_type = None if found and draw(st.booleans()) else kind
    return {"num_labels": count, "problem_type": problem_type}, labels


@st.composite
def texts(draw: st.DrawFn, config: OpenLlamaConfig) -> Batch:
    """Ids padded on the right only, or embeddings; perhaps a mask and positions."""
    length = draw(st.integers(1, 14))
    rows = 1 if config.pad_token_id is None else draw(st.integers(1, 4))  # HF takes no more without padding id
    generator = torch.Generator().manual_seed(draw(seeds))
    ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
    real = torch.arange(length) < ends
    ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
    batch = {}
    if config.pad_token_id is not None and config.pad_token_id >= 0:
        pad = config.pad_token_id
        ids = ids.where(ids != pad, (pad + 1) % config.vocab_size).where(real, pad)
    if draw(st.integers(0, 3)) == 0:
        batch["inputs_embeds"] = torch.randn(rows, length, config.hidden_size, generator=generator)
    else:
        batch["input_ids"] = ids
    if draw(st.booleans()):
        batch["attention_mask"] = real.to(draw(st.sampled_from(MASK_DTYPES)))
    if draw(st.booleans()):
        batch["position_ids"] = torch.randint(length, (rows, length), generator=generator)
    return batch


def everything(model: Any, batch: Batch, labels: Tensor) -> list[tuple[str, Tensor]]:
    """All that a forward and a backward pass give, by name; embeddings get a gradient too."""
    if "inputs_embeds" in batch:
        batch = {**batch, "inputs_embeds": batch["inputs_embeds"].clone().requires_grad_()}
    out = model(**batch, labels=labels, output_hidden_states=True, output_attentions=True)
    out.loss.backward()
    names = [("loss", out.loss), ("logits", out.logits)]
    names += [(f"hidden state {i}", state) for i, state in enumerate(out.hidden_states)]
    names += [(f"attention {i}", weights) for i, weights in enumerate(out.attentions)]
    names += [(f"cache {i}", tensor) for i, layer in enumerate(out.past_key_values) for tensor in layer]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names += [(f"gradient of {name}", grad) for name, grad in sorted(hf_to_native(found).items())]
    if "inputs_embeds" in batch:
        names.append(("gradient of inputs_embeds", batch["inputs_embeds"].grad))
    return names


def assert_equal(ours: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    pairs = zip(ours, theirs, strict=True)
    assert [name for (name, value), (_, expected) in pairs if not torch.equal(value, expected)] == []


@examples(60)
@given(data=st.data(), drawn=configs(hidden_dropout_prob=0.0), seed=seeds)
def test_logits_loss_and_gradients_of_every_kind_of_problem(
    data: st.DataObject, drawn: OpenLlamaConfig, seed: int
) -> None:
    batch = data.draw(texts(drawn))
    rows = len(next(iter(batch.values())))
    fields, labels = data.draw(problems(rows))
    config = dataclasses.replace(drawn, **fields)
    hf = hf_model(config, seed, KIND)
    ours = our_twin(hf, config)
    theirs = everything(hf, batch, labels)
    assert_equal(everything(ours, batch, labels), theirs)
    assert ours.config == config
    assert hf.config.problem_type in (REGRESSION, SINGLE, MULTI)
    if hf.config.problem_type == SINGLE:
        dtype = data.draw(st.sampled_from(INTEGERS))
        assert torch.equal(ours(**batch, labels=labels.to(dtype)).loss, theirs[0][1])
    compared["models, classifier: every kind of problem"] += 1


@examples(20)
@given(data=st.data(), config=configs(num_labels=3), seed=seeds, labelled=st.booleans(), cached=st.booleans())
def test_tuples_and_continued_caches_are_hf_s(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, labelled: bool, cached: bool
) -> None:
    batch = data.draw(texts(config))
    rows = len(next(iter(batch.values())))
    if labelled:
        batch["labels"] = torch.zeros(rows, dtype=torch.long)
    if cached and "attention_mask" in batch:
        mask = batch["attention_mask"]
        batch["attention_mask"] = torch.cat((mask.new_ones(rows, 3), mask), dim=1)
    hf = hf_model(config, seed, KIND)
    found = []
    for model in (our_twin(hf, config), hf):
        past = model.model(torch.full((rows, 3), 2)).past_key_values if cached else None
        out = model(**batch, past_key_values=past, return_dict=False, output_hidden_states=True)
        assert isinstance(out, tuple)
        found.append([flatten(value) for value in out])
    ours, theirs = found
    assert list(map(len, ours)) == list(map(len, theirs))
    assert all(torch.equal(*pair) for values in zip(ours, theirs, strict=True) for pair in zip(*values, strict=True))
    compared["models, classifier: tuples and caches"] += 1


def flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flatten(part)]


@pytest.mark.parametrize("labels", [torch.tensor([5.0, -1.0]), torch.tensor([[5], [-1]]), torch.tensor([True, False])])
def test_numbers_of_any_type_serve_regression_on_one_label(labels: Tensor) -> None:
    config = tiny_config(num_labels=1)
    hf = hf_model(config, 0, KIND)
    ours = our_twin(hf, config)
    assert torch.equal(ours(tiny_ids(), labels=labels).loss, hf(tiny_ids(), labels=labels).loss)
