"""The configuration: what it accepts, what it refuses and says, and that nothing is lost on disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import pydoc
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openllama import OpenLlamaConfig
from openllama.config import ACTIVATIONS
from openllama.errors import CheckpointNotFoundError, ConfigError
from openllama.generation import GenerationConfig
from tests.draw import examples
from tests.parity.draws import configs
from tests.tiny import tiny_config, tiny_ids, tiny_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
unknown_keys = st.text(min_size=1, max_size=8).map("x_{}".format)


@examples(60)
@given(config=configs(), extra=st.dictionaries(unknown_keys, json_values, max_size=3))
def test_nothing_is_lost_in_a_dict_in_json_in_a_pickle_or_in_a_copy(
    config: OpenLlamaConfig, extra: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, extra=extra)
    assert OpenLlamaConfig.from_dict(config.to_dict()) == config
    assert OpenLlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


@examples(15)
@given(config=configs(), extra=st.dictionaries(unknown_keys, json_values, max_size=3))
def test_nothing_is_lost_in_a_folder(config: OpenLlamaConfig, extra: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(config, extra=extra)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert OpenLlamaConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert OpenLlamaConfig.from_pretrained(str(tmp_path / "new" / "folder" / "config.json")) == config


def test_what_to_dict_gives_can_be_changed_without_changing_the_config() -> None:
    config = tiny_config(rope_scaling={"type": "linear", "factor": 2.0}, eos_token_id=[1, 2], extra={"a": {"b": 1}})
    values = config.to_dict()
    values["rope_scaling"]["factor"] = 3.0
    values["eos_token_id"].append(3)
    values["a"]["b"] = 2
    assert config == tiny_config(
        rope_scaling={"type": "linear", "factor": 2.0}, eos_token_id=[1, 2], extra={"a": {"b": 1}}
    )


def test_keys_it_does_not_know_are_kept_and_written_back() -> None:
    config = OpenLlamaConfig.from_dict(
        {"hidden_size": 64, "transformers_version": "4.28.0.dev0", "torch_dtype": "float16"}
    )
    assert config.extra == {"transformers_version": "4.28.0.dev0", "torch_dtype": "float16"}
    assert config.to_dict()["transformers_version"] == "4.28.0.dev0"
    assert config.to_dict()["model_type"] == "open-llama"
    assert "extra" not in config.to_dict()


def test_overrides_replace_fields_and_nothing_else(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert OpenLlamaConfig.from_pretrained(tmp_path, pad_token_id=3, num_labels=5) == tiny_config(
        pad_token_id=3, num_labels=5
    )
    with pytest.raises(ConfigError, match="pad_id, paddington: not a field"):
        OpenLlamaConfig.from_pretrained(tmp_path, paddington=3, pad_id=1)


@pytest.mark.parametrize("misspelt", [True, False])
def test_the_misspelt_key_of_early_checkpoints_wins_and_is_written_correctly(misspelt: bool) -> None:
    config = OpenLlamaConfig.from_dict(
        {"use_memorry_efficient_attention": misspelt, "use_memory_efficient_attention": not misspelt}
    )
    assert config.use_memory_efficient_attention is misspelt
    assert config.to_dict()["use_memory_efficient_attention"] is misspelt
    assert "use_memorry_efficient_attention" not in config.to_dict()


def test_labels_by_name_are_counted_as_in_hf_whatever_number_stands_beside_them() -> None:
    names = {"0": "bad", "1": "so so", "2": "good"}
    assert OpenLlamaConfig.from_dict({"id2label": names}).num_labels == 3
    assert OpenLlamaConfig.from_dict({"id2label": names}).to_dict()["id2label"] == names
    assert OpenLlamaConfig.from_dict({"id2label": names, "num_labels": 4}).num_labels == 3
    assert OpenLlamaConfig.from_dict({"id2label": None}).num_labels == 2


def test_names_of_other_labels_than_there_are_now_are_not_written() -> None:
    names = {"id2label": {"0": "bad", "1": "so so", "2": "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
    config = OpenLlamaConfig.from_dict(names, num_labels=5)
    assert config.num_labels == 5
    assert OpenLlamaConfig.from_dict(config.to_dict()).num_labels == 5
    assert not {"id2label", "label2id"} & set(config.to_dict())


def test_labels_have_names_by_number_as_in_hf() -> None:
    config = OpenLlamaConfig.from_dict({"id2label": {"0": "bad", "1": "good", "2": "odd"}})
    assert config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert config.label2id == {"bad": 0, "good": 1, "odd": 2}
    assert OpenLlamaConfig.from_dict({"id2label": ["no", "yes"]}).id2label == {0: "no", 1: "yes"}
    assert dataclasses.replace(config, num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    config.id2label = {0: "a", 1: "b", 2: "c"}
    assert OpenLlamaConfig.from_dict(config.to_dict()).id2label == config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("pad_token_id", "row"), [(None, None), (0, 0), (22, 22), (-1, 22), (-23, 0)]
)  # of a vocabulary of 23
def test_a_negative_padding_id_counts_from_the_end_and_is_kept_as_given(pad_token_id: int | None, row: int) -> None:
    config = tiny_config(pad_token_id=pad_token_id)
    assert config.padding_idx == row
    assert config.to_dict()["pad_token_id"] == pad_token_id


def test_an_integer_scaling_factor_becomes_a_float() -> None:
    scaling = {"type": "dynamic", "factor": 2}
    assert tiny_config(rope_scaling=scaling).rope_scaling == {"type": "dynamic", "factor": 2.0}
    assert isinstance(tiny_config(rope_scaling=scaling).rope_scaling["factor"], float)
    assert scaling == {"type": "dynamic", "factor": 2}


def test_head_dim_is_the_width_of_one_head() -> None:
    assert OpenLlamaConfig().head_dim == 128


IMPOSSIBLE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(
        ({name: value}, (name, repr(value)))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "num_labels")
        for value in (0, -1, 1.5, "8", None, True)
    ),
    ({"hidden_size": 100, "num_attention_heads": 3}, ("hidden_size 100", "num_attention_heads 3")),
    ({"hidden_size": 12, "num_attention_heads": 4}, ("12", "4", "3 dimensions", "even")),
    ({"vocab_size": 10, "pad_token_id": 10}, ("pad_token_id 10", "vocabulary of 10")),
    ({"vocab_size": 10, "pad_token_id": -11}, ("pad_token_id -11", "vocabulary of 10")),
    ({"pad_token_id": "0"}, ("pad_token_id", "'0'")),
    ({"hidden_act": "swiglu"}, ("'swiglu'", *ACTIVATIONS)),
    ({"problem_type": "ranking"}, ("'ranking'", "regression", "single_label_classification")),
    *(
        ({name: value}, (name, "[0, 1]", repr(value)))
        for name in ("hidden_dropout_prob", "attention_dropout_prob")
        for value in (-0.1, 1.1, float("nan"), None, "0.1")
    ),
    *(
        ({name: value}, (name, repr(value)))
        for name in ("initializer_range", "rms_norm_eps")
        for value in (-1e-6, float("nan"), float("inf"), None, "1e-6")
    ),
    *(
        ({name: value}, (name, "true or false", repr(value)))
        for name in ("use_stable_embedding", "shared_input_output_embedding", "use_cache", "tie_word_embeddings")
        for value in ("false", None, 1)
    ),
    ({"rope_scaling": {"type": "linear"}}, ("factor", "{'type': 'linear'}")),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, ("'x': 1",)),
    ({"rope_scaling": "linear"}, ("'linear'", "factor")),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ("'yarn'", "linear", "dynamic")),
    *(
        ({"rope_scaling": {"type": "linear", "factor": factor}}, ("above 1", repr(factor)))
        for factor in (1.0, 0.5, "2", None, True, float("inf"), float("nan"))
    ),
    (
        {"hidden_size": 4, "num_attention_heads": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("dynamic", "2 dimensions"),
    ),
]


@pytest.mark.parametrize(("fields", "said"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_an_impossible_field_is_refused_by_name_and_value(fields: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenLlamaConfig(**fields)
    assert [part for part in said if part not in str(caught.value)] == []


def test_a_name_that_is_no_field_cannot_be_assigned_and_no_field_deleted() -> None:
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError, match="has no field hiden_size"):
        config.hiden_size = 64
    with pytest.raises(dataclasses.FrozenInstanceError, match="hidden_size cannot be deleted"):
        del config.hidden_size
    assert config == tiny_config()


def test_a_subclass_may_have_a_field_without_a_rule() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Wider(OpenLlamaConfig):
        note: str = "none"

    assert Wider(note="mine").note == "mine"


@pytest.mark.parametrize("name", ["hidden_size", "rope_scaling"])
def test_assigning_says_how_to_do_it_right(name: str) -> None:
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError) as caught:
        setattr(config, name, 64)
    assert f"dataclasses.replace(model.config, {name}=64)" in str(caught.value)
    assert config == tiny_config()


@pytest.mark.parametrize(("name", "value"), [
    ("use_cache", False), ("output_attentions", True), ("output_hidden_states", True), ("return_dict", False),
    ("pad_token_id", 3), ("bos_token_id", None), ("eos_token_id", [2, 5]), ("problem_type", "regression"),
])  # fmt: skip
def test_what_a_call_looks_up_can_be_assigned_and_is_kept(tmp_path: Path, name: str, value: Any) -> None:
    config = tiny_config()
    setattr(config, name, value)
    assert config == tiny_config(**{name: value})
    config.save_pretrained(tmp_path)
    assert getattr(OpenLlamaConfig.from_pretrained(tmp_path), name) == value


@pytest.mark.parametrize(("name", "value", "said"), [
    ("use_cache", "no", "use_cache must be true or false, got 'no'"),
    ("pad_token_id", 23, "pad_token_id 23 is outside the vocabulary of 23"),
    ("problem_type", "ranking", "problem_type must be one of"),
])  # fmt: skip
def test_what_is_assigned_is_checked_as_what_is_given(name: str, value: Any, said: str) -> None:
    config = tiny_config()
    with pytest.raises(ConfigError, match=said):
        setattr(config, name, value)
    assert config == tiny_config()


def test_one_assignment_reaches_head_and_decoder_and_the_next_call() -> None:
    model = tiny_model()
    assert model.model.config is model.config
    model.config.use_cache = False
    assert model(tiny_ids()).past_key_values is None
    model.config.return_dict = False
    assert isinstance(model(tiny_ids()), tuple)
    assert isinstance(model.model(tiny_ids()), tuple)


def test_what_trainers_and_adapters_ask_of_a_config() -> None:
    config = tiny_config(extra={"_name_or_path": "s-JoL/Open-Llama-V1", "pretraining_tp": 2})
    assert config.get_text_config(decoder=True) is config
    assert (config.is_encoder_decoder, config.use_return_dict) == (False, True)
    assert config.keys_to_ignore_at_inference == ["past_key_values"]
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert [key in config for key in ("vocab_size", "model_type", "pretraining_tp", "extra", "rope_theta")] == [
        True, True, True, False, False
    ]  # fmt: skip
    assert (config.name_or_path, tiny_config().name_or_path) == ("s-JoL/Open-Llama-V1", "")
    assert getattr(config, "quantization_config", None) is None
    with pytest.raises(AttributeError, match="has no rope_theta"):
        _ = config.rope_theta
    config.pretraining_tp = 1  # as peft does where there is one
    assert (config.pretraining_tp, config.to_dict()["pretraining_tp"]) == (1, 1)


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        OpenLlamaConfig(100)  # type: ignore[misc]


# --- plain LLaMA ---


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 16, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False},
        {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10000, "rope_scaling": None, "pretraining_tp": 1},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    ],
)
def test_a_plain_llama_is_an_open_llama_with_both_flags_off(more: dict[str, Any]) -> None:
    config = OpenLlamaConfig.from_dict({**LLAMA, **more})
    assert not config.use_stable_embedding
    assert not config.shared_input_output_embedding
    assert config.hidden_dropout_prob == config.attention_dropout_prob == 0.0
    assert config.pad_token_id is None  # LLaMA has no padding row, whatever Open-Llama's default
    assert config.hidden_size == 64
    assert OpenLlamaConfig.from_dict(config.to_dict()) == config


def test_a_llama_keeps_its_scaling_its_dropout_and_llama_s_own_defaults() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    config = OpenLlamaConfig.from_dict({**LLAMA, "rope_scaling": scaling, "attention_dropout": 0.1, "pad_token_id": 0})
    assert (config.rope_scaling, config.attention_dropout_prob, config.pad_token_id) == (scaling, 0.1, 0)
    assert OpenLlamaConfig.from_dict({"model_type": "llama"}).vocab_size == 32000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_key_value_heads": 2}, ("num_key_value_heads 2", "4")),
        ({"head_dim": 32}, ("head_dim 32", "16")),
        ({"rope_theta": 500000.0}, ("rope_theta 500000.0", "10000.0")),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, ("rope_theta 500000.0", "10000.0")),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3"}}, ("rope_type 'llama3'", "'default'")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("rope_scaling", "llama3")),
        ({"attention_bias": True}, ("attention_bias True", "False")),
        ({"mlp_bias": True}, ("mlp_bias True", "False")),
        ({"num_attention_heads": 0}, ("num_attention_heads 0", "64")),
        ({"hidden_size": "64"}, ("'64'",)),
    ],
)
def test_a_llama_of_another_architecture_is_refused(more: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenLlamaConfig.from_dict({**LLAMA, **more})
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize("model_type", ["mistral", "gpt2", "", None, 3])
def test_another_model_type_is_refused(model_type: Any) -> None:
    with pytest.raises(ConfigError, match=r"model_type .* is not supported; .*'open-llama', .*'llama'") as caught:
        OpenLlamaConfig.from_dict({"model_type": model_type})
    assert repr(model_type) in str(caught.value)


def test_other_spellings_of_the_model_type_are_corrected() -> None:
    with pytest.raises(ConfigError, match="'open_llama' is not supported; write it as 'open-llama'"):
        OpenLlamaConfig.from_dict({"model_type": "open_llama"})


# --- files ---


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json") as caught:
        OpenLlamaConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "holds a list"),
        ('{"hidden_size": 100, "num_attention_heads": 3}', "hidden_size 100"),
        ('{"model_type": "bert"}', "'bert'"),
    ],
)
def test_a_broken_config_json_is_named_with_its_fault(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        OpenLlamaConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_config_json_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json"):
        OpenLlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(tmp_path: Path, number: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"custom": {number}}}')
    with pytest.raises(ConfigError, match=number):
        OpenLlamaConfig.from_pretrained(tmp_path)


def test_a_key_that_looks_like_a_field_that_is_not_given_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rms_norm_epsilon is not a field .* rms_norm_eps has its default"):
        assert OpenLlamaConfig.from_dict({"rms_norm_epsilon": 1e-5}).rms_norm_eps == 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenLlamaConfig.from_dict({"rms_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5, "transformers_version": "4.31.0"})


@pytest.mark.parametrize(("text", "message"), [
    (b'{"a": ' + b"[" * 10**5, "is not valid JSON"),
    (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nests objects and lists more than 64 deep"),
    (b" " * (2**23 + 1), "bytes; at most 8,388,608 are read"),
    (b'{"a": "\xff"}', "is not valid JSON"),
    (b'{"num_hidden_layers": 1000000000000}', "an integer of at most 100000"),
    (b'{"vocab_size": 1' + b"0" * 400 + b"}", "an integer of at most"),
    (b'{"rms_norm_eps": 1' + b"0" * 400 + b"}", "a number in"),
    (b'{"rms_norm_eps": 1e400}', "a number in"),
    (b'{"rms_norm_eps": NaN}', "NaN is not JSON"),
    (b'{"id2label": 3}', "id2label must be"),
    (b'{"model_type": "llama", "rope_parameters": [1]}', "rope_parameters must be"),
])  # fmt: skip
def test_hostile_files(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        OpenLlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [OpenLlamaConfig, GenerationConfig])
def test_help_says_what_each_field_is(kind: type) -> None:
    shown = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    for field in dataclasses.fields(kind):
        assert f"{field.name}: {field.metadata['about']}" in shown
        assert field.metadata["about"]


def test_names_of_classes_are_given_and_assigned_as_in_transformers(tmp_path: Path) -> None:
    names, numbers = {0: "bad", 1: "good", 2: "so"}, {"bad": 0, "good": 1, "so": 2}
    tiny_config().save_pretrained(tmp_path)
    given = OpenLlamaConfig.from_pretrained(tmp_path, num_labels=3, id2label=names, label2id=numbers)
    assigned = tiny_config(num_labels=3)
    assigned.id2label = names
    by_number = tiny_config(num_labels=3)
    by_number.label2id = numbers
    for config in (given, assigned, by_number):
        assert (config.num_labels, config.id2label, config.label2id) == (3, names, numbers)
        config.save_pretrained(tmp_path)
        assert OpenLlamaConfig.from_pretrained(tmp_path).id2label == names
    with pytest.raises(ConfigError, match="id2label must name the 3 classes of num_labels"):
        assigned.id2label = {0: "bad"}


def test_what_follows_from_fields_is_not_assigned_even_where_the_file_has_it() -> None:
    config = OpenLlamaConfig.from_dict({"head_dim": 7})
    with pytest.raises(dataclasses.FrozenInstanceError, match="head_dim follows from the fields"):
        config.head_dim = 9
