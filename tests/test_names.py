"""The table of names, and the check that a set of weights is a model."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.checkpoint.names import (
    HF_TO_NATIVE,
    NATIVE_TO_HF,
    check_layers,
    expected_shapes,
    floating_dtype,
    hf_to_native,
    layout_of,
    native_to_hf,
    select,
    unwrap,
    without,
)
from openllama.errors import ConfigError, InputError, KeyMismatchError
from openllama.rope import frequencies
from tests.checkpoints import assert_same_tensors, hf_weights, native_weights, tiny_config
from tests.draw import examples
from tests.parity.draws import configs

heads = st.sampled_from(("body", "causal-lm", "classifier"))
MODELS = {
    "body": OpenLlamaModel,
    "causal-lm": OpenLlamaForCausalLM,
    "classifier": OpenLlamaForSequenceClassification,
}
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def test_table_is_one_to_one() -> None:
    assert len(NATIVE_TO_HF) == len(HF_TO_NATIVE)
    assert not any("norm" in native and "layernorm" in native for native in NATIVE_TO_HF)


@examples(25)
@given(config=configs(), head=heads)
def test_expected_shapes_are_those_of_the_models(config, head) -> None:
    with torch.device("meta"):
        model = MODELS[head](config)
    prefix = "model." if head == "body" else ""
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)  # a file needs no copy of it
    assert expected_shapes(config, head) == shapes


@examples(25)
@given(config=configs(), head=heads)
def test_renaming_there_and_back_changes_nothing(config, head) -> None:
    native = native_weights(config, head)
    hf = native_to_hf(native, config)
    assert layout_of(native) == "native"
    assert layout_of(hf) == "hf"
    assert sum(name.endswith("inv_freq") for name in hf) == config.num_hidden_layers
    tied = head == "causal-lm" and config.tie_word_embeddings and not config.shared_input_output_embedding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = hf_to_native(hf)
    assert_same_tensors(again, {**native, "lm_head.weight": hf["lm_head.weight"]} if tied else native)
    assert all(hf[name].data_ptr() == tensor.data_ptr() for name, tensor in native_to_hf(again, config).items()
               if "inv_freq" not in name)  # fmt: skip


@pytest.mark.parametrize(("fields", "parameters"), [
    ({}, 6_738_415_616),  # LLaMA 7B, LLaMA 2 7B, open_llama_7b
    ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
     13_015_864_320),  # 13B
    ({"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26}, 3_426_473_600),  # open_llama_3b
])  # fmt: skip
def test_plain_llamas_have_their_published_sizes(fields, parameters) -> None:
    config = OpenLlamaConfig.from_dict({"model_type": "llama", **fields})
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(config).values()) == parameters


def test_native_names_stay_as_they_are() -> None:
    weights = native_weights(tiny_config())
    assert_same_tensors(hf_to_native(weights), weights)


def test_body_alone_has_no_prefix() -> None:
    config = tiny_config()
    bare = native_to_hf(native_weights(config, "body"), config)
    assert "embed_tokens.weight" in bare
    assert select(bare, config).head == "body"
    assert select(bare, config, "causal-lm").tensors.keys() == expected_shapes(config, "causal-lm").keys()


def test_everything_wrong_is_in_one_error() -> None:
    config = tiny_config(shared_input_output_embedding=False)
    weights = hf_weights(config)
    weights["norm.weight"] = weights["model.norm.weight"]
    weights["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(6)
    weights["model.layers.N.mlp.gate_proj.weight"] = torch.zeros(6, 8)
    weights["model.layers.7.mlp.gate_proj.weight"] = torch.zeros(6, 8)
    weights["model.layers.1.input_layernorm.weight"] = torch.zeros(9)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    del weights["lm_head.weight"], weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(KeyMismatchError) as caught:
        select(weights, config)
    text = str(caught.value)
    assert "not a weight of an Open-Llama (2): model.layers.0.mlp.gate_proj.bias, model.layers.N.mlp" in text
    assert "not in the model that the configuration describes (1): model.layers.7.mlp.gate_proj.weight" in text
    assert "given twice (1): model.norm.weight (as model.norm.weight and norm.weight)" in text
    assert "missing (2): lm_head.weight, model.layers.0.attention.q_proj.weight" in text
    assert "model.layers.1.attention_norm.weight is (9,), the configuration implies (8,)" in text
    assert "model.layers.1.mlp.up_proj.weight is torch.int8" in text
    assert "\n" not in text


def test_names_of_another_model() -> None:
    with pytest.raises(KeyMismatchError, match=r"found transformer\.wte"):
        hf_to_native({"transformer.wte.weight": torch.zeros(2, 2)})
    with pytest.raises(KeyMismatchError, match="found no weights"):
        hf_to_native({})


def test_rounded_inv_freq_is_fine() -> None:
    config = tiny_config(hidden_size=64)
    weights = hf_weights(config)
    for dtype in (torch.bfloat16, torch.float16):
        weights[INV_FREQ] = frequencies(32, None, 1, 1).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hf_to_native(weights)
            weights[INV_FREQ] = weights[INV_FREQ].float()
            hf_to_native(weights)


def test_mutated_inv_freq_is_reported_and_ignored() -> None:
    config = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=8)
    weights = hf_weights(config)
    weights[INV_FREQ] = frequencies(4, config.rope_scaling, 8, key_length=30)
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.rotary_emb\.inv_freq is not what"):
        assert_same_tensors(hf_to_native(weights), native_weights(config))


def test_inv_freq_of_other_heads_contradicts_the_config() -> None:
    weights = hf_weights(tiny_config())
    with pytest.raises(KeyMismatchError, match=r"inv_freq is \(2,\), the configuration implies \(1,\)"):
        select(weights, tiny_config(num_attention_heads=4))


def test_stray_head_of_a_shared_checkpoint() -> None:
    config = tiny_config()
    weights = hf_weights(config)
    weights["lm_head.weight"] = torch.zeros(13, 8)
    with pytest.warns(UserWarning, match="shared_input_output_embedding uses the embedding"):
        assert "lm_head.weight" not in select(weights, config).tensors


@pytest.mark.parametrize("equal", [True, False])
def test_tied_head_in_the_file(equal: bool) -> None:
    config = tiny_config(shared_input_output_embedding=False, tie_word_embeddings=True)
    weights = hf_weights(config)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not equal:
            weights["lm_head.weight"] = torch.zeros(13, 8)
        assert_same_tensors(select(weights, config).tensors, native_weights(config))
    assert [str(w.message)[:22] for w in caught] == ([] if equal else ["lm_head.weight differs"])


def test_left_over_heads() -> None:
    config = tiny_config(shared_input_output_embedding=False)
    with pytest.warns(UserWarning, match=r"lm_head\.weight is not used: this model has no such head"):
        select(hf_weights(config), config, "body")
    with pytest.warns(UserWarning, match=r"score\.weight is not used"):
        select(hf_weights(tiny_config(), "classifier"), tiny_config(), "causal-lm")
    with pytest.raises(KeyMismatchError, match=r"missing \(1\): lm_head\.weight"):
        select(hf_weights(config, "classifier"), config, "causal-lm")


def test_native_to_hf_wants_the_weights_of_the_config() -> None:
    weights = native_weights(tiny_config())
    with pytest.raises(KeyMismatchError, match=r"missing \(1\): lm_head\.weight"):
        native_to_hf(weights, tiny_config(shared_input_output_embedding=False))


def test_dtypes() -> None:
    assert floating_dtype("bfloat16") == floating_dtype(torch.bfloat16) == torch.bfloat16
    assert floating_dtype(None) is floating_dtype("auto") is None
    for wrong in ("int8", torch.int8, "nn", "nonsense"):
        with pytest.raises(ConfigError, match="dtype"):
            floating_dtype(wrong)


# ---- what trainers and other versions of transformers add


BUFFERS = [
    "model.layers.1.self_attn.bias",
    "model.layers.1.self_attn.masked_bias",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
]


@pytest.mark.parametrize("head", ["causal-lm", "body"])
def test_buffers_are_reported_once_and_left_out(head) -> None:
    config = tiny_config()
    prefix = "" if head == "body" else "model."
    buffers = {prefix + name.removeprefix("model."): torch.ones(1, 1, 4, 4) for name in BUFFERS}
    with pytest.warns(UserWarning, match=r"4 buffers are not weights.*layers\.1\.self_attn\.bias") as caught:
        assert_same_tensors(hf_to_native({**hf_weights(config, head), **buffers}), native_weights(config, head))
    assert len(caught) == 1
    with pytest.raises(KeyMismatchError, match=r"not a weight.*q_proj\.bias"):
        hf_to_native({**hf_weights(config), "model.layers.0.self_attn.q_proj.bias": torch.ones(8)})


def test_inv_freq_of_the_whole_model_is_checked_like_that_of_a_layer() -> None:
    config, name = tiny_config(), "model.rotary_emb.inv_freq"
    weights = {k: v for k, v in hf_weights(config).items() if "inv_freq" not in k}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_tensors(hf_to_native({**weights, name: frequencies(4, None, 1, 1)}), native_weights(config))
    with pytest.warns(UserWarning, match=r"model\.rotary_emb\.inv_freq is not what the configuration implies"):
        hf_to_native({**weights, name: 2 * frequencies(4, None, 1, 1)})


@pytest.mark.parametrize("wrap", [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.module.{name}",
    lambda name: f"_forward_module.{name}",
    lambda name: f"base_model.model.{name}",
    lambda name: f"module.base_model.model.{name}",
    lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    lambda name: f"_fsdp_wrapped_module.{name.replace('layers.', '_fsdp_wrapped_module.layers.')}",
    lambda name: f"module.{name.replace('self_attn.', 'self_attn._orig_mod.')}",
])  # fmt: skip
@pytest.mark.parametrize("head", ["causal-lm", "body", "classifier"])
def test_wrappers_are_removed_wherever_they_are(wrap, head) -> None:
    weights = hf_weights(tiny_config(shared_input_output_embedding=False), head)
    wrapped = {wrap(name): tensor for name, tensor in weights.items()}
    assert wrapped.keys() != weights.keys()
    assert_same_tensors(unwrap(wrapped), weights)


def test_a_weight_wrapped_and_unwrapped_is_there_twice() -> None:
    with pytest.raises(KeyMismatchError, match=r"given twice \(1\): a\.b \(as a\.b and module\.a\._orig_mod\.b\)"):
        unwrap({"a.b": torch.zeros(1), "module.a._orig_mod.b": torch.zeros(1)})


def test_ignored_weights_are_named() -> None:
    tensors = dict.fromkeys(["a.weight", "a.bias", "b.bias"], torch.zeros(1))
    with pytest.warns(UserWarning, match=r"ignored, as asked: a\.bias, b\.bias$"):
        assert list(without(tensors, ["*.bias"])) == ["a.weight"]
    with pytest.raises(InputError, match=r"no weight matches 'c\.\*'.*the first is a\.weight"):
        without(tensors, ["*.bias", "c.*"])
    assert without(tensors, []) == tensors


def test_an_open_llama_that_says_it_is_a_llama_and_the_other_way_round() -> None:
    open_llama, llama = tiny_config(), tiny_config(use_stable_embedding=False, shared_input_output_embedding=False)
    with pytest.raises(KeyMismatchError, match=r"so they are an Open-Llama.*model_type open-llama"):
        select(hf_weights(open_llama), llama)
    with pytest.raises(KeyMismatchError, match=r"as a plain LLaMA.*model_type llama"):
        select(hf_weights(llama), open_llama)


def test_a_config_with_far_more_layers_than_weights_is_refused_at_once() -> None:
    config = tiny_config(num_hidden_layers=10**5)
    with pytest.raises(KeyMismatchError, match="100000 needs 900000 weights, there are 20"):
        check_layers([f"w{i}" for i in range(20)], config)


def test_a_message_shows_ten_of_each_kind() -> None:
    config = tiny_config()
    with pytest.raises(KeyMismatchError, match=r"not a weight of an Open-Llama \(100\): .*x9 and 90 more"):
        select({**native_weights(config), **{f"x{i}": torch.ones(1) for i in range(100)}}, config)


def test_shapes_are_found_without_importing_torchs_compiler():
    script = (
        "import sys; from openllama import OpenLlamaConfig; from openllama.checkpoint.names import expected_shapes; "
        "expected_shapes(OpenLlamaConfig(num_hidden_layers=1)); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
