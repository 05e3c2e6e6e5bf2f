"""Text to token ids and back: sentencepiece pieces, and special tokens cut out of the text around them.

Ids and decoded text are those of the (slow) ``LlamaTokenizer.from_pretrained`` of transformers 4.31.0
on the same folder. Everything wrong with an argument or a file is a ``TokenizerError``.
"""

from __future__ import annotations

import codecs
import dataclasses
import inspect
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from openllama.errors import TokenizerError

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPACE = "▁"  # how sentencepiece writes a space inside a piece
NO_MAX_LENGTH = int(1e30)  # what HF's files hold for "no limit"; anything above 1e20 means it
MAIN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
USUAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
LIST_ROLE = "additional_special_tokens"
CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # lose their spaces, in this order


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token cut out of the text as a whole, and whether it swallows the whitespace on its left and right."""

    content: str
    single_word: bool = False  # this and `normalized` change nothing; they are kept for the files
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True

    def __str__(self) -> str:
        return self.content


class Encoding(dict[str, Any]):
    """``input_ids`` and ``attention_mask``; unpacks with ``**``, reads as attributes, moves with ``to``."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"this encoding holds {', '.join(self)}; it has no {name}")
        return self[name]

    def to(self, device: str | int | torch.device) -> Encoding:
        """Move every tensor to ``device``, in place; returns self."""
        if not all(isinstance(value, torch.Tensor) for value in self.values()):
            raise TokenizerError('only tensors move to a device; encode with return_tensors="pt"')
        self.update({name: value.to(device) for name, value in self.items()})
        return self


