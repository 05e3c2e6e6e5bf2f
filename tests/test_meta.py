"""LLaMA as Meta publishes it, against Meta's rotation of neighbouring numbers, written with complex numbers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from openllama import OpenLlamaForCausalLM
from openllama.checkpoint import convert, inspect, open_checkpoint, pieces, verify
from openllama.checkpoint.meta import META_TO_HF, Assembled
from openllama.checkpoint.names import HF_TO_NATIVE
from openllama.errors import ConfigError, KeyMismatchError
from tests.sentencepieces import trained, write_folder

PARAMS = {"dim": 24, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}
INNER, VOCABULARY = 32, 20
SHAPES = {
    "tok_embeddings": (VOCABULARY, 24), "output": (VOCABULARY, 24), "norm": (24,), "attention_norm": (24,),
    "ffn_norm": (24,), "wq": (24, 24), "wk": (24, 24), "wv": (24, 24), "wo": (24, 24),
    "w1": (INNER, 24), "w2": (24, INNER), "w3": (INNER, 24),
}  # fmt: skip
BY_COLUMNS = ("tok_embeddings", "wo", "w2")  # written down again, so that the package's table is not its own witness


def weights(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [name.replace(".N.", f".{n}.") for name in META_TO_HF for n in range(2 if ".N." in name else 1)]
    return {n: torch.randn(SHAPES[n.split(".")[-2]], generator=generator, dtype=torch.float64).to(dtype) for n in names}


def write(folder: Path, tensors: dict[str, Tensor], files: int = 1, **params: Any) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    for number in range(files):
        part = {"rope.freqs": torch.ones(3)}
        for name, tensor in tensors.items():
            dimension = 1 if name.split(".")[-2] in BY_COLUMNS else 0
            whole = tensor.ndim == 1
            part[name] = tensor.clone() if whole else tensor.chunk(files, dimension)[number].clone()
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    return folder


def meta_logits(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """A LLaMA by Meta's weights: each pair of neighbours in a head is a complex number, which is turned."""
    length, heads, width = ids.shape[1], PARAMS["n_heads"], 24 // PARAMS["n_heads"]
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D / 2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + PARAMS["norm_eps"]).sqrt() * tensors[name]

    def turned(x: Tensor) -> Tensor:  # (B, T, H, D)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    x = tensors["tok_embeddings.weight"][ids]
    for layer in ("layers.0.", "layers.1."):
        h = norm(x, layer + "attention_norm.weight")
        q, k, v = ((h @ tensors[f"{layer}attention.w{n}.weight"].T).unflatten(-1, (heads, width)) for n in "qkv")
        scores = torch.einsum("bthd,bshd->bhts", turned(q), turned(k)) / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("bhts,bshd->bthd", scores, v).flatten(2) @ tensors[f"{layer}attention.wo.weight"].T
        h = norm(x, layer + "ffn_norm.weight")
        inner = F.silu(h @ tensors[f"{layer}feed_forward.w1.weight"].T) * (
            h @ tensors[f"{layer}feed_forward.w3.weight"].T
        )
        x = x + inner @ tensors[f"{layer}feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ tensors["output.weight"].T


def test_every_weight_of_a_plain_llama_has_a_name() -> None:
    hf = {name for name in HF_TO_NATIVE if "embed_layer_norm" not in name and name != "score.weight"}
    assert {name for name, _ in META_TO_HF.values()} == hf


@pytest.mark.parametrize("files", [1, 2, 4])
def test_the_logits_are_meta_s(tmp_path: Path, files: int) -> None:
    tensors = weights()
    ids = torch.randint(VOCABULARY, (2, 9))
    expected = meta_logits(tensors, ids)
    source = write(tmp_path / "meta", tensors, files)
    convert(source, tmp_path / "native", progress=False)
    shutil.rmtree(source) if files == 2 else verify(tmp_path / "native", source)
    for folder in [tmp_path / "native"] + [source] * source.exists():
        model = OpenLlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert model.dtype == torch.float64
        # Our rotation is in float32, its angles too: the difference is theirs.
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_is_meta_s_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights(torch.float16)
    convert(write(tmp_path / "meta", tensors, 2), tmp_path / "native", progress=False)
    written = load_file(tmp_path / "native" / "model.safetensors")
    monkeypatch.setattr(pieces, "PIECE", 5 * 24)  # a few rows at a time
    convert(tmp_path / "meta", tmp_path / "again", progress=False)
    assert all(
        torch.equal(tensor, written[name]) for name, tensor in load_file(tmp_path / "again/model.safetensors").items()
    )
    for name, (hf, _) in META_TO_HF.items():
        if name.split(".")[-2] in ("wq", "wk"):
            continue
        for n in range(2 if ".N." in name else 1):
            native = HF_TO_NATIVE[hf].replace(".N.", f".{n}.")
            assert torch.equal(written[native], tensors[name.replace(".N.", f".{n}.")]), name
    key = written["model.layers.1.attention.k_proj.weight"].view(4, 2, 3, 24)  # halves of each head
    assert torch.equal(key.transpose(1, 2).reshape(24, 24), tensors["layers.1.attention.wk.weight"])


def test_rows_are_put_together_when_they_are_read() -> None:
    parts = (torch.arange(36.0).view(6, 6), torch.arange(36.0, 72).view(6, 6))
    assert Assembled(parts, 0)[5:8].equal(torch.cat(parts)[5:8])
    assert Assembled(parts, 1)[5:8].equal(torch.cat(parts, 1)[5:8])
    assert Assembled(parts, 0, 6)[:][:, 0].tolist() == [0, 12, 24, 6, 18, 30, 36, 48, 60, 42, 54, 66]


def test_the_configuration(tmp_path: Path) -> None:
    config = open_checkpoint(write(tmp_path / "one", weights(), 2)).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCABULARY, 24, INNER)
    assert (config.num_hidden_layers, config.num_attention_heads, config.rms_norm_eps) == (2, 4, 1e-5)
    assert not config.use_stable_embedding
    assert not config.shared_input_output_embedding
    assert config.pad_token_id is None
    assert "20, hidden 24" in str(inspect(tmp_path / "one"))


