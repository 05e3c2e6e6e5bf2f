"""What the comparisons of ``generate`` share: models and prompts to draw, settings, both sides of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from openllama import OpenLlamaConfig
from openllama.generation import GenerateOutput
from tests.parity import draws

Prompt = dict[str, Tensor]


@st.composite
def models(draw: st.DrawFn, **fixed: Any) -> OpenLlamaConfig:
    """Configurations whose text can be padded and can end (HF's embedding refuses a padding id of -1)."""
    pad = draw(st.sampled_from((None, 0, 1)))
    eos = draw(st.sampled_from((None, 2, [2, 1])))
    head = draw(st.sampled_from(("own", "own", "own", "shared", "tied")))  # the last two mostly repeat a token
    fields = {
        "pad_token_id": pad,
        "eos_token_id": eos,
        "vocab_size": draw(st.integers(16, 80)),
        "num_hidden_layers": draw(st.integers(2, 3)),
        "hidden_size": draw(st.sampled_from((16, 24, 40, 64))),
        "num_attention_heads": 4,
        "initializer_range": draw(st.floats(0.3, 0.5)),
        "shared_input_output_embedding": head == "shared",
        "tie_word_embeddings": head == "tied",
    }
    return draw(draws.configs(**{**fields, **fixed}))


@st.composite
def prompts(draw: st.DrawFn, config: OpenLlamaConfig, rows: Sequence[int] = (1, 2, 3)) -> Prompt:
    """Left-padded ids, with their mask, or without where padding is to be inferred."""
    batch, length = draw(st.sampled_from(rows)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(draws.seeds))
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    mask = draws.padding_mask(draw(st.sampled_from(("ones", "left"))), batch, length, generator)
    mask[:, -1] = True
    ids = ids.where(mask, config.pad_token_id or 0)
    ids[:, -1] += 5 * (ids[:, -1] < 5)  # no padding: HF has no place for a text of padding alone
    return {"input_ids": ids, "attention_mask": mask.long()} if draw(st.booleans()) else {"input_ids": ids}


lengths = st.sampled_from(({"max_new_tokens": 12}, {"max_length": 20}))

filterings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.2, 3.0),
        "top_k": st.integers(0, 90),
        "top_p": st.floats(0.05, 1.0),
        "typical_p": st.floats(0.1, 0.95),
        "epsilon_cutoff": st.floats(0.0, 0.1),
        "eta_cutoff": st.floats(0.0, 0.1),
        "renormalize_logits": st.booleans(),
    },
)


@st.composite
def processings(draw: st.DrawFn, config: OpenLlamaConfig) -> dict[str, Any]:
    """Settings of a few processors. Ids are kept apart, so that no step forbids every token."""
    token = st.integers(5, config.vocab_size - 1)
    word = st.lists(token, min_size=1, max_size=3)
    words = st.lists(word, min_size=1, max_size=3, unique_by=lambda ids: ids[-1])  # HF refuses a common last token
    bias = st.dictionaries(st.tuples(st.sampled_from((3, 4))), st.floats(-5, 5).filter(bool), min_size=1)
    available: dict[str, st.SearchStrategy[Any]] = {
        "repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(2, 4),
        "bad_words_ids": words,
        "sequence_bias": bias,
        "min_length": st.integers(0, 13),
        "min_new_tokens": st.integers(0, 24),  # more than there is room for, too
        "forced_bos_token_id": st.just(3),
        "forced_eos_token_id": st.sampled_from((2, [2, 1])),
        "remove_invalid_values": st.just(True),
        "suppress_tokens": st.lists(token, min_size=1, max_size=3),
        "begin_suppress_tokens": st.lists(token, min_size=1, max_size=3),
        "renormalize_logits": st.just(True),
    }
    if config.eos_token_id is not None:
        available["exponential_decay_length_penalty"] = st.tuples(st.integers(0, 4), st.floats(0.8, 1.5))
    names = draw(st.lists(st.sampled_from(sorted(available)), max_size=4, unique=True))
    return {name: draw(available[name]) for name in names}


def both(config: OpenLlamaConfig, seed: int, prompt: Prompt, **settings: Any) -> tuple[Any, Any]:
    """What HF makes and what we make, each from a model that has made nothing before."""
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    torch.manual_seed(seed)
    with within_hf_s_limits():
        expected = hf.generate(**prompt, **settings)
    torch.manual_seed(seed)
    return expected, ours.generate(**prompt, **settings)


@contextmanager
def within_hf_s_limits() -> Iterator[None]:
    """Leaves an example out where HF refuses what several eos ids make likely, and ours does not."""
    try:
        yield
    except ValueError as error:
        assume("can be equal to `eos_token_id" not in str(error))
        raise


ALL_OUTPUTS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


def assert_same_outputs(
    ours: GenerateOutput, hf: Any, tensors: bool = True, skip: Sequence[str] = (), prompt: int | None = None
) -> None:
    """The same fields in the same structure: ids bitwise, numbers close.

    Drawn beams may be of one text, and the last bit of a score decides which of them is taken: where
    ``prompt`` gives the length of the prompt, other beams will do if HF scores each token alike on them.
    """
    for name, expected in hf.items():
        if name in skip:
            continue
        got = ours[name]
        if name == "beam_indices" and prompt is not None:
            torch.testing.assert_close(*(_scores_along(hf, beams, prompt) for beams in (got, expected)))
        elif name in ("sequences", "beam_indices"):
            assert torch.equal(got, expected), name
        elif name == "sequences_scores":
            torch.testing.assert_close(got, expected)
        elif tensors:
            _assert_close(got, expected, name)


def _scores_along(hf: Any, beams: Tensor, prompt: int) -> Tensor:
    """HF's score of each new token of each text on the beam that it is said to come from."""
    return torch.stack(
        [
            hf.scores[step][beam, text[prompt + step]]
            for text, path in zip(hf.sequences, beams, strict=True)
            for step, beam in enumerate(path[path >= 0])
        ]
    )


def _assert_close(got: Any, expected: Any, name: str) -> None:
    if isinstance(expected, tuple):
        assert len(got) == len(expected), name
        for left, right in zip(got, expected, strict=True):
            _assert_close(left, right, name)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
