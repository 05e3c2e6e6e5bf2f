"""The tokenizer: text to tokens, tokens to ids, ids to text. Argument names are HF's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from openllama.errors import TokenizerError
from openllama.tokenizer import files
from openllama.tokenizer.batches import (
    NO_MAX_LENGTH,
    Encoding,
    cut,
    padded,
    room_for_text,
    to_tensors,
)
from openllama.tokenizer.checks import checked_text, one_of, to_list
from openllama.tokenizer.vocabulary import AddedToken, Token, Vocabulary, token_of_model

SPACE = "▁"  # how sentencepiece writes a space inside a piece
CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # stripped, in this order


class OpenLlamaTokenizer(Vocabulary):
    """Tokenizer over the sentencepiece model ``vocab_file``.

    If ``unk_token``, ``bos_token`` or ``eos_token`` is "", it is taken from the model file. With ``legacy``
    (HF's default) sentencepiece adds a space to the text after each special token.
    ``special_tokens_map`` and ``added_tokens`` are the contents of the files with these names; the map
    overrides the arguments. A plain string in it strips the whitespace around that token in the text, like
    every ordinary added token; an ``AddedToken`` (in JSON: an object) follows its flags.
    """

    def __init__(
        self,
        vocab_file: str | PathLike[str],
        unk_token: Token | None = "",
        bos_token: Token | None = "",
        eos_token: Token | None = "",
        pad_token: Token | None = None,
        sp_model_kwargs: Mapping[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        legacy: bool = True,
        *,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int | None = None,
        special_tokens_map: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
        extra: Mapping[str, Any] | None = None,  # keys of tokenizer_config.json that are kept but not used
        **roles: Any,  # sep_token, cls_token, mask_token, additional_special_tokens
    ) -> None:
        self.sp_model_kwargs = files.checked_options(sp_model_kwargs)
        sp, self._model_bytes = files.load_model(Path(vocab_file), self.sp_model_kwargs)
        self.add_bos_token, self.add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self.clean_up_tokenization_spaces, self.legacy = bool(clean_up_tokenization_spaces), bool(legacy)
        self.padding_side = one_of("padding_side", padding_side, ("left", "right"))
        self.truncation_side = one_of("truncation_side", truncation_side, ("left", "right"))
        self.model_max_length = NO_MAX_LENGTH if model_max_length is None else model_max_length
        self.extra = dict(extra or {})
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        for role, token in named.items():
            token = token_of_model(sp, role) if token == "" else token
            named[role] = AddedToken(token) if isinstance(token, str) else token
        super().__init__(sp, {**named, **roles, **(special_tokens_map or {})}, added_tokens or {})

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **overrides: Any) -> OpenLlamaTokenizer:
        """Load from a folder with ``tokenizer.model`` and, optionally, HF's three JSON files.

        ``overrides`` are arguments of the constructor; they override the files. ``folder`` can also be the
        path of a ``.model`` file; then no JSON file is read.
        """
        path = Path(folder).expanduser()
        if path.is_file():
            return cls(path, **overrides)
        arguments = files.read_folder(path)
        for role in overrides:
            arguments["special_tokens_map"].pop(role, None)
        try:
            return cls(path / files.MODEL_FILE, **{**arguments, **overrides})
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files that ``from_pretrained`` reads, here and in HF; creates the folder if needed."""
        special = {role: token for role, token in self._special.items() if token}
        main_roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        config = {
            **self.extra,
            **{name: getattr(self, name) for name in files.SETTINGS},
            **{role: str(special[role]) if role in special else None for role in main_roles},
            "tokenizer_class": "LlamaTokenizer",
        }
        files.write_folder(Path(folder), self._model_bytes, config, special, self._added)

    # ------------------------------------------------------------------ text to tokens

    def tokenize(self, text: str, split_special_tokens: bool = False) -> list[str]:
        """Tokens of a string. With ``split_special_tokens``, ``</s>`` in it is just four characters."""
        checked_text(text)
        if split_special_tokens:
            return [self._id_to_token(number) for number in self._plain_ids(text)]
        if not self.legacy:
            text = SPACE + text.replace(SPACE, " ")  # the mark tells _pieces which part is the first
        tokens: list[str] = []
        for part in self._split_at_special(text):
            tokens += [part] if part in self._no_split else self._pieces(part)
        return tokens

    def _split_at_special(self, text: str) -> list[str]:
        """Split at special and added tokens, and strip the whitespace around a token if its flags say so.

        "to be </s> or" -> ["to be ", "</s>", " or"], or ["to be", "</s>", "or"] if ``</s>`` strips both sides.
        """
        parts = [part for part in self._no_split_pattern.split(text) if part]
        flags = {str(token): token for token in self._special_tokens() if isinstance(token, AddedToken)}
        for i, part in enumerate(parts):  # later iterations see the changes of earlier ones
            if part in self._no_split:
                token = flags.get(part, AddedToken(part, lstrip=True, rstrip=True))
                if token.rstrip and i + 1 < len(parts):
                    parts[i + 1] = parts[i + 1].lstrip()
                if token.lstrip and i > 0:
                    parts[i - 1] = parts[i - 1].rstrip()
        return parts

    def _pieces(self, part: str) -> list[str]:
        """Pieces of a part of the text between special tokens.

        With a LLaMA model file sentencepiece adds a space to every string: "or" -> ["▁or"]. With ``legacy``
        that happens after ``</s>``, too; without it, the "or" of "</s>or" -> ["or"].
        """
        if self.legacy:
            return self.sp.encode(part, out_type=str)
        if part.startswith(SPACE):  # the mark: this part is the first
            return self.sp.encode(part[1:], out_type=str)
        pieces = self.sp.encode(part, out_type=str)
        if pieces and pieces[0].startswith(SPACE) and not part.startswith(" "):
            pieces[0] = pieces[0][1:]
        return [piece for piece in pieces if piece]

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of a string, without special ids: if sentencepiece finds a special token, byte tokens replace it.

        If the model file itself has a piece "<e>" and "<e>" has a role: "<e>" -> <0x3C> <0x65> <0x3E>.
        """
        ids = self.sp.encode(text if self.legacy else text.replace(SPACE, " "), out_type=int)
        special = set(self.all_special_ids) - {self.sp.unk_id()}
        plain: list[int] = []
        for number in ids:
            if number in special:
                characters = self.sp.id_to_piece(number).replace(SPACE, " ")
                plain += [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in characters.encode()]
            else:
                plain.append(number)
        return plain

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str, **options: Any) -> Any:
        """``input_ids`` of one string; options as in ``__call__``."""
        return self(checked_text(text), **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        split_special_tokens: bool = False,
    ) -> Encoding:
        """Encode a string or a list of strings; returns ``input_ids`` and ``attention_mask``.

        padding: True or "longest", "max_length", or False. truncation: True, False, or None, which truncates
        if ``max_length`` is given without padding. max_length: number of tokens with special tokens;
        ``model_max_length`` by default. return_tensors: None for lists, "pt" for int64 (B, T), B = 1 for
        a str. split_special_tokens: for untrusted text; ``</s>`` in it is encoded as ordinary characters.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not texts:
            raise TokenizerError(f"text must be a str or a non-empty list of str, got {texts!r}")
        for i, item in enumerate(texts):
            checked_text(item, "" if isinstance(text, str) else f"text {i}: ")
        bos, eos = self._bos_and_eos() if add_special_tokens else ([], [])
        room = room_for_text(truncation, max_length, self.model_max_length, padding, len(bos) + len(eos))
        rows = []
        for item in texts:
            ids = self._plain_ids(item) if split_special_tokens else [*map(self._token_to_id, self.tokenize(item))]
            rows.append([*bos, *cut(ids, room, self.truncation_side), *eos])
        if isinstance(text, str) and not rows[0]:
            padding = False  # HF pads an empty string in a batch, but not alone
        encoding = self.pad({"input_ids": rows}, padding, max_length, return_tensors)
        if return_tensors is None and isinstance(text, str):
            return Encoding({name: values[0] for name, values in encoding.items()})
        return encoding

    def _bos_and_eos(self) -> tuple[list[int], list[int]]:
        """Ids that add_special_tokens adds before and after a string; a list is empty if its setting is off."""
        for role, on in {"bos_token": self.add_bos_token, "eos_token": self.add_eos_token}.items():
            if on and self._special[role] is None:
                raise TokenizerError(f"add_{role} is on, but the tokenizer has no {role}")
        return [self.bos_token_id] * self.add_bos_token, [self.eos_token_id] * self.add_eos_token

    def pad(
        self,
        encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Pad a batch, or a list of single encodings, to one length; arguments as in ``__call__``.

        Keys other than ``input_ids`` and ``attention_mask`` are kept unchanged.
        """
        one_of("return_tensors", return_tensors, (None, "pt"))
        if not isinstance(encoded, Mapping):
            shared = set.intersection(*map(set, encoded)) if encoded else set()
            encoded = {key: [example[key] for example in encoded] for key in shared}
        batch = {key: [to_list(row) for row in to_list(value)] for key, value in encoded.items()}
        if not batch.get("input_ids") or not all(isinstance(row, list) for row in batch["input_ids"]):
            raise TokenizerError("pad takes a batch: input_ids must be a list of lists of ids and not empty")
        limit = max_length or self.model_max_length
        filled = padded(batch, padding, limit, self.pad_token_id, self.padding_side)
        return to_tensors(filled) if return_tensors else filled

    # ------------------------------------------------------------------ ids to text

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Text of an id, or of a sequence or 1-D tensor of ids.

        ``clean_up_tokenization_spaces`` (None: the tokenizer's setting) removes spaces before English punctuation.
        Added tokens get spaces around them: To ▁be <|user|> or -> "To be <|user|> or".
        """
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        parts: list[str] = []
        for added, group in groupby(tokens, self._added.__contains__):
            run = [*group]
            parts += run if added else [self.convert_tokens_to_string(run)]
        text = " ".join(parts)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        for spaced in CLEANED_UP if clean_up_tokenization_spaces else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(self, sequences: Iterable[Any], **options: Any) -> list[str]:
        """``decode`` of each sequence, or of each row of a (B, T) tensor."""
        return [self.decode(ids, **options) for ids in sequences]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens. As in HF, ordinary text before a special token gets a space in front.

        To ▁be </s> or -> " To be</s>or"
        """
        text = ""
        special_tokens = set(self.all_special_tokens)
        groups = [(special, [*group]) for special, group in groupby(tokens, special_tokens.__contains__)]
        for i, (special, group) in enumerate(groups):
            before_special = not special and i + 1 < len(groups)
            text += " " * before_special + ("".join(group) if special else self.sp.decode(group))
        return text
