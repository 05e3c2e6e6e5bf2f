"""What this package does where transformers 4.31.0 does something else: the rows of docs/fidelity.md, by number.

That transformers does what the page says is shown in tests/parity/test_fidelity_parity.py, and so is
every row in which the two do the same.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.attention import attention
from openllama.checkpoint import hf_to_native
from openllama.errors import BackendError, ConfigError, InputError, NumericalError
from openllama.masks import causal_mask, prepare_mask
from openllama.rope import cos_sin, frequencies
from tests.checkpoints import hf_weights, write_checkpoint
from tests.tiny import tiny_config, tiny_ids, tiny_model

ROOT = Path(__file__).parents[1]
BACKENDS = ("eager", "sdpa")
HALVES = (torch.bfloat16, torch.float16)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def rows_tested(file: str) -> set[int]:
    return {int(row) for row in re.findall(r"def test_row_(\d\d)_", (ROOT / file).read_text(encoding="utf-8"))}


def test_the_page_has_35_rows_and_each_has_its_test() -> None:
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    rows = [(int(number), verdict) for number, verdict in re.findall(r"^\| (\d+) \|.*\| (same|ours) \|", page, re.M)]
    assert [number for number, _ in rows] == list(range(1, 36))
    assert rows_tested("tests/parity/test_fidelity_parity.py") == set(range(1, 36))
    assert rows_tested("tests/test_fidelity.py") >= {number for number, verdict in rows if verdict == "ours"}


# ---- attention, masks, training


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_04_attention_dropout_acts_on_every_backend(backend: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 3, 6, 6)  # 3 heads, 6 tokens; with the unit matrix as values
    value = torch.eye(6).expand(1, 3, 6, 6)  # the output is the weights themselves
    mask = prepare_mask(None, 6, 6, query, backend)
    weights, _ = attention(query, key, value, mask, 0.0, backend)
    dropped, _ = attention(query, key, value, mask, 0.4, backend)
    kept = dropped != 0
    assert 0 < int((~kept & (weights != 0)).sum()) < int((weights != 0).sum())
    torch.testing.assert_close(dropped, (weights / 0.6).where(kept, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_04_attention_dropout_acts_in_training_only(backend: str) -> None:
    model = tiny_model(attn_implementation=backend, hidden_dropout_prob=0.0, attention_dropout_prob=0.5)
    evaluated, again = model(tiny_ids()).logits, model(tiny_ids()).logits
    trained = model.train()(tiny_ids()).logits
    assert torch.equal(evaluated, again)
    assert not torch.allclose(trained[:, 1:], evaluated[:, 1:], rtol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_05_a_mask_is_honoured_in_training(backend: str) -> None:
    model = tiny_model(attn_implementation=backend, **NO_DROPOUT)
    assert model.config.use_memory_efficient_attention
    evaluated = model(tiny_ids(), attention_mask=LEFT_PADDED).logits
    model.train()
    assert torch.equal(model(tiny_ids(), attention_mask=LEFT_PADDED).logits, evaluated)
    assert not torch.allclose(model(tiny_ids()).logits[0], evaluated[0])


def test_row_06_training_on_a_cpu_uses_sdpa_with_xformers_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    model = OpenLlamaForCausalLM(tiny_config()).train()
    assert model.model.attn_implementation == "sdpa"
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("installed", "said"), [(True, "runs on CUDA, the model is on cpu"), (False, "pip install")])
def test_row_06_xformers_by_name_is_refused_where_it_cannot_run(
    installed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(BackendError, match=said):
        OpenLlamaForCausalLM(tiny_config(), attn_implementation="xformers")


@pytest.mark.parametrize(("length", "cached"), [(3, 4), (1, 4), (3, 0)])
def test_row_07_the_last_query_sees_every_cached_key_whatever_the_backend(length: int, cached: int) -> None:
    visible = causal_mask(length, length + cached, torch.device("cpu"))
    for backend in ("eager", "sdpa", "xformers"):
        mask = prepare_mask(None, length, length + cached, torch.zeros(1, length, 4), backend)
        if mask.tensor is None:
            assert mask.causal == (length > 1)
            assert length == 1 or not cached  # the plain triangle, or all there is
        else:
            tensor = mask.tensor[0, 0]
            assert torch.equal(tensor if tensor.dtype == torch.bool else tensor == 0, visible)


def test_row_07_attentions_come_from_eager_whatever_the_backend() -> None:
    fused, eager = (tiny_model(attn_implementation=backend) for backend in ("sdpa", "eager"))
    out, specified = (m(tiny_ids(), attention_mask=LEFT_PADDED, output_attentions=True) for m in (fused, eager))
    assert all(map(torch.equal, out.attentions, specified.attentions))
    assert torch.equal(out.logits, specified.logits)
    assert fused(tiny_ids()).attentions is None


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan")])
def test_row_08_a_padding_mask_holds_zeros_and_ones_only(value: float) -> None:
    mask = LEFT_PADDED.float()
    mask[0, 0] = value
    with pytest.raises(InputError, match=r"only 1 \(attend\) and 0 \(padding\)"):
        tiny_model()(tiny_ids(), attention_mask=mask)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_08_a_mask_of_four_dimensions_is_used_as_it_is(backend: str, training: bool) -> None:
    model = tiny_model(attn_implementation=backend, **NO_DROPOUT).train(training)
    real = LEFT_PADDED.bool()
    visible = causal_mask(7, 7, real.device) & real[:, None, None]
    additive = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    expected = model(tiny_ids(), attention_mask=LEFT_PADDED).logits[real]
    for mask in (visible, additive):
        torch.testing.assert_close(model(tiny_ids(), attention_mask=mask).logits[real], expected)
    open_to_all = model(tiny_ids(), attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.bool)).logits[real]
    assert not torch.allclose(open_to_all, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_row_09_a_fully_masked_row_is_finite_in_sdpa_and_the_rest_is_eager_s(dtype: torch.dtype) -> None:
    fused, eager = (tiny_model(attn_implementation=b, initializer_range=0.2).to(dtype) for b in ("sdpa", "eager"))
    mask = LEFT_PADDED.clone()
    mask[1] = 0
    logits, expected = (m(tiny_ids(), attention_mask=mask).logits for m in (fused, eager))
    assert bool(logits.isfinite().all())
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_10_float64_works_throughout(backend: str) -> None:
    single = tiny_model(attn_implementation=backend)
    double = tiny_model(attn_implementation=backend).double()
    arguments = {"attention_mask": LEFT_PADDED, "labels": tiny_ids(), "output_hidden_states": True}
    expected, out = single(tiny_ids(), **arguments), double(tiny_ids(), **arguments)
    assert out.loss.dtype == out.logits.dtype == torch.float64
    torch.testing.assert_close(out.loss.float(), expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits[1].float(), expected.logits[1], rtol=1e-3, atol=1e-4)
    assert all(bool(state.isfinite().all()) for state in out.hidden_states)
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in double.parameters())


def test_row_10_softmax_and_norm_of_a_float64_model_are_float64() -> None:
    out = tiny_model().double()(tiny_ids(), output_attentions=True)
    for tensor in (out.attentions[-1], out.logits):
        assert not torch.equal(tensor, tensor.float().double())


@pytest.mark.parametrize("dtype", HALVES)
def test_row_12_the_loss_of_a_half_precision_model_is_float32(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    out = model(tiny_ids(), labels=tiny_ids())
    assert out.logits.dtype == dtype
    assert out.loss.dtype == torch.float32
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), tiny_ids()[:, 1:].flatten())
    assert torch.equal(out.loss, expected)
    assert model.loss(tiny_ids(), tiny_ids()).dtype == torch.float32
    classifier = tiny_model(OpenLlamaForSequenceClassification, num_labels=3).to(dtype)
    assert classifier(tiny_ids(), labels=torch.tensor([0, 2])).loss.dtype == torch.float32


@pytest.mark.parametrize("labels", [torch.randn(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float16)])
def test_row_12_the_type_of_the_labels_does_not_set_that_of_the_loss(labels: Tensor) -> None:
    for kind in ("regression", "multi_label_classification"):
        model = tiny_model(OpenLlamaForSequenceClassification, num_labels=3, problem_type=kind)
        loss = model(tiny_ids(), labels=labels).loss
        assert loss.dtype == torch.float32
        assert torch.equal(loss, model(tiny_ids(), labels=labels.float()).loss)


# ---- positions


@pytest.mark.parametrize("dtype", HALVES)
def test_row_13_rotary_tables_are_rounded_float32_ones_at_any_length(dtype: torch.dtype) -> None:
    positions = torch.arange(2100)[None]
    rounded = cos_sin(positions, 12, None, 16, 2100, dtype)
    exact = positions[0, :, None].double() * 10000.0 ** (-torch.arange(0, 12, 2).double() / 12)
    for table, truth in zip(rounded, (exact.cos(), exact.sin()), strict=True):
        assert table.dtype == dtype
        assert float((table[0, :, 0, 6:].double() - truth).abs().max()) < 0.003


def test_row_14_a_long_call_does_not_change_later_ones() -> None:
    model = tiny_model(**DYNAMIC)
    before = model(tiny_ids()).logits
    model(tiny_ids(length=40))
    assert torch.equal(model(tiny_ids()).logits, before)


def test_row_16_stored_frequencies_are_dropped_and_reported_if_they_are_others() -> None:
    config = tiny_config(**DYNAMIC)
    weights = hf_weights(config)
    stored = [name for name in weights if name.endswith("rotary_emb.inv_freq")]
    assert len(stored) == config.num_hidden_layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not [name for name in hf_to_native(weights) if "inv_freq" in name]
    weights[stored[1]] = frequencies(config.head_dim, config.rope_scaling, 16, key_length=40)
    with pytest.warns(UserWarning, match=f"{stored[1]} is not what the configuration implies"):
        assert not [name for name in hf_to_native(weights) if "inv_freq" in name]


def test_row_17_any_position_works_and_only_distances_count() -> None:
    model = tiny_model(OpenLlamaModel)
    near, far = (model(tiny_ids(), position_ids=torch.arange(7) + start)[0] for start in (0, 500))
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)
    spread = model(tiny_ids(), position_ids=torch.arange(7) * 100)[0]
    assert not torch.allclose(spread, near, rtol=0.01, atol=0.01)


def test_row_17_a_negative_position_is_refused() -> None:
    with pytest.raises(InputError, match="must not be negative, got -2"):
        tiny_model()(tiny_ids(), position_ids=torch.arange(7) - 2)


def test_row_17_the_key_length_sets_the_dynamic_base_not_the_positions() -> None:
    model, unscaled = tiny_model(OpenLlamaModel, **DYNAMIC), tiny_model(OpenLlamaModel)
    far = torch.arange(7) + 100
    assert torch.equal(model(tiny_ids(), position_ids=far)[0], unscaled(tiny_ids(), position_ids=far)[0])
    long = tiny_ids(length=20)  # beyond max_position_embeddings
    low = torch.zeros(20, dtype=torch.long)
    low[-1] = 5
    assert not torch.allclose(model(long, position_ids=low)[0], unscaled(long, position_ids=low)[0], rtol=1e-3)


# ---- classification


def test_row_20_the_last_token_that_is_not_padding_decides() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, pad_token_id=0)
    ids = torch.tensor([[0, 0, 5, 6], [5, 0, 6, 0], [5, 6, 7, 0]])
    scores = model.score(model.model(ids).last_hidden_state)
    assert torch.equal(model(ids).logits, scores[[0, 1, 2], [3, 2, 2]])
    everything_masked = torch.zeros_like(ids)
    everything_masked[:, 0] = 1  # the mask is not what says which token is padding
    scores = model.score(model.model(ids, attention_mask=everything_masked).last_hidden_state)
    assert torch.equal(model(ids, attention_mask=everything_masked).logits, scores[[0, 1, 2], [3, 2, 2]])


def test_row_20_without_a_padding_id_the_last_token_decides_in_any_batch() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, pad_token_id=None)
    scores = model.score(model.model(tiny_ids()).last_hidden_state)
    assert torch.equal(model(tiny_ids()).logits, scores[:, -1])


def test_row_20_a_row_of_nothing_but_padding_is_refused() -> None:
    model = tiny_model(OpenLlamaForSequenceClassification, pad_token_id=0)
    with pytest.raises(InputError, match=r"row 1 of input_ids is nothing but padding \(id 0\)"):
        model(torch.tensor([[5, 6], [0, 0], [0, 0]]))


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.rand(2, 2)])
def test_row_21_a_call_with_labels_leaves_the_config_as_it_was(labels: Tensor) -> None:
    model = tiny_model(OpenLlamaForSequenceClassification)
    before = model.config
    model(tiny_ids(), labels=labels)
    assert model.config is before
    assert model.config.problem_type is None


# ---- caches, embeddings


def test_row_22_a_cache_and_checkpointing_together_are_refused() -> None:
    model = tiny_model(**NO_DROPOUT)
    past = model(tiny_ids()).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="past_key_values cannot be combined with gradient checkpointing"):
        model.train()(tiny_ids(), past_key_values=past)
    assert model.eval()(tiny_ids(), past_key_values=past).past_key_values.get_seq_length() == 14


def test_row_22_checkpointing_switches_the_cache_off_with_a_warning() -> None:
    model = tiny_model(**NO_DROPOUT).train()
    assert model(tiny_ids()).past_key_values is not None
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache is switched off"):
        assert model(tiny_ids()).past_key_values is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tiny_ids(), use_cache=False)
        model.gradient_checkpointing_disable()
        assert model(tiny_ids()).past_key_values is not None


def test_row_23_the_output_embeddings_of_a_shared_model_use_the_table() -> None:
    model = tiny_model(shared_input_output_embedding=True)
    table = model.get_input_embeddings()
    assert model.get_output_embeddings().weight is table.weight
    model.set_output_embeddings(table)
    with pytest.raises(InputError, match="the output is the input table; use set_input_embeddings"):
        model.set_output_embeddings(torch.nn.Linear(24, 23, bias=False))
    new = torch.nn.Embedding(23, 24)
    before = model(tiny_ids()).logits
    model.set_input_embeddings(new)
    assert model.get_output_embeddings().weight is new.weight
    assert not torch.allclose(model(tiny_ids()).logits, before)


@pytest.mark.parametrize("size", [17, 40])
def test_row_24_resizing_keeps_the_padding_row(size: int) -> None:
    model = tiny_model(pad_token_id=3)
    model.resize_token_embeddings(size)
    table = model.get_input_embeddings()
    assert table.padding_idx == 3
    ids = torch.tensor([[3, 5, 6]])
    model.model(ids).last_hidden_state.sum().backward()
    assert not table.weight.grad[3].any()
    assert table.weight.grad[5].any()


@pytest.mark.parametrize("pad", [23, 24, -24])
def test_row_26_a_padding_id_outside_the_vocabulary_is_refused(pad: int) -> None:
    with pytest.raises(ConfigError, match=f"pad_token_id {pad} is outside the vocabulary of 23"):
        tiny_config(pad_token_id=pad)


def test_row_28_an_integer_factor_is_a_float() -> None:
    scaling = OpenLlamaConfig(rope_scaling={"type": "linear", "factor": 2}).rope_scaling
    assert scaling == {"type": "linear", "factor": 2.0}
    assert isinstance(scaling["factor"], float)
    for factor in (math.inf, math.nan, True):
        with pytest.raises(ConfigError, match='factor": a number above 1'):
            OpenLlamaConfig(rope_scaling={"type": "linear", "factor": factor})


def test_row_31_the_shared_head_is_a_plain_linear() -> None:
    model = tiny_model(shared_input_output_embedding=True)
    hidden = model.model(tiny_ids()).last_hidden_state
    assert torch.equal(model(tiny_ids()).logits, F.linear(hidden, model.get_input_embeddings().weight))


# ---- generation, loading, labels


@pytest.mark.parametrize("max_length", [7, 3])
def test_row_32_a_max_length_that_leaves_no_room_is_refused(max_length: int) -> None:
    with pytest.raises(InputError, match=f"max_length {max_length} leaves no room after a prompt of 7 tokens"):
        tiny_model().generate(tiny_ids(), max_length=max_length)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_row_33_weights_keep_the_type_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), extra={"torch_dtype": "float32"})
    write_checkpoint(tmp_path, {name: weight.to(dtype) for name, weight in hf_weights(config).items()}, config)
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_row_34_labels_of_any_integer_type_give_the_loss_of_int64(dtype: torch.dtype) -> None:
    def losses(labels: Tensor, classes: Tensor) -> list[Any]:
        model = tiny_model()
        classifier = tiny_model(OpenLlamaForSequenceClassification, num_labels=3)
        return [
            model(tiny_ids(), labels=labels).loss,
            model.loss(tiny_ids(), labels),
            classifier(tiny_ids(), labels=classes).loss,
        ]

    classes = torch.tensor([2, 0])
    assert losses(tiny_ids().to(dtype), classes.to(dtype)) == losses(tiny_ids(), classes)


@torch.no_grad()
def test_row_35_scores_that_are_nan_pick_no_token() -> None:
    model = tiny_model()
    model.lm_head.weight[7] = torch.nan
    for way in ({}, {"do_sample": True}):
        with pytest.raises(NumericalError, match="NaN"):
            model.generate(tiny_ids(), max_new_tokens=2, **way)
    assert model.generate(tiny_ids(), max_new_tokens=2, remove_invalid_values=True).shape == (2, 9)
