"""Loading and saving models."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file, load_model, save_model

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.checkpoint import convert, hf_to_native, reader, verify
from openllama.errors import (
    BackendError,
    CheckpointNotFoundError,
    ConfigError,
    DestinationExistsError,
    InputError,
    KeyMismatchError,
)
from tests.checkpoints import (
    FORMS,
    assert_same_tensors,
    hf_weights,
    native_weights,
    shift_data,
    tiny_config,
    write_checkpoint,
    write_file,
)
from tests.tiny import tiny_ids, tiny_model

MODELS = (OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification)
CONFIG = tiny_config()
OWN_HEAD = tiny_config(shared_input_output_embedding=False)
TIED = tiny_config(shared_input_output_embedding=False, tie_word_embeddings=True)
IDS = torch.tensor([[1, 5, 7, 2]])


def model_of(cls: Any, config: OpenLlamaConfig) -> Any:
    """A model whose every weight is random, the norms too."""
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def same_model(a: torch.nn.Module, b: torch.nn.Module) -> None:
    assert_same_tensors(a.state_dict(), b.state_dict())
    with torch.no_grad():
        assert torch.equal(a(IDS)[0], b(IDS)[0])


# ---- saving and loading


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("config", [CONFIG, OWN_HEAD, TIED], ids=["shared", "own head", "tied"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 300])
def test_saved_models_load_as_they_were(tmp_path: Path, cls: Any, config: OpenLlamaConfig, max_shard_size: Any) -> None:
    model = model_of(cls, config)
    model.save_pretrained(tmp_path / "m", max_shard_size=max_shard_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = cls.from_pretrained(tmp_path / "m")
    same_model(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["architectures"] == [cls.__name__]
    assert values["torch_dtype"] == "float32"
    if cls is OpenLlamaForCausalLM and config is TIED:
        assert loaded.lm_head.weight is loaded.model.embedding.tokens.weight
    if max_shard_size == "5GB":
        tied = cls is OpenLlamaForCausalLM and config is TIED
        stored = load_file(tmp_path / "m" / "model.safetensors")
        assert stored.keys() == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [hf_weights, native_weights])
def test_every_form_gives_the_same_model(tmp_path: Path, form: str, make: Any) -> None:
    write_checkpoint(tmp_path, make(OWN_HEAD), OWN_HEAD, form)
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(model.state_dict(), native_weights(OWN_HEAD))


def test_file_with_its_config_passed(tmp_path: Path) -> None:
    write_file(tmp_path / "x.pt", hf_weights(CONFIG))
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path / "x.pt", config=CONFIG)
    assert_same_tensors(model.state_dict(), native_weights(CONFIG))


def test_dtype(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in native_weights(CONFIG).items()}
    write_checkpoint(tmp_path, weights, dataclasses.replace(CONFIG, extra={"torch_dtype": "float32"}))
    load = OpenLlamaForCausalLM.from_pretrained
    assert load(tmp_path).dtype == torch.bfloat16  # the file's, whatever its config says
    assert load(tmp_path, torch_dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float64).dtype == torch.float64
    assert load(tmp_path, torch_dtype="float16").dtype == torch.float16
    with pytest.raises(InputError, match="dtype float16 and torch_dtype float32 are two names of one argument"):
        load(tmp_path, dtype="float16", torch_dtype="float32")
    with pytest.raises(ConfigError, match="int8"):
        load(tmp_path, dtype=torch.int8)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    write_checkpoint(tmp_path, weights, CONFIG)
    assert {parameter.dtype for parameter in load(tmp_path).parameters()} == {torch.float32}


def test_device(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG)
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).device == torch.device("cpu")
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path, device="cpu", low_cpu_mem_usage=True).dtype == torch.float32


@pytest.mark.parametrize("config", [CONFIG, OWN_HEAD, TIED], ids=["shared", "own head", "tied"])
def test_a_model_on_the_meta_device_has_all_shapes_and_ties_and_no_numbers(
    tmp_path: Path, config: OpenLlamaConfig
) -> None:
    write_checkpoint(tmp_path, hf_weights(config), config)
    wanted = {name: parameter.shape for name, parameter in OpenLlamaForCausalLM(config).named_parameters()}
    with torch.device("meta"):
        by_context = OpenLlamaForCausalLM.from_pretrained(tmp_path)
    for model in (by_context, OpenLlamaForCausalLM.from_pretrained(tmp_path, device="meta")):
        assert {name: parameter.shape for name, parameter in model.named_parameters()} == wanted
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model(IDS.to("meta")).logits.shape == (1, 4, 13)
        if config is TIED:
            assert model.lm_head.weight is model.model.embedding.tokens.weight


@pytest.mark.parametrize(
    "place", ["cpu", "auto", "balanced", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}]
)
def test_a_device_map_of_one_device_is_that_device(tmp_path: Path, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG)
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path, device_map=place).device == torch.device("cpu")


def test_a_device_map_may_name_the_accelerator_or_meta_and_no_second_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG)
    load = OpenLlamaForCausalLM.from_pretrained
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert load(tmp_path, device_map="auto").device == load(tmp_path, device_map="meta").device == torch.device("meta")
    for places in ({"model": "cpu", "lm_head": "meta"}, {"": "disk"}, {}):
        with pytest.raises(InputError, match="is not one device"):
            load(tmp_path, device_map=places)
    with pytest.raises(InputError, match="give device cpu or device_map auto, not both"):
        load(tmp_path, device="cpu", device_map="auto")


def test_use_safetensors_says_which_format_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pickle", hf_weights(CONFIG), CONFIG)
    write_checkpoint(tmp_path / "safe", hf_weights(CONFIG), CONFIG, "one safetensors")
    load = OpenLlamaForCausalLM.from_pretrained
    assert_same_tensors(load(tmp_path / "safe", use_safetensors=True).state_dict(), native_weights(CONFIG))
    assert_same_tensors(load(tmp_path / "pickle", use_safetensors=False).state_dict(), native_weights(CONFIG))
    with pytest.raises(CheckpointNotFoundError, match=r"no safetensors, but use_safetensors=True; .*openllama convert"):
        load(tmp_path / "pickle", use_safetensors=True)
    with pytest.raises(InputError, match="use_safetensors=False, but safetensors are read first"):
        load(tmp_path / "safe", use_safetensors=False)


@pytest.mark.parametrize("config", [CONFIG, OWN_HEAD, TIED], ids=["shared", "own head", "tied"])
def test_safetensors_own_functions_load_what_was_saved_and_save_what_loads(
    tmp_path: Path, config: OpenLlamaConfig
) -> None:
    model, other = model_of(OpenLlamaForCausalLM, config), model_of(OpenLlamaForCausalLM, config)
    model.save_pretrained(tmp_path)
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    same_model(other, model)
    save_model(model, tmp_path / "by safetensors.safetensors")
    same_model(OpenLlamaForCausalLM.from_pretrained(tmp_path / "by safetensors.safetensors"), model)


def test_backend(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG)
    assert OpenLlamaModel.from_pretrained(tmp_path).attn_implementation == "sdpa"
    assert OpenLlamaModel.from_pretrained(tmp_path, attn_implementation="eager").attn_implementation == "eager"
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path, use_memory_efficient_attention=False)
    assert model.model.attn_implementation == "eager"
    with pytest.raises(BackendError, match="nonsense"):
        OpenLlamaModel.from_pretrained(tmp_path, attn_implementation="nonsense")


def test_overrides(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG)
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path, pad_token_id=3).model.embedding.tokens.padding_idx == 3
    with pytest.raises(ConfigError, match="paddington: not a field"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path, paddington=3)
    with pytest.raises(KeyMismatchError, match=r"\(13, 8\), the configuration implies \(14, 8\)"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path, vocab_size=14)


def test_generation_config_is_kept(tmp_path: Path) -> None:
    model = model_of(OpenLlamaForCausalLM, CONFIG)
    model.generation_config = model.generation_config.replace(max_length=33)
    model.save_pretrained(tmp_path)
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).generation_config.max_length == 33
    assert not hasattr(OpenLlamaModel.from_pretrained(tmp_path), "generation_config")


# ---- other heads


@pytest.mark.parametrize("layout", [hf_weights, native_weights])
def test_body_and_heads_load_from_each_other(tmp_path: Path, layout: Any) -> None:
    for head in ("body", "causal-lm", "classifier"):
        write_checkpoint(tmp_path / head, layout(CONFIG, head), CONFIG)
    body = native_weights(CONFIG, "body")
    for head in ("body", "causal-lm", "classifier"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = [cls.from_pretrained(tmp_path / head).base_model.state_dict() for cls in MODELS]
        for state in loaded:
            assert_same_tensors(state, {k.removeprefix("model."): v for k, v in native_weights(CONFIG, head).items()
                                        if "score" not in k} if head != "body" else body)  # fmt: skip


def test_unused_and_new_weights_are_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "lm", hf_weights(OWN_HEAD), OWN_HEAD)
    write_checkpoint(tmp_path / "score", hf_weights(CONFIG, "classifier"), CONFIG)
    with pytest.warns(UserWarning, match=r"lm_head\.weight is not used"):
        OpenLlamaModel.from_pretrained(tmp_path / "lm")
    with pytest.warns(UserWarning, match=r"score\.weight is not used"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "score")
    with (
        pytest.warns(UserWarning, match=r"score\.weight is new"),
        pytest.warns(UserWarning, match=r"lm_head\.weight is not used"),
    ):
        model = OpenLlamaForSequenceClassification.from_pretrained(
            tmp_path / "lm", num_labels=3, initializer_range=0.5, dtype=torch.bfloat16
        )
    assert model.score.weight.shape == (3, 8)
    assert model.score.weight.dtype == torch.bfloat16
    assert 0.1 < model.score.weight.std() < 1.5


def test_no_other_weight_is_invented(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(OWN_HEAD, "body"), OWN_HEAD)
    with pytest.raises(KeyMismatchError, match=r"missing \(1\): lm_head\.weight"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(KeyMismatchError, match=r"missing \(2\): model\.embedding\.norm\.bias"):
        OpenLlamaModel.from_pretrained(write_llama(tmp_path / "llama"), use_stable_embedding=True)


def write_llama(folder: Path) -> Path:
    config = tiny_config(use_stable_embedding=False, shared_input_output_embedding=False)
    write_checkpoint(folder, hf_weights(config), None)
    values = {"model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 6,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_plain_llama(tmp_path: Path) -> None:
    model = OpenLlamaForCausalLM.from_pretrained(write_llama(tmp_path))
    assert model.model.embedding.norm is None
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_hf_state_dict_loads_strictly() -> None:
    for config in (CONFIG, OWN_HEAD, TIED):
        model = OpenLlamaForCausalLM(config)
        model.load_state_dict(hf_to_native(hf_weights(config)), strict=True)


def test_hub_names_are_not_fetched() -> None:
    with pytest.raises(CheckpointNotFoundError, match="local disk only, `openllama convert ORG/NAME DST` downloads"):
        OpenLlamaForCausalLM.from_pretrained("s-JoL/Open-Llama-V1")


# ---- memory of files


@pytest.mark.parametrize("form", FORMS)
def test_training_never_reaches_the_files(tmp_path: Path, form: str) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, form)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.embedding.tokens.weight, native_weights(CONFIG)["model.embedding.tokens.weight"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same_tensors(OpenLlamaForCausalLM.from_pretrained(tmp_path).state_dict(), native_weights(CONFIG))


def test_weights_outlive_their_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", native_weights(CONFIG), CONFIG, "safetensors shards")
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    assert_same_tensors(model.state_dict(), native_weights(CONFIG))


def test_weights_that_a_pickle_shares_train_apart(tmp_path: Path) -> None:
    weights = hf_weights(OWN_HEAD)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = OpenLlamaForCausalLM.from_pretrained(write_checkpoint(tmp_path, weights, OWN_HEAD))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(model.model.embedding.tokens.weight, weights["model.embed_tokens.weight"])


def misaligned_checkpoint(folder: Path, offset: int) -> int:
    """Write HF's safetensors with every tensor at ``offset`` modulo 64; the size of the model in bytes."""
    config = tiny_config(hidden_size=32, intermediate_size=16, num_attention_heads=1)  # sizes are multiples of 64
    write_checkpoint(folder, hf_weights(config), config, "safetensors shards")
    for file in folder.glob("*.safetensors"):
        shift_data(file, offset)
    return sum(tensor.nbytes for tensor in native_weights(config).values())


