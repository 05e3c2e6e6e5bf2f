"""Attention: eager is the formula, the fused backends are eager, and nobody gets a backend that cannot run."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaForCausalLM, OpenLlamaModel
from openllama import attention as attention_module
from openllama.attention import BACKENDS, attention, check_backend, register_backend
from openllama.errors import BackendError
from openllama.masks import Mask, causal_mask, prepare_mask
from tests.draw import examples
from tests.parity.draws import PADDINGS, padding_mask, seeds
from tests.tiny import tiny_config, tiny_ids, tiny_model

CPU = torch.device("cpu")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and a mask: none, of padding, or of four dimensions (bool or additive)."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length, cached = draw(st.integers(1, 9)), draw(st.integers(0, 5))
    head_dim = 2 * draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(seeds))
    query = torch.randn(batch, heads, length, head_dim, generator=generator)
    key, value = torch.randn(2, batch, heads, length + cached, head_dim, generator=generator)
    kind = draw(st.sampled_from((*PADDINGS, "full bool", "full additive")))
    if kind == "none":
        mask = None
    elif kind == "full bool":
        mask = torch.rand(batch, 1, length, length + cached, generator=generator) < 0.7
    elif kind == "full additive":
        mask = torch.randn(batch, heads, length, length + cached, generator=generator)
    else:
        mask = padding_mask(kind, batch, length + cached, generator).long()
    return query, key, value, mask


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Any]:
    hidden = torch.zeros(len(query), query.shape[2], 4)
    prepared = prepare_mask(mask, query.shape[2], key.shape[2], hidden, backend)
    return attention(query, key, value, prepared, 0.0, backend)


def seeing(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Bool (B, 1, T): queries that see something; for the others no formula says what comes out."""
    batch, length, key_length = len(query), query.shape[2], key.shape[2]
    if mask is None or (mask.ndim == 4 and mask.dtype != torch.bool):
        return torch.ones(batch, 1, length, dtype=torch.bool)
    if mask.ndim == 4:
        return mask.any(-1)
    causal = torch.ones(length, key_length, dtype=torch.bool).tril(key_length - length)
    return (causal & mask.bool()[:, None, None]).any(-1)


