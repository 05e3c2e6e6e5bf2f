"""Writes a model as one GGUF file, which llama.cpp, Ollama and others run: weights, tokenizer and chat template.

The weights are those of the plain LLaMA in ``export``. llama.cpp rotates neighbouring dimensions (0 with 1, 2 with 3),
while ours and HF's layout rotate dimension j with j + D / 2, so the rows of q and k change places within each head:

    D = 4   ours 0 1 2 3   in the file 0 2 1 3

One-dimensional weights are always float32. The package ``gguf`` writes the header; the weights are written here, a
piece at a time, and in the end that package reads the file again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import openllama
from openllama.checkpoint.archives import translated_errors
from openllama.checkpoint.export import check_llama, llama_tensors
from openllama.checkpoint.folders import check_space, finished_file
from openllama.checkpoint.meta import Assembled
from openllama.checkpoint.names import Weights, floating_dtype, translate
from openllama.checkpoint.pieces import Computed, Source, as_bytes, pieces
from openllama.checkpoint.progress import Progress, ShownProgress
from openllama.checkpoint.reader import Checkpoint
from openllama.checkpoint.record import SourceSums
from openllama.checkpoint.source import SourceFiles
from openllama.checkpoint.writer import CHUNK, forget
from openllama.config import OpenLlamaConfig
from openllama.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DestinationExistsError,
    InputError,
    TokenizerError,
    warn,
)
from openllama.rope import BASE
from openllama.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.export import model_file, no_split_tokens
from openllama.tokenizer.files import MODEL_FILE
from openllama.tokenizer.modelfile import CONTROL, UNUSED, USER_DEFINED, ModelFile

Q8_0 = "q8_0"  # blocks of 32 numbers: a float16 scale, and an integer from -127 to 127 for each
BLOCK = 32
MAGIC = b"GGUF"
VERSION, SOURCE = "openllama.version", "openllama.source"  # fields of ours, which other programs pass over
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.N.input_layernorm.weight": "blk.N.attn_norm.weight",
    "model.layers.N.self_attn.q_proj.weight": "blk.N.attn_q.weight",
    "model.layers.N.self_attn.k_proj.weight": "blk.N.attn_k.weight",
    "model.layers.N.self_attn.v_proj.weight": "blk.N.attn_v.weight",
    "model.layers.N.self_attn.o_proj.weight": "blk.N.attn_output.weight",
    "model.layers.N.post_attention_layernorm.weight": "blk.N.ffn_norm.weight",
    "model.layers.N.mlp.gate_proj.weight": "blk.N.ffn_gate.weight",
    "model.layers.N.mlp.up_proj.weight": "blk.N.ffn_up.weight",
    "model.layers.N.mlp.down_proj.weight": "blk.N.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FLOATS = ("scores", "epsilon", "freq_base", "factor")  # how the fields of type float32 end
TYPES = {torch.float64: "F32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A weight in the file: rows of ``source`` (float32), encoded as ``kind``."""

    source: Source
    shape: tuple[int, ...]
    kind: str  # F32, F16, BF16 or Q8_0

    @property
    def nbytes(self) -> int:
        numbers = self.source.shape.numel()
        return numbers // BLOCK * (BLOCK + 2) if self.kind == "Q8_0" else numbers * TORCH_TYPES[self.kind].itemsize


