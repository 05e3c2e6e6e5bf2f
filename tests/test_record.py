"""conversion.json: what a conversion read, wrote and left out, and that ``verify`` compares with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openllama import OpenLlamaForCausalLM
from openllama.checkpoint import conversion, convert, verify
from openllama.checkpoint.record import RECORD_FILE, SourceSums
from openllama.errors import CorruptCheckpointError, heard, warn
from tests.checkpoints import hf_weights, native_weights, tiny_config, write_checkpoint
from tests.sentencepieces import trained, write_folder

CONFIG = tiny_config()
NORM = "model.norm.weight"


@pytest.fixture(name="source")
def source_folder(tmp_path: Path) -> Path:
    weights = hf_weights(CONFIG)
    weights["model.embed_tokens.weight"][CONFIG.padding_idx] = 0
    folder = write_checkpoint(tmp_path / "hf", weights, CONFIG, "pickle shards")
    return write_folder(folder, trained("no bytes", model_type="word", vocab_size=12))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD_FILE).read_text())


def test_a_record_has_the_sums_of_all_files_and_weights(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "native", dtype="bfloat16", progress=False)
    found = record_of(tmp_path / "native")
    files = sorted(source.glob("*.bin"))
    assert found["source"] == {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }
    assert (found["to"], found["dtype"], found["warnings"]) == ("native", "bfloat16", [])
    written = load_file(tmp_path / "native" / "model.safetensors")
    assert found["weights"].keys() == written.keys()
    for name, tensor in written.items():
        content = tensor.view(torch.uint8).numpy().tobytes()
        assert found["weights"][name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert found["weights"][name]["shape"] == list(tensor.shape)
        assert found["weights"][name]["dtype"] == "bfloat16"
    assert found["left_out"] == {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "follows from the configuration" for layer in range(2)
    }


def test_a_record_says_what_is_unusual(tmp_path: Path) -> None:
    weights = hf_weights(CONFIG)
    weights[NORM][:2] = torch.tensor([float("nan"), 1])
    weights["model.layers.0.mlp.up_proj.weight"][0, :3] = torch.tensor([1e-6, 2e-6, 0])
    weights["model.embed_tokens.weight"][CONFIG.padding_idx] = 1.0
    weights["extra.weight"] = torch.ones(2)
    write_checkpoint(tmp_path / "hf", weights, CONFIG)
    with pytest.warns(UserWarning, match="NaN or infinity") as shown:
        convert(tmp_path / "hf", tmp_path / "half", dtype="float16", ignore=["extra.*"], progress=False)
    found = record_of(tmp_path / "half")
    assert found["left_out"]["extra.weight"] == "was to be ignored"
    assert found["weights"][NORM]["not_finite"] == 1
    assert found["weights"]["model.layers.0.mlp.up_proj.weight"]["subnormal"] >= 2
    said = {str(warning.message).replace(f"{tmp_path}/", "") for warning in shown}
    assert said >= {text for text in found["warnings"] if "row" not in text}
    assert "hf has no tokenizer.model" in str(found["warnings"])
    assert str(tmp_path) not in str(found), "a record tells nothing about the machine"
    assert any("of pad_token_id, is not zero" in text for text in found["warnings"])


def test_verify_compares_with_the_record(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "native", progress=False)
    report = verify(tmp_path / "native")
    assert report.recorded
    assert "as conversion.json records them" in str(report)
    assert not verify(source).recorded


@pytest.mark.parametrize("change", ["number", "type", "missing entry", "other entry"])
def test_what_was_changed_afterwards_is_found(source: Path, tmp_path: Path, change: str) -> None:
    convert(source, tmp_path / "native", progress=False)
    file = tmp_path / "native" / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    found = record_of(tmp_path / "native")
    if change == "number":
        tensors[NORM][3] += 2**-20
    elif change == "type":
        tensors[NORM] = tensors[NORM].double()
    elif change == "missing entry":
        del found["weights"][NORM]
    else:
        found["weights"]["model.other.weight"] = found["weights"][NORM]
    save_file(tensors, file, metadata=metadata)
    (tmp_path / "native" / RECORD_FILE).write_text(json.dumps(found))
    name = "model.other.weight" if change == "other entry" else NORM
    with pytest.raises(CorruptCheckpointError, match=f"{name} changed since the conversion"):
        verify(tmp_path / "native")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weights": 3}', '{"weights": {"a": 3}}', "{"])
def test_a_record_that_is_none_is_an_error(source: Path, tmp_path: Path, text: str) -> None:
    convert(source, tmp_path / "native", progress=False)
    (tmp_path / "native" / RECORD_FILE).write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"conversion\.json"):
        verify(tmp_path / "native")


def test_a_damaged_source_gives_no_result(source: Path, tmp_path: Path) -> None:
    file = max(source.glob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    place = content.index(native_weights(CONFIG)["model.layers.0.mlp.up_proj.weight"].numpy().tobytes()[:64])
    content[place + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        convert(source, tmp_path / "native", progress=False)
    assert not (tmp_path / "native").exists()


def test_sums_are_given_up_at_once_when_they_are_not_wanted_any_more(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**36)  # a sparse file that would take a minute
    with SourceSums([tmp_path / "large"]):
        pass


def test_a_model_saved_over_a_conversion_has_no_old_record(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "native", progress=False)
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path / "native")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "native")
    assert not verify(tmp_path / "native").recorded


def test_warnings_are_heard_by_each_conversion_that_runs() -> None:
    with heard() as first, heard() as second:
        pass
    with heard() as first:
        with heard() as second, pytest.warns(UserWarning, match="one"):
            warn("one")
        with pytest.warns(UserWarning, match="two"):
            warn("two")
    assert (first, second) == (["one", "two"], ["one"])


def test_a_source_that_is_replaced_meanwhile_is_refused(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    [file, *_] = source.glob("*.bin")
    write = conversion.write_weights

    def replacing(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "copy").write_bytes(file.read_bytes())
        (tmp_path / "copy").replace(file)
        return write(*arguments, **options)

    monkeypatch.setattr(conversion, "write_weights", replacing)
    with pytest.raises(CorruptCheckpointError, match="was changed while it was read"):
        convert(source, tmp_path / "native", progress=False)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("name", ["config.json", "*.bin"])
def test_a_source_that_is_replaced_before_it_is_read_is_refused(
    source: Path, tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    """Its weights would be those of the old files, its record and its tokenizer those of the new ones."""
    [file, *_] = source.glob(name)
    export = conversion.export

    def replacing(*arguments: Any) -> Any:
        (tmp_path / "copy").write_bytes(file.read_bytes())
        (tmp_path / "copy").replace(file)
        return export(*arguments)

    monkeypatch.setattr(conversion, "export", replacing)
    with pytest.raises(CorruptCheckpointError, match="was changed while it was read"):
        convert(source, tmp_path / "native", progress=False)
    assert not (tmp_path / "native").exists()