@examples(60)
@given(call=calls())
def test_eager_is_the_formula(call: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    query, key, value, mask = call
    output, weights = attend(query, key, value, mask, "eager")
    length, key_length = query.shape[2], key.shape[2]
    for row in range(len(query)):
        for head in range(query.shape[1]):
            for t in range(length):
                scores = key[row, head].double() @ query[row, head, t].double() / math.sqrt(query.shape[-1])
                if mask is not None and mask.ndim == 4:
                    own = mask[row, head % mask.shape[1], t]
                    scores = scores.masked_fill(~own, -1e30) if own.dtype == torch.bool else scores + own
                else:
                    hidden = torch.arange(key_length) > t + key_length - length
                    hidden |= torch.tensor(False) if mask is None else mask[row] == 0
                    scores = scores.masked_fill(hidden, -1e30)
                expected = scores.exp() / scores.exp().sum() if scores.max() > -1e29 else torch.full_like(scores, 0)
                if scores.max() <= -1e29:  # nothing to see: all keys alike
                    expected += 1 / key_length
                torch.testing.assert_close(weights[row, head, t].double(), expected, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(
                    output[row, head, t].double(), expected @ value[row, head].double(), rtol=1e-4, atol=1e-5
                )


def assert_as_specified(output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """What eager gives wherever there is something to see, and finite elsewhere."""
    specified, _ = attend(query, key, value, mask, "eager")
    assert bool(output.isfinite().all())
    seen = seeing(query, key, mask).expand(output.shape[:-1])
    torch.testing.assert_close(output[seen], specified[seen])


@examples(100)
@given(call=calls())
def test_sdpa_is_eager_wherever_there_is_something_to_see_and_finite_elsewhere(
    call: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    query, key, value, mask = call
    output, weights = attend(query, key, value, mask, "sdpa")
    assert weights is None
    assert_as_specified(output, query, key, value, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_rows_without_anything_to_see_are_finite_in_every_type(dtype: torch.dtype, backend: str) -> None:
    model = tiny_model(attn_implementation=backend).to(dtype)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0] * 7])
    out = model(tiny_ids(), attention_mask=mask, labels=tiny_ids())
    out.loss.backward()
    assert bool(out.logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_acts_on_the_weights_in_training_alone(backend: str) -> None:
    arguments = {"attention_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model = tiny_model(OpenLlamaModel, attn_implementation=backend, **arguments)
    ids = tiny_ids()
    quiet = model(ids)[0]
    assert torch.equal(model(ids)[0], quiet)
    model.train()
    first, second = model(ids)[0], model(ids)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, quiet)
    torch.manual_seed(3)
    repeated = model(ids)[0]
    torch.manual_seed(3)
    assert torch.equal(model(ids)[0], repeated)


def test_eager_dropout_scales_what_it_keeps_and_reports_the_weights_before() -> None:
    query, key, value = torch.randn(3, 1, 1, 200, 4)
    mask = prepare_mask(None, 200, 200, torch.zeros(1, 200, 4), "eager")
    _, weights = attention(query, key, value, mask, 0.0, "eager")
    ones = torch.ones_like(value)
    output, reported = attention(query, key, ones, mask, 0.5, "eager")
    assert reported is not None
    assert torch.equal(reported, weights)
    torch.testing.assert_close(output.mean(), torch.tensor(1.0), rtol=0, atol=0.1)
    assert output.std() > 0.05


# --- which backend ---


def test_the_config_chooses_the_default_and_the_argument_overrides_it() -> None:
    efficient, plain = tiny_config(), tiny_config(use_memory_efficient_attention=False)
    assert OpenLlamaModel(efficient).attn_implementation == "sdpa"
    assert OpenLlamaModel(plain).attn_implementation == "eager"
    assert OpenLlamaModel(efficient, attn_implementation="eager").attn_implementation == "eager"
    model = OpenLlamaForCausalLM(plain)
    model.set_attn_implementation("sdpa")
    assert model.model.attn_implementation == "sdpa"
    model.set_attn_implementation(None)
    assert model.model.attn_implementation == "eager"


def test_an_unknown_backend_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(BackendError) as caught:
        tiny_model(attn_implementation="flash_attention_2")
    assert [name for name in ("'flash_attention_2'", *BACKENDS) if name not in str(caught.value)] == []
    assert isinstance(caught.value, RuntimeError)


def test_a_backend_that_cannot_run_leaves_the_old_one() -> None:
    model = tiny_model()
    with pytest.raises(BackendError):
        model.set_attn_implementation("no such")
    assert model.model.attn_implementation == "eager"


def pretend_xformers(patch: pytest.MonkeyPatch, installed: bool) -> None:
    find_spec = importlib.util.find_spec
    spec = types.SimpleNamespace() if installed else None
    patch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "xformers" else find_spec(name, *a))


def test_xformers_by_name_without_the_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_xformers(monkeypatch, installed=False)
    with pytest.raises(BackendError, match=r"pip install 'openllama\[xformers\]'"):
        tiny_model(attn_implementation="xformers")


def test_xformers_by_name_on_a_cpu_says_where_it_runs_and_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_xformers(monkeypatch, installed=True)
    with pytest.raises(BackendError, match=r"CUDA.*on cpu.*'sdpa'"):
        tiny_model(attn_implementation="xformers")
    assert check_backend("xformers", torch.device("cuda")) == "xformers"
    assert check_backend("xformers", torch.device("meta")) == "xformers"


class LowerTriangularMask:
    """As in xformers: aligned to the upper left, so right only where lengths are equal."""


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float) -> Tensor:
    """xformers' contract, in eager: (B, T, H, D), and a bias of full size in rows aligned to 8."""
    batch, length, heads, head_dim = query.shape
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(head_dim)
    if isinstance(attn_bias, LowerTriangularMask):
        scores = scores.masked_fill(~torch.ones(length, key.shape[2], dtype=torch.bool).tril(), -torch.inf)
    elif attn_bias is not None:
        assert attn_bias.shape == (batch, heads, length, key.shape[2])
        assert attn_bias.dtype == query.dtype
        assert attn_bias.stride(-2) % 8 == 0
        scores = scores + attn_bias
    return (scores.softmax(-1) @ value).transpose(1, 2)


@examples(60)
@given(call=calls())
def test_xformers_is_given_what_it_wants_and_gives_what_eager_gives(
    call: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    ops = types.SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask, memory_efficient_attention=memory_efficient_attention
    )
    library = types.ModuleType("xformers")
    library.ops = ops  # type: ignore[attr-defined]
    query, key, value, mask = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "xformers", library)
        output, weights = attend(query, key, value, mask, "xformers")
    assert weights is None
    assert_as_specified(output, query, key, value, mask)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_asking_for_attentions_means_eager_for_that_call(backend: str) -> None:
    model = tiny_model(attn_implementation=backend)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    out = model(tiny_ids(), attention_mask=mask, output_attentions=True)
    specified = tiny_model()(tiny_ids(), attention_mask=mask)
    assert torch.equal(out.logits, specified.logits)
    assert len(out.attentions) == 2
    for weights in out.attentions:
        assert weights.shape == (2, 2, 7, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7))
    assert model.model.attn_implementation == backend
    assert model(tiny_ids()).attentions is None


