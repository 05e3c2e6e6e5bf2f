"""The settings: their file, what each may be, and which contradict each other."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch

from openllama import OpenLlamaForCausalLM
from openllama.errors import ConfigError, InputError
from openllama.generation import GenerationConfig, prepare
from openllama.generation.arguments import Arguments, GenerationSettings
from tests.generating import count_forwards, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_it_round_trips_with_the_keys_it_does_not_know(tmp_path):
    config = GenerationConfig(
        max_length=50,
        eos_token_id=[2, 3],
        sequence_bias={(1, 2): -3.0, (4,): 1.5},
        exponential_decay_length_penalty=(3, 1.1),
        early_stopping="never",
        extra={"transformers_version": "4.31.0"},
    )
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config


def test_a_file_that_is_not_json_is_refused_with_its_path(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_file_with_an_impossible_value_is_refused_with_its_path(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 3}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p"):
        GenerationConfig.from_pretrained(tmp_path)


def test_none_switches_off_what_may_be_off():
    off = {"temperature": None, "top_k": None, "top_p": None, "typical_p": None, "repetition_penalty": None}
    assert GenerationConfig(**off).top_k is None


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (0, -1.0, float("nan"), float("inf"), "hot")),
        ("top_k", (-1, 2.5)),
        ("top_p", (0, 1.5, -0.1)),
        ("typical_p", (0, 2)),
        ("min_p", (-0.1, 1.1)),
        ("epsilon_cutoff", (-0.1, 1.0)),
        ("eta_cutoff", (-0.1, 1.0)),
        ("repetition_penalty", (0, -2, float("inf"))),
        ("penalty_alpha", (-0.1, 1.1)),
        ("diversity_penalty", (-1,)),
        ("length_penalty", (float("nan"), None)),
        ("max_time", (0, -3, float("nan"))),
        ("min_length", (-1, 0.5)),
        ("min_new_tokens", (-1,)),
        ("no_repeat_ngram_size", (-1,)),
        ("max_new_tokens", (0,)),
        ("num_beams", (0, None)),
        ("num_beam_groups", (0,)),
        ("num_return_sequences", (0,)),
        ("prompt_lookup_num_tokens", (0,)),
        ("early_stopping", ("always", None, 1, 0)),
        ("do_sample", ("no", 1, None)),
        ("use_cache", ("no",)),
        ("num_beams", (2.0, True)),
        ("top_k", (2.0,)),
        ("max_length", (0, "x", None)),
        ("eos_token_id", ("abc", 2.5, True, torch.tensor(2))),
        ("pad_token_id", ("x", [1])),
        ("forced_bos_token_id", ("x", [3])),
        ("suppress_tokens", (5, ["a"])),
        ("bad_words_ids", ([5], [[3.5]])),
        ("exponential_decay_length_penalty", (3, [3], [3, "x"])),
        ("sequence_bias", ({(3,): float("nan")}, {(3.5,): 1.0})),
        ("sequence_bias", ({(): 1.0}, {3: 1.0}, [[1, 2, 3]])),
    ],
)
def test_impossible_values_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(InputError, match=field):
            GenerationConfig(**{field: value})


def test_numbers_of_numpy_become_pythons():
    config = GenerationConfig(
        top_k=np.int64(3),
        temperature=np.float32(0.5),
        eos_token_id=[np.int32(2)],
        suppress_tokens=(np.int64(7),),
        sequence_bias={(np.int64(3),): np.float64(1.5)},
    )
    assert json.loads(json.dumps(config.to_dict()))["sequence_bias"] == [[[3], 1.5]]
    assert config == GenerationConfig(
        top_k=3, temperature=0.5, eos_token_id=[2], suppress_tokens=[7], sequence_bias={(3,): 1.5}
    )


def test_a_setting_can_be_assigned_and_is_checked(model):
    """``model.generation_config.max_length = 50``, as code for transformers has it."""
    config = GenerationConfig()
    config.max_length = 50
    config.eos_token_id = (np.int64(2), 3)
    assert config == GenerationConfig(max_length=50, eos_token_id=[2, 3])
    with pytest.raises(InputError, match=r"temperature must be a number in .* got 0"):
        config.temperature = 0
    with pytest.raises(dataclasses.FrozenInstanceError, match="no field temprature"):
        config.temprature = 1.0
    assert config == GenerationConfig(max_length=50, eos_token_id=[2, 3])
    own = make_model()
    own.generation_config.max_new_tokens = 4
    assert torch.equal(own.generate(ONE), model.generate(ONE, max_new_tokens=4))


def test_an_id_that_is_changed_in_the_config_of_a_model_counts_for_generate(tmp_path):
    """``model.config.pad_token_id = tokenizer.pad_token_id``, as code for transformers has it."""
    own = make_model()
    own.generation_config = GenerationConfig(max_new_tokens=6, eos_token_id=3)
    own.save_pretrained(tmp_path)
    own = OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert (own.config.eos_token_id, own.generation_config.eos_token_id) == (None, 3)  # what a file says stays
    second = own.generate(ONE, eos_token_id=None)[0, 4].item()
    own.config.eos_token_id, own.config.pad_token_id = second, 7
    assert own.generation_config == GenerationConfig(max_new_tokens=6, eos_token_id=second, pad_token_id=7)
    assert own.generate(ONE).shape[1] == 5
    own.generation_config.eos_token_id = None  # and may differ again
    assert own.generate(ONE).shape[1] == 9
    own.config = dataclasses.replace(own.config, eos_token_id=[second])
    assert own.generation_config.eos_token_id == [second]


def test_every_setting_has_a_rule_that_its_default_passes():
    for field in dataclasses.fields(GenerationConfig):
        default = getattr(GenerationConfig(), field.name)
        assert field.metadata["rule"](default) == default
        with pytest.raises(ValueError, match=r"\w"):
            field.metadata["rule"](object())


def test_type_checkers_know_every_setting_by_its_name_and_type():
    """All but the one that the overloads of ``generate`` are told apart by."""
    declared = {field.name: field.type for field in dataclasses.fields(GenerationConfig)}
    del declared["extra"], declared["return_dict_in_generate"]
    known = {name: value.__forward_arg__ for name, value in GenerationSettings.__annotations__.items()}
    assert known == declared
    call = inspect.signature(prepare).parameters
    others = {name: value.__forward_arg__ for name, value in Arguments.__annotations__.items() if name not in declared}
    assert others == {name: call[name].annotation for name in call if name not in ("model", "input_ids", "options")}


def test_more_new_tokens_than_there_is_room_for_are_warned_of_at_the_callers_line(model):
    greedy = model.generate(ONE, max_new_tokens=6)[0].tolist()
    settings = {"max_new_tokens": 6, "eos_token_id": greedy[4]}
    assert model.generate(ONE, **settings).shape[1] == 5
    with pytest.warns(UserWarning, match="min_new_tokens 7 is above the 6 there is room for") as caught:
        ids = model.generate(ONE, min_new_tokens=7, **settings)
    assert caught[0].filename == __file__
    assert torch.equal(ids, model.generate(ONE, min_new_tokens=6, **settings))
    assert ids.shape[1] == 9


def test_the_message_for_temperature_zero_says_what_to_do():
    with pytest.raises(InputError, match=r"do_sample=False.*got 0"):
        GenerationConfig(temperature=0)


ONE, TWO = torch.tensor([[5, 9, 13]]), torch.tensor([[5, 9, 13], [7, 2, 30]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation_config", {"top_k": 3}),
        ("generator", 5),
        ("logits_processor", [3]),
        ("logits_processor", len),
        ("stopping_criteria", [3]),
        ("stopping_criteria", len),
        ("assistant_model", 3),
        ("extra", {}),
    ],
)
def test_objects_of_another_kind_are_refused_by_name(model, name, value):
    calls: list[int] = []
    handle = count_forwards(model, calls)
    with pytest.raises(InputError, match=name):
        model.generate(ONE, max_new_tokens=2, **{name: value})
    handle.remove()
    assert calls == []


@pytest.mark.parametrize("text", ["[]", '{"exponential_decay_length_penalty": 3}', '{"eos_token_id": "x"}'])
def test_a_file_of_another_shape_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


class Unset:
    """As a GenerationConfig of transformers 5: what is not set is None, and stands for the model's own."""

    def __init__(self, **given):
        self.given = given

    def to_dict(self):
        names = ("max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "top_k", "top_h", "use_cache")
        return {**dict.fromkeys(names), **self.given, "transformers_version": "5.24.0", "_from_model_config": False}


def test_what_transformers_5_leaves_unset_is_the_model_s_own():
    model = make_model()
    model.generation_config = own = GenerationConfig(top_k=7, eos_token_id=3, max_length=9)
    model.generation_config = Unset(max_new_tokens=4)
    assert model.generation_config == own.replace(max_new_tokens=4)
    expected = model.generate(ONE, max_new_tokens=5)
    assert torch.equal(model.generate(ONE, generation_config=Unset(max_new_tokens=5)), expected)
    with pytest.raises(InputError, match=r"generate does not take top_h=0\.5"):
        model.generate(ONE, generation_config=Unset(top_h=0.5))


def test_null_in_a_file_is_the_default_where_it_is_no_value():
    config = GenerationConfig.from_dict({"do_sample": None, "max_length": None, "top_k": None})
    assert (config.do_sample, config.max_length, config.top_k) == (False, 20, None)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (ONE, {"num_return_sequences": 2}, "num_return_sequences 2 .* do_sample=True"),
        (ONE, {"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences 3 .* num_beams 2"),
        (ONE, {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beams 4 .* num_beam_groups 3"),
        (ONE, {"num_beams": 2, "num_beam_groups": 4, "diversity_penalty": 1.0}, "num_beams 2 .* num_beam_groups 4"),
        (ONE, {"num_beams": 4, "num_beam_groups": 2}, r"diversity_penalty 0\.0"),
        (ONE, {"num_beams": 4, "diversity_penalty": 1.0}, r"diversity_penalty 1\.0 with num_beam_groups 1"),
        (ONE, {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "do_sample"),
        (ONE, {"penalty_alpha": 0.5, "num_beams": 2}, "penalty_alpha"),
        (ONE, {"penalty_alpha": 0.5, "do_sample": True}, "penalty_alpha"),
        (ONE, {"penalty_alpha": 0.5, "use_cache": False}, "use_cache"),
        (ONE, {"penalty_alpha": 0.5, "top_k": 1}, "top_k >= 2 tokens, got 1"),
        (ONE, {"exponential_decay_length_penalty": (1, 1.1)}, "eos_token_id"),
        (ONE, {"prompt_lookup_num_tokens": 3, "num_beams": 2}, "prompt_lookup_num_tokens"),
        (ONE, {"prompt_lookup_num_tokens": 3, "use_cache": False}, "use_cache"),
        (TWO, {"prompt_lookup_num_tokens": 3}, "one sequence at a time, got 2 prompts"),
        (ONE, {"prompt_lookup_num_tokens": 3, "do_sample": True, "num_return_sequences": 2}, "sequences 2"),
        (ONE, {"min_length": 6}, "min_length 6 .* 5 tokens"),
        (ONE, {"eos_token_id": 40}, "eos_token_id 40 .* 40"),
        (ONE, {"bad_words_ids": [[3, 41]]}, "bad_words_ids 41"),
        (ONE, {"bad_words_ids": [[]]}, "bad_words_ids"),
        (ONE, {"suppress_tokens": [-1]}, "suppress_tokens -1"),
        (ONE, {"sequence_bias": {(3, 44): 1.0}}, "sequence_bias 44"),
        (ONE, {"forced_eos_token_id": [2, 50]}, "forced_eos_token_id 50"),
        (TWO, {"eos_token_id": 2, "pad_token_id": -1}, "pad_token_id -1"),
        (ONE, {"temprature": 1.0}, "temprature"),
    ],
)
def test_contradictions_are_refused_before_any_forward_pass(model, ids, options, message):
    calls: list[int] = []
    handle = count_forwards(model, calls)
    with pytest.raises(InputError, match=message):
        model.generate(ids, max_new_tokens=2, **options)
    handle.remove()
    assert calls == []


def test_beams_are_not_streamed(model):
    for call in (lambda: model.stream(ONE, num_beams=2), lambda: model.generate(ONE, num_beams=2, streamer=object())):
        with pytest.raises(InputError, match="num_beams=1, got 2"):
            call()


def test_an_assistant_of_another_vocabulary_is_refused(model):
    with pytest.raises(InputError, match="vocabulary of 41, the model 40"):
        model.generate(ONE, assistant_model=make_model(vocab_size=41))
    with pytest.raises(InputError, match="not both"):
        model.generate(ONE, assistant_model=model, prompt_lookup_num_tokens=2)
    with pytest.raises(InputError, match="assistant_model serves"):
        model.generate(ONE, assistant_model=model, num_beams=2)


def test_a_setting_of_a_file_that_is_not_done_is_warned_of(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"guidance_scale": 1.5, "token_healing": false}')
    with pytest.warns(UserWarning, match=r"asks for what is not done: .*guidance_scale=1\.5"):
        GenerationConfig.from_pretrained(tmp_path)
