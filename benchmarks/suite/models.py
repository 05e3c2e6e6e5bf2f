"""The models that are measured: their shapes, and their files in the form that each program reads, written once."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.checkpoint import convert

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "open-llama-tiny"
BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.5}  # of a weight; int4: with a float16 scale for 32 weights
CACHE_ITEM = 2  # bytes of a number in the cache of keys and values


@dataclass(frozen=True)
class Shape:
    """What an engine has to read and to compute at the least."""

    name: str
    config: OpenLlamaConfig

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        config = self.config
        return config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    def weight_bytes(self, precision: str) -> float:
        """Bytes that one token reads: all matrices and the head. Of an input table it reads one row."""
        return (self.layer_weights + self.head_weights) * BITS[precision] / 8

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return tokens * 2 * self.config.num_hidden_layers * self.config.hidden_size * CACHE_ITEM

    def operations(self, tokens: int, rows: int = 1, past: int = 0) -> float:
        """Multiplications and additions of ``rows`` x ``tokens`` tokens after ``past`` others, with one logit row each.

        Attention counts what a causal mask leaves: two products with ``past + (tokens + 1) / 2`` keys for each token.
        """
        keys = past + (tokens + 1) / 2
        attention = 4 * self.config.num_hidden_layers * self.config.hidden_size * tokens * keys
        return rows * (2 * self.layer_weights * tokens + 2 * self.head_weights + attention)


def _config(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int) -> OpenLlamaConfig:
    return OpenLlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=4096, use_stable_embedding=True, pad_token_id=3,
        shared_input_output_embedding=True,
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("A", _config(100_000, 2048, 11008, 8, 32)),  # aerner/lm-v2: 0.88 billion parameters
        Shape("V1", _config(100_000, 4096, 11008, 32, 32)),  # Open-Llama-V1: 6.9 billion
        Shape("step", _config(8000, 512, 1376, 2, 8)),  # for training steps where products of bfloat16 are slow
        Shape("tiny", _config(4600, 256, 688, 4, 4)),  # checkpoints/open-llama-tiny
        Shape("small", _config(4600, 64, 96, 2, 2)),  # for tests
    )
}


class Files:
    """The model of a shape below ``folder``, in each form: native, hf, llama, bf16.gguf, openvino-int8 and so on.

    What is there is used again. A form is written under another name first, so one that is there is whole.
    """

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder / shape.name

    def form(self, name: str, python: Path) -> Path:
        """Where the form lies; it is written where it is missing. ``python``: of the program that reads it."""
        path = self.folder / name
        if not path.exists():
            print(f"writing {path}", flush=True)
            part = path.with_name(f"part-{name}")
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            self._write(name, part, python)
            part.rename(path)
        return path

    def _write(self, name: str, path: Path, python: Path) -> None:
        if name == "native":
            self._write_native(path)
        elif name in ("hf", "llama"):
            convert(self.form("native", python), path, to=name, progress=False)
        elif name in ("bf16.gguf", "int8.gguf"):
            dtype = {"bf16.gguf": "bfloat16", "int8.gguf": "q8_0"}[name]
            convert(self.form("native", python), path, to="gguf", dtype=dtype, progress=False)
        else:
            source = "bf16.gguf" if name == "int4.gguf" else "llama"
            script = Path(__file__).with_name("exports.py")
            command = list(map(str, (python, script, name, self.form(source, python), path)))
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")

    def _write_native(self, path: Path) -> None:
        """Random weights, with the tokenizer of the tiny model; ids above its pieces have no text."""
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            OpenLlamaForCausalLM(self.shape.config).save_pretrained(path)
        finally:
            torch.set_default_dtype(default)
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(TINY / file, path / file)


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