def test_what_is_refused(tmp_path: Path) -> None:
    tensors = weights()
    for number, (params, message) in enumerate([
        ({"n_kv_heads": 2}, "num_key_value_heads 2"), ({"rope_theta": 500000.0}, "rope_theta 500000"),
        ({"n_heads": 0}, "needs dim and n_heads"), ({"dim": "24"}, "needs dim and n_heads"),
    ]):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            inspect(write(tmp_path / f"{number}", tensors, **params))
    folder = write(tmp_path / "absent", tensors, 2)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(KeyMismatchError, match=r"embed_tokens\.weight is|tokens\.weight is \(20, 12\)"):
        inspect(folder)
    folder = write(tmp_path / "unknown", {**tensors, "layers.0.attention.wq.bias": torch.zeros(24)})
    with pytest.raises(KeyMismatchError, match=r"not a weight of an Open-Llama \(1\): layers\.0\.attention\.wq\.bias"):
        inspect(folder)
    folder = write(tmp_path / "different", tensors, 2)
    torch.save({}, folder / "consolidated.01.pth")
    with pytest.raises(KeyMismatchError, match=r"only one of consolidated\.00\.pth and consolidated\.01\.pth holds"):
        inspect(folder)


def test_files_of_llama_cpp_beside_them_and_pipes_do_no_harm(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", weights())
    (folder / "ggml-model-f16.gguf").write_bytes(b"GGUF")
    os.mkfifo(folder / "pipe.gguf")
    assert open_checkpoint(folder).tensors


def test_more_layers_than_there_are_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", weights(), n_layers=100_000)
    with pytest.raises((ConfigError, KeyMismatchError)):
        open_checkpoint(folder)


@pytest.mark.parametrize("files", [1, 2])
def test_a_gguf_file_keeps_meta_s_order_of_rows(tmp_path: Path, files: int) -> None:
    gguf = pytest.importorskip("gguf")
    tensors = weights(torch.float32)
    tensors |= {name: torch.randn(426, 24) for name in ("tok_embeddings.weight", "output.weight")}
    write_folder(write(tmp_path / "meta", tensors, files), trained("llama-like"))
    convert(tmp_path / "meta", tmp_path / "x.gguf", to="gguf", progress=False)
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for kind in "qk":
        assert (found[f"blk.0.attn_{kind}.weight"] == tensors[f"layers.0.attention.w{kind}.weight"].numpy()).all()


def test_on_the_meta_device_no_number_of_the_parts_is_read(tmp_path, monkeypatch):
    write(tmp_path / "meta", weights(), files=2)
    expected = OpenLlamaForCausalLM.from_pretrained(tmp_path / "meta")
    monkeypatch.setattr(Assembled, "__getitem__", lambda self, rows: pytest.fail("numbers are read"))
    model = OpenLlamaForCausalLM.from_pretrained(tmp_path / "meta", device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {name: of.shape for name, of in model.state_dict().items()} == {
        name: of.shape for name, of in expected.state_dict().items()
    }