class _Role:
    """Property ``eos_token`` (str or None), or ``eos_token_id`` (int or None), and their like."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.role, self.is_id = name.removesuffix("_id"), name.endswith("_id")

    def __get__(self, tokenizer: OpenLlamaTokenizer, owner: type) -> Any:
        token = tokenizer._special[self.role]
        if token is None and self.role == "pad_token":
            token = tokenizer._token_of_model(self.role)  # to HF no special token, so not one in texts; it can pad
        if token is None:
            return None
        return tokenizer._token_to_id(str(token)) if self.is_id else str(token)

    def __set__(self, tokenizer: OpenLlamaTokenizer, value: Any) -> None:
        if self.is_id and value is not None:
            value = tokenizer.convert_ids_to_tokens(value)
        token = _parse_role(self.role, value)
        if token is not None and not tokenizer._knows(str(token)):
            raise TokenizerError(f"{self.role} {str(token)!r} is not in the vocabulary; use add_special_tokens")
        tokenizer._special[self.role] = token


class OpenLlamaTokenizer:
    """Tokenizer over the sentencepiece model ``vocab_file``; argument names are HF's.

    ``unk_token``, ``bos_token`` and ``eos_token`` left "" are those the model file names. ``legacy`` (HF's
    default) lets each stretch of text after a special token begin with a space of its own.
    ``special_tokens_map`` and ``added_tokens`` are the contents of the files of those names; the map wins
    over the arguments. A bare string in it swallows the whitespace around that token in the text, as every
    ordinary added token does; an ``AddedToken`` (in JSON: an object) does what its flags say.
    """

    bos_token, eos_token, unk_token, pad_token = _Role(), _Role(), _Role(), _Role()
    bos_token_id, eos_token_id, unk_token_id, pad_token_id = _Role(), _Role(), _Role(), _Role()

    def __init__(
        self,
        vocab_file: str | PathLike[str],
        unk_token: str | AddedToken | None = "",
        bos_token: str | AddedToken | None = "",
        eos_token: str | AddedToken | None = "",
        pad_token: str | AddedToken | None = None,
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
        extra: Mapping[str, Any] | None = None,  # keys of tokenizer_config.json we have no use for
        **roles: Any,  # sep_token, cls_token, mask_token, additional_special_tokens
    ) -> None:
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        self.sp, self._model_bytes = _load_model(Path(vocab_file), self.sp_model_kwargs)
        self.add_bos_token, self.add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self.clean_up_tokenization_spaces, self.legacy = bool(clean_up_tokenization_spaces), bool(legacy)
        self.padding_side = _one_of("padding_side", padding_side, ("left", "right"))
        self.truncation_side = _one_of("truncation_side", truncation_side, ("left", "right"))
        self.model_max_length = NO_MAX_LENGTH if model_max_length is None else model_max_length
        self.extra = dict(extra or {})
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        for role, token in named.items():
            token = self._token_of_model(role) if token == "" else token
            named[role] = AddedToken(token) if isinstance(token, str) else token
        special = {**dict.fromkeys((*ROLES, LIST_ROLE)), **named, **roles, **(special_tokens_map or {})}
        self._special = {role: _parse_role(role, token) for role, token in special.items()}
        self._added: dict[str, int] = {}
        self._uncut: set[str] = set()  # tokens that are taken out of the text before sentencepiece sees it
        self._restore_added(added_tokens or {})
        self.add_tokens(self._special_tokens(), special_tokens=True)

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **overrides: Any) -> OpenLlamaTokenizer:
        """Read a folder holding ``tokenizer.model`` and, where there are any, HF's three JSON files beside it.

        ``overrides`` are arguments of the constructor and win over the files. A path of a ``.model`` file
        works too; that file then stands alone.
        """
        path = Path(folder)
        if path.is_file():
            return cls(path, **overrides)
        if not (path / MODEL_FILE).is_file():
            raise TokenizerError(f"{path / MODEL_FILE}: no such file; a tokenizer folder holds a sentencepiece model")
        config, special = _read_json(path / CONFIG_FILE), _read_json(path / SPECIAL_TOKENS_FILE)
        paths = {"vocab_file", "tokenizer_file", "special_tokens_map_file", "name_or_path"}  # of another machine
        known = {*inspect.signature(cls).parameters, *ROLES, LIST_ROLE} - {"vocab_file", "extra", "roles"}
        from_files = {
            **{key: value for key, value in config.items() if key in known},
            "special_tokens_map": {role: special[role] for role in special if role not in overrides},
            "added_tokens": _read_json(path / ADDED_TOKENS_FILE),
            "extra": {key: value for key, value in config.items() if key not in known | paths},
        }
        try:
            return cls(path / MODEL_FILE, **{**from_files, **overrides})
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files that ``from_pretrained``, here and in HF, reads; makes the folder where needed."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        kept = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "legacy", "model_max_length",
                "padding_side", "truncation_side", "sp_model_kwargs")  # fmt: skip
        config = {**self.extra, **{name: getattr(self, name) for name in kept}, "tokenizer_class": "LlamaTokenizer"}
        config |= {role: self._special[role] and str(self._special[role]) for role in MAIN_ROLES}
        special = {role: _to_json(token) for role, token in self._special.items() if token}
        (path / MODEL_FILE).write_bytes(self._model_bytes)
        (path / ADDED_TOKENS_FILE).unlink(missing_ok=True)  # an earlier tokenizer's would be read with this one
        for name, content in ((CONFIG_FILE, config), (SPECIAL_TOKENS_FILE, special), (ADDED_TOKENS_FILE, self._added)):
            if content:
                text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
                (path / name).write_text(text + "\n", encoding="utf-8")

    def _token_of_model(self, role: str) -> str | None:
        """The token that the sentencepiece file has in a role, or that of every LLaMA where it names none."""
        number = getattr(self.sp, role.replace("token", "id"))()
        return self.sp.id_to_piece(number) if number >= 0 else USUAL_TOKENS.get(role)

    def _restore_added(self, added: Mapping[str, int]) -> None:
        """Add tokens with the ids a file gives them."""
        if wrong := [token for token, number in added.items() if type(number) is not int]:
            raise TokenizerError(f"added token {wrong[0]!r} has the id {added[wrong[0]]!r}, which is no integer")
        for token, number in sorted(added.items(), key=lambda item: item[1]):
            if number == len(self) and not self._knows(token):
                self.add_tokens(token)
            elif not self._knows(token) or self._token_to_id(token) != number:
                here = f"is {self._token_to_id(token)}" if self._knows(token) else f"would be {len(self)}"
                raise TokenizerError(
                    f"{ADDED_TOKENS_FILE} gives {token!r} the id {number}; in this vocabulary it {here}"
                )

    # ------------------------------------------------------------------ vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces of the sentencepiece model, without added tokens."""
        return self.sp.get_piece_size()

    def __len__(self) -> int:
        return self.vocab_size + len(self._added)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {**{self.sp.id_to_piece(i): i for i in range(self.vocab_size)}, **self._added}

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that have a role, each once."""
        return list(dict.fromkeys(map(str, self._special_tokens())))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids: what ``skip_special_tokens`` skips."""
        return [self._token_to_id(token) for token in self.all_special_tokens]

    def add_tokens(self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Give each token that is new the next free id; returns how many were.

        New tokens are never split; with ``special_tokens`` neither are those the vocabulary had already.
        The embedding of the model must then have ``len(tokenizer)`` rows.
        """
        tokens = [tokens] if isinstance(tokens, (str, AddedToken)) else tokens
        names = [str(_parse_token(token, "an added token")) for token in tokens]
        new = [name for name in dict.fromkeys(names) if not self._knows(name)]
        self._added.update({name: len(self) + i for i, name in enumerate(new)})
        self._added_names = list(self._added)
        self._uncut.update(names if special_tokens else new)
        longest_first = sorted(self._uncut, key=len, reverse=True)
        self._cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        return len(new)

    def add_special_tokens(self, tokens: Mapping[str, Any], replace_additional_special_tokens: bool = True) -> int:
        """Give tokens their roles, e.g. ``{"pad_token": "<pad>"}``; returns how many were new to the vocabulary."""
        parsed = {role: _parse_role(role, token) for role, token in tokens.items()}
        if LIST_ROLE in parsed and not replace_additional_special_tokens:
            parsed[LIST_ROLE] = list(dict.fromkeys(self._special[LIST_ROLE] + parsed[LIST_ROLE]))
        self._special.update(parsed)
        return self.add_tokens(self._special_tokens(*parsed), special_tokens=True) if parsed else 0

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Id of a token (int) or of several (list); a token outside the vocabulary has the id of ``<unk>``."""
        if isinstance(tokens, str):
            return self._token_to_id(_checked_text(tokens))
        return [self._token_to_id(_checked_text(token)) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id (str) or of several, in a sequence or 1-D tensor (list)."""
        if isinstance(ids, int):
            return self._id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._id_to_token(n, f" at position {i}") for i, n in enumerate(_checked_ids(ids)) if n not in skipped]

    def _special_tokens(self, *roles: str) -> list[str | AddedToken]:
        held = [self._special[role] for role in roles or (*ROLES, LIST_ROLE)]
        return [token for entry in held if entry for token in (entry if isinstance(entry, list) else [entry])]

    def _knows(self, token: str) -> bool:
        unknown = (str(self._special["unk_token"]), self.sp.id_to_piece(self.sp.unk_id()))
        return token in self._added or token in unknown or self.sp.piece_to_id(token) != self.sp.unk_id()

    def _token_to_id(self, token: str) -> int:
        return self._added[token] if token in self._added else self.sp.piece_to_id(token)

    def _id_to_token(self, number: int, where: str = "") -> str:
        if not 0 <= number < len(self):
            raise TokenizerError(f"token id {number}{where} is outside the vocabulary of {len(self)} tokens")
        if number >= self.vocab_size:
            return self._added_names[number - self.vocab_size]
        return self.sp.id_to_piece(number)

    # ------------------------------------------------------------------ text to ids

    def tokenize(self, text: str, split_special_tokens: bool = False) -> list[str]:
        """Tokens of a text; with ``split_special_tokens``, of a plain one, where ``</s>`` is just four characters."""
        _checked_text(text)
        if split_special_tokens:
            return [self._id_to_token(number) for number in self._plain_ids(text)]
        if not self.legacy:
            text = SPACE + text.replace(SPACE, " ")  # the mark tells _pieces which stretch is the first
        parts = [part for part in self._cuts.split(text) if part] if self._cuts else [text]
        flags = {str(token): token for token in self._special_tokens() if isinstance(token, AddedToken)}
        for i, part in enumerate(parts):  # sees what the turns before it changed
            if part in self._uncut:
                token = flags.get(part, AddedToken(part, lstrip=True, rstrip=True))
                if token.rstrip and i + 1 < len(parts):
                    parts[i + 1] = parts[i + 1].lstrip()
                if token.lstrip and i > 0:
                    parts[i - 1] = parts[i - 1].rstrip()
        return [piece for part in parts for piece in ([part] if part in self._uncut else self._pieces(part))]

    def _pieces(self, text: str) -> list[str]:
        """Pieces of a stretch of text between special tokens."""
        if self.legacy or text.startswith(SPACE):
            return self.sp.encode(text if self.legacy else text[1:], out_type=str)
        pieces = self.sp.encode(text, out_type=str)
        if pieces and pieces[0].startswith(SPACE) and not text.startswith(" "):
            pieces[0] = pieces[0][1:]  # sentencepiece put that space there, as if a new text began
        return [piece for piece in pieces if piece]

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of a text, no special one among them: what sentencepiece itself takes for one is spelt in bytes."""
        ids = self.sp.encode(text if self.legacy else text.replace(SPACE, " "), out_type=int)
        special = {*self.all_special_ids} - {self.sp.unk_id()}
        spelt = {n: self.sp.id_to_piece(n).replace(SPACE, " ").encode() for n in special.intersection(ids)}
        byte_ids = {n: [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in text] for n, text in spelt.items()}
        return [part for n in ids for part in byte_ids.get(n, [n])]

    def encode(self, text: str, **options: Any) -> Any:
        """``input_ids`` of one text; the options of a call."""
        return self(_checked_text(text), **options)["input_ids"]

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
        """Encode a text or a batch of them: ``input_ids`` and ``attention_mask``.

        padding: True or "longest", "max_length", or False. truncation: True, False, or None, which cuts
        where ``max_length`` is given without padding. max_length: in tokens, special ones included;
        ``model_max_length`` by default. return_tensors: None for lists, "pt" for int64 (B, T), B = 1 for
        a str. split_special_tokens: for text that is not trusted; it cannot spell a special token.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not texts:
            raise TokenizerError(f"text must be a str or a non-empty list of them, got {texts!r}")
        for i, item in enumerate(texts):
            _checked_text(item, "" if isinstance(text, str) else f"text {i}: ")
        before, after = self._frame() if add_special_tokens else ([], [])
        room = self._room(truncation, max_length, padding, len(before) + len(after))
        width = self._width(padding, max_length, return_tensors)
        rows = []
        for item in texts:
            ids = self._plain_ids(item) if split_special_tokens else [*map(self._token_to_id, self.tokenize(item))]
            if room is not None and len(ids) > room:
                ids = ids[:room] if self.truncation_side == "right" else ids[len(ids) - room :]
            rows.append([*before, *ids, *after])
        encoding = self._padded({"input_ids": rows}, width)
        if return_tensors is None and isinstance(text, str):
            return Encoding({name: values[0] for name, values in encoding.items()})
        return _to_tensors(encoding) if return_tensors else encoding

    def pad(
        self,
        encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Bring a batch of encodings, or a list of single ones, to one length; arguments as in a call.

        Keys other than ``input_ids`` and ``attention_mask`` are kept as they are.
        """
        width = self._width(padding, max_length, return_tensors)
        if not isinstance(encoded, Mapping):
            shared = set.intersection(*map(set, encoded)) if encoded else set()
            encoded = {key: [example[key] for example in encoded] for key in shared}
        batch = {key: [_to_list(row) for row in _to_list(value)] for key, value in encoded.items()}
        if not batch.get("input_ids") or not all(isinstance(row, list) for row in batch["input_ids"]):
            raise TokenizerError("pad takes a batch: input_ids must be a list of lists of ids, and not empty")
        padded = self._padded(batch, width)
        return _to_tensors(padded) if return_tensors else padded

    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that add_special_tokens puts before and after a text."""
        wanted = {"bos_token": self.add_bos_token, "eos_token": self.add_eos_token}
        for role, on in wanted.items():
            if on and self._special[role] is None:
                raise TokenizerError(f"add_{role} is on, but the tokenizer has no {role}")
        return [self.bos_token_id] * self.add_bos_token, [self.eos_token_id] * self.add_eos_token

    def _room(self, truncation: bool | str | None, max_length: int | None, padding: Any, frame: int) -> int | None:
        """Tokens of its own that a text may have, None for any number."""
        _one_of("truncation", truncation, (True, False, None, "longest_first", "only_first", "do_not_truncate"))
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise TokenizerError(f"max_length must be a positive integer, got {max_length!r}")
        if truncation is None:
            truncation = max_length is not None and padding is False
        limit = max_length or self.model_max_length
        if truncation in (False, "do_not_truncate") or limit > 1e20:
            return None
        if limit < frame:
            raise TokenizerError(f"max_length {limit} leaves no room for the {frame} special tokens of each text")
        return limit - frame

    def _width(self, padding: bool | str, max_length: int | None, return_tensors: str | None) -> int | None:
        """Length to pad to, 0 for that of the longest text, None for no padding; refuses what cannot be done."""
        _one_of("return_tensors", return_tensors, (None, "pt"))
        _one_of("padding", padding, (True, "longest", "max_length", False, "do_not_pad"))
        if padding in (False, "do_not_pad"):
            return None
        if self.pad_token_id is None:
            raise TokenizerError("padding needs a pad token; tokenizer.pad_token = tokenizer.eos_token gives one")
        width = (max_length or self.model_max_length) if padding == "max_length" else 0
        if width > 1e20:
            raise TokenizerError("padding='max_length' needs max_length; the tokenizer has no model_max_length")
        return width

    def _padded(self, batch: Mapping[str, Any], width: int | None) -> Encoding:
        """The batch with masks, its rows filled up on padding_side."""
        rows = batch["input_ids"]
        masks = batch.get("attention_mask") or [[1] * len(row) for row in rows]
        length = 0 if width is None else width or max(map(len, rows))
        done = Encoding(batch)
        for name, values, filler in (("input_ids", rows, self.pad_token_id), ("attention_mask", masks, 0)):
            fill = [[filler] * (length - len(row)) for row in values]
            left = self.padding_side == "left"
            done[name] = [extra + row if left else row + extra for row, extra in zip(values, fill, strict=True)]
        return done

    # ------------------------------------------------------------------ ids to text

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Text of an id, or of a sequence or 1-D tensor of them.

        ``clean_up_tokenization_spaces`` (None: as the tokenizer is set) removes spaces before English punctuation.
        """
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids, skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        parts: list[str] = []
        for added, group in groupby(tokens, self._added.__contains__):
            stretch = [*group]
            parts += stretch if added else [self.convert_tokens_to_string(stretch)]
        text = " ".join(parts)
        for spaced in CLEANED_UP if clean_up_tokenization_spaces else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(self, sequences: Iterable[Any], **options: Any) -> list[str]:
        """``decode`` of each sequence, or of each row of a (B, T) tensor."""
        return [self.decode(ids, **options) for ids in sequences]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens. As in HF, a special token puts a space before the ordinary text that it ends."""
        text = ""
        groups = [(special, [*group]) for special, group in groupby(tokens, {*self.all_special_tokens}.__contains__)]
        for i, (special, group) in enumerate(groups):
            ended = not special and i + 1 < len(groups)
            text += " " * ended + ("".join(group) if special else self.sp.decode(group))
        return text


class StreamDecoder:
    """Decodes ids as they come: what it returns, put together, is ``decode(ids, skip_special_tokens=True)``.

    A character of several byte tokens comes whole, with the last of them. (Special tokens are always
    skipped: ``decode`` lets them change text that stands before them. Nothing is cleaned up.)
    """

    def __init__(self, tokenizer: OpenLlamaTokenizer) -> None:
        self._tokenizer, self._skipped = tokenizer, set(tokenizer.all_special_ids)
        self._before: str | None = None  # the last token
        self._start_run()

    def _start_run(self) -> None:
        """Begin a run of ordinary tokens; sentencepiece drops a leading space of its opening."""
        self._opening: list[int] = []  # ids up to the first that show any text
        self._shown = 0  # characters they show
        self._held: list[int] = []  # ids whose text is not out yet
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` makes certain, often none."""
        [number] = _checked_ids([token_id])
        token, added = self._tokenizer.convert_ids_to_tokens(number), self._tokenizer._added
        if number in self._skipped:
            return ""
        space = " " if self._before is not None and (token in added or self._before in added) else ""
        self._before = token
        if token in added:
            text = self._flush() + space + token
            self._start_run()
            return text
        self._held.append(number)
        if self._tokenizer.sp.is_byte(number):
            self._utf8.decode(bytes.fromhex(token[3:5]))
            if self._utf8.getstate()[0]:  # in the middle of a character
                return space
        else:
            self._utf8.reset()
        return space + self._flush()

    def finish(self) -> str:
        """The rest, half a character included; the decoder can then take another sequence."""
        text = self._flush()
        self._before = None
        self._start_run()
        return text

    def _flush(self) -> str:
        text = self._tokenizer.sp.decode(self._opening + self._held)[self._shown :]
        if not self._shown:
            self._opening, self._shown = self._opening + self._held, len(text)
        self._held = []
        return text


def _load_model(path: Path, options: Mapping[str, Any]) -> tuple[Any, bytes]:
    """A sentencepiece processor and the bytes of its file."""
    try:
        content = path.read_bytes()
        if not content:
            raise TokenizerError(f"{path} is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=content, **options), content
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
    except (RuntimeError, TypeError) as error:
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds, an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _parse_role(role: str, value: Any) -> Any:
    """One token or None, or the list of tokens that additional_special_tokens is."""
    if role == LIST_ROLE:
        if not isinstance(value, (list, tuple, type(None))):
            raise TokenizerError(f"{role} must be a list of tokens, got {value!r}")
        return [_parse_token(token, role) for token in value or ()]
    if role not in ROLES:
        raise TokenizerError(
            f"{role} is neither an argument of the tokenizer nor one of {', '.join(ROLES)}, {LIST_ROLE}"
        )
    return None if value is None else _parse_token(value, role)


def _parse_token(value: Any, role: str) -> str | AddedToken:
    """A token as a file or a caller gives it: a string, an AddedToken or the JSON of one."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        known = {field.name for field in dataclasses.fields(AddedToken)}
        value = AddedToken(**{key: flag for key, flag in value.items() if key in known})
    if not isinstance(value, (str, AddedToken)) or not str(value):
        raise TokenizerError(f"{role} must be a non-empty string or an AddedToken, got {value!r}")
    _checked_text(str(value), f"{role}: ")
    return value


def _to_json(token: Any) -> Any:
    if isinstance(token, list):
        return [_to_json(item) for item in token]
    return dataclasses.asdict(token) if isinstance(token, AddedToken) else token


def _checked_text(text: Any, where: str = "") -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"{where}text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise TokenizerError(f"{where}lone surrogate {code} at position {error.start} cannot be encoded") from None
    return text


def _checked_ids(ids: Any) -> list[int]:
    numbers = _to_list(ids)
    try:
        return [operator.index(n) for n in (numbers if isinstance(numbers, Sequence) else [numbers])]
    except TypeError:
        raise TokenizerError("token ids must be one sequence of integers; batch_decode takes several") from None


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if value not in choices:
        raise TokenizerError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _to_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _to_tensors(batch: Mapping[str, Any]) -> Encoding:
    """int64 tensors of lists of rows of one length."""
    for name, rows in batch.items():
        if len(lengths := sorted({len(row) for row in rows})) > 1:
            raise TokenizerError(f"{name} of lengths {lengths[0]} to {lengths[-1]} make no tensor; pass padding=True")
    return Encoding({name: torch.tensor(rows, dtype=torch.int64) for name, rows in batch.items()})