# --- a backend of one's own ---


@pytest.fixture
def own_backend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A backend "own", eager attention; the list gets the numbers of the layers that it has computed."""
    layers: list[int] = []

    def own(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, layer: int) -> tuple[Tensor, Tensor]:
        layers.append(layer)
        assert mask.causal or mask.tensor is None or mask.tensor.dtype == torch.bool
        seen = causal_mask(query.shape[2], key.shape[2], query.device) if mask.causal else mask.tensor
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
        return weights @ value, weights

    monkeypatch.setattr(attention_module, "_REGISTERED", {})
    register_backend("own", own)
    return layers


def test_a_registered_function_computes_attention_and_gets_the_number_of_the_layer(own_backend: list[int]) -> None:
    model, eager = tiny_model(attn_implementation="own"), tiny_model(attn_implementation="eager")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for arguments in ({}, {"attention_mask": mask}):
        own_backend.clear()
        found, expected = model(tiny_ids(), **arguments), eager(tiny_ids(), **arguments)
        assert own_backend == [0, 1]
        real = mask.bool() if arguments else slice(None)
        torch.testing.assert_close(found.logits[real], expected.logits[real])
    assert torch.equal(
        model.generate(tiny_ids(), attention_mask=mask, max_new_tokens=5),
        eager.generate(tiny_ids(), attention_mask=mask, max_new_tokens=5),
    )


def test_a_registered_function_also_computes_the_passes_that_return_attentions(own_backend: list[int]) -> None:
    model = tiny_model(attn_implementation="own")
    found = model(tiny_ids(), output_attentions=True).attentions
    assert own_backend == [0, 1]
    torch.testing.assert_close(found, tiny_model()(tiny_ids(), output_attentions=True).attentions)
    register_backend("own", lambda query, key, value, mask, dropout, layer: (query, None))
    model(tiny_ids())
    with pytest.raises(BackendError, match=r"'own' has none \('eager' does\)"):
        model(tiny_ids(), output_attentions=True)


@pytest.mark.parametrize(("name", "function"), [("eager", print), ("sdpa", print), ("mine", None)])
def test_what_cannot_be_a_backend_is_refused(own_backend: list[int], name: str, function: Any) -> None:
    with pytest.raises(BackendError, match="needs a new name and a function"):
        register_backend(name, function)
    with pytest.raises(BackendError, match="'mine' is unknown; choose one of eager, sdpa, xformers, own"):
        tiny_model(attn_implementation="mine")


@pytest.mark.parametrize("wrong", ["transposed", "alone"])
def test_a_registered_function_must_return_a_pair_in_the_layout_of_the_query(
    own_backend: list[int], wrong: str
) -> None:
    register_backend("own", lambda q, k, v, mask, dropout, layer: q if wrong == "alone" else (q.transpose(1, 2), None))
    model = tiny_model(attn_implementation="own")
    with pytest.raises(BackendError, match=r"'own' must return a pair: an output \(2, 2, 7, 12\)"):
        model(tiny_ids())