def write_gguf(
    source: Checkpoint,
    weights: Weights,
    dst: Path,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write ``weights`` and the tokenizer of ``source`` to the file ``dst``.

    ``dtype``: as in ``convert``; None keeps the type of the weights, or the narrowest that holds all.
    """
    gguf = _package()
    quantised = dtype == Q8_0
    cast_to = None if quantised else floating_dtype(dtype)
    _check_destination(dst, overwrite)
    _check_model(weights, source.config)
    if not (source.folder / MODEL_FILE).is_file():
        raise CheckpointNotFoundError(f"{source.folder} has no {MODEL_FILE}; a GGUF file holds the tokenizer, too")
    tokenizer = OpenLlamaTokenizer.from_pretrained(source.folder)
    kind = "Q8_0" if quantised else TYPES[cast_to or weights.dtype]
    fields = {
        **_architecture(gguf, source.config, kind, dst.stem),
        VERSION: openllama.__version__,
        SOURCE: _source_text({file.name: "0" * 64 for file in source.files}),
        **_vocabulary(gguf, tokenizer, source.config),
    }
    entries = _entries(weights, source.config, kind)
    total = sum(entry.nbytes for entry in entries.values())
    shown = ShownProgress(total) if progress else Progress()
    with (
        SourceFiles(source.files) as files,
        SourceSums(source.files) as sums,
        finished_file(dst) as path,
        closing(shown),
    ):
        source.check_unchanged()
        _check_destination(dst, overwrite)  # again: it may have been written since
        check_space(path.parent, total)
        file = _File(gguf, path, fields, entries, files, shown)
        shown.begin("write", dst.name, total)
        written = file.write()
        file.replace_text(SOURCE, _source_text({name: of["sha256"] for name, of in sums.results().items()}))
        shown.begin("compare", dst.name, total)
        file.compare(written)
        files.check_unchanged()


def _source_text(sums: Mapping[str, object]) -> str:
    """The field that says what the file was made from: SHA-256 by the names of the files."""
    return json.dumps(sums)


# ---- what cannot be exact is refused


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise InputError('writing GGUF files needs the package gguf: pip install "openllama[export]"') from error
    return gguf


def _check_model(weights: Weights, config: OpenLlamaConfig) -> None:
    if weights.head != "causal-lm":
        raise ConfigError(
            f"a {weights.head} cannot be converted to gguf: llama.cpp needs a language-model head; use llama"
        )
    check_llama(config, "gguf")
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(
            f"hidden_act {config.hidden_act!r} cannot be converted to gguf: llama.cpp has 'silu' only here"
        )


def _check_destination(dst: Path, overwrite: bool) -> None:
    if dst.suffix != ".gguf":
        raise InputError(f"{dst}: gguf is one file; give it a name that ends in .gguf, such as {dst / 'model.gguf'}")
    if not dst.exists():
        return
    if not overwrite:
        raise DestinationExistsError(f"{dst} exists; choose another file, or pass overwrite (--overwrite)")
    if not dst.is_file() or not _is_gguf(dst):
        raise DestinationExistsError(f"{dst} is not a GGUF file, so it is not replaced; choose another name")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


# ---- what the file holds


def _architecture(gguf: ModuleType, config: OpenLlamaConfig, kind: str, name: str) -> dict[str, Any]:
    """Fields that describe the model, by their full names."""
    file_type = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}[kind]
    fields = {
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_attention_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": BASE,
    }
    if config.rope_scaling is not None:
        fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": config.rope_scaling["factor"]}
    return fields


def _vocabulary(gguf: ModuleType, tokenizer: OpenLlamaTokenizer, config: OpenLlamaConfig) -> dict[str, Any]:
    """Fields of the tokenizer; ids without a token get the name "[PAD4600]" and are never produced from text."""
    model = model_file(tokenizer)
    _warn_of_normalisation(model)
    if len(tokenizer) > config.vocab_size:
        raise TokenizerError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")
    names, scores, kinds = list(model.pieces), list(model.scores), list(model.kinds)
    rest = range(len(names), config.vocab_size)
    names += [f"[PAD{number}]" for number in rest]
    scores += [-1000.0 for _ in rest]
    kinds += [UNUSED for _ in rest]
    special = set(tokenizer.all_special_tokens)
    for number, token in no_split_tokens(tokenizer).items():
        names[number] = token.content
        if number != tokenizer.sp.unk_id():
            kinds[number] = CONTROL if token.content in special else USER_DEFINED
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    if len(ends) > 1:
        warn(f"a GGUF file has one id that ends a text: {ends[0]} is used, {ends[1:]} are not")
    ids = {
        "bos": config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": ends[0] if ends else tokenizer.eos_token_id,
        "unknown": tokenizer.sp.unk_id(),
        "padding": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.padding_idx,
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{role}_token_id": number for role, number in ids.items() if number is not None},
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos_token,
        "tokenizer.ggml.add_eos_token": tokenizer.add_eos_token,
        "tokenizer.ggml.add_space_prefix": model.adds_space,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _warn_of_normalisation(model: ModelFile) -> None:
    """llama.cpp passes text to BPE as it is."""
    if model.charsmap:
        warn(
            f"the tokenizer normalises text ({model.rule or 'unnamed rules'}), llama.cpp does not: give it normalised "
            'text (Python: unicodedata.normalize("NFKC", text)), or full-width characters such as "，" get other ids'
        )
    if model.squeezes_spaces:
        warn("the tokenizer reads several spaces as one, llama.cpp does not: give it text without double spaces")


def _entries(weights: Weights, config: OpenLlamaConfig, kind: str) -> dict[str, _Entry]:
    """The weights by their names in the file; those whose rows are not whole blocks are F16 instead of Q8_0."""
    entries = {}
    for name, source in llama_tensors(weights, config, torch.float32).items():
        shape = tuple(source.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            source = _interleaved(source, config.num_attention_heads)
        fits = len(shape) == 1 or kind != "Q8_0" or shape[-1] % BLOCK == 0
        entry = _Entry(source, shape, "F32" if len(shape) == 1 else kind if fits else "F16")
        entries[translate(name, NAMES) or name] = entry
    return entries


def _interleaved(source: Source, heads: int) -> Source:
    """The rows of q or k (H * D, C) in the order of the file, which is that of Meta's; as a view (H, D/2, 2, C)."""

    def view(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Assembled):
            return cast(Tensor, dataclasses.replace(tensor, head_dim=None))
        return tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2)

    if isinstance(source, Computed):
        return dataclasses.replace(source, source=view(source.source))
    return view(source)


