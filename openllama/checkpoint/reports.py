"""What is wrong with a source without being an error of its weights: it is said when it is converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from openllama.checkpoint.names import EMBEDDING, Weights
from openllama.checkpoint.writer import Written
from openllama.config import OpenLlamaConfig, read_json
from openllama.errors import ConfigError, TokenizerError, listed, warn
from openllama.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.files import MODEL_FILE

TOKENIZER_JSON = "tokenizer.json"


def warn_of_numbers(written: Mapping[str, Written]) -> None:
    """Name the weights that hold NaN or infinity, if there are any."""
    names = [f"{name} ({of.not_finite:,})" for name, of in written.items() if of.not_finite]
    if names:
        warn(f"the result holds NaN or infinity: {listed(names)}")


def remarks(weights: Weights, config: OpenLlamaConfig) -> list[str]:
    """What is unusual but no fault, for the record alone: a row of padding that is not zero."""
    row = config.padding_idx
    if row is None or config.quantization is not None or not weights.tensors[EMBEDDING][row].any():
        return []
    return [f"row {row} of {EMBEDDING}, of pad_token_id, is not zero: the model was trained with another padding id"]


def check_generation_config(folder: Path) -> None:
    """Read generation_config.json, if there is one, before it is copied; raises ``ConfigError`` if it is broken."""
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json", ConfigError)


def check_tokenizer(folder: Path, vocab_size: int, is_needed: bool) -> None:
    """Load the tokenizer of ``folder`` before it is copied.

    Raises ``TokenizerError`` if it is broken. A ``tokenizer.json`` alone, none at all where one ``is_needed``, and more
    tokens than the model has rows, are warned of.
    """
    if not (folder / MODEL_FILE).exists():
        if (folder / TOKENIZER_JSON).exists():
            warn(
                f"{folder} has {TOKENIZER_JSON} but no {MODEL_FILE}: the result has no tokenizer; add the "
                "sentencepiece model that it was made from"
            )
        elif is_needed:
            warn(f"{folder} has no {MODEL_FILE}: the result has no tokenizer; copy it there, or later into the result")
        return
    try:
        size = len(OpenLlamaTokenizer.from_pretrained(folder))
    except TokenizerError as error:
        raise TokenizerError(f"{error}; copy or download the tokenizer again, or remove its files") from error
    if size > vocab_size:
        warn(f"the tokenizer of {folder} has {size} tokens, the model only {vocab_size} rows for them")
