"""How often generation reads a value back from the device, which makes a GPU wait: once per token, or never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openllama import OpenLlamaForCausalLM
from tests.generating import as_on_a_device, count_forwards, make_model

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
INDEXINGS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Reads(TorchDispatchMode):
    """Counts what needs a value, or a shape that depends on values, on the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function in INDEXINGS and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += function in READS or by_mask
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """``tolist`` and ``numpy`` of a CPU tensor dispatch nothing: they are counted apart."""
    as_on_a_device(monkeypatch)
    counter = Reads()
    for name in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *arguments: Any, original: Any = original) -> Any:
            counter.count += 1
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return counter


PROMPT = torch.tensor([[5, 9, 13, 2], [7, 21, 3, 30]])
PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
EVERYTHING = {
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[4, 5], [6]],
    "sequence_bias": {(3, 8): 1.0, (9,): -1.0},
    "suppress_tokens": [11],
    "forced_eos_token_id": 2,
    "min_new_tokens": 30,
    "exponential_decay_length_penalty": (2, 1.01),
    "remove_invalid_values": True,
    "renormalize_logits": True,
}
FILTERS = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.95,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
}


def model_of(backend: str) -> OpenLlamaForCausalLM:
    model = make_model()
    model.set_attn_implementation(backend)
    return model


def per_token(model: OpenLlamaForCausalLM, reads: Reads, **settings: Any) -> float:
    """Reads per token: what 10 tokens more cost."""
    counts = []
    for length in (5, 15):
        before = reads.count
        with reads:
            ids = model.generate(PROMPT, max_new_tokens=length, **settings)
        assert ids.shape[1] == 4 + length, "it must not have ended"
        counts.append(reads.count - before)
    return (counts[1] - counts[0]) / 10


@pytest.mark.filterwarnings("ignore:min_new_tokens")
@pytest.mark.parametrize("mask", [None, PADDED])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0),
        ({"eos_token_id": 2, **EVERYTHING}, 1),
        ({"eos_token_id": [2, 3], "min_new_tokens": 30, **FILTERS}, 1),
        ({"eos_token_id": 2, **EVERYTHING, **FILTERS}, 1),
        ({"max_time": 1e9}, 1),
        ({"use_cache": False}, 0),
        ({"penalty_alpha": 0.6, "top_k": 4}, 0),
        ({"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": 2, "min_new_tokens": 30}, 1),
        ({"num_beams": 3, "eos_token_id": 2, "min_new_tokens": 30}, 2),
        ({"num_beams": 3, "do_sample": True, "eos_token_id": 2, "min_new_tokens": 30}, 2),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, 4),
    ],
)
def test_a_token_costs_so_many_reads(reads, settings, backend, mask, expected):
    """Greedy search, sampling and contrastive search ask whether all have ended; beams are kept on the host."""
    assert per_token(model_of(backend), reads, attention_mask=mask, **settings) == expected


@pytest.mark.parametrize("eos", [None, 39])
def test_guessing_ahead_reads_twice_per_guess_and_the_assistant_once_per_token_it_makes(reads, eos):
    """The assistant only where a token may end the sequence. Looking up reads twice for each ending it looks for."""
    model, assistant = make_model(), make_model(7)
    passes: list[int] = []
    guessed: list[int] = []
    count_forwards(model, passes)
    count_forwards(assistant, guessed)
    with reads:
        model.generate(PROMPT[:1], attention_mask=PADDED[1:], max_new_tokens=1, assistant_model=assistant)
    door = reads.count - 2
    passes.clear()
    with reads:
        settings = {"attention_mask": PADDED[1:], "eos_token_id": eos, "max_new_tokens": 20, "min_new_tokens": 20}
        model.generate(PROMPT[:1], assistant_model=assistant, **settings)
    assert min(len(guessed), len(passes)) > 1
    assert reads.count - door - 2 == door + 2 * len(passes) + (len(guessed) if eos else 0)

    before = reads.count
    passes.clear()
    with reads:
        model.generate(PROMPT[:1], attention_mask=PADDED[1:], max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert reads.count - before <= door + (2 + 2 * 2) * len(passes)


def test_a_reader_is_seen(reads):
    """What the tests above rely on: each way of reading counts."""
    scores = torch.rand(2, 3)
    ways = [
        lambda: bool(scores.any()),
        lambda: int(scores[0, 0]),
        lambda: scores.max().item(),
        lambda: scores.tolist(),
        lambda: scores[scores > 0.5],
        lambda: scores.nonzero(),
        lambda: torch.equal(scores, scores),
        lambda: scores.index_put((scores > 0.5,), torch.tensor(0.0)),
        lambda: scores.masked_select(scores > 0.5),
    ]
    for way in ways:
        before = reads.count
        with reads:
            way()
        assert reads.count == before + 1