# ---- writing


@dataclasses.dataclass(frozen=True)
class _File:
    """The file as it is written, and as the package ``gguf`` reads it again."""

    gguf: ModuleType
    path: Path
    fields: dict[str, Any]
    entries: Mapping[str, _Entry]
    source: SourceFiles
    progress: Progress

    def write(self) -> dict[str, str]:
        """Write it; the disk has it when this returns. Returns the SHA-256 of each weight's bytes."""
        writer = self.gguf.GGUFWriter(self.path, "llama")
        for key, value in self.fields.items():
            _add_field(writer, key, value)
        for name, entry in self.entries.items():
            kind = self.gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), entry.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        sums = {}
        for name, entry in self.entries.items():
            total = hashlib.sha256()
            for data in self._encoded(name, entry):
                file.write(data)
                total.update(data)
                self.progress.tick(data.nbytes)
            writer.write_padding(file, entry.nbytes)
            sums[name] = total.hexdigest()
        file.flush()
        os.fsync(file.fileno())
        writer.close()
        return sums

    def replace_text(self, key: str, text: str) -> None:
        """Write ``text`` in place of one of the same length, of a field near the start of the file."""
        old, new = self.fields[key].encode(), text.encode()
        with self.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            at = content.find(old)
            if at < 0:
                raise CorruptCheckpointError(self._differs(key))
            content[at : at + len(old)] = new
            content.flush()
        self.fields[key] = text

    def compare(self, sums: Mapping[str, str]) -> None:
        """Read it from the disk; raise ``CorruptCheckpointError`` unless it has the fields and the SHA-256 sums."""
        with self.path.open("rb") as file:
            forget(file.fileno())
        with translated_errors(self.path):
            reader = self.gguf.GGUFReader(self.path)
        for key, value in self.fields.items():
            read = reader.fields[key].contents() if key in reader.fields else None
            if read != (np.asarray(value, np.float32).tolist() if key.endswith(FLOATS) else value):
                raise CorruptCheckpointError(self._differs(key))
        written = {tensor.name: tensor for tensor in reader.tensors}
        for name, entry in self.entries.items():
            stored, total = np.asarray(written[name].data).reshape(-1).view(np.uint8), hashlib.sha256()
            for start in range(0, entry.nbytes, CHUNK):
                data = stored[start : start + CHUNK]
                total.update(data.data)
                self.progress.tick(data.nbytes)
            if stored.nbytes != entry.nbytes or total.hexdigest() != sums[name]:
                raise CorruptCheckpointError(self._differs(name))

    def _encoded(self, name: str, entry: _Entry) -> Iterator[memoryview]:
        """The bytes of a weight, in pieces."""
        for piece in pieces(entry.source, self.source.read):
            if entry.kind == "Q8_0":
                rows = piece.reshape(-1, entry.shape[-1]).numpy()
                yield self.gguf.quants.quantize(rows, self.gguf.GGMLQuantizationType.Q8_0).data
                continue
            cast = piece.to(TORCH_TYPES[entry.kind])
            if entry.kind == "F16" and (cast.isinf() & piece.isfinite()).any():
                raise CheckpointError(f"{name} holds numbers too large for float16 (above 65504); use bfloat16")
            yield as_bytes(cast).numpy().data

    def _differs(self, what: str) -> str:
        return f"{self.path}: {what} differs when read again; is the disk or memory failing?"


def _add_field(writer: Any, key: str, value: Any) -> None:
    """Write ``value`` as the type that llama.cpp expects: flags, unsigned ids and sizes, float32, strings, arrays."""
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    for kind, add in (*kinds, (list, writer.add_array)):
        if isinstance(value, kind):
            add(key, value)
            return
    raise InputError(f"{key}: a {type(value).__name__} cannot be written")
