"""Code for transformers with the import changed: every argument and method has its place, taken or refused by name."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import openllama
from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.dropin import GENERATING, LOADING, SAVING
from openllama.errors import InputError
from openllama.generation import GenerationConfig, prepare
from tests.draw import examples
from tests.oracle import compared, transformers
from tests.parity import draws
from tests.parity.generation import models, prompts
from tests.test_dropin import PAGE
from tests.tiny import tiny_config, tiny_ids

CONFIG = tiny_config(hidden_dropout_prob=0.0, attention_dropout_prob=0.0)
LENGTH = {"max_new_tokens": 8}


# --- nothing of transformers 4.31.0 is forgotten ---


def arguments_of(function: Any) -> set[str]:
    """Its parameters, and what it takes out of its keyword arguments."""
    names = {name for name in inspect.signature(function).parameters if name not in ("cls", "self", "kwargs")}
    popped = set(re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(function)))
    return {name for name in names | popped if not name.startswith("_")}


def test_every_argument_of_loading_and_saving_is_taken_or_refused() -> None:
    hf = transformers.PreTrainedModel
    ours = set(inspect.signature(OpenLlamaForCausalLM.from_pretrained).parameters)
    first = {"pretrained_model_name_or_path", "model_args"}  # the folder, and arguments of a constructor
    assert arguments_of(hf.from_pretrained) - ours - LOADING.keys() == first
    ours = set(inspect.signature(OpenLlamaForCausalLM.save_pretrained).parameters)
    assert arguments_of(hf.save_pretrained) - ours - SAVING.keys() == {"save_directory"}


def test_every_argument_and_setting_of_generate_is_taken_or_refused() -> None:
    hf = transformers.GenerationMixin
    ours = {*inspect.signature(prepare).parameters, *GenerationConfig.field_names(), "streamer"}
    assert arguments_of(hf.generate) <= ours | GENERATING.keys()
    settings = {name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_")}
    assert settings - ours - GENERATING.keys() == {"transformers_version"}


@pytest.mark.parametrize("kind", ["OpenLlamaModel", "OpenLlamaForCausalLM", "OpenLlamaForSequenceClassification"])
def test_every_method_is_here_or_on_the_page(kind: str) -> None:
    hf, ours = getattr(transformers, kind), getattr(openllama, kind)
    names = {name for name in dir(hf) if not name.startswith("_")} - set(dir(nn.Module))
    page = PAGE.read_text(encoding="utf-8")
    decodes = set(dir(transformers.GenerationMixin))  # of classes that generate nothing, which have it there, too
    missing = {name for name in names if not hasattr(ours, name)} - (
        decodes if kind != "OpenLlamaForCausalLM" else set()
    )
    assert {name for name in missing if f"`{name}`" not in page} == set()


def test_every_field_of_a_config_is_here_or_on_the_page() -> None:
    ours, page = OpenLlamaConfig(), PAGE.read_text(encoding="utf-8")
    names = [name for name in dir(transformers.OpenLlamaConfig()) if not name.startswith("_")]
    settings = transformers.GenerationConfig().to_dict()  # which 4.31.0 also keeps in the config of a model
    assert [
        name for name in names if not hasattr(ours, name) and name not in settings and f"`{name}`" not in page
    ] == []


# --- a GenerationConfig of transformers ---


@examples(15)
@given(data=st.data(), config=models(), seed=draws.seeds)
def test_a_generation_config_of_transformers_gives_its_ids(data: Any, config: OpenLlamaConfig, seed: int) -> None:
    settings = data.draw(st.sampled_from((
        {"max_length": 20}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {},
        {"do_sample": True, "top_k": None, "temperature": 0.7}, {"penalty_alpha": 0.5, "top_k": 4},
    )))  # fmt: skip
    ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    theirs = transformers.GenerationConfig(**{"max_new_tokens": 8, **ids, **settings})
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    prompt = data.draw(prompts(config))
    torch.manual_seed(seed)
    expected = hf.generate(**prompt, generation_config=theirs)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(ours.generate(**prompt, generation_config=theirs), expected)
        ours.generation_config = theirs
        torch.manual_seed(seed)
        assert torch.equal(ours.generate(**prompt), expected)
    compared["models, ids by transformers' GenerationConfig"] += 1


def test_a_model_takes_the_generation_config_that_transformers_made_of_its_own(tmp_path: Any) -> None:
    hf = draws.hf_model(CONFIG, 0)
    ours = draws.our_twin(hf, CONFIG)
    before = ours.generation_config
    ours.generation_config = hf.generation_config
    assert isinstance(ours.generation_config, GenerationConfig)
    assert ours.generation_config == before
    ours.save_pretrained(tmp_path)
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).generation_config == before


@pytest.mark.parametrize(("settings", "said"), [
    ({"guidance_scale": 2.0}, "does not take guidance_scale=2.0"),
    ({"force_words_ids": [[3]]}, r"does not take force_words_ids \(list\)"),
    ({"encoder_repetition_penalty": 1.5}, "does not take encoder_repetition_penalty=1.5"),
    ({"of_my_own": 3}, "does not know of_my_own"),
    ({"temperature": 0.0}, "temperature must be"),
])  # fmt: skip
def test_what_would_be_lost_of_a_generation_config_is_refused(settings: dict[str, Any], said: str) -> None:
    theirs = transformers.GenerationConfig()
    for name, value in settings.items():
        setattr(theirs, name, value)
    ours = draws.our_twin(draws.hf_model(CONFIG, 0), CONFIG)
    with pytest.raises(InputError, match=said):
        ours.generate(tiny_ids(), generation_config=theirs)
    before = ours.generation_config
    with pytest.raises(InputError, match=said):
        ours.generation_config = theirs
    assert ours.generation_config is before


# --- scores of tokens ---


@examples(20)
@given(data=st.data(), config=models(), seed=draws.seeds, normalize=st.booleans())
def test_transition_scores_are_hf_s(data: Any, config: OpenLlamaConfig, seed: int, normalize: bool) -> None:
    settings = data.draw(st.sampled_from((
        {}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    )))  # fmt: skip
    hf = draws.hf_model(config, seed)
    ours = draws.our_twin(hf, config)
    prompt = data.draw(prompts(config))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = ours.generate(**prompt, **LENGTH, return_dict_in_generate=True, output_scores=True, **settings)
    given = (output.sequences, output.scores, output.beam_indices, normalize)
    torch.testing.assert_close(ours.compute_transition_scores(*given), hf.compute_transition_scores(*given))
    compared["models, transition scores"] += 1


# --- padding on the wrong side ---


@contextmanager
def hf_s_warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    logger = transformers.logging.get_logger("transformers.generation.utils")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


PADDED = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])


@pytest.mark.parametrize("eos", [None, 2, 0])
@pytest.mark.parametrize("give_mask", [True, False])
@pytest.mark.parametrize(("ids", "wrong"), [(PADDED, True), (PADDED.flip(1), False), (PADDED + 1, False)])
def test_prompts_padded_on_the_right_are_warned_of_where_hf_warns(
    ids: torch.Tensor, wrong: bool, give_mask: bool, eos: int | None
) -> None:
    config = tiny_config(eos_token_id=eos)
    hf = draws.hf_model(config, 0)
    prompt = {"input_ids": ids, **({"attention_mask": (ids != 0).long()} if give_mask else {})}
    with hf_s_warnings() as said:
        hf.generate(**prompt, max_new_tokens=2)
    assert any("right-padding" in message for message in said) == wrong
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws.our_twin(hf, config).generate(**prompt, max_new_tokens=2)
    assert any('padding_side="left"' in str(warning.message) for warning in caught) == wrong


def test_classes_for_other_tasks_have_no_generation_config() -> None:
    for kind in (OpenLlamaModel, OpenLlamaForSequenceClassification):
        assert not hasattr(kind(CONFIG), "generation_config")
