"""Opening checkpoints: every form, and every way in which files are wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor

from openllama import OpenLlamaForCausalLM
from openllama.checkpoint import reader
from openllama.checkpoint.files import open_file
from openllama.checkpoint.folders import finished_folder
from openllama.checkpoint.reader import open_checkpoint
from openllama.checkpoint.writer import OURS
from openllama.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    KeyMismatchError,
)
from tests.checkpoints import (
    FORMS,
    assert_same_tensors,
    edit_index,
    edit_json,
    hf_weights,
    native_weights,
    tiny_config,
    write_checkpoint,
    write_file,
)

CONFIG = tiny_config()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [hf_weights, native_weights])
def test_every_form_of_folder(tmp_path: Path, form: str, make: Any) -> None:
    weights = make(CONFIG)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, weights, CONFIG, form))
    assert_same_tensors(checkpoint.tensors, weights)
    assert checkpoint.format == ("safetensors" if "safetensors" in form else "pickle")
    assert len(checkpoint.files) == (3 if "shards" in form else 1)
    assert checkpoint.config == CONFIG


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "other.safetensors"])
def test_single_files(tmp_path: Path, name: str) -> None:
    weights = hf_weights(CONFIG)
    write_file(tmp_path / name, weights)
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json.*--config"):
        open_checkpoint(tmp_path / name)
    assert_same_tensors(open_checkpoint(tmp_path / name, CONFIG).tensors, weights)
    CONFIG.save_pretrained(tmp_path / "elsewhere")
    assert open_checkpoint(tmp_path / name, tmp_path / "elsewhere" / "config.json").config == CONFIG
    CONFIG.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path / name).config == CONFIG


def test_overrides_change_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG)
    assert open_checkpoint(tmp_path, pad_token_id=3).config.pad_token_id == 3
    assert open_checkpoint(tmp_path, CONFIG, pad_token_id=3).config.pad_token_id == 3
    with pytest.raises(ConfigError, match="no_such_field"):
        open_checkpoint(tmp_path, no_such_field=3)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"PK\x03\x04" + b"x" * 50, b"\x80\x02", b"\x80\x02}q\x00(X"])
def test_empty_and_garbage(tmp_path: Path, name: str, content: bytes) -> None:
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CorruptCheckpointError, match=name):
            open_checkpoint(tmp_path)


# ---- names that safetensors keeps in the metadata

TIED = tiny_config(shared_input_output_embedding=False, tie_word_embeddings=True)


def test_a_tied_table_under_one_name(tmp_path: Path) -> None:
    weights = hf_weights(TIED)
    del weights["model.embed_tokens.weight"]
    TIED.save_pretrained(tmp_path)
    metadata = {"format": "pt", "model.embed_tokens.weight": "lm_head.weight", "model.norm.weight": "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = OpenLlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded["model.embedding.tokens.weight"], weights["lm_head.weight"])
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"]), "a tensor that is there is no alias"


def test_what_the_library_saves_of_a_tied_model(tmp_path: Path) -> None:
    model = OpenLlamaForCausalLM(TIED)
    save_model(model, str(tmp_path / "model.safetensors"))
    TIED.save_pretrained(tmp_path)
    assert_same_tensors(OpenLlamaForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_tied_table_under_one_name_in_shards(tmp_path: Path) -> None:
    """huggingface_hub's ``save_torch_model`` notes it in the index."""
    weights = hf_weights(TIED)
    table = weights.pop("model.embed_tokens.weight")
    write_checkpoint(tmp_path, weights, TIED, "safetensors shards")
    others = {"model.embed_tokens.weight": "lm_head.weight", "total_size": 7, "x": ["lm_head.weight"]}
    edit_json(tmp_path / "model.safetensors.index.json", lambda content: content["metadata"].update(others))
    assert torch.equal(open_checkpoint(tmp_path).tensors["model.embed_tokens.weight"], table)


def test_names_do_not_make_a_file_larger_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, path, {"c": "a", "d": "b"})
    assert open_file(path).keys() == {"a", "b", "c", "d"}
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, path, {"c": "a", "d": "a"})
    with pytest.raises(CorruptCheckpointError, match="2 other names"):
        open_file(path)


@pytest.mark.parametrize("form", ["one safetensors", "pickle shards"])
def test_wrapped_names_in_every_format(tmp_path: Path, form: str) -> None:
    weights = {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in hf_weights(CONFIG).items()}
    write_checkpoint(tmp_path, weights, CONFIG, form)
    assert_same_tensors(open_checkpoint(tmp_path).tensors, hf_weights(CONFIG))


