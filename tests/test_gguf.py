"""GGUF files, read by the package gguf: weights, the order of q and k, the tokenizer; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openllama
from openllama import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification
from openllama.checkpoint import convert, pieces
from openllama.checkpoint import gguf as written
from openllama.errors import ConfigError, CorruptCheckpointError, DestinationExistsError, InputError
from tests.sentencepieces import TINY_CHECKPOINT, trained, write_folder
from tests.tiny import tiny_model

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer normalises text")


def export(target: Path, source: Path = TINY_CHECKPOINT, **options: Any) -> Any:
    convert(source, target, to="gguf", progress=False, **options)
    return gguf.GGUFReader(target)


def source_of(folder: Path, kind: Any = OpenLlamaForCausalLM, **fields: Any) -> Path:
    """A model of a few thousand numbers with a tokenizer of 420 pieces."""
    tiny_model(kind, **{"vocab_size": 425, **fields}).save_pretrained(folder)
    return write_folder(folder, trained("llama-like"), tokenizer_config={"add_bos_token": True})


def weights(reader: Any) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("piece", [2**23, 64])
def test_the_weights_are_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    source = source_of(tmp_path / "source")
    model = OpenLlamaForCausalLM.from_pretrained(source)
    found = weights(export(tmp_path / "model.gguf", source))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert len(found) == 3 + 9 * 2
    assert np.array_equal(found["output.weight"], state["model.embedding.tokens.weight"])
    assert np.array_equal(found["token_embd.weight"], model.model.embedding(torch.arange(425)).detach().numpy())
    for layer in range(2):
        for theirs, ours in (("attn_v", "attention.v_proj"), ("attn_output", "attention.o_proj"),
                             ("ffn_norm", "mlp_norm"), ("ffn_down", "mlp.down_proj")):  # fmt: skip
            assert np.array_equal(found[f"blk.{layer}.{theirs}.weight"], state[f"model.layers.{layer}.{ours}.weight"])
        for theirs, ours in (("attn_q", "attention.q_proj"), ("attn_k", "attention.k_proj")):
            weight = state[f"model.layers.{layer}.{ours}.weight"]  # 2 heads of 12 rows: 0, 6, 1, 7, ...
            rows = [12 * head + 6 * half + j for head in range(2) for j in range(6) for half in range(2)]
            assert np.array_equal(found[f"blk.{layer}.{theirs}.weight"], weight[rows])


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 1 / 254 * 1.01)])
def test_types(tmp_path: Path, dtype: str, bound: float) -> None:
    exact = weights(export(tmp_path / "exact.gguf", dtype="float32"))
    reader = export(tmp_path / "rounded.gguf", dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    expected = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    for name, rounded in weights(reader).items():
        if name.endswith("norm.weight"):
            assert kinds[name] == "F32"
        elif dtype == "q8_0" and "ffn_down" in name:
            assert kinds[name] == "F16"  # rows of 688 numbers are not whole blocks of 32
        else:
            assert kinds[name] == expected
            assert abs(rounded - exact[name]).max() <= bound * abs(exact[name]).max()


def test_the_tokenizer_and_the_shape(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", rope_scaling={"type": "linear", "factor": 2.0})
    fields = {name: field.contents() for name, field in export(tmp_path / "model.gguf", source).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.0)
    names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (names[:3], kinds[:3], len(names)) == (["<unk>", "<s>", "</s>"], [2, 3, 3], 425)
    assert (names[-1], kinds[-1]) == ("[PAD424]", 5)
    assert kinds[names.index("<0x0A>")] == 6
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert "user:" in fields["tokenizer.chat_template"]


def test_a_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    fields = export(tmp_path / "model.gguf").fields
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in TINY_CHECKPOINT.glob("*.bin")}
    assert json.loads(fields["openllama.source"].contents()) == sums
    assert fields["openllama.version"].contents() == openllama.__version__


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, '"dynamic" cannot be converted to gguf'),
        ({"kind": OpenLlamaForSequenceClassification}, "a classifier cannot be converted"),
    ],
)
def test_models_that_llama_cpp_does_not_compute_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    source = source_of(tmp_path / "source", **fields)
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "model.gguf", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_destinations(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        export(tmp_path / "folder")
    (tmp_path / "model.gguf").write_text("my notes")
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        export(tmp_path / "model.gguf")
    with pytest.raises(DestinationExistsError, match="not a GGUF file"):
        export(tmp_path / "model.gguf", overwrite=True)
    assert (tmp_path / "model.gguf").read_text() == "my notes"
    export(tmp_path / "other.gguf")
    export(tmp_path / "other.gguf", overwrite=True, dtype="q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "other.gguf"]


def test_a_file_that_appears_while_the_source_is_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = written._entries

    def slow(*arguments: Any) -> Any:
        (tmp_path / "model.gguf").write_bytes(b"GGUF of another program")
        return entries(*arguments)

    monkeypatch.setattr(written, "_entries", slow)
    with pytest.raises(DestinationExistsError, match="--overwrite"):
        export(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF of another program"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_source_gives_no_result(tmp_path: Path) -> None:
    """One bit of a weight in a pickle, whose archive has a CRC-32 of it."""
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "source")
    file = max((tmp_path / "source").glob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        export(tmp_path / "model.gguf", tmp_path / "source")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_normalisation_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="llama.cpp does not"):
        export(tmp_path / "model.gguf")


def test_the_extra_is_named_where_the_package_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"openllama\[export\]"):
        export(tmp_path / "model.gguf")


@pytest.mark.parametrize("place", [-40, 4000, 4001, 4002, 4003, 5000, 5001])
def test_a_disk_that_loses_bits_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """One bit of the last weight, or of the tokenizer's names and their lengths."""
    source = source_of(tmp_path / "source")
    write = written._File.write

    def faulty(self: Any) -> dict[str, str]:
        sums = write(self)
        content = bytearray(self.path.read_bytes())
        content[place] ^= 1
        self.path.write_bytes(content)
        return sums

    monkeypatch.setattr(written._File, "write", faulty)
    with pytest.raises(CorruptCheckpointError, match=r"differs when read again|is truncated or damaged"):
        export(tmp_path / "model.gguf", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