def offsets(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() % 64 for parameter in model.parameters()}


@pytest.mark.parametrize("offset", [1, 4, 8, 32])
def test_misaligned_weights_are_copied_to_multiples_of_64_bytes(tmp_path: Path, offset: int) -> None:
    misaligned_checkpoint(tmp_path, offset)
    assert {tensor.data_ptr() % 64 for tensor in reader.open_checkpoint(tmp_path).tensors.values()} == {offset}
    assert offsets(OpenLlamaForCausalLM.from_pretrained(tmp_path)) == {0}


def test_misaligned_weights_stay_in_the_file_if_copies_would_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = misaligned_checkpoint(tmp_path, 8)
    monkeypatch.setattr(reader, "MAX_ALIGNED_COPIES", size)
    assert offsets(OpenLlamaForCausalLM.from_pretrained(tmp_path)) == {0}
    monkeypatch.setattr(reader, "MAX_ALIGNED_COPIES", size - 1)
    assert offsets(OpenLlamaForCausalLM.from_pretrained(tmp_path)) == {8}
    cast = OpenLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert offsets(cast) == {0}, "a cast is a copy in any case"


def test_only_misaligned_tensors_are_copied() -> None:
    numbers = torch.arange(64.0)
    tensors = {"aligned": numbers, "at 64": numbers[16:], "at 4": numbers[1:], "at 32": numbers[8:]}
    copies = reader.aligned(tensors)
    assert_same_tensors(copies, tensors)
    assert [name for name in tensors if copies[name] is not tensors[name]] == ["at 4", "at 32"]


