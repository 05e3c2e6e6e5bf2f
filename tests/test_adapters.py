"""Adapters: their names and configurations, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openllama.checkpoint import convert, inspect
from openllama.checkpoint.adapters import MODULES, WORDS, convert_adapter, rename_adapter, rename_config
from openllama.checkpoint.files import open_file
from openllama.checkpoint.names import HF_TO_NATIVE
from openllama.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DestinationExistsError,
    InputError,
    KeyMismatchError,
)
from tests.checkpoints import assert_same_tensors

CONFIG = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}
HF = "base_model.model.model.layers.10.self_attn.q_proj.lora_A.weight"
NATIVE = "base_model.model.model.layers.10.attention.q_proj.lora_A.weight"


def adapter(folder: Path, tensors: dict[str, Tensor], pickled: bool = False, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_words_make_the_table_of_names() -> None:
    for hf, native in HF_TO_NATIVE.items():
        assert ".".join(WORDS.get(word, word) for word in hf.split(".")) == native
    assert len(MODULES["hf"]) == len(MODULES["native"])


@pytest.mark.parametrize(("hf", "native"), [
    (HF, NATIVE),
    (HF.replace("model.model.model", "model.model"), NATIVE.replace("model.model.model", "model.model")),  # no head
    ("base_model.model.model.embed_tokens.lora_A", "base_model.model.model.embedding.tokens.lora_A"),
    ("base_model.model.model.embed_layer_norm.bias", "base_model.model.model.embedding.norm.bias"),
    ("base_model.model.score.weight", "base_model.model.score.weight"),
    ("prompt_embeddings", "prompt_embeddings"),
])  # fmt: skip
def test_weights_are_renamed_both_ways(hf: str, native: str) -> None:
    tensor = torch.zeros(1)
    for to, name in (("native", native), ("hf", hf)):
        for given in (hf, native):
            assert list(rename_adapter({given: tensor}, to)) == [name]  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "hf", "native"), [
    ("target_modules", ["q_proj", "self_attn.v_proj"], ["q_proj", "attention.v_proj"]),
    ("target_modules", ["layers.3.self_attn.q_proj"], ["layers.3.attention.q_proj"]),
    ("target_modules", r"model\.layers\.[0-7]\.self_attn\.(q|v)_proj", r"model\.layers\.[0-7]\.attention\.(q|v)_proj"),
    ("target_modules", "all-linear", "all-linear"),
    ("target_modules", ".*", ".*"),
    ("modules_to_save", ["embed_tokens", "score"], ["embedding.tokens", "score"]),
    ("modules_to_save", ["norm"], ["norm"]),
    ("modules_to_save", ["classifier"], ["classifier"]),
    ("rank_pattern", {"self_attn.q_proj": 4}, {"attention.q_proj": 4}),
    ("alpha_pattern", {r"layers\.1\.mlp\.up_proj": 4}, {r"layers\.1\.mlp\.up_proj": 4}),
    ("modules_to_save", None, None),
    ("r", 8, 8),
])  # fmt: skip
def test_configurations_are_renamed_both_ways(field: str, hf: Any, native: Any) -> None:
    for given in (hf, native):
        assert rename_config({field: given}, "native") == {field: native}
        assert rename_config({field: given}, "hf") == {field: hf}


@pytest.mark.parametrize("targets", [["tokens"], r".*attentio.\.q_proj", "("])
def test_targets_that_would_mean_other_modules_are_refused(targets: Any) -> None:
    with pytest.raises(KeyMismatchError, match=r"target_modules: .*(cannot be translated|not a regular expression)"):
        rename_config({"target_modules": targets}, "hf")


@pytest.mark.parametrize("regex", [
    "(.+)+x", "(.|..)*x", "(?:a?){60}x", r"(.+)\1\1x", "(?=.*)x", "(m|mo|.)?" * 12, r"\w?" * 40, ".*" * 9, "a" * 9999,
])  # fmt: skip
def test_regular_expressions_that_may_run_for_ever_are_refused(regex: str) -> None:
    started = time.monotonic()
    for config in ({"target_modules": regex}, {"rank_pattern": {regex: 4}}):
        with pytest.raises(KeyMismatchError, match="could take too long"):
            rename_config(config, "native")
    assert time.monotonic() - started < 2


def test_many_regular_expressions_are_refused_where_one_is_not(tmp_path: Path) -> None:
    rename_config({"rank_pattern": {".*mlp.*": 4}}, "native")
    with pytest.raises(KeyMismatchError, match="not many of them"):
        rename_config({"rank_pattern": {f".*{number}.*": 4 for number in range(999)}}, "native")
    adapter(tmp_path / "hf", {HF: torch.zeros(1)}, modules_to_save=["x"] * 1001)
    with pytest.raises(CorruptCheckpointError, match="modules_to_save names more than 1,000 modules"):
        convert_adapter(tmp_path / "hf", tmp_path / "native")


@pytest.mark.parametrize("regex", [
    r".*\.layers\.(1|2|1\d)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj", ".*mlp.*", ".+_proj$",
    r".*[kv]_?proj?.*",
])  # fmt: skip
def test_usual_regular_expressions_are_read(regex: str) -> None:
    native = regex.replace("self_attn", "attention")
    assert rename_config({"target_modules": regex}, "native") == {"target_modules": native}


def test_modules_of_another_model_are_refused() -> None:
    with pytest.raises(KeyMismatchError, match=r"not of a module of an Open-Llama \(1\): .*\.c_attn"):
        rename_adapter(
            {HF: torch.zeros(1), "base_model.model.transformer.h.0.c_attn.lora_A.weight": torch.zeros(1)}, "hf"
        )
    with pytest.raises(KeyMismatchError, match="both layouts"):
        rename_adapter({HF: torch.zeros(1), NATIVE: torch.zeros(1)}, "native")


@pytest.mark.parametrize("pickled", [True, False])
def test_a_folder_is_converted(tmp_path: Path, pickled: bool) -> None:
    tensor = torch.randn(2, 3)
    adapter(tmp_path / "hf", {HF: tensor}, pickled, target_modules=["self_attn.q_proj"])
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hf" / "README.md").write_text("not copied")
    convert(tmp_path / "hf", tmp_path / "native", dtype="float16", progress=False)
    assert sorted(path.name for path in (tmp_path / "native").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "native/adapter_config.json").read_text()) == {
        **CONFIG, "target_modules": ["attention.q_proj"]
    }  # fmt: skip
    assert_same_tensors(open_file(tmp_path / "native/adapter_model.safetensors"), {NATIVE: tensor.half()})
    (tmp_path / "plain").touch()
    for path in (tmp_path / "native").iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path


def test_what_is_refused_before_work(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "hf", {HF: torch.zeros(1)})
    with pytest.raises(DestinationExistsError, match="is or contains the source"):
        convert_adapter(folder, folder, overwrite=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        convert_adapter(folder, tmp_path / "there")
    with pytest.raises(CheckpointNotFoundError, match=r"is an adapter, not a model.*openllama convert"):
        inspect(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"none of adapter_model\.safetensors"):
        convert_adapter(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_damaged_adapter_gives_no_result(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "hf", {HF: torch.full((2, 8), 1.5)}, pickled=True)
    content = (folder / "adapter_model.bin").read_bytes()
    number = torch.full((1,), 1.5).numpy().tobytes()
    (folder / "adapter_model.bin").write_bytes(content.replace(number, torch.full((1,), 3.0).numpy().tobytes(), 1))
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        convert(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(("field", "value"), [
    ("target_modules", 5), ("target_modules", [1]), ("rank_pattern", [1]), ("modules_to_save", {"a": 1}),
])  # fmt: skip
def test_configurations_of_other_types_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter(tmp_path / "hf", {name: torch.ones(2, 8)}, **{field: value})
    with pytest.raises(CorruptCheckpointError, match=field):
        convert(tmp_path / "hf", tmp_path / "native")


def test_a_model_is_not_replaced_by_an_adapter_and_large_numbers_stay_finite(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter(tmp_path / "hf", {name: torch.full((2, 8), 1e6)}, target_modules=["q_proj"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(DestinationExistsError, match="no adapter"):
        convert(tmp_path / "hf", tmp_path / "model", overwrite=True)
    with pytest.raises(CorruptCheckpointError, match="too large for float16"):
        convert(tmp_path / "hf", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_options_for_models_are_refused_for_adapters(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter(tmp_path / "hf", {name: torch.ones(2, 8)}, target_modules=["q_proj"])
    for options in ({"ignore": ["*"]}, {"max_shard_size": "1GB"}):
        with pytest.raises(InputError, match=r"--ignore.*--max-shard-size"):
            convert(tmp_path / "hf", tmp_path / "native", **options)
