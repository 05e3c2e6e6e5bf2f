"""The tokenizer in the form that current transformers, vLLM and others read: tokenizer.json and its settings.

The algorithm is sentencepiece's BPE, spelt out for the ``tokenizers`` library: the normalisation compiled in the model
file, a space in front where the model adds one, then the merges in the order of their scores. transformers 5 itself
reads a LLaMA's tokenizer.model without its normalisation (NFKC in V1), so that tokenizer.json is needed.
"""

from __future__ import annotations

import base64
from typing import Any

from openllama.errors import TokenizerError
from openllama.tokenizer.files import SETTINGS
from openllama.tokenizer.modelfile import BPE, NORMAL, UNKNOWN, USER_DEFINED, ModelFile, parse_model_file
from openllama.tokenizer.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.tokens import SPACE
from openllama.tokenizer.vocabulary import AddedToken


def model_file(tokenizer: OpenLlamaTokenizer) -> ModelFile:
    """The parts of the sentencepiece model; raises ``TokenizerError`` where other programs would cut differently."""
    model = parse_model_file(tokenizer._model_bytes)
    if model.algorithm != BPE:
        raise TokenizerError(
            f"only BPE tokenizers can be exported; this one uses algorithm {model.algorithm}, not {BPE}"
        )
    if USER_DEFINED in model.kinds:
        piece = model.pieces[model.kinds.index(USER_DEFINED)]
        raise TokenizerError(f"the user-defined piece {piece!r} cannot be exported; only sentencepiece cuts it right")
    if not tokenizer.legacy or tokenizer.sp_model_kwargs:
        raise TokenizerError(
            f"legacy must be true and sp_model_kwargs empty, got {tokenizer.legacy} and {tokenizer.sp_model_kwargs}: "
            "other programs do not have these settings"
        )
    return model


def tokenizer_files(tokenizer: OpenLlamaTokenizer) -> dict[str, dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json, by file name."""
    config = {
        **tokenizer.extra,
        **{name: getattr(tokenizer, name) for name in SETTINGS if name not in ("legacy", "sp_model_kwargs")},
        **{role: _plain(token) for role, token in tokenizer._special.items() if token},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.chat_template,
    }
    return {"tokenizer.json": _tokenizer_json(tokenizer, model_file(tokenizer)), "tokenizer_config.json": config}


def no_split_tokens(tokenizer: OpenLlamaTokenizer) -> dict[int, AddedToken]:
    """The tokens that are cut out of a text before its pieces are found, by id."""
    flags = {str(token): token for token in tokenizer._special_tokens() if isinstance(token, AddedToken)}
    tokens = {tokenizer._token_to_id(name): flags.get(name, AddedToken(name, lstrip=True, rstrip=True))
              for name in tokenizer._no_split}  # fmt: skip
    return dict(sorted(tokens.items()))


def _tokenizer_json(tokenizer: OpenLlamaTokenizer, model: ModelFile) -> dict[str, Any]:
    special = set(tokenizer.all_special_tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token.content, "single_word": False, "lstrip": token.lstrip,
             "rstrip": token.rstrip, "normalized": False, "special": token.content in special}
            for number, token in no_split_tokens(tokenizer).items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": _post_processor(tokenizer),
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.kinds.index(UNKNOWN)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": tokenizer.sp.piece_to_id("<0x00>") != tokenizer.sp.unk_id(),
            "vocab": {piece: number for number, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }  # fmt: skip


def _normalizers(model: ModelFile) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.rule == "nfkc":  # the next step sees a letter with its marks as one character; composed, most are one
        steps.append({"type": "NFKC"})
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.squeezes_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$| +(?= )"}, "content": ""})
    if model.adds_space:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _decoders(model: ModelFile) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.adds_space else steps


def _post_processor(tokenizer: OpenLlamaTokenizer) -> dict[str, Any] | None:
    """What puts bos before and eos after a text; None if the settings say neither."""
    bos = [tokenizer.bos_token] * tokenizer.add_bos_token
    eos = [tokenizer.eos_token] * tokenizer.add_eos_token
    if not bos + eos:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        before, after = ([{"SpecialToken": {"id": token, "type_id": kind}} for token in part] for part in (bos, eos))
        return [*before, {"Sequence": {"id": sequence, "type_id": kind}}, *after]

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in bos + eos}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [n], "tokens": [token]} for token, n in ids.items()},
    }


def _merges(model: ModelFile) -> list[str]:
    """Every pair of pieces whose concatenation is a piece, the highest score first, as "left right"."""
    scores = {p: s for p, s, kind in zip(model.pieces, model.scores, model.kinds, strict=True) if kind == NORMAL}
    by_score = sorted(scores, key=lambda piece: -scores[piece])  # stable: of equal scores, the lower id first
    return [
        f"{piece[:i]} {piece[i:]}"
        for piece in by_score
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]


def _plain(token: Any) -> Any:
    return [str(one) for one in token] if isinstance(token, list) else str(token)
