"""The proof for all processors at once: the kernels that transformers 4.31.0 calls are those that ours calls.

Matrix products round by shape, strides and alignment, in another way on each processor. Where both sides ask for the
same ones in the same order they get the same bits, whatever the processor does with them. See ``kernels``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig
from openllama.cache import PreallocatedCache
from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws
from tests.parity.generation import filterings, lengths, models, prompts, within_hf_s_limits
from tests.parity.kernels import Call, Recorder, record
from tests.tiny import tiny_config, tiny_ids

pytestmark = pytest.mark.filterwarnings("ignore:a sequence of more than")

OWN_HEAD: dict[str, Any] = {"shared_input_output_embedding": False}
VOCABULARY = 97  # no other size or product of sizes: an operand that has it is that of the head
SHARED_HEAD: dict[str, Any] = {"shared_input_output_embedding": True, "vocab_size": VOCABULARY}


def without_head(products: list[Call]) -> list[Call]:
    """All but those of a shared head, which is an einsum in HF and F.linear here: its logits and its two gradients."""
    return [call for call in products if not any(VOCABULARY in operand.shape for operand in call.operands)]


def assert_same_kernels(ours: Recorder, hf: Recorder, config: OpenLlamaConfig, rowwise: tuple[str, ...] = ()) -> None:
    """``rowwise``: kernels on another number of equal rows, each of which is rounded alone."""
    assert hf.products
    if config.shared_input_output_embedding:
        assert without_head(ours.products) == without_head(hf.products)
        assert len(ours.products) == len(hf.products) > len(without_head(hf.products))
    else:
        assert ours.products == hf.products
    kept = [Counter(call for call in side.rounded if call.kernel not in rowwise) for side in (ours, hf)]
    assert kept[0] == kept[1]  # in another order within a cutoff by entropy


def pass_and_gradients(model: Any, batch: draws.Batch) -> tuple[Recorder, Recorder]:
    with Recorder() as forward:
        loss = model(**batch).loss
    return forward, record(loss.backward)


@examples(60)
@given(data=st.data(), config=draws.configs(**OWN_HEAD) | draws.configs(**SHARED_HEAD), seed=draws.seeds)
def test_a_pass_and_its_gradients_call_the_kernels_of_hf(data, config, seed):
    batch = data.draw(draws.batches(config))
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    for mine, theirs in zip(pass_and_gradients(ours, batch), pass_and_gradients(hf, batch), strict=True):
        assert_same_kernels(mine, theirs, config)
    compared["models, kernels of a pass and its gradients"] += 1


def pieces_and_gradients(model: Any, pieces: list[draws.Batch]) -> tuple[Recorder, Recorder]:
    past, total = None, torch.zeros(())
    with Recorder() as forward:
        for piece in pieces:
            out = model(**piece, past_key_values=past, use_cache=True)
            past, total = out.past_key_values, total + out.logits.square().sum()
    return forward, record(total.backward)


@examples(30)
@given(data=st.data(), config=draws.configs(**OWN_HEAD) | draws.configs(**SHARED_HEAD), seed=draws.seeds)
def test_a_prompt_in_pieces_and_its_gradients_call_the_kernels_of_hf(data, config, seed):
    batch = data.draw(draws.batches(config))
    pieces = draws.chunks_of(batch, data.draw(draws.chunkings(draws.length_of(batch))))
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    for mine, theirs in zip(pieces_and_gradients(ours, pieces), pieces_and_gradients(hf, pieces), strict=True):
        assert_same_kernels(mine, theirs, config)
    compared["models, kernels of a prompt in pieces"] += 1


def assert_generating_calls_the_kernels_of_hf(
    data: st.DataObject, config: OpenLlamaConfig, seed: int, rowwise: tuple[str, ...] = (), **settings: Any
) -> None:
    prompt = data.draw(prompts(config))
    settings = {**settings, **data.draw(lengths)}
    hf = draws.hf_model(config, seed)
    recorders = []
    for model in (draws.our_twin(hf, config), hf):
        torch.manual_seed(seed)
        with within_hf_s_limits():
            recorders.append(record(lambda model=model: model.generate(**prompt, **settings)))
    assert_same_kernels(*recorders, config, rowwise)
    compared["models, kernels of generate"] += 1


@examples(12)
@given(data=st.data(), config=models(**OWN_HEAD) | models(**SHARED_HEAD), seed=draws.seeds, use_cache=st.booleans())
def test_greedy_search_calls_the_kernels_of_hf(data, config, seed, use_cache):
    assert_generating_calls_the_kernels_of_hf(data, config, seed, use_cache=use_cache)


@examples(12)
@given(data=st.data(), config=models(**OWN_HEAD), seed=draws.seeds, filtering=filterings)
def test_sampling_calls_the_kernels_of_hf(data, config, seed, filtering):
    assert_generating_calls_the_kernels_of_hf(data, config, seed, do_sample=True, **filtering)


@examples(8)
@given(
    data=st.data(), config=models(**OWN_HEAD), seed=draws.seeds, beams=st.integers(2, 4), sampled=st.booleans(),
    use_cache=st.booleans(),
)  # fmt: skip
def test_beam_search_calls_the_kernels_of_hf(data, config, seed, beams, sampled, use_cache):
    settings = {"num_beams": beams, "do_sample": sampled, "use_cache": use_cache}
    assert_generating_calls_the_kernels_of_hf(data, config, seed, **settings)


@examples(5)
@given(data=st.data(), config=models(**OWN_HEAD), seed=draws.seeds)
def test_diverse_beam_search_calls_the_kernels_of_hf(data, config, seed):
    settings = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}
    assert_generating_calls_the_kernels_of_hf(data, config, seed, rowwise=("_log_softmax",), **settings)


@examples(8)
@given(data=st.data(), config=models(**OWN_HEAD), seed=draws.seeds, top_k=st.integers(2, 6))
def test_contrastive_search_calls_the_kernels_of_hf(data, config, seed, top_k):
    settings = {"penalty_alpha": 0.6, "top_k": top_k}
    assert_generating_calls_the_kernels_of_hf(data, config, seed, rowwise=("linalg_vector_norm",), **settings)


# ---- the recorder sees what it has to


CONFIG = tiny_config(**OWN_HEAD)
IDS = tiny_ids(batch=2, length=9)


def small_model() -> Any:
    return draws.our_twin(draws.hf_model(CONFIG, seed=0), CONFIG)


@torch.no_grad()
def in_two_pieces(model: Any, past: Any = None) -> list[Call]:
    def run() -> None:
        first = model(IDS[:, :5], past_key_values=past, use_cache=True)
        model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)

    return record(run).products


def test_a_preallocated_cache_is_seen_in_both_products_of_attention():
    model = small_model()
    growing = in_two_pieces(model)
    preallocated = in_two_pieces(model, PreallocatedCache(CONFIG, 2, 16))
    differing = [ours.kernel for ours, other in zip(growing, preallocated, strict=True) if ours != other]
    assert differing == ["bmm"] * (
        2 * 2 * CONFIG.num_hidden_layers
    )  # of both pieces: the strides are those of all room


def test_a_weight_beside_the_boundary_of_a_vector_is_seen():
    model = small_model()
    before = in_two_pieces(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    room = torch.empty(weight.numel() + 1)
    weight.data = room[1:].view_as(weight).copy_(weight.detach())
    after = in_two_pieces(model)
    differing = [(ours, other) for ours, other in zip(before, after, strict=True) if ours != other]
    assert [(a.operands[1].alignment, b.operands[1].alignment) for a, b in differing] == [(0, 4)] * 2


def test_a_fused_projection_is_seen():
    model = small_model()
    before = in_two_pieces(model)
    attention = model.model.layers[0].attention
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])

    class Fused(torch.nn.Module):
        """The projection of q, which computes those of k and v with it."""

        def forward(self, x: Tensor) -> Tensor:
            query, attention.k_proj.forward, attention.v_proj.forward = _thirds(F.linear(x, fused))
            return query

    attention.q_proj = Fused()
    assert len(in_two_pieces(model)) == len(before) - 4


def _thirds(x: Tensor) -> tuple[Tensor, Any, Any]:
    query, key, value = x.chunk(3, dim=-1)
    return query, lambda _: key, lambda _: value


def test_logits_of_the_last_position_alone_are_seen():
    model = small_model()
    full, last = (record(lambda keep=keep: model(IDS, logits_to_keep=keep)).products for keep in (0, 1))
    assert full[:-1] == last[:-1]
    assert full[-1] != last[-1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_are_the_same_in_every_mode(context):
    model = small_model()
    with context():
        recorder = record(lambda: model(IDS))
    assert recorder.products == in_one_piece(model).products
    assert recorder.rounded == in_one_piece(model).rounded
    assert len(recorder.products) == 1 + 9 * CONFIG.num_hidden_layers


def in_one_piece(model: Any) -> Recorder:
    return record(lambda: model(IDS))


def test_an_unknown_kernel_is_refused():
    with pytest.raises(KeyError, match=r"digamma\.default"):
        record(lambda: torch.ones(3).digamma())


# ---- what the recorder leaves out may be left out


@examples(20)
@given(data=st.data(), config=draws.configs(), seed=draws.seeds)
def test_frequencies_are_computed_by_the_kernels_of_hf(data, config, seed):
    batch = data.draw(draws.batches(config))
    hf = []
    built = record(lambda: hf.append(draws.hf_model(config, seed)))
    twin = draws.our_twin(hf[0], config)
    called = record(lambda: hf[0](**batch))  # under dynamic scaling computes them again
    ours = record(lambda: twin(**batch))
    assert ours.frequencies
    assert {*ours.frequencies} == {*built.frequencies, *called.frequencies}


@examples(40)
@given(
    function=st.sampled_from((torch.cos, torch.sin)),
    start=st.integers(0, 70), length=st.integers(1, 200), step=st.integers(1, 5), seed=draws.seeds,
)  # fmt: skip
def test_an_angle_is_rounded_alike_wherever_it_lies(function, start, length, step, seed):
    angles = 100 * torch.rand(2048, generator=torch.Generator().manual_seed(seed))
    chosen = slice(start, start + length * step, step)
    expected = function(angles)[chosen]
    assert torch.equal(function(angles[chosen]), expected)
    assert torch.equal(function(angles[chosen].clone()), expected)
    assert torch.equal(function(angles[chosen][:, None].expand(-1, 3))[:, 1], expected)


@examples(40)
@given(
    function=st.sampled_from((lambda x: x.log_softmax(-1), lambda x: x.norm(dim=-1, keepdim=True))),
    rows=st.integers(2, 9), length=st.integers(1, 200), seed=draws.seeds,
)  # fmt: skip
def test_a_row_is_rounded_alike_whatever_lies_beside_it(function, rows, length, seed):
    matrix = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    together = function(matrix)
    for row in range(rows):
        assert torch.equal(function(matrix[row : row + 1].clone()), together[row : row + 1])
        assert torch.equal(function(matrix[[row, row, 0]])[1:2], together[row : row + 1])