# ---- where models are saved


def test_saving_again_and_beside_other_files(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("mine")
    (tmp_path / "tokenizer.model").write_text("tokens")
    model = model_of(OpenLlamaForCausalLM, CONFIG)
    model.save_pretrained(tmp_path, max_shard_size=300)
    model = model_of(OpenLlamaForCausalLM, CONFIG)
    model.save_pretrained(tmp_path)
    names = {"log.txt", "tokenizer.model", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    same_model(OpenLlamaForCausalLM.from_pretrained(tmp_path), model)
    with pytest.raises(DestinationExistsError, match="exists"):
        model.save_pretrained(tmp_path, overwrite=False)


def test_saving_over_the_files_a_model_is_mapped_from(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG, "one safetensors")
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path)
    same_model(OpenLlamaForCausalLM.from_pretrained(tmp_path), model)


def test_hf_pickles_are_left_beside_a_saved_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG)
    before = (tmp_path / "pytorch_model.bin").read_bytes()
    model = model_of(OpenLlamaForCausalLM, CONFIG)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before
    same_model(OpenLlamaForCausalLM.from_pretrained(tmp_path), model)


def test_models_that_left_their_config_are_not_saved(tmp_path: Path) -> None:
    model = OpenLlamaForCausalLM(CONFIG)
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(KeyMismatchError, match=r"model\.layers\.0\.mlp\.extra\.weight"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_weights_from_elsewhere_are_saved_in_place_of_the_model_s_own(tmp_path: Path) -> None:
    model, other = model_of(OpenLlamaForCausalLM, CONFIG), model_of(OpenLlamaForCausalLM, CONFIG)
    gathered = {f"module.{name}": parameter for name, parameter in other.named_parameters()}
    model.save_pretrained(tmp_path, state_dict=gathered, save_function=torch.save)
    same_model(OpenLlamaForCausalLM.from_pretrained(tmp_path), other)
    del gathered["module.model.norm.weight"]
    with pytest.raises(KeyMismatchError, match=r"missing \(1\): model\.norm\.weight"):
        model.save_pretrained(tmp_path / "x", state_dict=gathered)
    assert not (tmp_path / "x").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model_of(OpenLlamaForCausalLM, CONFIG).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_a_function_that_would_write_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"save_function .* cannot be used: .* model\.state_dict\(\) has the weights"):
        model_of(OpenLlamaForCausalLM, CONFIG).save_pretrained(tmp_path / "x", save_function=lambda *arguments: None)
    with pytest.raises(InputError, match="save_pretrained does not know max_shard"):
        model_of(OpenLlamaForCausalLM, CONFIG).save_pretrained(tmp_path / "x", max_shard="1GB")
    assert not (tmp_path / "x").exists()


