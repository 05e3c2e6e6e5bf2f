"""Beam search, beam sampling and diverse beam search make the texts that transformers 4.31.0 makes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.draw import examples
from tests.oracle import compared
from tests.parity import draws
from tests.parity.generation import (
    ALL_OUTPUTS,
    assert_same_outputs,
    both,
    filterings,
    lengths,
    models,
    processings,
    prompts,
)

pytestmark = pytest.mark.filterwarnings("ignore:a sequence of more than", "ignore:min_new_tokens")

SCORES = {"return_dict_in_generate": True, "output_scores": True}
varied: list[bool] = []


@st.composite
def beams(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "num_beams": draw(st.integers(2, 5)),
        "length_penalty": draw(st.sampled_from((1.0, 0.0, -1.0, 2.0, 0.5))),
        "early_stopping": draw(st.sampled_from((False, True, "never"))),
        **draw(lengths),
    }


@examples(40)
@given(data=st.data(), config=models(), seed=draws.seeds, settings=beams())
def test_beam_search_equals_hf(data, config, seed, settings):
    prompt = data.draw(prompts(config))
    settings["num_return_sequences"] = data.draw(st.integers(1, settings["num_beams"]))
    settings["use_cache"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        settings.update(data.draw(processings(config)))
    expected, output = both(config, seed, prompt, **settings, **SCORES)
    assert_same_outputs(output, expected, tensors=False)
    compared["models, beam search"] += 1
    varied.append(max(len(set(row[-10:].tolist())) for row in output.sequences) > 3)


@examples(40)
@given(data=st.data(), config=models(), seed=draws.seeds, settings=beams(), filtering=filterings)
def test_beam_sampling_equals_hf_under_the_same_seed(data, config, seed, settings, filtering):
    prompt = data.draw(prompts(config))
    if data.draw(st.booleans()):
        settings.update(data.draw(processings(config)))
    settings["num_return_sequences"] = data.draw(st.integers(1, 3))
    expected, output = both(config, seed, prompt, do_sample=True, **{**settings, **filtering}, **SCORES)
    assert_same_outputs(output, expected, tensors=False, prompt=prompt["input_ids"].shape[1])
    compared["models, beam sampling"] += 1


@examples(30)
@given(data=st.data(), config=models(), seed=draws.seeds, settings=beams(), penalty=st.floats(0.1, 5.0))
def test_diverse_beam_search_equals_hf(data, config, seed, settings, penalty):
    prompt, groups = data.draw(prompts(config)), data.draw(st.integers(2, 3))
    settings.update(num_beams=groups * data.draw(st.integers(1, 2)), num_beam_groups=groups, diversity_penalty=penalty)
    settings["num_return_sequences"] = data.draw(st.integers(1, settings["num_beams"]))
    if data.draw(st.booleans()):
        settings.update(data.draw(processings(config)))
    expected, output = both(config, seed, prompt, **settings, **SCORES)
    assert_same_outputs(output, expected, tensors=False, skip=["beam_indices"])  # HF's are those of the first group
    compared["models, diverse beam search"] += 1


@examples(8)
@given(data=st.data(), config=models(), seed=draws.seeds, settings=beams(), do_sample=st.booleans())
def test_scores_attentions_and_hidden_states_of_beams_equal_hf(data, config, seed, settings, do_sample):
    prompt = data.draw(prompts(config, rows=(1,)))  # of more, HF goes on computing row 0 where a prompt is done
    expected, output = both(config, seed, prompt, do_sample=do_sample, **settings, **ALL_OUTPUTS)
    assert_same_outputs(output, expected, prompt=prompt["input_ids"].shape[1] if do_sample else None)
    compared["models, outputs of beam search"] += 1


def test_the_drawn_texts_were_not_constant():
    if not varied:
        pytest.skip("runs after test_beam_search_equals_hf")
    assert sum(varied) > len(varied) / 2
