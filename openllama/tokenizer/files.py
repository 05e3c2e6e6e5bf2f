"""The folder of a tokenizer: the sentencepiece model and, optionally, HF's three JSON files and its chat template.

    tokenizer.model          the pieces
    tokenizer_config.json    {"add_bos_token": false, "model_max_length": 2048, "eos_token": "</s>", ...}
    special_tokens_map.json  {"eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": false, ...}}
    added_tokens.json        {"<|user|>": 4600}
    chat_template.jinja      the format of conversations; here it is written into the second file

The second file holds settings, the fourth new tokens. For special tokens the third file overrides the second.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from openllama.config import read_json, read_limited, refuse_lfs_pointer
from openllama.errors import TokenizerError
from openllama.tokenizer.vocabulary import ROLES

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
ALL_FILES = (MODEL_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE)
MODEL_OPTIONS = ("enable_sampling", "nbest_size", "alpha")
MAX_MODEL = 2**26  # bytes; the largest tokenizers in use have 5 MB
MAX_TEMPLATE = 2**20

#: arguments and attributes of the tokenizer that tokenizer_config.json stores, besides the roles
SETTINGS = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "legacy", "model_max_length",
            "padding_side", "truncation_side", "sp_model_kwargs")  # fmt: skip
#: keys of tokenizer_config.json that are dropped: paths on another machine, and what the other two files store
DROPPED = ("vocab_file", "tokenizer_file", "special_tokens_map_file", "name_or_path",
           "special_tokens_map", "added_tokens")  # fmt: skip


def checked_options(options: Any) -> dict[str, Any]:
    """Options of sentencepiece that change how text is cut; a file must not name other files or start threads."""
    if not isinstance(options or {}, Mapping) or not set(options or {}) <= set(MODEL_OPTIONS):
        raise TokenizerError(f"sp_model_kwargs takes {', '.join(MODEL_OPTIONS)}; got {options!r}")
    return dict(options or {})


def load_model(path: Path, options: Mapping[str, Any]) -> tuple[Any, bytes]:
    """Load a sentencepiece model; returns its processor and the bytes of the file."""
    content = read_limited(path, MAX_MODEL, TokenizerError)
    if not content:
        raise TokenizerError(f"{path} is empty")
    refuse_lfs_pointer(path, content, TokenizerError)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content, **options)
        model.id_to_piece(list(range(model.get_piece_size())))  # raises ValueError for one that is not UTF-8
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
    if not 0 <= model.unk_id() < model.get_piece_size():
        raise TokenizerError(f"{path} has {model.get_piece_size()} pieces and none for unknown text; is it truncated?")
    return model, content


def read_folder(folder: Path) -> dict[str, Any]:
    """Read the JSON files of a folder; returns arguments of ``OpenLlamaTokenizer``."""
    if not (folder / MODEL_FILE).is_file():
        raise TokenizerError(
            f"{folder / MODEL_FILE}: no such file; a tokenizer folder needs a sentencepiece model. `openllama convert "
            "ORG/NAME DST` downloads one from the Hugging Face hub"
        )
    config = _read_json(folder / CONFIG_FILE)
    arguments = {key: config.pop(key) for key in (*SETTINGS, *ROLES) if key in config}
    if (folder / TEMPLATE_FILE).exists():
        content = read_limited(folder / TEMPLATE_FILE, MAX_TEMPLATE, TokenizerError)
        try:
            config["chat_template"] = content.decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{folder / TEMPLATE_FILE} is not UTF-8: {error}") from error
    return {
        **arguments,
        "special_tokens_map": _read_json(folder / SPECIAL_TOKENS_FILE),
        "added_tokens": _read_json(folder / ADDED_TOKENS_FILE),
        "extra": {key: value for key, value in config.items() if key not in DROPPED},
    }


def write_folder(folder: Path, model: bytes, config: Any, special_tokens_map: Any, added_tokens: Any) -> None:
    """Write the model and the JSON files; a file without content is not written."""
    contents = {CONFIG_FILE: config, SPECIAL_TOKENS_FILE: special_tokens_map, ADDED_TOKENS_FILE: added_tokens}
    files = {MODEL_FILE: model}
    for name, content in contents.items():
        if content:
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=dataclasses.asdict)
            files[name] = f"{text}\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        (folder / name).write_bytes(written)
    for name in {*contents, TEMPLATE_FILE} - files.keys():
        (folder / name).unlink(missing_ok=True)  # else the file of an earlier tokenizer would be read


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; an empty dict if there is no file."""
    return read_json(path, TokenizerError) if path.exists() else {}