def test_save_and_convert_agree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", hf_weights(OWN_HEAD), OWN_HEAD)
    OpenLlamaForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    convert(tmp_path / "hf", tmp_path / "converted", progress=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()
    verify(tmp_path / "saved", tmp_path / "hf")


# ---- what every model knows of itself


@pytest.mark.parametrize("cls", MODELS)
def test_conveniences(cls: Any) -> None:
    model = cls(TIED).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert isinstance(model.base_model, OpenLlamaModel)
    assert model.get_decoder() is model.base_model
    assert not list(model.buffers())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == count
    assert model.num_parameters(exclude_embeddings=True) == count - 13 * 8
    model.base_model.norm.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == count - 8
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == count - 8 - 13 * 8
    model.set_attn_implementation("eager")
    assert model.base_model.attn_implementation == "eager"
    model.config = dataclasses.replace(TIED, use_cache=False)
    assert model.base_model.config.use_cache is False


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj),
        lambda model: torch.nn.utils.prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5),
        lambda model: setattr(model.model.layers[0].mlp, "base_layer", torch.nn.Linear(2, 2)),
    ],
)
def test_modules_in_place_of_the_models_own_are_refused_before_saving(tmp_path: Path, change: Any) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(InputError, match=r"are of an adapter, a parametrization, .* merge or remove it before saving"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_head_that_the_config_does_not_know_of_is_not_dropped_in_silence(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm_head = torch.nn.Linear(24, 23, bias=False)
    with pytest.raises(InputError, match="shared_input_output_embedding=False"):
        model.save_pretrained(tmp_path)
    model.config = dataclasses.replace(model.config, shared_input_output_embedding=False)
    model.save_pretrained(tmp_path)
    loaded = OpenLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_process_that_does_not_write_needs_no_weights(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "saved", is_main_process=False, state_dict={})
    assert not (tmp_path / "saved").exists()
