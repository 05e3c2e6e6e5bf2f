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
    """Right-padded ids without padding inside, or embeddings; a mask that may agree, and positions."""
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
    hf_labels = labels
    if fields["problem_type"] == MULTI and fields["num_labels"] == 1:
        hf_labels = labels.reshape(rows, 1)
    theirs = everything(hf, batch, hf_labels)
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
    batch.pop("position_ids", None)
    if "input_ids" in batch and config.pad_token_id is not None:  # the last token of all, in both halves
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == config.pad_token_id, 1)
        batch["input_ids"][batch["input_ids"] == config.pad_token_id] = 2
    hf = hf_model(config, seed, KIND)
    ours = our_twin(hf, config)
    if labelled:
        batch["labels"] = torch.zeros(len(next(iter(batch.values()))), dtype=torch.long)
    found = []
    for model in (ours, hf):
        arguments = dict(batch)
        if cached:
            past_ids = torch.full((len(next(iter(batch.values()))), 3), 2)
            arguments["past_key_values"] = model.model(past_ids).past_key_values
            if "attention_mask" in batch:
                mask = batch["attention_mask"]
                arguments["attention_mask"] = torch.cat((mask.new_ones(len(mask), 3), mask), dim=1)
        found.append(model(**arguments, return_dict=False, output_hidden_states=True))
    ours_out, hf_out = found
    assert isinstance(ours_out, tuple)
    assert [type(value) is Tensor for value in ours_out] == [type(value) is Tensor for value in hf_out]
    flat = [[t for value in out for t in flatten(value)] for out in found]
    assert len(flat[0]) == len(flat[1])
    assert all(map(torch.equal, *flat))
    compared["models, classifier: tuples and caches"] += 1


def flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flatten(part)]


@pytest.mark.parametrize("labels", [torch.tensor([5.0, -1.0]), torch.tensor([[5], [-1]]), torch.tensor([True, False])])
def test_numbers_of_any_type_serve_regression_on_one_label(labels: Tensor) -> None:
    config = OpenLlamaConfig(
        vocab_size=23, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    hf = hf_model(config, 0, KIND)
    ours = our_twin(hf, config)
    ids = torch.randint(1, 23, (2, 7))
    assert torch.equal(ours(ids, labels=labels).loss, hf(ids, labels=labels).loss)
