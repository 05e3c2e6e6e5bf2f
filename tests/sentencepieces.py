"""Sentencepiece models and texts for the tokenizer tests: small trained ones, the real ones where they lie."""

from __future__ import annotations

import io
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
TINY_CHECKPOINT = ROOT / "checkpoints" / "open-llama-tiny"
REAL = {"v1": "open_llama_v1_10w_vocab.model", "v2": "open_llama_v2_llama_extended.model"}
CORPORA = ("shakespeare.txt", "classical_chinese.txt")

LINES = [
    "To be, or not to be: that is the question.",
    "user:Who is there?\nsystem:The king, the queen and 42 players.",
    "床前明月光,疑是地上霜。舉頭望明月,低頭思故鄉。",
    "Don't the players   play the play that they were asked to play?",
    "其 始 播 百 穀。 1234567890 <b>bold</b> \t tab",
] * 3

#: what each model mirrors, and how it is trained beside that
TRAINED: dict[str, dict[str, Any]] = {
    "v1-like": {"remove_extra_whitespaces": False},
    "llama-like": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "pad_id": -1},
    "squeezing": {"remove_extra_whitespaces": True},  # sentencepiece's own default
    "no bytes": {"byte_fallback": False, "vocab_size": 150},
}

SPLICES = [
    *("<s>", "</s>", "<pad>", "<unk>", "<0x0A>", "<0xE5>", "▁", "▁▁", "<", "/s>", "<|user|>", "\n\n", "[PAD]", "the"),
    *(" ", "  ", "\n", "\t", "\u3000", "\u00a0", "\u200b", "\u2028", "\ufeff", "\x00", "\x1c", "\x85"),
    *("床前明月光", "龘", "😀", "👩\u200d👩\u200d👧", "🇨🇳", "e\u0301", "ＡＢ①", "ﷺ", "ｶﾞ", "한", "שלום", "\ufffd"),
    *("user:", "\nsystem:", " play ", "to be", " .", " n't", " ' ", "1234", "play the", "\n\n\t", " zq", "月光霜"),
]

texts = st.lists(st.one_of(st.sampled_from(SPLICES), st.text(max_size=8)), max_size=12).map("".join)


@cache
def trained(name: str, **options: Any) -> bytes:
    """A BPE model with byte fallback, NFKC, single digits and ``<unk> <s> </s> <pad>`` = 0..3, as V1's."""
    usual = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "nfkc",
             "split_digits": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "minloglevel": 2}  # fmt: skip
    model = io.BytesIO()
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(LINES), model_writer=model, **{**usual, **TRAINED[name], **options})
    return model.getvalue()


def model_bytes(name: str) -> bytes:
    """The trained model or the real one ("v1", "v2") of that name; skips where a real one is not there."""
    if name in TRAINED:
        return trained(name)
    folder = os.environ.get("OPENLLAMA_TOKENIZERS") or ROOT.parent / "shared" / "tokenizers"
    path = Path(folder) / REAL[name]
    if not path.is_file():
        lacking = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        lacking(f"no {REAL[name]}; set OPENLLAMA_TOKENIZERS to the folder that holds it")
    return path.read_bytes()


def corpus(name: str) -> list[str]:
    """Lines of a text of the training corpus; skips where it is not there."""
    path = ROOT.parent / "shared" / "corpus" / name
    if not path.is_file():
        pytest.skip(f"no {name} in shared/corpus beside the checkout")
    return path.read_text(encoding="utf-8").splitlines()


def write_folder(folder: Path, model: bytes, **files: Any) -> Path:
    """A tokenizer folder: ``tokenizer.model``, and a JSON file per keyword (``tokenizer_config={...}``)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