# ---- folders and indexes


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"holds none of model\.safetensors"):
        open_checkpoint(tmp_path)
    write_file(tmp_path / "pytorch_model-00001-of-00002.bin", hf_weights(CONFIG))
    absent = r"pytorch_model-00002-of-00002\.bin, pytorch_model\.bin\.index\.json: copy or download"
    with pytest.raises(CheckpointNotFoundError, match=rf"it has pytorch_model-00001-of-00002\.bin without {absent}"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "mine.bin")
    with pytest.raises(CheckpointNotFoundError, match=r"it has mine\.bin: pass the file itself"):
        open_checkpoint(tmp_path)
    with pytest.raises(
        CorruptCheckpointError, match=r"config\.json is not an index .* pass a folder or a file of weigh"
    ):
        open_checkpoint(tmp_path / "config.json")


@pytest.mark.parametrize("form", ["pickle shards", "safetensors shards"])
def test_absent_shard(tmp_path: Path, form: str) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, form)
    (shard,) = tmp_path.glob("*-00002-of-00003.*")
    shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"names {shard.name}, .* \(1 of 3\): copy or download"):
        open_checkpoint(tmp_path)


def test_a_shard_alone_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, "safetensors shards")
    with pytest.raises(CheckpointNotFoundError, match="is one of 3 files of a checkpoint; pass their folder"):
        open_checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    write_file(tmp_path / "model-00001-of-00001.safetensors", native_weights(CONFIG))
    assert_same_tensors(open_checkpoint(tmp_path / "model-00001-of-00001.safetensors").tensors, native_weights(CONFIG))


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/b.bin", "a\\b.bin", "..", "", 3, None])
def test_index_that_points_elsewhere(tmp_path: Path, name: Any) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, "pickle shards")
    edit_index(tmp_path, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(CorruptCheckpointError, match=r"places model\.norm\.weight in"):
        open_checkpoint(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf_weights(CONFIG), CONFIG, "pickle shards")

    def disagree(weight_map: dict[str, str]) -> None:
        weight_map["model.extra.weight"] = weight_map["model.norm.weight"]
        del weight_map["model.norm.weight"]
        shards = sorted(set(weight_map.values()))
        here = weight_map["model.embed_tokens.weight"]
        weight_map["model.embed_tokens.weight"] = next(shard for shard in shards if shard != here)

    edit_index(tmp_path, disagree)
    with pytest.raises(KeyMismatchError) as caught:
        open_checkpoint(tmp_path)
    assert "model.norm.weight is in pytorch_model-" in str(caught.value)
    assert "but not in the index" in str(caught.value)
    assert "model.extra.weight is not in pytorch_model-" in str(caught.value)
    assert "model.embed_tokens.weight is in pytorch_model-00001-of-00003.bin, the index says" in str(caught.value)


def test_key_in_two_shards(tmp_path: Path) -> None:
    weights = hf_weights(CONFIG)
    write_checkpoint(tmp_path, weights, CONFIG, "safetensors shards")
    second = tmp_path / "model-00002-of-00003.safetensors"
    tensors: dict[str, Tensor] = {k: v.clone() for k, v in open_file(second).items()}
    save_file({**tensors, next(iter(weights)): torch.zeros(1)}, second)
    with pytest.raises(KeyMismatchError, match=rf"{next(iter(weights))} is in {second.name}, the index says"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "b", "a": "c"}}',
])  # fmt: skip
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_wrapped_names_in_the_shards_of_an_index(tmp_path: Path) -> None:
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in hf_weights(CONFIG).items()}
    write_checkpoint(tmp_path, wrapped, CONFIG, "pickle shards")
    assert_same_tensors(open_checkpoint(tmp_path).tensors, hf_weights(CONFIG))


# ---- a folder that another program replaces


class Replacing:
    """Replaces the model in a folder, config and weights, just before a file of it is opened."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.left = folder, times

    def __call__(self, file: Path) -> dict[str, Tensor]:
        if self.left:
            self.left -= 1
            with finished_folder(self.folder, OURS) as new:
                write_checkpoint(new, native_weights(NEW, seed=self.left + 1), NEW, "one safetensors")
        return open_file(file)


NEW = tiny_config(rms_norm_eps=0.5)


def test_a_folder_that_is_replaced_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG, "one safetensors")
    monkeypatch.setattr(reader, "open_file", Replacing(tmp_path, 1))
    found = open_checkpoint(tmp_path)
    assert found.config.rms_norm_eps == 0.5
    assert_same_tensors(found.tensors, native_weights(NEW, seed=1))


def test_a_folder_that_becomes_another_model_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old index names files that are gone."""
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG, "safetensors shards")
    monkeypatch.setattr(reader, "open_file", Replacing(tmp_path, 1))
    assert_same_tensors(open_checkpoint(tmp_path).tensors, native_weights(NEW, seed=1))


def test_a_folder_that_is_replaced_again_and_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, native_weights(CONFIG), CONFIG, "one safetensors")
    monkeypatch.setattr(reader, "open_file", Replacing(tmp_path, 9))
    with pytest.raises(CorruptCheckpointError, match="was changed while it was read"):
        open_checkpoint(tmp_path)
